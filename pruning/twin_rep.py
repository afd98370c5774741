"""Twin-Rep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Method, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.masks import Masks, top_mask
from rprune.pruning.papers import ATTACK, EPS, Settings
from rprune.pruning.reinitialize import reinitialize
from rprune.pruning.reparametrised import Reparametrised
from rprune.seeds import derive


class TwinPruner(Reparametrised):
    """W = w v m: two dense factors, and a mask that is all ones until the epoch ``prune_at``."""

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        twins: tuple[dict[str, Tensor], dict[str, Tensor]],
        prune_at: int,
        allocation: str = "magnitude",
    ) -> None:
        super().__init__(model, budget)
        self.prune_at, self.allocation = prune_at, allocation
        self.pruned = False
        self._masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self._held.items()}
        for label, factors in zip("wv", twins, strict=True):
            self.learned |= {f"{label} {name}": factor.requires_grad_() for name, factor in factors.items()}
        self.refresh()

    def effective(self) -> dict[str, Tensor]:
        return {name: self.learned[f"w {name}"] * self.learned[f"v {name}"] * m for name, m in self._masks.items()}

    def current_masks(self) -> Masks:
        return self._masks

    def before_epoch(self, epoch: int) -> None:
        if epoch == self.prune_at and not self.pruned:
            self._masks, self.pruned = self.masks(), True
            self.refresh()

    def within_budget(self) -> bool:
        return self.pruned

    def masks(self) -> Masks:
        if self.pruned:
            return self._masks
        products = {name: weight.detach() for name, weight in self.effective().items()}
        counts = allocate(self.allocation, products, self.budget)
        return {name: top_mask(product.abs(), counts[name]) for name, product in products.items()}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"masks": dict(self._masks), "pruned": self.pruned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._masks = {name: mask.to(self._held[name].device) for name, mask in state["masks"].items()}
        self.pruned = state["pruned"]
        super().load_state_dict(state)


@METHODS.register("twin-rep")
@dataclass(frozen=True, kw_only=True)
class TwinRep(Method):
    """Train every weight as a product of two factors and prune once, early on (Li et al., AAAI 2023, unstructured).

    Weight decay on both factors is an implicit pull to sparsity. ``prune_at`` of the stage (the authors' epoch 10 of
    100) the largest |w v| stay and the mask rests from then on; the model holds the folded product throughout.
    ``allocation`` magnitude ranks all layers together, as the authors do; at 99.9 % that can leave wide layers at their
    floor, and erk or lamp do not. Unlike in their code the budget is exact. Both factors are drawn as the model's
    weights are; without ``reinitialize`` each begins as the square root of the given weight's magnitude. Their recipe:
    TRADES, SGD lr 0.1, weight decay 2e-4. Costs a training step, and the weights' memory twice.
    """

    epochs: ClassVar[int] = 100
    paper: ClassVar[str] = "Li et al., AAAI 2023"
    learns: ClassVar[str] = "two factors of each weight"
    cost: ClassVar[str] = "a training step"
    paper_settings: ClassVar[Settings] = {
        "threat": EPS,
        "prune": {
            "objective": {"name": "trades", "attack": ATTACK},
            "weight_decay": 2e-4,
            "schedule": "piecewise:0.7,0.85",
        },
    }

    prune_at: Annotated[float, Field(ge=0, lt=1)] = 0.1
    allocation: str = "magnitude"
    reinitialize: bool = True

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        if self.reinitialize:
            reinitialize(model, derive(context.seed, "twin"))
            twin = _copy(model)
            reinitialize(model, context.seed)
            twins = _copy(model), twin
        else:
            roots = {name: weight.abs().sqrt() for name, weight in _copy(model).items()}
            twins = {name: weight.sign() * roots[name] for name, weight in _copy(model).items()}, roots
        at = max(1, round(self.prune_at * context.epochs))
        at = min(at, max(0, context.epochs - 1))  # the last epoch has the mask
        return TwinPruner(model, budget, twins, at, self.allocation)

    def takes_costs(self) -> bool:
        return True


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in prunable(model).items()}
