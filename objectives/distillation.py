"""Robust distillation, around any objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rprune.attacks.base import Attack
from rprune.attacks.noise import Stream
from rprune.objectives.base import Loss, Objective, Step
from rprune.objectives.trades import kl


@dataclass(frozen=True, kw_only=True, eq=False)
class Distilled(Objective):
    """(1 - weight) L + weight T^2 KL(teacher(x) || student), both at temperature T (ARD; Goldblum et al., AAAI 2020).

    The teacher sees the clean image. The student's logits are those that the wrapped objective yields: at the
    adversarial point for PGD-AT, at the clean one for TRADES, whose own term ties the adversarial one to it. ARD's
    temperature is 30 and its weight 1; 4 and 0.5 are ours. The teacher is in eval mode; it costs one forward a batch.
    """

    inner: Objective
    teacher: nn.Module
    weight: float = 0.5
    temperature: float = 4.0

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, progress: float, noise: Stream) -> Iterator[Step]:
        with torch.no_grad():
            target = self.teacher(x) / self.temperature
        for inner in self.inner(net, x, y, progress, noise):

            def loss(inner: Step = inner) -> Loss:
                found = inner()
                term = self.temperature**2 * kl(target, found.logits / self.temperature).mean()
                value = (1 - self.weight) * found.value + self.weight * term
                return Loss(value, found.logits, found.parts | {"distillation": term.detach()})

            yield loss

    @property
    def attack_used(self) -> Attack | None:
        return self.inner.attack_used
