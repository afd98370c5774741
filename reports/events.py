"""TensorBoard event files: a run for each training stage, a scalar for each figure of its epochs.

Written with tensorboard's own record writer; torch's SummaryWriter would need torch.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from rprune.errors import UsageError
from rprune.reports.schema import Report


def event_files(report: Report) -> dict[str, bytes]:
    """The history of every stage as event files, by path below a log folder; the same bytes for the same report.

    The time of an epoch is its share of the stage's time. Raises UsageError when tensorboard is not installed.
    """
    record, runs, now = _Records(), _Runs(), 0.0
    with suppress(ValueError):
        now = datetime.fromisoformat(report.created).timestamp() - sum(entry.seconds for entry in report.lineage)
    files: dict[str, io.BytesIO] = {}
    for entry in report.lineage:
        for i, row in enumerate(entry.history, 1):
            epoch = int(row.get("epoch", i))
            stage = f"{entry.stage} smoke" if report.smoke else entry.stage  # as of a run that is going on
            name = f"{runs.name(stage, epoch)}/events.out.tfevents.report"
            stream = files.setdefault(name, io.BytesIO())
            record.write(stream, epoch, now + entry.seconds * i / len(entry.history), row)
        now += entry.seconds
    return {name: stream.getvalue() for name, stream in files.items()}


class Live:
    """Event files below ``folder`` that grow with every epoch; nothing is written before the first.

    Raises UsageError when tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._record, self._runs = folder, _Records(), _Runs()
        self._streams: dict[str, IO[bytes]] = {}

    def write(self, stage: str, epoch: int, values: Mapping[str, float]) -> None:
        name, now = self._runs.name(stage, epoch), time.time()
        if name not in self._streams:
            # what is resumed goes on in a new file beside the old one
            path = self._folder / name / f"events.out.tfevents.{int(now)}.{os.getpid()}"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._streams[name] = path.open("wb")
        self._record.write(self._streams[name], epoch, now, values)
        self._streams[name].flush()

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


class _Runs:
    """Folder names: the stage's, with a number when its kind comes again (epochs start anew)."""

    def __init__(self) -> None:
        self._epoch: dict[str, int] = {}
        self._round: dict[str, int] = {}

    def name(self, stage: str, epoch: int) -> str:
        stage = re.sub(r"\W+", "-", stage)
        if epoch <= self._epoch.get(stage, 0):
            self._round[stage] = self._round.get(stage, 1) + 1
        self._epoch[stage] = epoch
        return stage if stage not in self._round else f"{stage}-{self._round[stage]}"


class _Records:
    """Scalars as records of an event file."""

    def __init__(self) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise UsageError("tensorboard is not installed", "pip install 'rprune[tensorboard]'") from None
        self._event, self._summary, self._writer = Event, Summary, RecordWriter

    def write(self, stream: IO[bytes], step: int, at: float, values: Mapping[str, float]) -> None:
        """The figures of a step, ``at`` seconds since 1970; a fresh stream first says what it is."""
        writer = self._writer(stream)
        if stream.tell() == 0:
            writer.write(self._event(wall_time=at, file_version="brain.Event:2").SerializeToString())
        names = sorted(set(values) - {"epoch"})
        scalars = self._summary(value=[self._summary.Value(tag=name, simple_value=values[name]) for name in names])
        writer.write(self._event(wall_time=at, step=step, summary=scalars).SerializeToString())
