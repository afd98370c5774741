"""Which range of an activation the integers cover, from what calibration data show."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx

from rprune.errors import WorkError
from rprune.quantization.simulate import Scale
from rprune.quantization.weights import SHRUNK, Observer, half_up

BINS = 8192  # of a histogram; 2 a step in 12 bits
NARROWEST = 1e-6  # of a range, so that a constant activation has a scale


@dataclass(frozen=True)
class Observed:
    """The least and the largest value, with zero between them, and a histogram of the values between."""

    low: float
    high: float
    counts: Float[Tensor, " bins"]

    def centres(self) -> Float[Tensor, " bins"]:
        width = (self.high - self.low) / len(self.counts)
        return self.low + width * (torch.arange(len(self.counts), dtype=torch.float64) + 0.5)


def observe(
    network: fx.GraphModule, calibration: Sequence[Tensor], names: Collection[str], histograms: bool
) -> dict[str, Observed]:
    """The values of the nodes ``names`` over all batches; two passes with histograms, which no order of them changes.

    Raises WorkError when an activation is not finite.
    """
    ranges = _Ranges(network, names)
    _run(ranges, calibration)
    counts: dict[str, Tensor] = {}
    if histograms:
        counting = _Counts(network, ranges.ends)
        _run(counting, calibration)
        counts = counting.counts
    empty = torch.zeros(0, dtype=torch.float64)
    return {name: Observed(low, high, counts.get(name, empty)) for name, (low, high) in ranges.ends.items()}


def scale_of(seen: Observed, bits: int, observer: Observer, percentile: float) -> Scale:
    """A float16 scale and a zero point for integers 0..2^bits - 1.

    * minmax: the whole range.
    * percentile: the least and the largest values are left out, ``percentile`` per cent of them stay, to a bin of the
      histogram; half of the rest goes at either end, as in ONNX Runtime's calibration.
    * mse: the part of the range, in steps of 2 %, that makes the squared error of the values least.
    """
    top = (1 << bits) - 1
    if observer == "percentile":
        return _scale(*_percentile(seen, percentile), top)
    if observer == "mse":
        candidates = [_scale(part * seen.low, part * seen.high, top) for part in SHRUNK]
        return min(reversed(candidates), key=lambda scale: _error(seen, scale))  # of equals the widest
    return _scale(seen.low, seen.high, top)


def _scale(low: float, high: float, top: int) -> Scale:
    scale = float(half_up(torch.tensor(max(high - low, NARROWEST) / top)))
    return Scale(scale, min(max(round(-low / scale), 0), top), top)


def _percentile(seen: Observed, percentile: float) -> tuple[float, float]:
    share = seen.counts.cumsum(0) / seen.counts.sum()
    outside = (1 - percentile / 100) / 2
    first, last = int((share <= outside).sum()), int((share < 1 - outside).sum())
    width = (seen.high - seen.low) / len(seen.counts)
    low = seen.low + width * first
    high = seen.low + width * (last + 1)
    return min(low, 0.0), min(max(high, 0.0), seen.high)


def _error(seen: Observed, scale: Scale) -> float:
    values = seen.centres()
    error = scale.dequantize(scale.quantize(values)) - values
    return float(seen.counts @ error.square())


def _run(interpreter: fx.Interpreter, calibration: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for batch in calibration:
            interpreter.run(batch.cpu())


class _Ranges(fx.Interpreter):
    def __init__(self, network: fx.GraphModule, names: Collection[str]) -> None:
        super().__init__(network)
        self.names = names
        self.ends: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            if not bool(torch.isfinite(value).all()):
                raise WorkError(f"activation {n.name} is not finite on the calibration data", "the model has diverged")
            if n.name in self.names:
                low, high = self.ends.get(n.name, (0.0, 0.0))  # zero is always representable
                self.ends[n.name] = (min(low, value.min().item()), max(high, value.max().item()))
        return value


class _Counts(fx.Interpreter):
    def __init__(self, network: fx.GraphModule, ends: dict[str, tuple[float, float]]) -> None:
        super().__init__(network)
        self.ends = ends
        self.counts: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.ends:
            low, high = self.ends[n.name]
            found = torch.histc(value, BINS, low, max(high, low + NARROWEST)).double()
            self.counts[n.name] = self.counts.get(n.name, 0) + found
        return value
