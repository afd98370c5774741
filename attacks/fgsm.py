"""Fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rprune.attacks.base import ATTACKS, Attack, Loss, input_gradient
from rprune.attacks.noise import Noise
from rprune.attacks.norms import project, steepest
from rprune.threat import ThreatModel


@ATTACKS.register("fgsm")
@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One step of size eps from x itself (Goodfellow et al., ICLR 2015, section 4)."""

    def queries(self, classes: int = 10) -> int:  # noqa: ARG002
        return 2

    def perturb(self, net: nn.Module, x: Tensor, threat: ThreatModel, loss: Loss, noise: Noise) -> Tensor:  # noqa: ARG002
        gradient, *_ = input_gradient(net, x, loss)
        return project(x + threat.eps * steepest(gradient, threat.norm), x, threat)
