"""Stability training, for randomized smoothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.noise import Stream
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step
from rprune.objectives.trades import kl


@OBJECTIVES.register("stability")
@dataclass(frozen=True, kw_only=True)
class Stability(Objective):
    """CE(z(x), y) + beta KL(p(x) || p(x + n)), n ~ N(0, sigma^2 I) (Carmon et al., NeurIPS 2019).

    Stability training (Zheng et al., CVPR 2016) in the form in which HYDRA prunes for randomized smoothing; beta 6 and
    sigma 0.25 are both papers'. Carmon et al. clamp x + n to [0, 1]; HYDRA does not, nor does certification, nor this.
    The gradient flows through p(x) and p(x + n). There is no attack, so validation counts clean accuracy.
    """

    paper: ClassVar[str] = "Carmon et al., NeurIPS 2019"
    cost: ClassVar[str] = "2 forwards and backwards"

    sigma: Annotated[float, Field(gt=0)] = 0.25
    beta: Annotated[float, Field(ge=0)] = 6.0

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:  # noqa: ARG002
        noisy = x + self.sigma * noise.normal(x, "stability")

        def loss() -> Loss:
            logits, disturbed = net(x), net(noisy)
            ce = self.cross_entropy(logits, y)
            divergence = kl(logits, disturbed).mean()
            return Loss(ce + self.beta * divergence, logits, {"ce": ce.detach(), "kl": divergence.detach()})

        yield loss
