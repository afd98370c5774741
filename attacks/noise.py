"""Random numbers for attacks: a plain stream in training; keyed by sample in evaluation.

Keyed numbers depend on (seed, sample id, purpose, element) alone, so a result does not change with batch size, order,
sharding or resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rprune.data.loaders import Rows
from rprune.seeds import derive

IMAGES = -4  # the dimension of (..., b, c, h, w) that counts images


@runtime_checkable
class Noise(Protocol):
    def uniform(self, like: Float[Tensor, "b ..."], purpose: str) -> Float[Tensor, "b ..."]:
        """Uniform in [-1, 1], of the shape and device of ``like``."""
        ...

    def normal(self, like: Float[Tensor, "b ..."], purpose: str) -> Float[Tensor, "b ..."]:
        """Standard Gaussian, of the shape and device of ``like``."""
        ...


@dataclass(frozen=True)
class Stream:
    """Numbers drawn one after another from a generator on the images' device; the loop makes one for every epoch.

    ``memory`` holds what an objective carries from batch to batch within the epoch (Free-AT's perturbation). Where the
    images are ``rows`` of a batch, numbers are drawn for all of it, so that its parts have those that it would have.
    """

    generator: torch.Generator
    memory: dict[str, Tensor] = field(default_factory=dict)
    rows: Rows | None = None

    def uniform(self, like: Tensor, purpose: str) -> Tensor:  # noqa: ARG002  a stream has no keys
        return self._drawn(torch.rand, like).mul_(2).sub_(1)

    def normal(self, like: Tensor, purpose: str) -> Tensor:  # noqa: ARG002
        return self._drawn(torch.randn, like)

    def _drawn(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        shape, rows = list(like.shape), self.rows if like.dim() >= -IMAGES else None  # one number is for all parts
        if rows is not None:
            shape[IMAGES] = rows.whole
        drawn = draw(shape, generator=self.generator, device=like.device, dtype=like.dtype)
        return drawn if rows is None or rows.share == 1 else drawn.index_select(IMAGES, rows.index.to(like.device))


@dataclass(frozen=True)
class Keyed:
    """Numbers that are a hash of (seed, purpose, sample id, position in the image)."""

    seed: int
    ids: Int64[Tensor, " b"]

    def select(self, mask: Tensor) -> Keyed:
        return Keyed(self.seed, self.ids[mask])

    def uniform(self, like: Tensor, purpose: str) -> Tensor:
        return (2 * self._unit(like, purpose) - 1).to(like.dtype)

    def normal(self, like: Tensor, purpose: str) -> Tensor:
        radius = torch.sqrt(-2 * torch.log1p(-self._unit(like, purpose + "/radius")))
        return (radius * torch.cos(2 * math.pi * self._unit(like, purpose + "/angle"))).to(like.dtype)

    def _unit(self, like: Tensor, purpose: str) -> Tensor:
        """Uniform in [0, 1) with 53 random bits, float64."""
        key = derive(self.seed, purpose)
        columns = torch.arange(like[0].numel(), device=like.device, dtype=torch.int64)
        rows = _mix(self.ids.to(like.device) + key)
        bits = _mix(rows[:, None] + columns[None, :] * _signed(0x9E3779B97F4A7C15))
        unit = (_shift(bits, 11)).double() * 2.0**-53
        return unit.view(like.shape)


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), on wrapping int64."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)
