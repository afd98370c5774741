"""Training without an adversary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from rprune.attacks.noise import Stream
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step


@OBJECTIVES.register("benign")
@dataclass(frozen=True, kw_only=True)
class Benign(Objective):
    """Cross-entropy on clean images."""

    cost: ClassVar[str] = "1 forward, 1 backward"

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:  # noqa: ARG002
        def loss() -> Loss:
            logits = net(x)
            return Loss(self.cross_entropy(logits, y), logits)

        yield loss
