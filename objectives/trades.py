"""TRADES."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.base import at_rest
from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step
from rprune.threat import ThreatModel


def kl(natural: Tensor, adversarial: Tensor) -> Tensor:
    """KL(softmax natural || softmax adversarial) of each sample, from logits of shape (b, k)."""
    log_p = natural.log_softmax(1)
    return (log_p.exp() * (log_p - adversarial.log_softmax(1))).sum(1)


@OBJECTIVES.register("trades")
@dataclass(frozen=True, kw_only=True)
class TRADES(Objective):
    """CE(z(x), y) + beta KL(p(x) || p(x')), x' the point of highest KL (Zhang et al., ICML 2019, eq. 5).

    beta 6 and the start x + 0.001 N(0, I) are the authors', which HYDRA and HARP keep. p(x) inside the attack does not
    change from step to step, so it is computed once; the gradient of the loss flows through p(x) and p(x').
    """

    paper: ClassVar[str] = "Zhang et al., ICML 2019"
    cost: ClassVar[str] = "steps + 3 forwards, steps + 2 backwards"

    threat: ThreatModel
    attack: PGD = PGD(steps=10, start="near")
    beta: Annotated[float, Field(ge=0)] = 6.0

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:  # noqa: ARG002
        with at_rest(net, x) as still:
            with torch.no_grad():
                target = still(x)
            point = self.attack.training_point(still, x, self.threat, lambda logits: kl(target, logits), noise)

        def loss() -> Loss:
            natural, adversarial = net(x), net(point)
            ce = self.cross_entropy(natural, y)
            divergence = kl(natural, adversarial).mean()
            return Loss(ce + self.beta * divergence, natural, {"ce": ce.detach(), "kl": divergence.detach()})

        yield loss
