"""What all stages of a run share: data on its device, threat model, seed, and where progress goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from rprune.data.loaders import Loader, loader
from rprune.data.sources import load_data
from rprune.data.splits import DataSet
from rprune.errors import InputError, UsageError
from rprune.models.registry import Architecture
from rprune.pipeline.artifact import Artifact, DataRecord
from rprune.pipeline.recipe import DataSection, ModelSection
from rprune.threat import ThreatModel
from rprune.training.loop import EpochLog


class Reporter(Protocol):
    """Where progress goes; the command line draws bars, the library is silent."""

    def epoch(self, stage: str, log: EpochLog) -> None: ...

    def progress(self, what: str, done: int, good: int, total: int) -> None: ...


class Silent:
    def epoch(self, stage: str, log: EpochLog) -> None: ...

    def progress(self, what: str, done: int, good: int, total: int) -> None: ...


@dataclass(eq=False)
class Bench:
    """What all stages of a run share: data on its device, threat model, seed, reporter."""

    data: DataSet
    section: DataSection
    threat: ThreatModel
    seed: int
    device: torch.device
    reporter: Reporter = field(default_factory=Silent)
    typed: frozenset[str] = frozenset()  # names of user code that the user wrote; names in files are not followed
    _loaders: dict[str, Loader] = field(default_factory=dict)

    @classmethod
    def open(
        cls, section: DataSection, threat: ThreatModel | None, seed: int, device: str, reporter: Reporter | None = None
    ) -> Bench:
        data = load_data(
            section.source, download=section.download, validation=section.validation, augment=section.augment
        )
        return cls(data, section, threat or data.threat, seed, pick_device(device), reporter or Silent())

    def loader(self, split: str) -> Loader:
        if split not in self._loaders:
            self._loaders[split] = loader(self.data.split(split), self.device)
        return self._loaders[split]

    def record(self) -> DataRecord:
        splits = ("train", "validation", "test")
        return DataRecord(
            source=self.data.source,
            validation=self.section.validation,
            augment=self.data.augment,
            classes=list(self.data.classes),
            sha256={name: self.data.split(name).digest for name in splits},
        )


def pick_device(name: str) -> torch.device:
    """``auto`` takes the GPU when there is one. Raises UsageError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device  # with its index: cuda -> cuda:0
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}", "use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device '{name}' is not supported", "use cpu or cuda")
    return device


def architecture(section: ModelSection, data: DataSet) -> Architecture:
    return Architecture(section.arch, len(data.classes), data.shape, section.kwargs, section.mean, section.std)


def progress_of(bench: Bench, what: str) -> Callable[[int, int, int], None]:
    """A callback (done, good, total) that reports under a name."""
    return lambda done, good, total: bench.reporter.progress(what, done, good, total)


def check_fits(artifact: Artifact, data: DataSet) -> None:
    """Raises InputError when a model and a data set cannot go together."""
    arch = artifact.metadata.arch
    if arch.num_classes != len(data.classes):
        raise InputError(
            f"the model has {arch.num_classes} classes, {data.source} has {len(data.classes)}",
            "give the matching --data",
        )
    if arch.input_shape != data.shape:
        raise InputError(
            f"the model takes images of {arch.input_shape}, {data.source} has {data.shape}", "give the matching --data"
        )
