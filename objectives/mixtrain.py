"""Training on symbolic bounds of a few images of each batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.certification.compat import Compat
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step
from rprune.objectives.ibp import bounded, ramped
from rprune.threat import ThreatModel


@OBJECTIVES.register("mixtrain")
@dataclass(frozen=True, kw_only=True)
class MixTrain(Objective):
    """CE(z(x), y) + w CE(-m(x'), y'), m the lower margins by symbolic intervals (Wang et al., arXiv 2018).

    In HYDRA's form: the second term is in a batch with probability ``alpha``, on ``samples`` of its images; eps grows
    linearly over the first ``ramp`` of the stage, and from there on w = 0.1 grows by 2.5 every ``period``, up to 50.
    alpha 0.8, 5 samples (CNN-small; 1 for CNN-large), ramp 10 and period 5 of 60 epochs are HYDRA's; it prunes and
    fine-tunes with ramp 0, and steps Adam at lr 0.001 with batches of 25 to 50.

    Differs from HYDRA's code: samples are drawn without replacement, eps moves at every step instead of every epoch,
    the box is [0, 1] instead of each image's own range (``compat`` "hydra" has its box, and its eps), and symbolic
    bounds are intersected with intervals. Batch norm is bounded by its running statistics. Validation attacks with PGD;
    take ``select = "last"``.

    Memory and time grow with samples x (neurons of a layer) x (neurons of the layer below): for small nets.
    """

    paper: ClassVar[str] = "Wang et al., arXiv 2018"
    cost: ClassVar[str] = "1 forward and backward; for each sample one more for every unstable neuron"

    threat: ThreatModel
    validation_attack: PGD = PGD(steps=10)
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.8
    samples: Annotated[int, Field(ge=1)] = 5
    ramp: Annotated[float, Field(ge=0, le=1)] = 1 / 6
    period: Annotated[float, Field(gt=0)] = 1 / 12
    compat: Compat | None = None

    def weight(self, progress: float) -> float:
        """w at a point of the stage."""
        rises = math.floor(max(progress - self.ramp, 0) / self.period + 1e-9)  # 1/4 is a whole period after 1/6
        return min(0.1 * 2.5 ** min(rises, 100), 50.0)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:
        reached = ramped(progress, self.ramp)
        # waits for the device once a batch: otherwise every batch would pay for bounds
        mixed = float(noise.uniform(x.new_empty(1), "mixtrain/batch")) < 2 * self.alpha - 1
        chosen = noise.uniform(x.new_empty(len(x)), "mixtrain/samples").argsort()[: self.samples]

        def loss() -> Loss:
            logits = net(x)
            natural = self.cross_entropy(logits, y)
            if not mixed:
                return Loss(natural, logits, {"ce": natural.detach()})
            bounds = bounded(net, x[chosen], self.threat, reached, self.compat, symbolic=True)
            lower = bounds.linear_margins(y[chosen])
            bound = self.weight(progress) * self.cross_entropy(-lower, y[chosen])
            return Loss(natural + bound, logits, {"ce": natural.detach(), "bound": bound.detach()})

        yield loss
