"""The steps of a network as a C program takes them, and the tensors between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rprune.quantization.simulate import LEVELS


@dataclass(eq=False)
class Value:
    """A tensor between two steps: ``channels`` planes of height x width, or a vector where both are 1.

    ``pad`` and ``plane``, the distance of two planes, are settled once all readers are known; ``zero`` is the integer
    that stands for 0, ``top`` the largest; ``place`` is its offset in the arena, in cells.
    """

    channels: int
    height: int
    width: int
    zero: int = 0
    top: int = LEVELS
    pad: int = 0
    plane: int = 0
    place: int = 0
    slack: int = 0  # cells that readers may touch behind the last plane

    @property
    def pitch(self) -> int:
        return self.width + self.pad

    @property
    def lead(self) -> int:
        """Border cells in front of the first plane."""
        return self.pad * self.pitch + self.pad

    @property
    def cells(self) -> int:
        return self.lead + self.channels * self.plane + self.slack


@dataclass(eq=False)
class Step:
    """What makes ``out`` of ``given``."""

    given: tuple[Value, ...]
    out: Value


@dataclass(eq=False)
class Sum:
    """A residual sum that the convolution before it takes in.

    Integers: rint(first * r1 + (second * r2 + offset)), where the convolution's own result is ``first`` or second.
    """

    other: Value
    relu: bool
    own_first: bool = True
    r1: float = 1.0
    r2: float = 1.0
    offset: float = 0.0


@dataclass(eq=False)
class Product(Step):
    """Convolution or linear layer. ``weight`` (o, c, kh, kw) holds floats, or integers as int64; ``bias`` likewise.

    ``scale`` (o,) brings integer sums to the output's integers, or to real logits where ``logits``; None for floats.
    """

    weight: NDArray[Any]
    bias: NDArray[Any]
    relu: bool
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    scale: NDArray[np.float32] | None = None
    own: Value | None = None  # the result before the sum, where there is one
    sum: Sum | None = None
    logits: bool = False
    shares: Product | None = None  # an earlier convolution whose phases of the same input this one reads

    @property
    def linear(self) -> bool:
        """Is there one position, of which every output may read every input?"""
        images = self.given[0], self.out
        sides = *self.weight.shape[2:], *(side for image in images for side in (image.height, image.width))
        return self.groups == 1 and all(side == 1 for side in sides)


@dataclass(eq=False)
class Elementwise(Step):
    """``kind``: add, with the numbers of QAdd in ``sum``; relu; affine, with ``scale`` and ``shift``."""

    kind: str
    relu: bool = False
    sum: Sum | None = None
    scale: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    shift: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    given_scale: float = 1.0
    out_scale: float = 1.0


@dataclass(eq=False)
class Pool(Step):
    """``kind``: max, average. ``scale`` multiplies the sum of an average."""

    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    scale: float = 1.0


@dataclass(eq=False)
class Flatten(Step):
    """Planes to a vector, channel by channel."""


@dataclass(eq=False)
class Dequantize(Step):
    """Integers to real logits."""

    scale: float


@dataclass(eq=False)
class Plan:
    """``steps`` from ``image`` to ``logits``. ``integers``: 8-bit arithmetic; ``arena``: cells for all values."""

    image: Value
    logits: Value
    steps: list[Step]
    integers: bool
    input_shape: tuple[int, int, int]
    arena: int = 0


def reads(step: Step) -> list[Value]:
    """Every value that a step reads."""
    more = [step.sum.other] if isinstance(step, Product) and step.sum is not None else []
    return [*step.given, *more]
