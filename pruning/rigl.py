"""RigL, and what methods that rewire a sparse net share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Method, Moving, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.masks import Masks, enliven, random_masks, top_mask
from rprune.pruning.papers import Settings
from rprune.pruning.reinitialize import reinitialize
from rprune.seeds import derive

Growth = Literal["gradient", "random"]


@dataclass(frozen=True)
class Schedule:
    """When to rewire, and which share of a layer: share/2 (1 + cos(pi t / end)), every ``every`` steps to ``end``."""

    every: int
    share: float
    end: int

    @classmethod
    def of(cls, context: Context, every: int, share: float, end: float) -> Schedule:
        """``end`` is a share of the stage. A short stage rewires more often, so that 30 times fit."""
        steps = max(1, context.epochs * context.steps_per_epoch)
        return cls(max(1, min(every, steps // 30)), share, max(1, round(end * steps)))

    def at(self, step: int) -> float:
        """The share that moves after this step (from 0); 0 where nothing moves."""
        if step == 0 or step % self.every or step >= self.end:
            return 0.0
        return cosine_share(self.share, step, self.end)


def cosine_share(share: float, step: int, end: int) -> float:
    """The share of a layer's weights that moves at this step (Evci et al., ICML 2020, section 3)."""
    return share / 2 * (1 + math.cos(math.pi * step / end))


def rewire(weight: Tensor, mask: Tensor, growth: Tensor, kept: int, share: float) -> Tensor:
    """A new mask: drops the ``share`` smallest kept magnitudes, adds as many of the largest ``growth`` among the rest.

    A weight that is dropped may come back at once. ``mask`` has exactly ``kept`` entries, and so has the new one.
    """
    moving = min(math.floor(share * kept + 1e-9), weight.numel() - kept)
    magnitude = torch.where(mask, weight.detach().abs(), -1.0)
    held = top_mask(magnitude, kept - moving)
    return held | top_mask(torch.where(held, -1.0, growth.abs()), moving)


class Rewiring(Moving):
    """A mask of fixed layer counts whose weakest members make way for promising ones."""

    def __init__(
        self, model: nn.Module, masks: Masks, schedule: Schedule, growth: Growth, replaces_step: bool, seed: int
    ) -> None:
        super().__init__(model, masks)
        self.schedule, self.growth, self.replaces_step, self.seed = schedule, growth, replaces_step, seed
        self.kept = {name: int(mask.sum()) for name, mask in masks.items()}
        self.step = 0
        self.moved = 0
        self._gradients: dict[str, Tensor] = {}

    def before_step(self) -> None:
        if self.schedule.at(self.step):
            # of all entries: the model is plain, so its weights' gradients are dense
            self._gradients = {n: w.grad.detach().clone() for n, w in self._weights.items() if w.grad is not None}
            if self.replaces_step:
                for parameter in self.parameters():
                    parameter.grad = None
                return
        super().before_step()

    def after_step(self) -> None:
        share = self.schedule.at(self.step)
        if share:
            self._rewire(share)
        self.step += 1
        super().after_step()

    def _rewire(self, share: float) -> None:
        generator = torch.Generator().manual_seed(derive(self.seed, "growth", self.step))
        for name, weight in self._weights.items():
            growth = self._gradients.get(name, torch.zeros_like(weight))
            if self.growth == "random":
                growth = torch.rand(weight.shape, generator=generator).to(weight.device)
            old = self._masks[name]
            new = rewire(weight, old, growth, self.kept[name], share)
            with torch.no_grad():
                weight.masked_fill_(new & ~old, 0.0)
                self._forget(weight, new ^ old)
            self._masks[name] = new
        self._gradients = {}

    def _forget(self, weight: Tensor, changed: Tensor) -> None:
        """Momentum of weights that come or go starts at 0."""
        state: Mapping[str, Any] = {} if self.optimizer is None else self.optimizer.state.get(weight, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(changed, 0.0)

    def finish(self) -> Masks:
        enliven(self._weights, self._masks)
        return self._masks

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        super().load_state_dict(state)


@METHODS.register("rigl")
@dataclass(frozen=True, kw_only=True)
class RigL(Method):
    """Train a sparse net whose connections move to where the gradient is large (Evci et al., ICML 2020, Algorithm 1).

    Starts from a random mask (``allocation``: erk, the paper's best) and fresh weights. Every ``every`` steps until
    ``end`` of the stage, each layer drops its ``share`` of smallest weights, falling by a cosine, and grows as many
    where the dense gradient of the training objective is largest; such an update replaces the gradient step. 100, 0.3
    and 3/4 are the paper's; stages of fewer than 3,000 steps rewire more often. Costs a training step.
    """

    epochs: ClassVar[int] = 200
    paper: ClassVar[str] = "Evci et al., ICML 2020"
    learns: ClassVar[str] = "weights, mask"
    cost: ClassVar[str] = "a training step"
    paper_settings: ClassVar[Settings] = {
        "prune": {"objective": "benign", "epochs": 250, "weight_decay": 5e-4, "schedule": "piecewise:0.3,0.6,0.9"}
    }

    share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    every: Annotated[int, Field(ge=1)] = 100
    end: Annotated[float, Field(gt=0, le=1)] = 0.75
    allocation: str = "erk"
    reinitialize: bool = True

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        if self.reinitialize:
            reinitialize(model, context.seed)
        counts = allocate(self.allocation, prunable(model), budget)
        schedule = Schedule.of(context, self.every, self.share, self.end)
        return Rewiring(
            model, random_masks(prunable(model), counts, context.seed), schedule, "gradient", True, context.seed
        )

    def takes_costs(self) -> bool:
        return True
