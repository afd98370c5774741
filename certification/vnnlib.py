"""VNN-LIB files of one sample's robustness, for external verifiers: unsat means certified. No torch.

Version 1.0 is what most verifiers read; 2.0 (December 2025) names the network's tensors. Bounds are float64 numbers in
the space of the ONNX file's input, the same to the last bit as those that rprune proves.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Version = Literal["1.0", "2.0"]


def property_text(
    lo: NDArray[np.float64], hi: NDArray[np.float64], label: int, classes: int, version: Version, title: str = ""
) -> str:
    """The negated property: an image in [lo, hi], arrays (c, h, w), for which another class is at least as likely."""
    write = _first if version == "1.0" else _second
    head = [f"; {line}" for line in title.splitlines()]
    return "\n".join([*head, *write(lo, hi, label, classes)]) + "\n"


def _first(lo: NDArray[np.float64], hi: NDArray[np.float64], label: int, classes: int) -> Iterator[str]:
    for index in range(lo.size):
        yield f"(declare-const X_{index} Real)"
    for index in range(classes):
        yield f"(declare-const Y_{index} Real)"
    for index, (low, high) in enumerate(zip(lo.ravel(), hi.ravel(), strict=True)):
        yield f"(assert (<= X_{index} {_number(high)}))"
        yield f"(assert (>= X_{index} {_number(low)}))"
    yield _any([f"(and (>= Y_{other} Y_{label}))" for other in range(classes) if other != label])


def _second(lo: NDArray[np.float64], hi: NDArray[np.float64], label: int, classes: int) -> Iterator[str]:
    shape = ", ".join(str(side) for side in (1, *lo.shape))
    yield "(vnnlib-version <2.0>)"
    yield f"(declare-network f (declare-input X float32 [{shape}]) (declare-output Y float32 [1, {classes}]))"
    for place in product(*map(range, lo.shape)):
        name = f"X[{', '.join(str(index) for index in (0, *place))}]"
        yield f"(assert (<= {name} {_number(hi[place])}))"
        yield f"(assert (>= {name} {_number(lo[place])}))"
    yield _any([f"(>= Y[0, {other}] Y[0, {label}])" for other in range(classes) if other != label])


def _any(terms: list[str]) -> str:
    return f"(assert {terms[0]})" if len(terms) == 1 else f"(assert (or {' '.join(terms)}))"


def _number(value: float) -> str:
    """Exact, and without an exponent, which not every parser reads."""
    return np.format_float_positional(np.float64(value), trim="0")
