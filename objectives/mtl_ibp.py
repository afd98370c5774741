"""Training on a mixture of an adversarial loss and interval bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.base import at_rest, cross_entropy
from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.certification.live import Bounds
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step
from rprune.objectives.ibp import certified, ramped
from rprune.threat import ThreatModel


@OBJECTIVES.register("mtl-ibp")
@dataclass(frozen=True, kw_only=True)
class MTLIBP(Objective):
    """(1 - alpha) CE(z(x'), y) + alpha CE(-m(x), y), m lower margins by intervals (De Palma et al., ICLR 2024).

    m are those of ``ibp``; x' is a PGD point within ``reach`` times eps. eps grows linearly from 0 over the first
    ``ramp`` of the stage. Defaults are CTBench's for 2/255 on CIFAR-10 (alpha 0.01, reach 2, one step); at 8/255 it
    has alpha 0.6 and reach 1. A small alpha trains nets that intervals hardly certify: ask for ``crown``.
    """

    paper: ClassVar[str] = "De Palma et al., ICLR 2024"
    cost: ClassVar[str] = "steps + 3 forwards and backwards: the attack, its point, two for centre and radius"

    threat: ThreatModel
    attack: PGD = PGD(steps=1, step=1.0)
    validation_attack: PGD = PGD(steps=10)
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.01
    reach: Annotated[float, Field(gt=0)] = 2.0
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.5

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:
        reached = ramped(progress, self.ramp)
        near = self.threat.scaled(reached)
        with at_rest(net, x) as still:
            point = self.attack.training_point(still, x, near.scaled(self.reach), cross_entropy(y), noise)

        def loss() -> Loss:
            logits = net(point)
            adversarial = self.cross_entropy(logits, y)
            lower = Bounds(net, x, near).interval_margins(y)
            robust = self.cross_entropy(-lower, y)
            parts = {"ce": adversarial.detach(), "ce_bound": robust.detach(), "certified": certified(lower)}
            return Loss((1 - self.alpha) * adversarial + self.alpha * robust, logits, parts)

        yield loss
