"""A stage on its first batch alone, for a few steps: what costs and profiles are read from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rprune.data.loaders import WHOLE, Batch, Loader, Part
from rprune.data.splits import Augment
from rprune.models.registry import Architecture
from rprune.pipeline.artifact import Artifact
from rprune.pipeline.bench import Bench, Silent
from rprune.pipeline.recipe import FinetuneStage, PruneStage, Section
from rprune.pipeline.stages import epochs_of, run_stage

VALIDATED = 128  # samples of a trial's validation
Watch = AbstractContextManager[Any] | None


@dataclass(frozen=True, eq=False)
class Trial:
    """What a trial left, a stand-in for the stages behind it; ``steps``: seconds of each, ``around``: of all else."""

    bench: Bench
    made: Artifact
    steps: list[float]
    around: float


def trial(
    bench: Bench,
    stage: Section,
    source: Artifact | None,
    arch: Architecture | None,
    teacher: Artifact | None,
    watch: Sequence[Watch],
) -> Trial:
    """Run a stage on its first batch, a step inside each of ``watch``, with few validation samples; writes nothing.

    Methods that score weights on data do that on these batches, too.
    """
    probe = _Probe(bench.loader("train"), watch)
    small = replace(
        bench, data=replace(bench.data, validation=bench.data.validation.select(slice(0, VALIDATED))),
        reporter=Silent(), _loaders={"train": probe},
    )  # fmt: skip
    changes: dict[str, Any] = {"epochs": 1} if epochs_of(stage) else {}
    changes |= {"data_fraction": 1.0} if isinstance(stage, PruneStage) else {}
    changes |= {"soup": 1} if isinstance(stage, FinetuneStage) else {}
    started = time.monotonic()
    made = run_stage(small, stage.model_copy(update=changes), source, arch, None, teacher)
    total = time.monotonic() - started
    return Trial(small, made, probe.seconds, max(0.0, total - sum(probe.seconds)))


@dataclass(eq=False)
class _Probe:
    """The first batch of a loader, as often as steps are watched, and the ``seconds`` that each of them took."""

    inner: Loader
    watch: Sequence[Watch]
    seconds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.inner)

    def sizes(self, batch_size: int) -> list[int]:
        return self.inner.sizes(batch_size)[:1] * len(self.watch)

    def shuffled(
        self, batch_size: int, generator: torch.Generator, augment: Augment, part: Part = WHOLE
    ) -> Iterator[Batch]:
        batch = next(self.inner.shuffled(batch_size, generator, augment, part))
        self.seconds = []
        for watched in self.watch:
            _finish(batch.x)
            started = time.monotonic()
            with watched or nullcontext():
                yield batch
                _finish(batch.x)
            self.seconds.append(time.monotonic() - started)

    def ordered(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        return self.inner.ordered(batch_size, limit)

    def take(self, ids: Tensor) -> Batch:
        return self.inner.take(ids)


def _finish(x: Tensor) -> None:
    """Wait for what a GPU still has to do."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
