"""Free adversarial training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.noise import Stream
from rprune.attacks.norms import into_ball, steepest
from rprune.attacks.pgd import PGD
from rprune.objectives.base import OBJECTIVES, Loss, Objective, Step
from rprune.threat import ThreatModel


@OBJECTIVES.register("free-at")
@dataclass(frozen=True, kw_only=True)
class FreeAT(Objective):
    """CE(z(x + d), y) in m steps a batch, whose own backward also moves d (Shafahi et al., NeurIPS 2019, algorithm 1).

    d <- clip(d + eps sign(gradient), -eps, eps), in l2 the unit gradient and the ball. d is carried from replay to
    replay and from batch to batch, and starts an epoch at 0; the images x + d are clamped to [0, 1]. 4 replays and the
    step of eps are HYDRA's ImageNet setting. An epoch makes m times the steps: the paper divides the epochs by m.

    There is no search in eval mode here: the gradient is that of the training step. Validation attacks with PGD.
    """

    paper: ClassVar[str] = "Shafahi et al., NeurIPS 2019"
    cost: ClassVar[str] = "replays forwards, backwards and optimizer steps"

    threat: ThreatModel
    replays: Annotated[int, Field(ge=1)] = 4
    validation_attack: PGD = PGD(steps=10)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:  # noqa: ARG002
        carried = noise.memory.get("free-at")
        if carried is None or len(carried) < len(x):
            carried = noise.memory["free-at"] = torch.zeros_like(x)
        delta = carried[: len(x)].clone().requires_grad_()  # a smaller last batch takes the first rows

        def loss() -> Loss:
            delta.grad = None  # a second call in the same step (AWP) replaces the gradient
            logits = net((x + delta).clamp(0, 1))
            return Loss(self.cross_entropy(logits, y), logits)

        for _ in range(self.replays):
            yield loss
            if delta.grad is not None:
                with torch.no_grad():
                    step = self.threat.eps * steepest(delta.grad, self.threat.norm)
                    delta.copy_(into_ball(delta + step, self.threat))
        carried[: len(x)] = delta.detach()
