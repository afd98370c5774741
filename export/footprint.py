"""What a sparse network takes: numbers stored, multiplications, and the bytes below which no coding of it goes.

Everything is counted on the arrays that a file holds. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = Mapping[str, NDArray[Any]]
"""Name of a layer's weight -> its array, int8 or float32, with its zeros."""


@dataclass(frozen=True)
class Bound:
    """Bytes, not rounded: ``mask`` says where the non-zero weights are, ``values`` what they are."""

    mask: float
    values: float


def bound(weights: Weights) -> Bound:
    """The information in weights that are drawn independently (Shannon, 1948): what an ideal coder would need.

    ``mask``: sum over layers of N H(p) bits, H the binary entropy, p the layer's share of non-zero weights. ``values``:
    the number of non-zero weights times the empirical entropy of their values, over the whole network. A coder that
    sees structure (filters that died, runs) may go below it; the numbers p and the table of values are not counted.
    """
    alive = [array[array != 0] for array in weights.values()]
    mask = sum(
        array.size * _entropy(np.array([len(values), array.size - len(values)]))
        for array, values in zip(weights.values(), alive, strict=True)
    )
    _, counts = np.unique(np.concatenate(alive), return_counts=True)
    return Bound(mask / 8, int(counts.sum()) * _entropy(counts) / 8)


@dataclass(frozen=True)
class Footprint:
    """Counts of numbers unless said otherwise; ``dataclasses.asdict`` makes JSON of it.

    ``kept`` of ``total`` weights in the file are not zero; ``side`` is what stands beside them (biases, scales, batch
    norm) by kind. ``dense_`` is the network before it was pruned and shrunk: its conv and linear weights, all its
    parameters, its multiply-accumulates for one image, and its parameters in float32 in bytes. ``density`` is all that
    is stored, side included, over ``dense_parameters``; ``ratios`` are ``dense_bytes`` over the size of each file.
    """

    kept: int
    total: int
    side: dict[str, int]
    dense_weights: int
    dense_parameters: int
    dense_bytes: int
    density: float
    bound: Bound
    sparse_macs: int
    dense_macs: int
    ratios: dict[str, float]


def footprint(
    weights: Weights,
    positions: Mapping[str, int],
    *,
    side: Mapping[str, int],
    dense_weights: int,
    dense_parameters: int,
    dense_macs: int,
    files: Mapping[str, int],
) -> Footprint:
    """The footprint of a network that holds ``weights``.

    ``positions``: how often each entry of a weight is applied for one image, by its name (``models.cost.positions``);
    ``side``: numbers stored beside the weights, by kind; ``files``: size in bytes by file name; the rest as in
    :class:`Footprint`.
    """
    nonzero = {name: int(np.count_nonzero(array)) for name, array in weights.items()}
    kept, dense_bytes = sum(nonzero.values()), 4 * dense_parameters
    return Footprint(
        kept=kept,
        total=sum(array.size for array in weights.values()),
        side=dict(side),
        dense_weights=dense_weights,
        dense_parameters=dense_parameters,
        dense_bytes=dense_bytes,
        density=(kept + sum(side.values())) / dense_parameters,
        bound=bound(weights),
        sparse_macs=sum(count * positions[name] for name, count in nonzero.items()),
        dense_macs=dense_macs,
        ratios={name: dense_bytes / size for name, size in files.items()},
    )


def _entropy(counts: NDArray[Any]) -> float:
    """Of a distribution given by counts, in bits; 0 for none."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float((shares * -np.log2(shares)).sum())
