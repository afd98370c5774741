"""What all stages of a run share: data on its device, threat model, seed, and where progress goes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from rprune.attacks.base import Attack
from rprune.attacks.suites import suite
from rprune.data.loaders import Loader, Mixed, loader
from rprune.data.sources import load_data
from rprune.data.splits import ArraySplit, DataSet, Split, hold_out
from rprune.errors import InputError, UsageError
from rprune.evaluation.accuracy import classes_of, predictions
from rprune.models.registry import Architecture
from rprune.pipeline.artifact import Artifact, DataRecord, load_artifact
from rprune.pipeline.recipe import DataSection, ModelSection
from rprune.threat import ThreatModel
from rprune.training.loop import EpochLog
from rprune.training.world import world


class Reporter(Protocol):
    """Where progress goes; the command line draws bars, the library is silent."""

    def epoch(self, stage: str, log: EpochLog) -> None: ...

    def progress(self, what: str, done: int, good: int | None, total: int) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


class Silent:
    def epoch(self, stage: str, log: EpochLog) -> None: ...

    def progress(self, what: str, done: int, good: int | None, total: int) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        """What nobody may miss."""
        warnings.warn(text, stacklevel=3)


@dataclass(eq=False)
class Bench:
    """What all stages of a run share: data on its device, threat model, seed, reporter."""

    data: DataSet
    section: DataSection
    threat: ThreatModel
    seed: int
    device: torch.device
    reporter: Reporter = field(default_factory=Silent)
    pseudo: Split | None = None  # pseudo-labelled samples that join every training batch
    typed: frozenset[str] = frozenset()  # names of user code that the user wrote; names in files are not followed
    smoke: bool = False  # what is made is to be marked: it shows that the chain works, and nothing else
    suites: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # a recipe's own, by name
    _loaders: dict[str, Loader] = field(default_factory=dict)

    @classmethod
    def open(
        cls, section: DataSection, threat: ThreatModel | None, seed: int, device: str, reporter: Reporter | None = None
    ) -> Bench:
        data = load_data(
            section.source, download=section.download, validation=section.validation, augment=section.augment,
            limit=section.limit,
        )  # fmt: skip
        chosen = pick_device(device)
        pseudo = _pseudo(section, data, chosen)
        _digest_once([split for split in (data.train, data.validation, data.test, pseudo) if split is not None])
        return cls(data, section, threat or data.threat, seed, chosen, reporter or Silent(), pseudo)

    def loader(self, split: str) -> Loader:
        if split not in self._loaders:
            self._loaders[split] = loader(self.data.split(split), self.device)
        return self._loaders[split]

    def training(self, fraction: float = 1.0) -> Loader:
        """Training batches, of a fixed random share of the split; with pseudo-labelled samples where there are any."""
        split = self.data.train
        if fraction < 1:
            split, _ = hold_out(split, 1 - fraction, ("train", "unused"))
        labelled = self.loader("train") if fraction == 1 else loader(split, self.device)
        return labelled if self.pseudo is None else Mixed(labelled, loader(self.pseudo, self.device))

    def suite(self, name: str) -> tuple[Attack, ...]:
        """The attacks of a suite, the recipe's own or a known one. Raises UsageError for an unknown name."""
        return suite(name, self.suites)

    def record(self) -> DataRecord:
        digests = {name: self.data.split(name).digest for name in ("train", "validation", "test")}
        if self.pseudo is not None:
            digests["pseudo"] = self.pseudo.digest
        return DataRecord(
            pseudo=self.section.pseudo,
            source=self.data.source,
            validation=self.section.validation,
            augment=self.data.augment,
            limit=self.section.limit,
            classes=list(self.data.classes),
            sha256=digests,
        )


def _digest_once(splits: Sequence[Split]) -> None:
    """Of several processes on one machine the first reads all bytes for the digests; others take its word."""
    here = world()
    if here.size > 1 and int(os.environ.get("LOCAL_WORLD_SIZE", here.size)) == here.size:
        for split in splits:
            vars(split)["digest"] = here.shared(split.digest if here.first else None)


def _pseudo(section: DataSection, data: DataSet, device: torch.device) -> Split | None:
    """The pseudo-labelled split that a data section names. Raises InputError where it does not fit the data."""
    if section.pseudo is None:
        if section.pseudo_model is not None:
            raise UsageError("pseudo_model labels nothing", 'name the samples too: pseudo = "npz:FILE"')
        return None
    found = load_data(section.pseudo, download=section.download, validation=section.validation, limit=section.limit)
    if found.shape != data.shape or len(found.classes) > len(data.classes):
        raise InputError(
            f"{section.pseudo} has {len(found.classes)} classes of {found.shape}, "
            f"{data.source} has {len(data.classes)} of {data.shape}",
            "pseudo-labelled samples need the same shape and classes",
        )
    split = found.train
    if section.pseudo_model is None:
        return split
    if not isinstance(split, ArraySplit):
        raise InputError(f"{section.pseudo} does not fit in memory", "store the labels with it, without pseudo_model")
    teacher = load_artifact(Path(section.pseudo_model))
    check_fits(teacher, data)
    predicted = predictions(classes_of(teacher.model(device)), loader(split, device)).predicted
    return ArraySplit("pseudo", split.images, predicted.numpy())


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
