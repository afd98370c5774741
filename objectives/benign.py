"""Training without an adversary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from rprune.attacks.noise import Noise
from rprune.objectives.base import OBJECTIVES, Loss, Objective


@OBJECTIVES.register("benign")
@dataclass(frozen=True, kw_only=True)
class Benign(Objective):
    """Cross-entropy on clean images."""

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Noise) -> Iterator[Loss]:  # noqa: ARG002
        logits = net(x)
        yield Loss(nn.functional.cross_entropy(logits, y), logits)
