"""Interval bound propagation (Gowal et al., ICCV 2019, section 3) over traced float and 8-bit networks.

Linear layers move the centre with the weights and the radius with their magnitudes; monotone layers act on both ends.
The margin specification z_y - z_j is merged into the last linear layer. Layers of the 8-bit simulation bring their own
integer intervals (``interval``), which hold for the integers that the exported file computes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, fx, nn

from rprune.models.graph import Add, Affine, GlobalAvgPool, layer, output_of
from rprune.threat import ThreatModel

OUTWARD = 1e-6  # the box is this much wider than eps: the tolerance with which attacks are checked
MONOTONE = (nn.ReLU, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Flatten, GlobalAvgPool)
LOGIT_ROUNDING = 2.0**-21  # relative; three float32 roundings for each of two logits

UNIT = 2.0**-24  # of float32
SMALLEST = 2.0**-126  # below it float32 has fewer digits: what an operation may lose on top

Interval = tuple[Tensor, Tensor]


def gamma(count: int) -> float:
    """What ``count`` float32 operations in any order may err by, relative to their magnitudes (Higham, 2002, 3.1)."""
    return count * UNIT / (1 - count * UNIT)


def box(x: Float[Tensor, "b c h w"], threat: ThreatModel) -> Interval:
    """float64 pixel bounds in [0,1] that contain the threat's ball (in l2 too no pixel moves by more than eps)."""
    x, reach = x.double(), outward(threat).eps
    return (x - reach).clamp_min(0), (x + reach).clamp_max(1)


def outward(threat: ThreatModel) -> ThreatModel:
    """The threat as it is proved: a little wider, unless it is none."""
    return ThreatModel.of(threat.norm, repr(threat.eps + OUTWARD)) if threat.eps > 0 else threat


def bounds(network: fx.GraphModule, lo: Tensor, hi: Tensor, loose: bool = False) -> Interval:
    """Bounds of the logits for all inputs in [lo, hi]; ``network`` comes from ``trace`` or ``simulated``.

    ``loose``, of integers: whatever kernels compute between the quantisers, in integers or in float32 in any order.
    """
    found = _Interpreter(network, loose=loose).run((lo, hi))
    return found[0], found[1]


def margins(
    network: fx.GraphModule, lo: Tensor, hi: Tensor, y: Int64[Tensor, " b"], loose: bool = False
) -> Float[Tensor, "b k"]:
    """Lower bounds of z_y - z_j over the box, for every class j; +inf at j = y. ``loose``: as in :func:`bounds`."""
    last = output_of(network)
    head = layer(network, last) if last.op == "call_module" else None
    affine = _real_affine(head)
    if affine is None:
        low, high = bounds(network, lo, hi, loose)
        lower = low.gather(1, y[:, None]) - high
    else:
        (source,) = last.args
        assert isinstance(source, fx.Node)
        weight, bias = affine
        low, high = _Interpreter(network, stop=source, loose=loose).run((lo, hi))
        centre, radius = (low + high) / 2, (high - low) / 2
        logits = F.linear(centre, weight, bias)
        spread = (weight[y][:, None] - weight[None]).abs()
        reach = torch.einsum("bi,bki->bk", radius, spread)
        lower = logits.gather(1, y[:, None]) - logits - reach
        if not isinstance(head, nn.Linear):
            rounding, size = LOGIT_ROUNDING, logits.abs() + F.linear(radius, weight.abs())
            if loose:
                reach = torch.maximum(low.abs(), high.abs())
                rounding, size = 2 * gamma(_terms(head)), F.linear(reach, weight.abs()) + bias.abs()
            lower = lower - rounding * size.amax(1, keepdim=True)
    return lower.scatter(1, y[:, None], torch.inf)


def certified(
    network: fx.GraphModule, x: Float[Tensor, "b c h w"], y: Int64[Tensor, " b"], threat: ThreatModel
) -> Bool[Tensor, " b"]:
    """True where no point of the threat's ball changes the prediction y."""
    return proved(margins(network, *box(x, threat), y), y)


def proved(lower: Float[Tensor, "b k"], y: Int64[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """Where every other class stays below, by lower bounds of the margins. One that is not finite proves nothing."""
    other = torch.ones_like(lower, dtype=torch.bool).scatter(1, y[:, None], False)
    return ((lower > 0) & (torch.isfinite(lower) | ~other)).all(1)


def of_integers(network: nn.Module) -> bool:
    """Whether a network is an 8-bit simulation, whose layers bring intervals of their own."""
    return any(hasattr(module, "interval") for module in network.modules())


def through(module: nn.Module, *inputs: Interval, loose: bool = False) -> Interval:
    """Bounds of a layer's value from those of its inputs, in their precision; differentiable for real layers."""
    lo, hi = inputs[0]
    own: Any = getattr(module, "loose" if loose else "interval", None)
    if own is not None:
        low, high = own(*(end for pair in inputs for end in pair))
        return low, high
    if isinstance(module, MONOTONE):
        return module(lo), module(hi)
    if isinstance(module, Add):
        return lo + inputs[1][0], hi + inputs[1][1]
    centre, radius = (lo + hi) / 2, (hi - lo) / 2
    if isinstance(module, Affine):
        scale = module.scale.to(lo.dtype)
        centre, radius = centre * scale + module.shift.to(lo.dtype), radius * scale.abs()
    else:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        weight = module.weight.to(lo.dtype)
        bias = None if module.bias is None else module.bias.to(lo.dtype)
        if isinstance(module, nn.Linear):
            centre, radius = F.linear(centre, weight, bias), F.linear(radius, weight.abs())
        else:
            geometry: Any = (module.stride, module.padding, module.dilation, module.groups)
            centre, radius = F.conv2d(centre, weight, bias, *geometry), F.conv2d(radius, weight.abs(), None, *geometry)
    return centre - radius, centre + radius


class _Interpreter(fx.Interpreter):
    """Runs a network on (lo, hi) pairs in float64."""

    def __init__(self, network: fx.GraphModule, stop: fx.Node | None = None, loose: bool = False) -> None:
        super().__init__(network)
        self.stop, self.loose = stop, loose

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            try:
                return super().run(*args, **kwargs)
            except _Stopped as stopped:
                return stopped.value

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n is self.stop:
            raise _Stopped(value)
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Interval:  # noqa: ARG002
        low, high = through(self.fetch_attr(target), *args, loose=self.loose)
        return low, high


class _Stopped(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def _terms(head: Any) -> int:
    found: int = head.terms
    return found


def _real_affine(head: nn.Module | None) -> tuple[Tensor, Tensor] | None:
    if isinstance(head, nn.Linear):
        offset = torch.zeros(head.out_features) if head.bias is None else head.bias.detach()
        return head.weight.double(), offset.double()
    real_affine: Any = getattr(head, "real_affine", None)
    if real_affine is not None and getattr(head, "conv", None) is None:
        weight, bias = real_affine()
        return weight, bias
    return None
