"""A network of integers that computes in torch what ONNX Runtime computes from the exported file.

Between layers travel the integers themselves (0..2^b - 1, so 0..255 in 8 bits), held in floating tensors. Each layer
forms its integer accumulator exactly and brings it back to b bits with the float32 operations of ONNX Runtime's
kernels, in their order: rint(float32(acc) * float32(sx * sw / sy)) + zero point. Rounding passes gradients straight
through, so the same network is what attacks differentiate. ``interval`` maps bounds of the integers to bounds of the
integers with the same operations, which are monotone: bounds computed with it hold for the integers themselves.
``loose`` does so for any kernel that rounds to the same grids: integers, or the graph's own float32 operations between
its quantisers, in any order; its bounds reach further by the error of such sums, and so over a tie here and there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn

from rprune.certification.ibp import SMALLEST, gamma
from rprune.models.graph import GlobalAvgPool, pair

LEVELS = 255  # the largest integer of 8 bits
EXACT_FLOAT32 = 1 << 24  # every integer below is a float32
OPERATIONS = 12  # roundings around a sum, more than any kernel has: scales, zero points, biases, a division


class _Rounded(torch.autograd.Function):
    """clamp(rint(x) + zero_point, low, top), half to even.

    The gradient passes straight through wherever nothing is clamped, both ends included: torch's own clamp stops it at
    the ends, which would blind attacks at black and at white pixels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, zero_point: int, low: int, top: int) -> Tensor:
        rounded = x.round() + zero_point
        ctx.save_for_backward((rounded >= low) & (rounded <= top))
        return rounded.clamp_(low, top)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None


def to_integers(steps: Tensor, zero_point: int, low: int = 0, top: int = LEVELS) -> Tensor:
    """Real values in units of the scale to integers ``low``..``top`` around the zero point."""
    integers: Tensor = _Rounded.apply(steps, zero_point, low, top)
    return integers


@dataclass(frozen=True)
class Scale:
    """real = scale * (integer - zero_point), integer in 0..``top``. ``scale`` is a float32 value."""

    scale: float
    zero_point: int
    top: int = LEVELS

    def quantize(self, real: Tensor) -> Tensor:
        return self.integers(real / self.scale)

    def integers(self, steps: Tensor, relu: bool = False) -> Tensor:
        """Values in units of the scale as integers; ``relu`` clips them at the zero point."""
        return to_integers(steps, self.zero_point, self.zero_point if relu else 0, self.top)

    def dequantize(self, q: Tensor) -> Tensor:
        return (q - self.zero_point) * self.scale

    def outward(self, low: Tensor, high: Tensor, size: Tensor, terms: int, relu: bool = False) -> tuple[Tensor, Tensor]:
        """Integers between which a float32 sum of ``terms`` operations lies; ``size``: the sum of its magnitudes, >= 0.

        ``low``, ``high`` and ``size`` are real values in float64.
        """
        error = gamma(terms) * size + terms * SMALLEST
        ends = ((end / self.scale) for end in (low - error, high + error))
        low, high = (self.integers(end, relu) for end in ends)
        return low, high


