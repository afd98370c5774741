"""PGD adversarial training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from rprune.attacks.base import at_rest, cross_entropy
from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step
from rprune.threat import ThreatModel


@OBJECTIVES.register("pgd-at")
@dataclass(frozen=True, kw_only=True)
class PGDAT(Objective):
    """CE(z(x'), y) at the PGD point x' (Madry et al., ICLR 2018, eq. 2.1).

    10 steps of eps/4 from a random start, as HYDRA, HARP and Robust-ADMM train. The attack sees the net in eval mode,
    the loss in train mode.
    """

    paper: ClassVar[str] = "Madry et al., ICLR 2018"
    cost: ClassVar[str] = "steps + 1 forwards and backwards"

    threat: ThreatModel
    attack: PGD = PGD(steps=10)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:  # noqa: ARG002
        with at_rest(net, x) as still:
            point = self.attack.training_point(still, x, self.threat, cross_entropy(y), noise)

        def loss() -> Loss:
            logits = net(point)
            return Loss(self.cross_entropy(logits, y), logits)

        yield loss
