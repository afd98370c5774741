"""MART."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.base import at_rest, cross_entropy
from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step
from rprune.objectives.trades import kl
from rprune.threat import ThreatModel


def boost(logits: Tensor, y: Tensor) -> Tensor:
    """-log(1 - max_{c != y} p_c) of each sample, from logits of shape (b, k).

    1 - p_c is the sum of the other classes' probabilities; taken so, it stays finite where p_c rounds to 1.
    """
    log_p = logits.log_softmax(1)
    rival = log_p.scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    return -log_p.scatter(1, rival, -torch.inf).logsumexp(1)


@OBJECTIVES.register("mart")
@dataclass(frozen=True, kw_only=True)
class MART(Objective):
    """BCE(p(x'), y) + beta KL(p(x) || p(x')) (1 - p_y(x)), x' the PGD point (Wang et al., ICLR 2020).

    BCE is CE(z(x'), y) - log(1 - max_{c != y} p_c(x')). beta is the paper's lambda: 5, and 6 in HARP and BCS-P. The
    attack raises the cross-entropy from x + 0.001 N(0, I). The gradient flows through p(x) and p(x').

    The authors' code adds 1e-4 inside the second logarithm and 1e-12 and 1e-7 elsewhere, so that it stays finite; here
    the formulas are the paper's, in log space. The loss then does not saturate where the net is surely wrong.
    """

    paper: ClassVar[str] = "Wang et al., ICLR 2020"
    cost: ClassVar[str] = "steps + 2 forwards and backwards"

    threat: ThreatModel
    attack: PGD = PGD(steps=10, start="near")
    beta: Annotated[float, Field(ge=0)] = 5.0

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:  # noqa: ARG002
        with at_rest(net, x) as still:
            point = self.attack.training_point(still, x, self.threat, cross_entropy(y), noise)

        def loss() -> Loss:
            natural, adversarial = net(x), net(point)
            bce = self.cross_entropy(adversarial, y) + boost(adversarial, y).mean()
            doubt = -natural.log_softmax(1).gather(1, y[:, None]).squeeze(1).expm1()  # 1 - p_y(x)
            divergence = (kl(natural, adversarial) * doubt).mean()
            return Loss(bce + self.beta * divergence, natural, {"bce": bce.detach(), "kl": divergence.detach()})

        yield loss
