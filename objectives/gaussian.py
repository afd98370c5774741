"""Gaussian augmentation, for randomized smoothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.noise import Stream
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step


@OBJECTIVES.register("gaussian")
@dataclass(frozen=True, kw_only=True)
class Gaussian(Objective):
    """CE(z(x + n), y), n ~ N(0, sigma^2 I) (Cohen et al., ICML 2019, section 3.3).

    sigma should be that of the certificate: 0.25, HYDRA's. The noisy image is not clamped to [0, 1], as it is not in
    certification. There is no attack, so validation counts clean accuracy.
    """

    paper: ClassVar[str] = "Cohen et al., ICML 2019"
    cost: ClassVar[str] = "1 forward, 1 backward"

    sigma: Annotated[float, Field(gt=0)] = 0.25

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:  # noqa: ARG002
        noisy = x + self.sigma * noise.normal(x, "gaussian")

        def loss() -> Loss:
            logits = net(noisy)
            return Loss(self.cross_entropy(logits, y), logits)

        yield loss
