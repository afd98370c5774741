"""Lower bounds of margins of a finished network by name, for the true class and all others."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, fx

from rprune.certification import ibp
from rprune.certification.live import Bounds, Relaxation
from rprune.certification.rounding import float_error
from rprune.errors import UsageError
from rprune.models.graph import shape_of
from rprune.threat import ThreatModel

Method = Literal["ibp", "crown-ibp", "deepz", "crown", "alpha-crown"]
METHODS: tuple[Method, ...] = ("ibp", "crown-ibp", "deepz", "crown", "alpha-crown")
CASCADE: tuple[Method, ...] = ("ibp", "crown-ibp", "crown", "alpha-crown")  # from the cheapest on
SECTIONS = {"ibp": 250, "crown-ibp": 50, "deepz": 10, "crown": 10, "alpha-crown": 10}  # images of small nets at once
WIDE = 8192  # values of a layer from which on single images fill the rows of a section


def together(network: fx.GraphModule, method: Method) -> int:
    """How many images to bound at once: what is fast; memory is bounded whatever their number."""
    if method in ("ibp", "crown-ibp"):
        return SECTIONS[method]
    widest = max(math.prod(shape_of(node)[1:]) for node in network.graph.nodes if node.op != "output")
    return SECTIONS[method] if widest < WIDE else 1


def lower_margins(
    network: fx.GraphModule, x: Float[Tensor, "b c h w"], y: Int64[Tensor, " b"], threat: ThreatModel, method: Method
) -> Float[Tensor, "b k"]:
    """Lower bounds of z_y - z_j over the threat's ball, in real arithmetic, +inf at j = y; at least those of "ibp".

    ``network``: float64, from ``trace``; for "ibp" also one from ``simulated``, whose integers are exact.

    "deepz" is the symbolic intervals of MixTrain's verifier: :class:`Bounds` with "parallel", tightened.

    Raises UsageError for linear bounds of integers.
    """
    region = ibp.box(x, threat)
    if method == "ibp":
        return ibp.margins(network, *region, y)
    if ibp.of_integers(network):
        raise UsageError(f"{method} does not bound integers", "use ibp for the 8-bit form; it is exact there")
    relaxation: Relaxation = "parallel" if method == "deepz" else "crown"
    bounds = Bounds(network, x.double(), ibp.outward(threat), relaxation, tighten=method != "crown-ibp", pixels=region)
    with torch.no_grad():
        found = bounds.optimised_margins(y) if method == "alpha-crown" else bounds.linear_margins(y)
        found = torch.fmax(found, bounds.interval_margins(y))
    return found.scatter(1, y[:, None], torch.inf)


def smallest(lower: Float[Tensor, "b k"], y: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The smallest bound over the other classes."""
    return lower.scatter(1, y[:, None], torch.inf).amin(1)


def rounded_margins(
    network: fx.GraphModule, x: Float[Tensor, "b c h w"], y: Int64[Tensor, " b"], threat: ThreatModel, lower: Tensor
) -> Float[Tensor, "b k"]:
    """``lower`` less what float32 sums in any order may add to the difference of two logits.

    Of integers, the bounds of any kernel between the quantisers (:func:`rprune.certification.ibp.bounds`, ``loose``).
    """
    if ibp.of_integers(network):
        return ibp.margins(network, *ibp.box(x, threat), y, loose=True)
    error = float_error(network, *ibp.box(x, threat))
    return lower - error - error.gather(1, y[:, None])
