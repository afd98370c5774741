"""Single-step adversarial training: FGSM from a random start, and from noise that is not clipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.base import at_rest, cross_entropy, input_gradient
from rprune.attacks.noise import Stream
from rprune.attacks.norms import random_in_ball, steepest
from rprune.attacks.pgd import PGD
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step
from rprune.objectives.pgd_at import PGDAT
from rprune.threat import ThreatModel


@OBJECTIVES.register("fast-at")
@dataclass(frozen=True, kw_only=True)
class FastAT(PGDAT):
    """CE(z(x'), y) at one FGSM step x' from a random start (Wong et al., ICLR 2020, algorithm 3).

    PGD-AT with one step of 1.25 eps, the paper's, from a uniform point of the ball. Its known failure, a net that
    single steps cannot fool and PGD can, shows in validation, which attacks with 10 steps.
    """

    paper: ClassVar[str] = "Wong et al., ICLR 2020"
    cost: ClassVar[str] = "2 forwards and backwards"

    attack: PGD = PGD(steps=1, step=1.25)
    validation_attack: PGD = PGD(steps=10)


@OBJECTIVES.register("n-fgsm")
@dataclass(frozen=True, kw_only=True)
class NFGSM(Objective):
    """CE(z(x'), y) at one FGSM step x' from noise that is not clipped (N-FGSM; de Jorge et al., NeurIPS 2022).

    x' = x + n + eps sign(gradient at x + n), n uniform in the ball of k eps. k 2 and the step of eps are the authors'.
    x + n and x' are clamped to [0, 1] only, so x' may be (k + 1) eps away from x. In l2, which the paper does not
    treat, the step is eps times the unit gradient. Validation attacks with PGD inside the ball.
    """

    paper: ClassVar[str] = "de Jorge et al., NeurIPS 2022"
    cost: ClassVar[str] = "2 forwards and backwards"

    threat: ThreatModel
    k: Annotated[float, Field(ge=0)] = 2.0
    step: Annotated[float, Field(gt=0)] = 1.0
    validation_attack: PGD = PGD(steps=10)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:  # noqa: ARG002
        norm, eps = self.threat.norm, self.threat.eps
        unit = noise.uniform(x, "n-fgsm")
        normal = noise.normal(x, "n-fgsm") if norm == "l2" else unit
        start = (x + self.k * eps * random_in_ball(unit, normal, norm)).clamp(0, 1)
        with at_rest(net, x) as still:
            gradient, *_ = input_gradient(still, start, cross_entropy(y))
        point = (start + self.step * eps * steepest(gradient, norm)).clamp(0, 1)

        def loss() -> Loss:
            logits = net(point)
            return Loss(self.cross_entropy(logits, y), logits)

        yield loss
