"""SmoothAdv: adversarial training of the smoothed classifier."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.base import at_rest, cross_entropy
from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step
from rprune.threat import ThreatModel


def log_mean_softmax(logits: Tensor) -> Tensor:
    """log of the mean over m of softmax(logits), shape (m, b, k) -> (b, k)."""
    return logits.log_softmax(2).logsumexp(0) - math.log(len(logits))


class Smoothed(nn.Module):
    """The net's class probabilities averaged over fixed noise of shape (m, b, c, h, w), as logarithms."""

    def __init__(self, net: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.net = net
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return log_mean_softmax(noisy_logits(self.net, x, self.noise))


def noisy_logits(net: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    """Logits (m, b, k) of the images (b, c, h, w) under each noise (m, b, c, h, w), in one pass."""
    logits: Tensor = net((x + noise).flatten(0, 1))
    return logits.view(*noise.shape[:2], -1)


@OBJECTIVES.register("smoothadv")
@dataclass(frozen=True, kw_only=True)
class SmoothAdv(Objective):
    """mean_j CE(z(x' + n_j), y), x' the PGD point of -log mean_j p_y(x' + n_j) (Salman et al., NeurIPS 2019).

    The m noises n_j ~ N(0, sigma^2 I) of an image are the same in all steps of the attack and in the loss, and are not
    clamped. The attack starts at x with steps of 2 eps / T, as the authors' code; T 10 and m 2 lie in the ranges that
    the paper sweeps (2 to 10, 1 to 8). The natural threat is l2, whose radius is certified; linf works too. The paper's
    warm-up of eps is left out. Validation runs the attack on the net itself, without noise.
    """

    paper: ClassVar[str] = "Salman et al., NeurIPS 2019"
    cost: ClassVar[str] = "samples x (steps + 1) forwards and backwards"

    threat: ThreatModel
    attack: PGD = PGD(steps=10, step=0.2, start="none")
    sigma: Annotated[float, Field(gt=0)] = 0.25
    samples: Annotated[int, Field(ge=1)] = 2

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:  # noqa: ARG002
        drawn = self.sigma * noise.normal(x.expand(self.samples, *x.shape), "smoothadv")
        # the logits of Smoothed are log-probabilities, so cross-entropy of them is -log of the mean
        with at_rest(net, x) as still:
            point = self.attack.training_point(Smoothed(still, drawn), x, self.threat, cross_entropy(y), noise)

        def loss() -> Loss:
            logits = noisy_logits(net, point, drawn)
            ce = self.cross_entropy(logits.flatten(0, 1), y.repeat(self.samples))
            return Loss(ce, log_mean_softmax(logits))

        yield loss
