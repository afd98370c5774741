"""HARP's rates: a learned kept share for each part of a network, and a penalty that grows until the target is met."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rprune.pruning.base import Scored

ALPHA = 0.1  # a_min = ALPHA * a_t (HARP, section 3.2; --alpha of its code)


def initial_r(a_init: float, a_t: float) -> float:
    """r such that rate(r) = a_init (HARP eq. 7), with the sigmoid held in [0.01, 0.99]."""
    a_min = ALPHA * a_t
    u = min(max((a_init - a_min) / (1 - a_min), 0.01), 0.99)
    return math.log(u / (1 - u))


def rate(r: Float[Tensor, ...], a_t: float) -> Float[Tensor, ...]:
    """Kept share a = a_min + (1 - a_min) sigmoid(r) of a layer (HARP's activation g)."""
    a_min = ALPHA * a_t
    return a_min + (1 - a_min) * torch.sigmoid(r)


class Rated(Scored):
    """Base of pruners that learn one r a layer, or a group of channels, beside the scores of another base."""

    def __init__(
        self, model: nn.Module, a_init: Sequence[float], a_t: float, gamma_step: float, *arguments: Any
    ) -> None:
        self.a_t = a_t
        self.gamma_step = gamma_step
        self.gamma = gamma_step
        self.frozen = False  # gamma stays from the first epoch that meets the target on
        device = next(model.parameters()).device
        start = [initial_r(a, a_t) for a in a_init]
        self.r = torch.tensor(start, dtype=torch.float32, device=device, requires_grad=True)
        super().__init__(model, *arguments)

    @abstractmethod
    def hardware_loss(self) -> Tensor:
        """How far the rates are above the target, as a share of it; 0 from there on."""

    def rates(self) -> Tensor:
        """Kept shares a, differentiable."""
        return rate(self.r, self.a_t)

    def parameters(self) -> Iterable[Tensor]:
        return [*super().parameters(), self.r]

    def penalty(self) -> Tensor | None:
        return self.gamma * self.hardware_loss()

    def before_epoch(self, epoch: int) -> None:
        if not self.frozen:
            self.gamma = self.gamma_step * (epoch + 1)

    def after_epoch(self, epoch: int) -> None:  # noqa: ARG002
        self.frozen = self.frozen or self.within_budget()

    def within_budget(self) -> bool:
        return round(float(self.hardware_loss().detach()), 4) == 0

    def log(self) -> dict[str, float]:
        return super().log() | {"gamma": self.gamma, "hardware_loss": float(self.hardware_loss().detach())}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"r": self.r.detach(), "gamma": self.gamma, "frozen": self.frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.r.copy_(state["r"])
        self.gamma, self.frozen = state["gamma"], state["frozen"]
        super().load_state_dict(state)
