"""Batches on the device: one resident uint8 tensor for small sets, a DataLoader for sets that do not fit."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from rprune.data.crops import NUMBERS, Numbers, flips, windows
from rprune.data.pixels import enlarged, picked
from rprune.data.splits import ArraySplit, Augment, FileSplit, Labels, Split
from rprune.errors import RpruneError

CROP_PADDING = 4  # pixels on each side, as all CIFAR recipes of the field


class Batch(NamedTuple):
    x: Float[Tensor, "b c h w"]  # in [0,1]
    y: Int64[Tensor, " b"]
    ids: Int64[Tensor, " b"]  # position of the sample in its split


Part = tuple[int, int]
"""(i, n), i from 0: every n-th sample of a batch, from the i-th on."""
WHOLE: Part = (0, 1)


@dataclass(frozen=True, eq=False)
class Rows:
    """Which samples of a batch of ``whole`` a part has, and their ``share`` of it.

    A batch that is too small for the part gives it its first sample, with share 0.
    """

    index: Int64[Tensor, " b"]
    whole: int
    share: float

    @classmethod
    def of(cls, whole: int, part: Part) -> Rows:
        place, parts = part
        index = torch.arange(whole)[place::parts]
        return cls(index, whole, len(index) / whole) if len(index) else cls(torch.zeros(1).long(), whole, 0.0)


@runtime_checkable
class Loader(Protocol):
    """Batches of one split."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def sizes(self, batch_size: int) -> list[int]:
        """Samples of each batch of :meth:`shuffled`."""
        ...

    def shuffled(
        self, batch_size: int, generator: torch.Generator, augment: Augment, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """One epoch of training: every sample once, in an order and augmentation drawn from ``generator`` alone.

        ``part``: of every batch those :class:`Rows`, as they are in the whole one.
        """
        ...

    def ordered(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """The first ``limit`` samples as they are, in order."""
        ...

    def take(self, ids: Int64[Tensor, " b"]) -> Batch:
        """These samples as they are, in this order."""
        ...


def loader(split: Split, device: torch.device, workers: int | None = None) -> Loader:
    """The loader that fits the split."""
    if isinstance(split, ArraySplit):
        images = torch.from_numpy(split.images).to(device)
        return Resident(images, torch.from_numpy(split.labels).to(device))
    return Streamed(split, device, min(8, os.cpu_count() or 1) if workers is None else workers)


@dataclass(frozen=True, eq=False)
class Resident:
    """All images of a split as one uint8 tensor on the device."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def sizes(self, batch_size: int) -> list[int]:
        return _sizes(len(self), batch_size)

    def shuffled(
        self, batch_size: int, generator: torch.Generator, augment: Augment, part: Part = WHOLE
    ) -> Iterator[Batch]:
        order = torch.randperm(len(self), generator=generator).to(self.labels.device)
        for every in torch.split(order, batch_size):
            rows = Rows.of(len(every), part)
            ids = every[rows.index.to(every.device)]
            yield Batch(augmented(self.images[ids], generator, augment, rows), self.labels[ids], ids)

    def ordered(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        ids = torch.arange(len(self), device=self.labels.device)[:limit]
        for part in torch.split(ids, batch_size):
            yield self.take(part)

    def take(self, ids: Tensor) -> Batch:
        ids = ids.to(self.labels.device)
        return Batch(to_unit(self.images[ids]), self.labels[ids], ids)


@dataclass(frozen=True, eq=False)
class Mixed:
    """Every batch of ``labelled`` with as many samples of ``extra`` behind it, which starts over when it ends.

    Robust self-training (Carmon et al., NeurIPS 2019): ``extra`` holds pseudo-labels. Its ids count on after the
    labelled ones. An epoch is one pass over ``labelled``, as in HYDRA's code.
    """

    labelled: Loader
    extra: Loader

    def __len__(self) -> int:
        return len(self.labelled)

    def sizes(self, batch_size: int) -> list[int]:
        return [2 * size for size in self.labelled.sizes(batch_size)]

    def shuffled(
        self, batch_size: int, generator: torch.Generator, augment: Augment, part: Part = WHOLE
    ) -> Iterator[Batch]:
        order = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        more = self._endless(batch_size, order, augment)
        held = next(more)
        for batch in self.labelled.shuffled(batch_size, generator, augment):
            count = len(batch.y)
            while len(held.y) < count:
                held = _joined(held, next(more))
            other, held = (Batch(*(part[rows] for part in held)) for rows in (slice(count), slice(count, None)))
            whole = _joined(batch, other._replace(ids=other.ids + len(self.labelled)))
            rows = Rows.of(len(whole.y), part).index.to(whole.y.device)
            yield whole if part == WHOLE else Batch(*(column[rows] for column in whole))

    def ordered(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        return self.labelled.ordered(batch_size, limit)

    def take(self, ids: Tensor) -> Batch:
        return self.labelled.take(ids)

    def _endless(self, batch_size: int, generator: torch.Generator, augment: Augment) -> Iterator[Batch]:
        while True:
            yield from self.extra.shuffled(batch_size, generator, augment)


@dataclass(frozen=True, eq=False)
class Streamed:
    """Image files decoded by worker processes."""

    split: FileSplit
    device: torch.device
    workers: int = 0

    def __len__(self) -> int:
        return len(self.split)

    def sizes(self, batch_size: int) -> list[int]:
        return _sizes(len(self), batch_size)

    def shuffled(
        self, batch_size: int, generator: torch.Generator, augment: Augment, part: Part = WHOLE
    ) -> Iterator[Batch]:
        batches = torch.split(torch.randperm(len(self), generator=generator), batch_size)
        places = [Rows.of(len(ids), part) for ids in batches]
        own = (ids[rows.index].numpy() for ids, rows in zip(batches, places, strict=True))
        numbers: Iterable[Numbers | None] = itertools.repeat(None)
        if augment == "resized-crop-flip":  # of the whole image, which only the one who decodes it sees
            augment, numbers = "none", (drawn(generator, rows) for rows in places)
        for rows, (images, ids) in zip(places, self._decode(zip(own, numbers, strict=False)), strict=True):
            yield Batch(augmented(images, generator, augment, rows), self._labels(ids), ids.to(self.device))

    def ordered(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        batches = torch.split(torch.arange(len(self))[:limit], batch_size)
        for images, ids in self._decode((ids.numpy(), None) for ids in batches):
            yield Batch(to_unit(images), self._labels(ids), ids.to(self.device))

    def take(self, ids: Tensor) -> Batch:
        images = torch.from_numpy(self.split.read(ids.cpu().numpy())).to(self.device)
        return Batch(to_unit(images), self._labels(ids.cpu()), ids.to(self.device))

    def _labels(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.split.labels)[ids].to(self.device)

    def _decode(self, batches: Iterable[_Wanted]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and ids of batches, which are drawn here, in order, whatever workers decode them."""
        feed = torch.utils.data.DataLoader(
            _Decoder(self.split), batch_sampler=batches, num_workers=self.workers,  # type: ignore[arg-type]
            collate_fn=_unchanged, pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        for found in feed:
            if isinstance(found, RpruneError):
                raise found
            images, ids = found
            yield images.to(self.device, non_blocking=True), ids


_Wanted = tuple[Labels, Numbers | None]
"""Ids of a batch, and the numbers of its random crops."""


@dataclass(frozen=True, eq=False)
class _Decoder(torch.utils.data.Dataset[Any]):
    """Decodes a batch at once. Gives an error back: one raised in a worker would arrive with its traceback as text."""

    split: FileSplit

    def __getitems__(self, wanted: _Wanted) -> tuple[Tensor, Tensor] | RpruneError:
        ids, numbers = wanted
        try:
            return torch.from_numpy(self.split.read(ids, numbers)), torch.from_numpy(ids)
        except RpruneError as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch


def _sizes(total: int, batch_size: int) -> list[int]:
    return [min(batch_size, total - start) for start in range(0, total, batch_size)]


def _joined(first: Batch, second: Batch) -> Batch:
    return Batch(*(torch.cat(pair) for pair in zip(first, second, strict=True)))


def to_unit(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    return images.float().div_(255)


def drawn(generator: torch.Generator, rows: Rows) -> Numbers:
    """The random numbers of crops of ``rows`` of a batch, for all of which they are drawn."""
    numbers = torch.rand(rows.whole, NUMBERS, generator=generator, dtype=torch.float64)[rows.index]
    return np.asarray(numbers)


def augmented(
    images: UInt8[Tensor, "b c h w"], generator: torch.Generator, augment: Augment, rows: Rows
) -> Float[Tensor, "b c h w"]:
    """Random crop after zero padding, or of random size, and horizontal flip, for a whole batch at once.

    The images are ``rows`` of a batch, for all of which numbers are drawn.
    """
    if augment == "none":
        return to_unit(images)
    _, _, height, width = images.shape
    device = images.device
    if augment == "resized-crop-flip":
        numbers = drawn(generator, rows)
        boxes, mirrored = torch.from_numpy(windows(height, width, numbers)), torch.from_numpy(flips(numbers))
        return to_unit(enlarged(images, boxes.to(device), mirrored.to(device)))
    padded = torch.nn.functional.pad(images, (CROP_PADDING,) * 4)
    places = torch.randint(0, 2 * CROP_PADDING + 1, (2, rows.whole), generator=generator)
    top, left = places[:, rows.index].to(device)
    lines = top[:, None] + torch.arange(height, device=device)
    columns = left[:, None] + torch.arange(width, device=device)
    if augment == "crop-flip":
        flip = torch.rand(rows.whole, generator=generator)[rows.index].to(device) < 0.5
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    return to_unit(picked(padded, lines, columns))