class QInput(nn.Module):
    """Pixels in [0,1] to integers."""

    def __init__(self, out: Scale) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return self.out.quantize(x)

    def interval(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        # quantised in float32, where the network itself does it
        return self(lo.float()).to(lo.dtype), self(hi.float()).to(hi.dtype)

    def loose(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        return self.out.outward(lo.double(), hi.double(), hi.double().abs(), OPERATIONS)


class QOutput(nn.Module):
    """Integers to real logits, where the last layer does not leave them real itself."""

    def __init__(self, given: Scale) -> None:
        super().__init__()
        self.given = given

    def forward(self, q: Tensor) -> Tensor:
        return self.given.dequantize(q.float())

    def interval(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        return self(lo).double(), self(hi).double()

    def loose(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (self.given.dequantize(end.double()) for end in (lo, hi))
        return low - gamma(OPERATIONS) * low.abs(), high + gamma(OPERATIONS) * high.abs()


class QMatmul(nn.Module):
    """Convolution or linear layer: integer weights, one scale an output channel; int32 bias at scale sx * sw.

    ``out`` None leaves real-valued logits; ``relu`` clips at the zero point of the output.
    """

    weight: Tensor
    bias: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        source: nn.Conv2d | nn.Linear,
        weight: Int[Tensor, "o ..."],
        bias: Int32[Tensor, " o"],
        weight_scale: Float[Tensor, " o"],
        given: Scale,
        out: Scale | None,
        relu: bool,
    ) -> None:
        super().__init__()
        self.given, self.out, self.relu = given, out, relu
        self.conv: dict[str, Any] | None = None
        if isinstance(source, nn.Conv2d):
            names = ("stride", "padding", "dilation", "groups")
            self.conv = {name: getattr(source, name) for name in names}
        self.exact_float32 = largest_accumulator(weight, bias, given.top) < EXACT_FLOAT32
        dtype = torch.float32 if self.exact_float32 else torch.float64
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias.to(dtype))
        self.register_buffer("weight_scale", weight_scale)

    def forward(self, q: Tensor) -> Tensor:
        return self._finish(self._product(q.to(self.weight.dtype) - self.given.zero_point, self.weight, self.bias))

    def interval(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the output integers, or of the real logits when ``out`` is None."""
        low, high = self._accumulators(lo, hi)
        return self._finish(low).double(), self._finish(high).double()

    def loose(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        step = (self.weight_scale.double() * self.given.scale).view((-1,) if self.conv is None else (-1, 1, 1))
        low, high = (step * end for end in self._accumulators(lo, hi))
        largest = torch.maximum(*((end.double() - self.given.zero_point).abs() for end in (lo, hi)))
        size = step * self._product(largest, self.weight.abs().double(), self.bias.abs().double())
        if self.out is not None:
            return self.out.outward(low, high, size, self.terms, self.relu)
        return low - gamma(self.terms) * size, high + gamma(self.terms) * size

    def _accumulators(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Exact bounds of the sums of products, bias included."""
        positive, negative = self.weight.clamp_min(0).double(), self.weight.clamp_max(0).double()
        lo, hi, bias = lo.double() - self.given.zero_point, hi.double() - self.given.zero_point, self.bias.double()
        low = self._product(lo, positive, bias) + self._product(hi, negative, None)
        high = self._product(hi, positive, bias) + self._product(lo, negative, None)
        return low, high

    @property
    def terms(self) -> int:
        """Roundings on the way of a float32 sum."""
        return self.weight[0].numel() + OPERATIONS

    def real_affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias in float64 that map the integers of the input to real logits (linear layers only)."""
        assert self.conv is None
        scale = self.weight_scale.double() * self.given.scale
        weight = self.weight.double() * scale[:, None]
        return weight, self.bias.double() * scale - weight.sum(1) * self.given.zero_point

    def _product(self, q: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(q, weight, bias) if self.conv is None else F.conv2d(q, weight, bias, **self.conv)

    def multiplier(self) -> Float[Tensor, " o"]:
        """What brings accumulators to the steps of the output, or to real logits."""
        real = self.weight_scale * torch.tensor(self.given.scale, dtype=torch.float32)
        return real if self.out is None else real / torch.tensor(self.out.scale, dtype=torch.float32)

    def _finish(self, accumulator: Tensor) -> Tensor:
        scaled = accumulator.float() * self.multiplier().view((-1,) if self.conv is None else (-1, 1, 1))
        return scaled if self.out is None else self.out.integers(scaled, self.relu)


def largest_accumulator(weight: Int[Tensor, "o ..."], bias: Int32[Tensor, " o"], top: int = LEVELS) -> int:
    """The largest of top * sum |w| + |b| over the filters: no sum of their terms, in any order, exceeds it."""
    return int((top * weight.flatten(1).long().abs().sum(1) + bias.abs()).max())


class QAdd(nn.Module):
    """Residual sum, rounded once: rint(a * ra + (b * rb + c)) with fused multiply-adds, as in ONNX Runtime's kernel."""

    def __init__(self, a: Scale, b: Scale, out: Scale, relu: bool) -> None:
        super().__init__()
        self.a, self.b, self.out, self.relu = a, b, out, relu
        f32 = torch.float32
        sa, sb, sy = (torch.tensor(s.scale, dtype=f32) for s in (a, b, out))
        self.ra, self.rb = float(sa / sy), float(sb / sy)
        # zero points enter before the single rounding: zy - fma(ra, za, rb * zb), each step rounded to float32
        shift_b = float(torch.tensor(self.rb * b.zero_point, dtype=f32))
        shift = torch.tensor(self.ra * a.zero_point + shift_b, dtype=f32)
        self.offset = float(torch.tensor(float(out.zero_point), dtype=f32) - shift)

    def forward(self, qa: Tensor, qb: Tensor) -> Tensor:
        inner = (qb.double() * self.rb + self.offset).float()
        total = (qa.double() * self.ra + inner.double()).float()
        return to_integers(total, 0, self.out.zero_point if self.relu else 0, self.out.top)

    def interval(self, alo: Tensor, ahi: Tensor, blo: Tensor, bhi: Tensor) -> tuple[Tensor, Tensor]:
        return self(alo, blo).to(alo.dtype), self(ahi, bhi).to(ahi.dtype)

    def loose(self, alo: Tensor, ahi: Tensor, blo: Tensor, bhi: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (
            [self.a.dequantize(a.double()), self.b.dequantize(b.double())] for a, b in ((alo, blo), (ahi, bhi))
        )
        # the fused kernel's offset holds the zero points: what they stand for counts, too
        zeros = (
            self.a.zero_point * self.a.scale + self.b.zero_point * self.b.scale + self.out.zero_point * self.out.scale
        )
        size = torch.maximum(low[0].abs(), high[0].abs()) + torch.maximum(low[1].abs(), high[1].abs()) + 2 * zeros
        return self.out.outward(low[0] + low[1], high[0] + high[1], size, OPERATIONS, self.relu)


class QAvgPool(nn.Module):
    """Average pooling: integer sum, then one rounding. ``kernel`` None pools the whole image to 1x1."""

    def __init__(self, source: nn.AvgPool2d | None, given: Scale, out: Scale) -> None:
        super().__init__()
        self.source, self.given, self.out = source, given, out

    def forward(self, q: Tensor) -> Tensor:
        kernel = q.shape[2:] if self.source is None else self.source.kernel_size
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        count = height * width
        centred = (q if self.given.top * count < EXACT_FLOAT32 else q.double()) - self.given.zero_point
        if self.source is None:
            total = centred.sum((2, 3), keepdim=True)
        else:
            total = F.avg_pool2d(centred, (height, width), self.source.stride, divisor_override=1)
        return self.out.integers(total.float() * self.multiplier(count).to(q.device))

    def multiplier(self, count: int) -> Float[Tensor, ""]:
        """What brings sums of ``count`` integers to the steps of the output."""
        given, out = (torch.tensor(scale, dtype=torch.float32) for scale in (self.given.scale, self.out.scale))
        return given / (count * out)

    def interval(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        return self(lo).to(lo.dtype), self(hi).to(hi.dtype)

    def loose(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        pool: nn.Module = GlobalAvgPool() if self.source is None else self.source
        low, high = (self.given.dequantize(end.double()) for end in (lo, hi))
        size = torch.maximum(low.abs(), high.abs())
        count = size[0, 0].numel() if self.source is None else math.prod(pair(self.source.kernel_size))
        return self.out.outward(pool(low), pool(high), pool(size), count + OPERATIONS)


class QAffine(nn.Module):
    """A channel-wise scale and shift, computed in float32 between two quantisers."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, given: Scale, out: Scale, relu: bool) -> None:
        super().__init__()
        self.given, self.out, self.relu = given, out, relu
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, q: Tensor) -> Tensor:
        real = self.given.dequantize(q.float()) * self.scale + self.shift
        return self.out.integers(real / self.out.scale, self.relu)

    def interval(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self(lo), self(hi)
        return torch.minimum(a, b).to(lo.dtype), torch.maximum(a, b).to(hi.dtype)

    def loose(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.scale.double(), self.shift.double()
        a, b = (self.given.dequantize(end.double()) * scale for end in (lo, hi))
        size = torch.maximum(a.abs(), b.abs()) + shift.abs()
        low, high = torch.minimum(a, b) + shift, torch.maximum(a, b) + shift
        return self.out.outward(low, high, size, OPERATIONS, self.relu)


class QKeep(nn.Module):
    """A layer that acts on the integers as they are: max pooling, flattening, a ReLU that nothing took in."""

    def __init__(self, source: nn.Module, given: Scale) -> None:
        super().__init__()
        self.source, self.given = source, given

    def forward(self, q: Tensor) -> Tensor:
        if isinstance(self.source, nn.ReLU):
            return q.clamp_min(self.given.zero_point)
        result: Tensor = self.source(q)
        return result

    def interval(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        return self(lo), self(hi)

    def loose(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        return self.interval(lo, hi)
