"""Two processes never work on one output, and a killed one stands in nobody's way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rprune.errors import UsageError
from rprune.locks import working_in, working_on

HOLD = """
import sys
from pathlib import Path
from rprune.locks import working_in, working_on
with (working_in if sys.argv[1] == "in" else working_on)(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""
INT8 = "model-lwm-0.5-finetuned-int8.pt"


@pytest.fixture
def holder():
    """``holder("in" or "on", path)``: a process that works there until its standard input ends."""
    started = []

    def hold(how: str, path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, how, str(path)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("how", "working"), [("in", working_in), ("on", working_on)])
def test_the_other_process_is_named(holder, tmp_path, how, working):
    process = holder(how, tmp_path / "out")
    with pytest.raises(UsageError, match=rf"in use by process {process.pid} on "), working(tmp_path / "out"):
        pass
    process.communicate("")
    with working(tmp_path / "out"):
        pass
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_a_killed_process_held_is_free(holder, tmp_path):
    process = holder("on", tmp_path / "out")
    process.kill()
    process.wait()
    assert (tmp_path / ".out.lock").exists()
    with working_on(tmp_path / "out"):
        assert str(os.getpid()) in (tmp_path / ".out.lock").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("how", "output", "command"),
    [
        ("in", "out", ("run", "recipe.toml", "-o", "out")),
        ("on", "n.pt", ("train", "-d", "digits", "--epochs", 1, "-o", "n.pt")),
        ("on", "n", ("prune", "model.pt", "-s", 0.5, "-m", "lwm", "-o", "n")),
        ("on", "n.pt", ("shrink", "model.pt", "-o", "n.pt")),
        ("in", "n.attack", ("attack", "model.pt", "--suite", "fgsm", "-n", 4, "-o", "n.attack")),
        ("in", "n.attack", ("attack", "model.pt", "--suite", "fgsm", "-n", 4, "-o", "n.attack", "--force")),
        ("on", "n.json", ("certify", "model.pt", "-m", "ibp", "-n", 2, "-o", "n.json")),
        ("on", "n", ("export", INT8, "-o", "n")),
    ],
)  # fmt: skip
def test_every_command_that_writes_for_long_asks(holder, call, chain, tmp_path, how, output, command):
    (tmp_path / "recipe.toml").write_text(
        'rprune = 1\nname = "r"\n[data]\nsource = "digits"\n[[stage]]\nkind = "train"\n'
    )
    process = holder(how, tmp_path / output)
    before = sorted(tmp_path.rglob("*"))
    command = [chain / word if word in ("model.pt", INT8) else word for word in command]
    said = call(*command, "--device", "cpu", "-q", cwd=tmp_path)
    assert f"{output} is in use by process {process.pid}" in said.refused(2)
    assert sorted(tmp_path.rglob("*")) == before
