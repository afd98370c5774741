"""Flying Bird."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Method, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.masks import random_masks
from rprune.pruning.papers import Settings
from rprune.pruning.reinitialize import reinitialize
from rprune.pruning.rigl import Growth, Rewiring, Schedule


@METHODS.register("flying-bird")
@dataclass(frozen=True, kw_only=True)
class FlyingBird(Method):
    """Adversarial training of a sparse net that rewires itself (Chen et al., ICLR 2022, section 3.2).

    RigL's scheme under a robust objective: half of each layer's weights move, by a cosine, every 900 steps; the shares
    of the layers come from IGQ (all figures are the authors' code's). ``growth``: "gradient", the paper's, or "random",
    which the authors' command line defaults to. Momentum is masked. Flying Bird+, whose density floats with validation
    figures, is not built: it has no budget. Costs a training step.
    """

    epochs: ClassVar[int] = 200
    paper: ClassVar[str] = "Chen et al., ICLR 2022"
    learns: ClassVar[str] = "weights, mask"
    cost: ClassVar[str] = "a training step"
    paper_settings: ClassVar[Settings] = {
        "threat": {"norm": "linf", "eps": "8/255"},
        "prune": {"objective": "pgd-at", "weight_decay": 5e-4, "schedule": "piecewise:0.5,0.75"},
    }

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    every: Annotated[int, Field(ge=1)] = 900
    growth: Growth = "gradient"
    allocation: str = "igq"
    reinitialize: bool = True

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        if self.reinitialize:
            reinitialize(model, context.seed)
        counts = allocate(self.allocation, prunable(model), budget)
        schedule = Schedule.of(context, self.every, self.share, 1.0)
        return Rewiring(
            model, random_masks(prunable(model), counts, context.seed), schedule, self.growth, False, context.seed
        )

    def takes_costs(self) -> bool:
        return True
