"""The repository as a whole: packaging, container, README."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [*ROOT.glob("*/__init__.py"), *ROOT.glob("export/*/__init__.py")]


def test_the_package_list_is_what_lies_on_disk():
    places = (path.parent.relative_to(ROOT) for path in PACKAGES)
    folders = {".".join(("rprune", *place.parts)) for place in places}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == {"rprune"} | folders


def test_every_floor_is_in_the_layers_contract():
    layers = PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    named = {name.strip() for layer in layers for name in layer.split("|")}
    assert {f"rprune.{p.parent.name}" for p in ROOT.glob("*/__init__.py") if p.parent.name != "recipes"} <= named


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_recipe(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ROOT,
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("rprune-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = [ROOT, *(path.parent for path in PACKAGES)]
    wanted = {f"rprune/{path.relative_to(ROOT)}" for folder in packages for path in folder.glob("*.py")}
    wanted |= {f"rprune/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").glob("*.toml")}
    wanted |= {
        "rprune/py.typed",
        "rprune/model_zoo.toml",
        "rprune/reports/report.html.j2",
        "rprune/export/c/kernels.c",
        "rprune/models/fingerprints.json",
    }
    assert wanted <= names
    assert {name.partition("/")[0] for name in names} == {"rprune", f"rprune-{wheel.name.split('-')[1]}.dist-info"}


def test_the_dockerfile_ends_as_a_user_at_the_entry_point():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert sum(line.startswith("FROM") for line in lines) == 2
    assert lines.index("USER rprune") < next(i for i, line in enumerate(lines) if line.startswith("ENTRYPOINT"))
    assert 'ENTRYPOINT ["rprune"]' in lines
    assert PYPROJECT["project"]["scripts"] == {"rprune": "rprune.cli.app:main"}
    base = next(line for line in lines if line.startswith("ARG BASE="))
    version = re.search(r"python:3\.(\d+)", base)
    assert version is not None
    assert int(version[1]) >= 11


def test_the_docker_context_holds_what_the_build_needs():
    ignored = set((ROOT / ".dockerignore").read_text().split())
    needed = {
        *(p.split(".")[1] for p in PYPROJECT["tool"]["setuptools"]["packages"] if "." in p),
        "README.md",
        "LICENSE",
    }
    assert not ignored & needed
    for source in re.findall(r"^COPY (?!--from)(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        assert (ROOT / source).exists()


def test_readme_names_both_commands_and_every_folder():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
    for path in ROOT.glob("*/__init__.py"):
        assert re.search(rf"^{path.parent.name}/ ", text, re.MULTILINE), path.parent.name


def test_readme_states_the_exit_codes():
    from rprune.errors import EXIT_CODES

    text = (ROOT / "README.md").read_text()
    for code in EXIT_CODES:
        assert re.search(rf"^\| {code} \|", text, re.MULTILINE)


def test_links_in_the_documents_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_makefile_targets_of_ci_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
