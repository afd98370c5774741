"""rprune doctor: one line a finding, how to mend it, and exit 4 for what is needed and broken."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rprune.export.saturation import int8_is_exact
from rprune.pipeline import checkup
from rprune.pipeline.checkup import Finding, fits, requirements


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """No variables of the machine's own, and a cache of the test's."""
    for name in ("RPRUNE_SEED", "RPRUNE_DEVICE", "RPRUNE_CO2", "RPRUNE_DATA", "RPRUNE_KEY_PASSWORD", "RPRUNE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_this_machine_is_healthy(call, tmp_path):
    said = call("doctor", "--json", cwd=tmp_path)
    assert said.code == 0, said.out
    states = {finding["what"]: finding["state"] for finding in said.json["findings"]}
    assert said.json["healthy"]
    assert states["Python"] == states["torch"] == states["import torch"] == states["ONNX Runtime"] == "ok"
    assert {"CPU", "int8 kernels", "C compiler", "current folder", "cache", "data folder"} <= set(states)
    assert all(finding["mend"] for finding in said.json["findings"] if finding["state"] != "ok")


def test_text_has_a_line_for_each_finding(call, tmp_path):
    said = call("doctor", cwd=tmp_path)
    assert "all that rprune needs is here" in said.out
    assert sum(line.startswith(("ok ", "warn ", "missing ")) for line in said.out.splitlines()) >= 20


def test_missing_torch_is_a_line_and_exit_code_4(tmp_path):
    code = "import sys; sys.modules['torch'] = None; from rprune.cli.app import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "missing import torch" in done.stdout
    assert "int8 kernels" in done.stdout
    assert done.stderr == ""


def test_package_that_is_too_old_or_absent_is_broken_unless_it_is_an_extra(monkeypatch):
    wanted = [("numpy", ">=99", None), ("no-such-package", ">=1", None), ("no-such-extra", ">=1", "energy")]
    monkeypatch.setattr(checkup, "requirements", lambda: wanted)
    old, absent, extra = checkup._packages()
    assert (old.broken, absent.broken, extra.broken) == (True, True, False)
    assert "numpy>=99" in old.mend
    assert "rprune[energy]" in extra.mend


@pytest.mark.parametrize(
    ("version", "wanted", "right"),
    [
        ("0.29.2", ">=0.26,<1", True), ("1.0", ">=0.26,<1", False), ("0.26", ">=0.26,<1", True),
        ("2.14.1+cu130", ">=2.11", True), ("2.9", ">=2.11", False), ("1.26.0", ">=1.26", True), ("5", "", True),
    ],
)  # fmt: skip
def test_ranges_of_versions(version, wanted, right):
    assert fits(version, wanted) is right


def test_requirements_are_those_of_the_project():
    found = {name: wanted for name, wanted, extra in requirements() if extra is None}
    assert {"typer", "torch", "onnxruntime", "numpy"} <= set(found)
    assert ">=" in found["torch"]


def test_int8_products_add_up_as_rprune_asks_for_them():
    from rprune.export.session import may_saturate

    assert int8_is_exact(may_saturate())


@pytest.mark.parametrize(
    ("exact", "needs", "state", "words"),
    [
        ({False: True, True: True}, False, "ok", "exact with default settings"),
        ({False: False, True: True}, True, "warn", "session.x64quantprecision=1"),
        ({False: True, True: True}, True, "warn", "no VNNI"),
        ({False: False, True: False}, True, "missing", "under any setting"),
    ],
)
def test_int8_kernels_that_saturate(monkeypatch, exact, needs, state, words):
    monkeypatch.setattr(checkup, "int8_is_exact", exact.get)
    monkeypatch.setattr(checkup, "may_saturate", lambda: needs)
    *_, found = checkup._onnx_runtime()
    assert (found.state, found.broken) == (state, state == "missing")
    assert words in found.detail


def test_variables_that_nothing_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("RPRUNE_SEDE", "1")
    monkeypatch.setenv("RPRUNE_SEED", "many")
    monkeypatch.setenv("RPRUNE_DATA", str(tmp_path / "none"))
    found = {finding.what: finding for finding in [*checkup._environment(), *checkup._data()]}
    assert "did you mean 'RPRUNE_SEED'?" in found["RPRUNE_SEDE"].mend
    assert found["RPRUNE_SEED"].state == found["data folder"].state == "warn"
    assert found["RPRUNE_DATA"].state == "ok"


def test_every_variable_that_the_source_reads_is_known():
    root = Path(checkup.__file__).parent.parent
    modules = {*root.glob("*.py"), *(file for init in root.glob("*/__init__.py") for file in init.parent.rglob("*.py"))}
    text = "".join(file.read_text(encoding="utf-8") for file in modules - {Path(checkup.__file__)})
    assert set(re.findall(r'"(RPRUNE_\w+)"', text)) == set(checkup.VARIABLES)


def test_password_is_known_and_not_shown(monkeypatch):
    monkeypatch.setenv("RPRUNE_KEY_PASSWORD", "hunter2")
    (found,) = checkup._environment()
    assert found.state == "ok"
    assert "hunter2" not in repr(found)


def test_sets_in_the_data_folder_are_named(monkeypatch, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setenv("RPRUNE_DATA", str(tmp_path))
    (found,) = checkup._data()
    assert found.detail.endswith(": cifar10")


def test_a_full_disk_is_broken_for_work_and_not_for_the_cache(monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    work, cache = checkup._disk()
    assert (work.broken, cache.state, cache.broken) == (True, "missing", False)


def test_a_check_that_breaks_is_a_finding():
    def _odd_thing():
        raise ZeroDivisionError("boom")
        yield

    assert list(checkup._safely(_odd_thing)) == [
        Finding("odd thing", "warn", "cannot be looked at: boom", "please report this")
    ]


def test_a_compiler_that_does_not_work(monkeypatch):
    monkeypatch.setenv("CC", "false")
    (found,) = checkup._c_compiler()
    assert (found.state, found.broken) == ("warn", False)
    monkeypatch.setenv("CC", "/no/such/compiler")
    (found,) = checkup._c_compiler()
    assert found.state == "missing"
