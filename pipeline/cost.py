"""What a stage that trains will cost, from three of its steps: the first warms up, one is counted, one is timed."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rprune.data.loaders import WHOLE, Batch, Loader, Part
from rprune.data.splits import Augment
from rprune.models.registry import Architecture
from rprune.pipeline.artifact import Artifact
from rprune.pipeline.bench import Bench, Silent
from rprune.pipeline.quantizing import EPOCHS
from rprune.pipeline.recipe import FinetuneStage, PruneStage, QuantizeStage, Section, Trained, TrainStage
from rprune.pipeline.stages import _objective, _scores, run_stage
from rprune.pruning.base import METHODS

STEPS = 3
VALIDATED = 128  # samples of a trial's validation


@dataclass(frozen=True)
class Cost:
    """Of a stage: optimizer steps, floating-point operations of training (convolutions and matrix products, two a
    multiply-accumulate), seconds on this machine with validation, and the largest memory in bytes: of the GPU, else of
    the whole process."""

    steps: int
    flops: float
    seconds: float
    memory: int

    def to_json(self) -> dict[str, Any]:
        return vars(self).copy()


def cost(
    bench: Bench,
    stage: Section,
    source: Artifact | None,
    arch: Architecture | None = None,
    teacher: Artifact | None = None,
) -> tuple[Cost, Artifact]:
    """The cost of a stage, and what its trial left: a stand-in for the stages behind it. Writes nothing.

    The trial is the stage itself on its first batch, three times, with few validation samples. Time before the first
    step, of methods that score weights on data, is that of three batches.
    """
    epochs, share = _epochs(stage), getattr(stage, "data_fraction", 1.0)
    probe = Probe(bench.loader("train"))
    small = replace(
        bench, data=replace(bench.data, validation=bench.data.validation.select(slice(0, VALIDATED))),
        reporter=Silent(), _loaders={"train": probe},
    )  # fmt: skip
    changes: dict[str, Any] = {"epochs": 1} if epochs else {}
    changes |= {"data_fraction": 1.0} if isinstance(stage, PruneStage) else {}
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    started = time.monotonic()
    made = run_stage(small, stage.model_copy(update=changes), source, arch, None, teacher)
    total = time.monotonic() - started
    steps, seconds = 0, max(0.0, total - sum(probe.seconds))
    if epochs:
        assert isinstance(stage, Trained)
        steps = epochs * math.ceil(round(len(bench.data.train) * share) / stage.batch_size)
        started = time.monotonic()
        _scores(small, made.model(bench.device), _objective(made.metadata.objective, bench).attack_used)
        validation = (time.monotonic() - started) * len(bench.data.validation) / len(small.data.validation)
        seconds += steps * probe.seconds[-1] + epochs * validation
    return Cost(steps, float(steps * probe.flops), seconds, _memory(bench.device)), made


def _epochs(stage: Section) -> int:
    if isinstance(stage, TrainStage | FinetuneStage):
        return stage.epochs
    if isinstance(stage, PruneStage):
        return METHODS.build(stage.method).epochs if stage.epochs is None else stage.epochs
    if isinstance(stage, QuantizeStage) and stage.mode == "qat":
        return stage.epochs or EPOCHS
    return 0


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Probe:
    """The first batch of a loader, three times, and what was done with it: ``flops`` of a step, ``seconds`` of each."""

    def __init__(self, inner: Loader) -> None:
        self.inner, self.flops, self.seconds = inner, 0, [0.0]

    def __len__(self) -> int:
        return len(self.inner)

    def sizes(self, batch_size: int) -> list[int]:
        return self.inner.sizes(batch_size)[:1] * STEPS

    def shuffled(
        self, batch_size: int, generator: torch.Generator, augment: Augment, part: Part = WHOLE
    ) -> Iterator[Batch]:
        batch = next(self.inner.shuffled(batch_size, generator, augment, part))
        self.seconds = []
        for step in range(STEPS):
            counter = _Flops() if step == 1 else None
            _finish(batch.x)
            started = time.monotonic()
            if counter is None:
                yield batch
            else:
                with counter:
                    yield batch
                self.flops = counter.total
            _finish(batch.x)
            self.seconds.append(time.monotonic() - started)

    def ordered(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        return self.inner.ordered(batch_size, limit)

    def take(self, ids: Tensor) -> Batch:
        return self.inner.take(ids)


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    """Counts what is executed inside. FlopCounterMode would hook the modules, which gradients of images do not bear."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        rule = flop_registry.get(func.overloadpacket)
        if rule is not None:
            self.total += rule(*args, **(kwargs or {}), out_val=found)
        return found


def _finish(x: Tensor) -> None:
    """Wait for what a GPU still has to do."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
