"""Progress where there is no terminal: lines with the time spent and the time left."""

import io

import pytest
from rich.console import Console

from rprune.cli import console
from rprune.training.loop import EpochLog


@pytest.fixture
def clock(monkeypatch):
    """``clock(seconds)`` lets time pass."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


@pytest.fixture
def printed(monkeypatch):
    """``printed()``: the lines so far."""
    written = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=written, width=100))
    return lambda: written.getvalue().splitlines()


def test_epochs_count_from_where_the_stage_began(clock, printed):
    lines = console.ProgressLines()
    for epoch in (1, 2, 3, 4):
        clock(40)
        lines.epoch("train", EpochLog(epoch, 4, {"loss": 1.0}))
    assert [line.split("loss 1")[1].strip() for line in printed()] == ["40s < 120s", "80s < 80s", "120s < 40s", "160s"]


def test_resumed_epochs_do_not_shorten_what_is_left(clock, printed):
    lines = console.ProgressLines()
    clock(60)
    lines.epoch("train", EpochLog(3, 5, {"loss": 1.0}))
    assert printed()[0].endswith("60s < 120s")


def test_samples_that_a_ledger_held_already_do_not_count_for_the_pace(clock, printed):
    lines = console.ProgressLines()
    clock(500)
    lines.progress("square", 900, 400, 1000)
    clock(40)
    lines.progress("square", 920, 390, 1000)
    assert printed()[-1] == "square  920/1000  holds 390  40s < 160s"


def test_quiet_says_nothing(clock, printed):
    lines = console.ProgressLines(quiet=True)
    clock(60)
    lines.epoch("train", EpochLog(1, 1, {}))
    assert printed() == []
