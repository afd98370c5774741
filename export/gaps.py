"""Sparse arrays as gaps and values: what compact ONNX files, packed files and C sources store of a weight.

The entries of a flattened array that are not zero, in order; a gap is the number of zeros in front of one. Where a gap
does not fit its type, fillers stand between: the largest gap with the value 0, which moves on without writing anything.
Positions are ascending by construction, so a decoder needs to check only that the last one lies inside. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError

KINDS = (np.uint8, np.uint16)


@dataclass(frozen=True, eq=False)
class Gaps:
    """``gaps`` uint8 or uint16 and ``values`` of one length: the entries of an array, fillers among them."""

    gaps: NDArray[Any]
    values: NDArray[Any]

    @property
    def nbytes(self) -> int:
        return self.gaps.nbytes + self.values.nbytes


def encode(array: NDArray[Any]) -> Gaps:
    """The entries of ``array`` in the order of memory (C), with the type of gap that takes fewer bytes."""
    flat = array.reshape(-1)
    places = np.flatnonzero(flat)
    gaps = np.diff(places, prepend=-1) - 1
    return min((_with(kind, gaps, flat[places]) for kind in KINDS), key=lambda found: found.nbytes)


def decode(entries: Gaps, shape: tuple[int, ...]) -> NDArray[Any]:
    """The dense array, zeros +0.

    Raises InputError when ``entries`` are not what :func:`encode` could have written for that shape: types or lengths
    differ, a value that is no filler is zero or not finite, or an entry lies outside.
    """
    check(entries, math.prod(shape))
    dense = np.zeros(math.prod(shape), entries.values.dtype)
    dense[positions(entries)] = entries.values
    return dense.reshape(shape)


def positions(entries: Gaps) -> NDArray[np.int64]:
    """Where the entries lie in the flattened array; a filler's place is that of a zero."""
    return np.cumsum(entries.gaps.astype(np.int64) + 1) - 1


def check(entries: Gaps, size: int) -> None:
    """Raises InputError as :func:`decode` does, before anything of the array's size is allocated."""
    gaps, values = entries.gaps, entries.values
    if gaps.ndim != 1 or gaps.shape != values.shape or gaps.dtype not in KINDS:
        raise InputError(f"gaps {gaps.dtype}{gaps.shape} do not fit values {values.dtype}{values.shape}")
    end = int(gaps.sum(dtype=np.int64)) + len(gaps)
    if end > size:
        raise InputError(f"the last entry is at {end - 1}, the array has {size}")
    zero = values == 0
    if bool((gaps[zero] != np.iinfo(gaps.dtype).max).any()) or bool(zero[-1:].any()):
        raise InputError("an entry is zero")
    if values.dtype.kind == "f" and not bool(np.isfinite(values).all()):
        raise InputError("an entry is not a finite number")


def _with(kind: Any, gaps: NDArray[np.int64], values: NDArray[Any]) -> Gaps:
    largest = int(np.iinfo(kind).max)
    fillers = gaps // (largest + 1)  # each filler passes over ``largest`` zeros and stands on one more
    last = np.cumsum(fillers + 1) - 1
    found = np.full(len(gaps) + int(fillers.sum()), largest, kind)
    filled = np.zeros(len(found), values.dtype)
    found[last] = gaps - fillers * (largest + 1)
    filled[last] = values
    return Gaps(found, filled)
