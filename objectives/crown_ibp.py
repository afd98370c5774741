"""Training on linear bounds that give way to interval bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.certification.compat import Compat
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step
from rprune.objectives.ibp import bounded, certified, ramped
from rprune.threat import ThreatModel


@OBJECTIVES.register("crown-ibp")
@dataclass(frozen=True, kw_only=True)
class CROWNIBP(Objective):
    """CE(-m(x), y), m = beta m_CROWN + (1 - beta) m_IBP the lower margins z_y - z_j (Zhang et al., ICLR 2020).

    eps grows linearly from 0 and beta falls from 1 to ``final_beta`` over the first ``ramp`` of the stage, so with
    final_beta 0 the rest is IBP. Defaults are HYDRA's: final_beta 0, no natural term, ramp 0.6 (60 of 100 epochs in its
    configuration, 120 of 200 in its script); it prunes and fine-tunes with ramp 0. HYDRA steps Adam at lr 0.001 with
    weight decay 1e-4. The authors use final_beta 1 for 2/255 on CIFAR-10; such a model is certified by CROWN-IBP, not
    by IBP. ``kappa`` adds the authors' natural term, kappa CE(z(x), y) + (1 - kappa) CE(-m(x), y), with kappa from 1 to
    the given value over the ramp.

    HYDRA trains for eps 0.007 where its paper says 2/255, and clamps the box to the batch's own range; here eps is the
    threat's and the box is [0, 1], unless ``compat`` is "hydra". The natural pass moves batch norm's running
    statistics, which the bounds use, and is logged. An l2 ball is bounded by the dual norm in m_CROWN and enclosed in
    the linf ball in m_IBP, so an l2 threat wants final_beta 1. Validation attacks with PGD; take ``select = "last"``,
    as HYDRA does.
    """

    paper: ClassVar[str] = "Zhang et al., ICLR 2020"
    cost: ClassVar[str] = "3 forwards, 2 backwards; on the ramp one more of each for every class"

    threat: ThreatModel
    validation_attack: PGD = PGD(steps=10)
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.6
    final_beta: Annotated[float, Field(ge=0, le=1)] = 0.0
    kappa: Annotated[float, Field(ge=0, le=1)] | None = None
    compat: Compat | None = None

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:  # noqa: ARG002
        reached = ramped(progress, self.ramp)
        beta = 1 - reached * (1 - self.final_beta)
        kappa = 0.0 if self.kappa is None else 1 - reached * (1 - self.kappa)

        def loss() -> Loss:
            logits = net(x)
            natural = self.cross_entropy(logits, y)
            bounds = bounded(net, x, self.threat, reached, self.compat)
            lower = bounds.interval_margins(y)
            if beta > 0:
                lower = beta * bounds.linear_margins(y) + (1 - beta) * lower
            robust = self.cross_entropy(-lower, y)
            value = robust if kappa == 0 else kappa * natural + (1 - kappa) * robust
            parts = {"ce": natural.detach(), "ce_bound": robust.detach(), "certified": certified(lower)}
            return Loss(value, logits, parts)

        yield loss
