"""Where the time of a training step goes: a trace, and a table of its phases and operators."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from rprune.errors import UsageError
from rprune.files import write_text
from rprune.models.registry import Architecture
from rprune.phases import PREFIX
from rprune.pipeline.artifact import Artifact
from rprune.pipeline.bench import Bench
from rprune.pipeline.recipe import Section
from rprune.pipeline.stages import epochs_of
from rprune.pipeline.trial import trial

OPERATORS = 30  # rows of the table


@dataclass(frozen=True)
class Phase:
    """A part of one training step: seconds of the CPU, with those of the parts in it, and how often it ran."""

    name: str
    seconds: float
    calls: int


def profiled(
    bench: Bench,
    stage: Section,
    source: Artifact | None,
    arch: Architecture | None,
    teacher: Artifact | None,
    folder: Path,
) -> tuple[list[Phase], Artifact]:
    """The phases of one of the stage's steps, behind two that warm up, the longest first; and what these steps made.

    Into ``folder``: ``trace.json``, for Perfetto or chrome://tracing, and ``table.txt``: the operators that cost most.
    A GPU works behind the CPU: there a phase is the time to hand the work over, and the operators tell the rest.
    Raises UsageError for a stage that does not train.
    """
    if not epochs_of(stage):
        raise UsageError("this stage does not train: there is no step to profile", "leave out --profile")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
    gpu = bench.device.type == "cuda"
    watch = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])])
    made = trial(bench, stage, source, arch, teacher, [None, None, watch]).made
    folder.mkdir(parents=True, exist_ok=True)
    watch.export_chrome_trace(str(folder / "trace.json"))
    events = watch.key_averages()
    order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    write_text(folder / "table.txt", events.table(sort_by=order, row_limit=OPERATORS) + "\n")
    phases = [
        Phase(event.key.removeprefix(PREFIX), event.cpu_time_total / 1e6, event.count)
        for event in events
        if event.key.startswith(PREFIX)
    ]
    return sorted(phases, key=lambda phase: -phase.seconds), made
