"""Least weight magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Fixed, Method, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.masks import top_mask


@METHODS.register("lwm")
@dataclass(frozen=True, kw_only=True)
class LWM(Method):
    """Keep the weights of largest magnitude, in one shot (Han et al., NeurIPS 2015, section 3).

    The baseline of HYDRA and HARP. ``allocation``: uniform, as those papers' baseline. Learns nothing; costs one
    selection.
    """

    epochs: ClassVar[int] = 0
    paper: ClassVar[str] = "Han et al., NeurIPS 2015"
    cost: ClassVar[str] = "1 selection"

    allocation: str = "uniform"

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:  # noqa: ARG002
        weights = prunable(model)
        counts = allocate(self.allocation, weights, budget)
        return Fixed(model, {name: top_mask(weight.abs(), counts[name]) for name, weight in weights.items()})
