"""Training on interval bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.certification.compat import Compat, hydra_box, hydra_threat
from rprune.certification.live import Bounds
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step
from rprune.threat import ThreatModel


def ramped(progress: float, ramp: float) -> float:
    """Linear from 0 to 1 over the first ``ramp`` of a stage, 1 from there on."""
    return 1.0 if progress >= ramp else progress / ramp


def bounded(
    net: nn.Module, x: Tensor, threat: ThreatModel, reached: float, compat: Compat | None, symbolic: bool = False
) -> Bounds:
    """Bounds over a ball of ``reached`` times eps, with CROWN's relaxation or ``symbolic`` intervals."""
    if compat == "hydra":
        threat = hydra_threat(threat)
    threat = threat.scaled(reached)
    pixels = hydra_box(x, threat, each=symbolic) if compat == "hydra" else None
    return Bounds(net, x, threat, "parallel" if symbolic else "crown", tighten=symbolic, pixels=pixels)


def certified(lower: Tensor) -> Tensor:
    """Share of the batch whose margins (b, k) to all other classes are above 0; they are 0 at the class itself."""
    return ((lower > 0).sum(1) == lower.shape[1] - 1).to(lower.dtype).mean()


@OBJECTIVES.register("ibp")
@dataclass(frozen=True, kw_only=True)
class IBP(Objective):
    """kappa CE(z(x), y) + (1 - kappa) CE(-m(x), y), m lower margins by intervals (Gowal et al., ICCV 2019).

    m_j bounds z_y - z_j over the ball, with this difference merged into the last layer. eps grows linearly from 0, and
    kappa falls from 1 to ``kappa``, over the first ``ramp`` of the stage; then both stay. kappa 0.5 is the paper's;
    ramp 0.5 is CTBench's (80 of 160 epochs), where the authors' code ramps for 10,000 of 60,000 steps after 2,000
    without bounds. ramp 0 is full eps throughout: to prune or fine-tune a model that is certified already.

    Bounds use batch norm's running statistics, the natural term those of the batch. Intervals enclose an l2 ball in the
    linf ball of the same radius, far more than an l2 threat asks. Validation attacks with PGD at the full eps; that
    score may be highest before the bounds hold, so take ``select = "last"``.
    """

    paper: ClassVar[str] = "Gowal et al., ICCV 2019"
    cost: ClassVar[str] = "3 forwards and backwards: one natural, two for centre and radius"

    threat: ThreatModel
    validation_attack: PGD = PGD(steps=10)
    kappa: Annotated[float, Field(ge=0, le=1)] = 0.5
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.5

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:  # noqa: ARG002
        reached = ramped(progress, self.ramp)
        kappa = 1 - reached * (1 - self.kappa)

        def loss() -> Loss:
            logits = net(x)
            natural = self.cross_entropy(logits, y)
            lower = Bounds(net, x, self.threat.scaled(reached)).interval_margins(y)
            robust = self.cross_entropy(-lower, y)
            parts = {"ce": natural.detach(), "ce_bound": robust.detach(), "certified": certified(lower)}
            return Loss(kappa * natural + (1 - kappa) * robust, logits, parts)

        yield loss
