"""Splits of a data set: uint8 images in memory, or image files that are decoded on demand. NumPy only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError
from rprune.threat import ThreatModel

Augment: TypeAlias = Literal["none", "crop", "crop-flip"]
Images: TypeAlias = NDArray[np.uint8]
Labels: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """Images ``(n, channels, height, width)`` in uint8 and labels ``(n,)`` in int64, both in memory."""

    name: str
    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """sha256 over shape, decoded pixels and labels: equal for equal samples whatever file they came from."""
        sha = hashlib.sha256(repr(self.images.shape).encode())
        sha.update(np.ascontiguousarray(self.images).tobytes())
        sha.update(self.labels.astype("<i8").tobytes())
        return sha.hexdigest()

    def select(self, indices: NDArray[np.int64] | slice, name: str | None = None) -> ArraySplit:
        return ArraySplit(name or self.name, self.images[indices], self.labels[indices])

    def pixels(self, start: int, stop: int) -> Images:
        return self.images[start:stop]


@dataclass(frozen=True, eq=False)
class FileSplit:
    """Image files that do not fit in memory; each is resized to ``size`` and centre-cropped when it is read."""

    name: str
    paths: tuple[Path, ...]
    labels: Labels
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """sha256 over the bytes of every file and its label (the pixels themselves are too many to decode twice)."""
        sha = hashlib.sha256(repr(self.shape).encode())
        for path, label in zip(self.paths, self.labels, strict=True):
            sha.update(hashlib.sha256(path.read_bytes()).digest())
            sha.update(int(label).to_bytes(8, "little"))
        return sha.hexdigest()

    def select(self, indices: NDArray[np.int64] | slice, name: str | None = None) -> FileSplit:
        chosen = np.arange(len(self))[indices]
        return FileSplit(name or self.name, tuple(self.paths[i] for i in chosen), self.labels[chosen], self.shape)

    def pixels(self, start: int, stop: int) -> Images:
        return np.stack([read_image(path, self.shape) for path in self.paths[start:stop]])


Split: TypeAlias = ArraySplit | FileSplit


@dataclass(frozen=True, eq=False)
class DataSet:
    """Train, validation and test splits with what a run needs to know of them.

    The validation split is held out of the training data and serves model selection; the test split never does.
    """

    source: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    augment: Augment
    threat: ThreatModel

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.train.shape

    @cached_property
    def digest(self) -> str:
        parts = (self.train.digest, self.validation.digest, self.test.digest)
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def split(self, name: str) -> Split:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


def hold_out(split: Split, fraction: float, names: tuple[str, str]) -> tuple[Split, Split]:
    """Part a split into (rest, held out) by a fixed permutation (MT19937, seed 0, a stream NumPy has frozen)."""
    order = np.random.RandomState(0).permutation(len(split)).astype(np.int64)
    cut = max(1, round(len(split) * fraction))
    if len(split) < 2:
        raise InputError(f"the {split.name} split has {len(split)} sample(s)", "give at least 2, one is held out")
    return split.select(np.sort(order[cut:]), names[0]), split.select(np.sort(order[:cut]), names[1])


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A PIL image; InputError when it cannot be opened or decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            yield image
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"cannot read image {path}: {error}", "remove or repair the file") from None


def read_image(path: Path, shape: tuple[int, int, int]) -> Images:
    """Decode an image file to uint8 ``shape``: resize the short side, then crop the centre."""
    from PIL import Image

    channels, height, width = shape
    with opened(path) as file:
        image: Image.Image = file.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            scale = max(width / image.width, height / image.height)
            wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
            image = image.resize((wide, high), Image.Resampling.BILINEAR)
            left, top = (wide - width) // 2, (high - height) // 2
            image = image.crop((left, top, left + width, top + height))
        array = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def checked(name: str, images: NDArray[Any], labels: NDArray[Any], classes: Sequence[str], origin: str) -> ArraySplit:
    """An ArraySplit from outside data, or an InputError that names what is wrong with it."""
    if images.dtype != np.uint8:
        raise InputError(f"{origin}: {name} images are {images.dtype}", "store pixels as uint8 (0..255)")
    if images.ndim != 4 or len(images) != len(labels) or len(labels) == 0:
        raise InputError(f"{origin}: {name} has images {images.shape} and labels {labels.shape}", "need one label each")
    if labels.dtype.kind not in "iu":
        raise InputError(f"{origin}: {name} labels are {labels.dtype}", "store labels as integers")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise InputError(
            f"{origin}: {name} labels run from {labels.min()} to {labels.max()} for {len(classes)} classes",
            "labels must be 0 .. classes-1",
        )
    return ArraySplit(name, np.ascontiguousarray(images), labels.astype(np.int64))
