"""A random mask from the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Fixed, Method, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.masks import random_masks
from rprune.pruning.papers import HYDRA, Settings
from rprune.pruning.reinitialize import reinitialize, scale_to_density


@METHODS.register("scratch")
@dataclass(frozen=True, kw_only=True)
class Scratch(Method):
    """Train a random sparse net from fresh weights: the baseline of no search at all (Sehwag et al., NeurIPS 2020).

    "Scratch" in Table 1 there, whose pretraining of 100 epochs at lr 0.1 is the default here. The mask is drawn once,
    the same kept share in each layer (``allocation``), and held. ``reinitialize`` false keeps the weights that are
    given. ``scale_init`` divides them by the square root of their layer's kept share, for nets without batch norm
    (scale_rand_init of HYDRA's code, which does it twice). Costs a training step.
    """

    epochs: ClassVar[int] = 100
    paper: ClassVar[str] = "Sehwag et al., NeurIPS 2020"
    learns: ClassVar[str] = "weights"
    cost: ClassVar[str] = "a training step"
    paper_settings: ClassVar[Settings] = HYDRA

    allocation: str = "uniform"
    reinitialize: bool = True
    scale_init: bool = False

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        if self.reinitialize:
            reinitialize(model, context.seed)
        counts = allocate(self.allocation, prunable(model), budget)
        if self.scale_init:
            scale_to_density(model, counts)
        return Fixed(model, random_masks(prunable(model), counts, context.seed))

    def takes_costs(self) -> bool:
        return True
