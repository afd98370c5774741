"""WRM: adversarial training by a penalty instead of a ball."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.base import at_rest, cross_entropy, input_gradient
from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step


@OBJECTIVES.register("wrm")
@dataclass(frozen=True, kw_only=True)
class WRM(Objective):
    """CE(z(x'), y), x' the highest point of gamma CE(z(x'), y) - |x' - x|^2 / 2 (Sinha et al., ICLR 2018, algorithm 1).

    Ascent from x with step 1 / sqrt(t + 1), t = 0, 1, ..., clamped to [0, 1]; no ball bounds it. gamma weighs the loss,
    as in ATMC (Gui et al., NeurIPS 2019), and is the inverse of Sinha et al.'s, which weighs the distance. gamma 1.3
    and 7 steps are those of ATMC's poster; its code has 20. Validation attacks with PGD in the ball of the threat.
    """

    paper: ClassVar[str] = "Sinha et al., ICLR 2018"
    cost: ClassVar[str] = "steps + 1 forwards and backwards"

    gamma: Annotated[float, Field(gt=0)] = 1.3
    steps: Annotated[int, Field(ge=1)] = 7
    validation_attack: PGD = PGD(steps=10)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:  # noqa: ARG002
        point = x
        with at_rest(net, x) as still:
            for t in range(self.steps):
                gradient, *_ = input_gradient(still, point, cross_entropy(y))
                point = (point + (self.gamma * gradient - (point - x)) / math.sqrt(t + 1)).clamp(0, 1)

        def loss() -> Loss:
            logits = net(point)
            return Loss(self.cross_entropy(logits, y), logits)

        yield loss
