"""The threat model that every floor shares. Importing this module does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from rprune.errors import UsageError, unknown_name

Norm: TypeAlias = Literal["linf", "l2"]


def parse_fraction(text: str | float) -> float:
    """``"8/255"`` or ``"0.1"`` or a number -> float. Raises UsageError for anything else."""
    try:
        value = _fraction(text) if isinstance(text, str) else float(text)
    except (ValueError, ArithmeticError):
        raise UsageError(f"'{text}' is not a number", "write a decimal (0.03) or a fraction (8/255)") from None
    if not math.isfinite(value):
        raise UsageError(f"'{text}' is not finite", "write a decimal (0.03) or a fraction (8/255)")
    return value


def _fraction(text: str) -> float:
    """Whole numbers over whole numbers, or a decimal; never exactly, which 1e999999999 would fill the memory with."""
    above, slash, below = text.replace(" ", "").partition("/")
    value = int(above) / int(below) if slash else float(above)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


@dataclass(frozen=True)
class ThreatModel:
    """What the adversary may do: perturb pixels in [0,1] by at most eps in the given norm, staying in [0,1].

    eps keeps the way the user wrote it (``"8/255"``) in ``text``; ``eps`` is its float value in pixel units.
    """

    norm: Norm
    text: str

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise unknown_name("norm", self.norm, get_args(Norm))
        if self.eps < 0:
            raise UsageError(f"eps {self.text} is negative", "eps is a distance in [0,1] pixel units")

    @property
    def eps(self) -> float:
        return parse_fraction(self.text)

    @classmethod
    def of(cls, norm: str, eps: str | float) -> ThreatModel:
        return cls(norm, str(eps))  # type: ignore[arg-type]  # checked in __post_init__

    def scaled(self, factor: float) -> ThreatModel:
        return ThreatModel(self.norm, repr(self.eps * factor))

    def __str__(self) -> str:
        return f"{self.norm} {self.text}"
