"""What HYDRA's released code does otherwise: eps 0.007 in place of 2/255, a box within the range of the images at hand.

Both make less hold than is counted: 0.007 is 1.785/255, and a box that ends at the darkest and the brightest pixel of
the batch leaves out part of the ball.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from rprune.certification.ibp import Interval
from rprune.threat import ThreatModel

Compat = Literal["hydra"]
PAPER, CODE = ThreatModel.of("linf", "2/255"), ThreatModel.of("linf", "0.007")
BATCH = 128  # of HYDRA's evaluation


def hydra_threat(threat: ThreatModel) -> ThreatModel:
    """The threat that HYDRA's code takes for the paper's; others as they are."""
    return CODE if (threat.norm, threat.eps) == (PAPER.norm, PAPER.eps) else threat


def hydra_box(x: Float[Tensor, "b c h w"], threat: ThreatModel, each: bool = False) -> Interval:
    """eps around x, within the range of the batch; ``each``: of each image, as where it bounds images one by one."""
    axes = (1, 2, 3) if each else (0, 1, 2, 3)
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    return (x - threat.eps).maximum(low), (x + threat.eps).minimum(high)
