"""Real environments that hold what README.md names for a gate runner and nothing else: torch is absent, not hidden."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rprune

GATE = ("typer", "rich", "pydantic", "numpy", "scipy")
VERIFY = (*GATE, "scikit-learn", "safetensors", "onnx", "onnxruntime", "brotli", "jinja2", "matplotlib")

pytestmark = pytest.mark.slow


def _with_what_they_require(names: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    rest = list(names)
    while rest:
        if (name := rest.pop()) not in found:
            found.add(name)
            needs = map(Requirement, distribution(name).requires or ())
            rest += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return found


def _environment(folder: Path, names: tuple[str, ...]) -> Path:
    """A new environment's Python. Its packages are links to those that run the tests: nothing is downloaded."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (site / "rprune").symlink_to(Path(rprune.__file__).parent.resolve(), target_is_directory=True)
    for name in _with_what_they_require(names):
        there = distribution(name)
        for top in {file.parts[0] for file in there.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(there.locate_file(top))).resolve())
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def gate_runner(tmp_path_factory):
    return _environment(tmp_path_factory.mktemp("gate"), GATE)


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
    return _environment(tmp_path_factory.mktemp("verify"), VERIFY)


def _said(interpreter: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    # nothing of this machine's PYTHONPATH and user site comes in
    command = [interpreter, "-s", *map(str, arguments)]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", ["torch", "torchvision"])
def test_neither_has_torch(gate_runner, verifier, tmp_path, name):
    for interpreter in (gate_runner, verifier):
        assert f"No module named '{name}'" in _said(interpreter, "-c", f"import {name}", cwd=tmp_path).stderr


def test_readme_names_these_packages():
    text = (Path(rprune.__file__).parent / "README.md").read_text(encoding="utf-8")
    paragraph = text[text.index("A gate runner needs no torch") :].partition("\n\n")[0]
    assert all(name in paragraph for name in VERIFY)


JUDGED = [
    (("gate", "out", "--min", "sparsity=0.5"), 0, "GATE PASSED"),
    (("gate", "out", "--min", "clean_accuracy=1"), 1, "GATE FAILED"),
    (("compare", "out", "out"), 0, "McNemar"),
]


@pytest.mark.parametrize(("arguments", "code", "wanted"), JUDGED)
def test_gate_runner(gate_runner, chain, arguments, code, wanted):
    done = _said(gate_runner, "-m", "rprune", *arguments, cwd=chain.folder)
    assert (done.returncode, wanted in done.stdout) == (code, True), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "wanted"),
    [
        *JUDGED,
        (("report", "out"), 0, "clean accuracy"),
        (("report", "out", "--markdown", "doc/r.md", "--card", "doc/README.md", "--bom", "doc/bom.cdx.json",
          "--html", "doc/r.html", "--plots", "doc/plots", "--force"), 0, "doc/plots"),
        (("inspect", "out/model.int8.onnx"), 0, "opset"),
        (("inspect", "out/model.onnx"), 0, "opset"),
        (("verify", "out", "--level", "replay"), 0, "VERIFIED level=replay"),
    ],
)  # fmt: skip
def test_verifier(verifier, chain, arguments, code, wanted):
    done = _said(verifier, "-m", "rprune", *arguments, cwd=chain.folder)
    assert (done.returncode, wanted in done.stdout) == (code, True), done.stdout + done.stderr


def test_bundle_of_every_form_is_replayed(verifier, bundle):
    """All but the C source, which takes torch to write again: that is said."""
    done = _said(verifier, "-m", "rprune", "verify", bundle, "--level", "replay", cwd=bundle.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "VERIFIED level=replay" in done.stdout
    assert "model.c" in done.stdout


@pytest.mark.parametrize(
    ("environment", "arguments", "package"),
    [("verifier", ("evaluate", "model.pt"), "torch"), ("gate_runner", ("verify", "out"), "brotli")],
)
def test_what_is_not_here_is_named(request, chain, environment, arguments, package):
    done = _said(request.getfixturevalue(environment), "-m", "rprune", *arguments, cwd=chain.folder)
    assert (done.returncode, done.stdout) == (3, "")
    assert f"this command needs {package}" in done.stderr
