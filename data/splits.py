"""Splits of a data set: uint8 images in memory, or image files that are decoded on demand. NumPy only."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rprune.data.crops import Numbers, flips, windows
from rprune.data.places import ImagePlace, ImagePlaces
from rprune.errors import InputError
from rprune.threat import ThreatModel

Augment: TypeAlias = Literal["none", "crop", "crop-flip", "resized-crop-flip"]
Images: TypeAlias = NDArray[np.uint8]
Labels: TypeAlias = NDArray[np.int64]
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever its name, no file may start another program (EPS)
MOST_PIXELS = 1 << 26  # of one image: 192 MiB in colour


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
    """Images that do not fit in memory; each is resized to ``shape`` and centre-cropped when it is read."""

    name: str
    places: ImagePlaces
    labels: Labels
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """sha256 over the bytes of every image file and its label (the pixels are too many to decode twice).

        Reads everything: minutes for millions of images. No cache keeps it, since a file's size and time of change do
        not prove its bytes.
        """
        hashes = np.empty((len(self), 32), np.uint8)

        def fill(indices: NDArray[np.int64]) -> None:
            for i in indices.tolist():
                hashes[i] = np.frombuffer(hashlib.sha256(self.places[i].read()).digest(), np.uint8)

        with ThreadPoolExecutor() as pool:  # reading and sha256 run side by side
            for _ in pool.map(fill, np.array_split(self.places.as_on_disk(), len(self) // 256 + 1)):
                pass
        labels = self.labels.astype("<i8")[:, None].view(np.uint8)
        return hashlib.sha256(repr(self.shape).encode() + np.hstack([hashes, labels]).tobytes()).hexdigest()

    def select(self, indices: NDArray[np.int64] | slice, name: str | None = None) -> FileSplit:
        chosen = np.arange(len(self))[indices]
        return FileSplit(name or self.name, self.places.select(chosen), self.labels[chosen], self.shape)

    def pixels(self, start: int, stop: int) -> Images:
        return self.read(np.arange(len(self))[start:stop])

    def read(self, ids: NDArray[np.int64], numbers: Numbers | None = None) -> Images:
        """These images ``(b, *shape)``; random crops where ``numbers`` (b, NUMBERS) say which."""
        rows = itertools.repeat(None) if numbers is None else numbers
        return np.stack(
            [read_image(self.places[i], self.shape, row) for i, row in zip(ids.tolist(), rows, strict=False)]
        )


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


def at_most(split: Split, limit: int | None) -> Split:
    """The split, or ``limit`` of its samples, drawn once and for all by the permutation of :func:`hold_out`."""
    if limit is None or len(split) <= limit:
        return split
    return split.select(np.sort(np.random.RandomState(0).permutation(len(split)).astype(np.int64)[:limit]))


@contextmanager
def opened(place: ImagePlace) -> Iterator[Any]:
    """A PIL image; InputError when it cannot be opened or decoded."""
    from PIL import Image, UnidentifiedImageError

    content = place.read()
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            yield image
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"cannot read image {place}: it is in no known format", "remove or repair the file") from None
    except Exception as error:  # decoders raise whatever damaged bytes cause
        raise InputError(f"cannot read image {place}: {error}", "remove or repair the file") from None


def read_image(place: ImagePlace, shape: tuple[int, int, int], numbers: Numbers | None = None) -> Images:
    """Decode an image to uint8 ``shape``: resize the short side, then crop the centre.

    With ``numbers`` (NUMBERS,) a random window of it is resized to the shape, and perhaps mirrored
    (:mod:`rprune.data.crops`).
    """
    from PIL import Image

    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    with opened(place) as file:
        if numbers is not None:
            image = _window(file, windows(file.height, file.width, numbers[None])[0], mode, (width, height))
            if flips(numbers[None])[0]:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            image = file.convert(mode)
            if image.size != (width, height):
                scale = max(width / image.width, height / image.height)
                wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
                image = image.resize((wide, high), Image.Resampling.BILINEAR)
                left, top = (wide - width) // 2, (high - height) // 2
                image = image.crop((left, top, left + width, top + height))
        array = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _window(file: Any, window: NDArray[np.int64], mode: str, size: tuple[int, int]) -> Any:
    """The window (top, left, height, width) of an image file, resized to ``size`` (width, height).

    JPEG decodes a half, a quarter or an eighth of all lines and columns where the window has still ``size`` then.
    """
    from PIL import Image

    top, left, height, width = window.tolist()
    across, down = file.size
    drafted = file.draft(None, (-(-across * size[0] // width), -(-down * size[1] // height)))
    share = drafted[1][2] / across if drafted else 1.0  # the last line and column may reach over the edge
    x, y, right, bottom = left * share, top * share, (left + width) * share, (top + height) * share
    part = file.crop((int(x), int(y), math.ceil(right), math.ceil(bottom))).convert(mode)
    box = (x - int(x), y - int(y), right - int(x), bottom - int(y))
    return part.resize(size, Image.Resampling.BILINEAR, box)


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
