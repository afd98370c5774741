"""SIGTERM ends a command as Ctrl-C does: one line, exit 130, and the same command goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rprune.cli.signals import ended_gently
from rprune.pipeline.artifact import load_artifact

TRAIN = ("train", "-d", "digits", "--objective", "benign", "--batch-size", "64", "--device", "cpu", "-o", "n.pt")
ATTACK = ("--suite", "square", "-n", "300", "--no-health", "--device", "cpu", "-o", "n.attack")


def ended(command: tuple[object, ...], cwd: Path, begun: Path, number: signal.Signals) -> tuple[int, str]:
    """Exit code and messages of a command that gets a signal as soon as a file is there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may ignore it
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "rprune", *map(str, command), "-q"], cwd=cwd, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 90
    while not begun.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_training_that_is_told_to_end_goes_on(tmp_path, call, number):
    code, said = ended((*TRAIN, "--epochs", 60), tmp_path, tmp_path / "n.pt.partial" / "resume.pt", number)
    assert (code, said.splitlines()) == (
        130, ["error: interrupted", "hint: what is finished is kept; the same command continues"]
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["n.pt.partial"]
    assert not [path.name for path in (tmp_path / "n.pt.partial").iterdir() if path.name.startswith(".")]
    assert call(*TRAIN, "--epochs", 60, "-q", cwd=tmp_path).code == 0
    assert len(load_artifact(tmp_path / "n.pt").metadata.lineage[-1].history) == 60


@pytest.mark.slow
def test_an_attack_that_is_told_to_end_goes_on(tmp_path, call, chain):
    command = ("attack", chain / "model.pt", *ATTACK)
    code, said = ended(command, tmp_path, tmp_path / "n.attack" / "ledger.jsonl", signal.SIGTERM)
    assert code == 130, said
    assert len(said.splitlines()) == 2
    before = (tmp_path / "n.attack" / "ledger.jsonl").read_bytes()
    assert call(*command, "-q", cwd=tmp_path).code == 0
    assert (tmp_path / "n.attack" / "ledger.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])


def test_a_second_signal_ends_at_once(tmp_path):
    code = """
import os, signal
from rprune.cli.signals import ended_gently
with ended_gently():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "", "")


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    first = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may ignore it
    try:
        with ended_gently():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            inside = signal.getsignal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is not inside
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, first)
