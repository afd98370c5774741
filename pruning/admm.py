"""Robust-ADMM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Method, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.masks import Masks, impose, top_mask
from rprune.pruning.papers import Settings
from rprune.pruning.parts import Channels, Columns, Keep, Parts, Resource
from rprune.pruning.structure import check_structure

UPDATES = 10  # dual updates in the paper's ADMM stage: 200 epochs, one every 20
PAPER_STEPS = 200 * 391  # of that stage on CIFAR-10 at batch 128, for which rho was chosen


class AdmmPruner(Pruner):
    """Dense weights W, drawn to their sparse copies Z; U is the scaled dual."""

    def __init__(
        self, model: nn.Module, counts: dict[str, int], rho: float, rho_growth: float, every: int, epochs: int
    ) -> None:
        super().__init__(model)
        self.counts, self.rho, self.rho_growth, self.every, self.epochs = counts, rho, rho_growth, every, epochs
        self.epoch = 0
        self.weights = prunable(model)
        self.sparse = self.project({name: weight.detach() for name, weight in self.weights.items()})
        self.dual = {name: torch.zeros_like(weight) for name, weight in self.sparse.items()}

    def select(self, values: dict[str, Tensor]) -> Masks:
        """What a projection keeps."""
        return {name: top_mask(value.abs(), self.counts[name]) for name, value in values.items()}

    def project(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The nearest tensors within the budget."""
        masks = self.select(values)
        return {name: value.masked_fill(~masks[name], 0.0) for name, value in values.items()}

    def penalty(self) -> Tensor:
        gaps = [w - (self.sparse[name] - self.dual[name]) for name, w in self.weights.items()]
        total: Tensor = torch.stack([gap.square().sum() for gap in gaps]).sum()
        return self.rho / 2 * total

    def before_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if epoch and epoch % self.every == 0:
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """rho grows, Z <- the projection of W + U, U <- U + W - Z."""
        self.rho *= self.rho_growth
        moved = {name: weight.detach() + self.dual[name] for name, weight in self.weights.items()}
        self.sparse = self.project(moved)
        self.dual = {name: moved[name] - self.sparse[name] for name in moved}

    def within_budget(self) -> bool:
        return self.epoch >= self.epochs - 1  # dense epochs before the last one say nothing about the pruned net

    def masks(self) -> Masks:
        return self.select({name: weight.detach() for name, weight in self.weights.items()})

    def finish(self) -> Masks:
        masks = self.masks()
        impose(self.weights, masks)
        return masks

    def log(self) -> dict[str, float]:
        squares = {name: weight.detach().square() for name, weight in self.weights.items()}
        whole = sum(float(values.sum()) for values in squares.values())
        outside = sum(float(squares[name].masked_fill(mask, 0.0).sum()) for name, mask in self.masks().items())
        return {"rho": self.rho, "energy_outside": outside / whole}

    def state_dict(self) -> dict[str, Any]:
        return {"sparse": self.sparse, "dual": self.dual, "rho": self.rho, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.sparse:
            self.sparse[name] = state["sparse"][name].to(self.sparse[name])
            self.dual[name] = state["dual"][name].to(self.dual[name])
        self.rho, self.epoch = state["rho"], state["epoch"]


class StructuredAdmmPruner(AdmmPruner):
    """Z keeps the rows, columns or channel slices of the largest l2 norm, tied layers the same ones."""

    exact = False

    def __init__(self, model: nn.Module, parts: Parts, allocation: str, *settings: Any) -> None:
        self.parts = parts
        super().__init__(model, parts.allocate(allocation, parts.scores(parts.weights, power=2)), *settings)

    def best(self, values: dict[str, Tensor]) -> Keep:
        return self.parts.best(self.parts.scores(values, power=2), self.counts)

    def select(self, values: dict[str, Tensor]) -> Masks:
        return self.parts.own(self.best(values))

    def masks(self) -> Masks:
        """At the end a channel goes with all that makes it and reads it."""
        return self.parts.masks(self.best(self.weights))


@METHODS.register("robust-admm")
@dataclass(frozen=True, kw_only=True)
class RobustADMM(Method):
    """Draw the weights to a sparse copy while training them robustly (Ye et al., ICCV 2019).

    Adds rho/2 |W - Z + U|^2 to the loss; Z is the projection of W + U to the largest magnitudes, U the scaled dual.
    Both are updated every ``every`` epochs, after rho has grown by ``rho_growth``. Figures are the authors' code's: rho
    0.001 growing by 1.3, 200 epochs with an update every 20 (None keeps those 10 updates a stage), SGD lr 0.01. ``rho``
    None scales 0.001 by the ratio of steps between the paper's stage and this one: short stages would draw nothing
    otherwise. The released code differentiates through U, which multiplies the penalty's gradient by the number of
    updates + 1; here U is a constant. The last epoch counts; its weights are cut to the budget. ``structure``: weight
    is the paper's irregular; column, filter and (HARP's fork) channel project by l2 norms, ``resource`` says what
    sparsity is a share of then. Filters of layers that meet in a sum are projected as one, so that the net becomes
    smaller; columns make none smaller. Costs a training step and one pass over the weights.
    """

    epochs: ClassVar[int] = 200
    paper: ClassVar[str] = "Ye et al., ICCV 2019"
    learns: ClassVar[str] = "weights"
    cost: ClassVar[str] = "a training step + 1 pass over the weights"
    lr: ClassVar[float] = 0.01
    structures: ClassVar[tuple[str, ...]] = ("weight", "column", "filter", "channel")
    counted: ClassVar[tuple[str, ...]] = ("every",)
    paper_settings: ClassVar[Settings] = {
        "threat": {"norm": "linf", "eps": "8/255"},
        "train": {"objective": "pgd-at", "epochs": 200, "lr": 0.1, "weight_decay": 1e-4},
        "prune": {
            "method": {"rho": 0.001, "every": 20},
            "objective": "pgd-at",
            "lr": 0.01,
            "weight_decay": 1e-4,
            "schedule": "thirds:20",
        },
        "finetune": {
            "objective": "pgd-at",
            "epochs": 200,
            "lr": 0.01,
            "weight_decay": 1e-4,
            "schedule": "piecewise:0.4,0.75",
        },
    }

    rho: Annotated[float, Field(gt=0)] | None = None
    rho_growth: Annotated[float, Field(ge=1)] = 1.3
    every: Annotated[int, Field(ge=1)] | None = None
    allocation: str = "uniform"
    structure: Literal["weight", "column", "filter", "channel"] = "weight"
    resource: Resource = "weights"

    def __post_init__(self) -> None:
        check_structure(self.structure, self.resource, self.allocation)

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        every = self.every or max(1, context.epochs // UPDATES)
        steps = max(1, context.epochs * context.steps_per_epoch)
        rho = self.rho or 0.001 * max(1.0, PAPER_STEPS / steps)
        settings = (rho, self.rho_growth, every, context.epochs)
        if self.structure == "weight":
            return AdmmPruner(model, allocate(self.allocation, prunable(model), budget), *settings)
        parts: Parts = (
            Columns(model, budget, context, self.resource)
            if self.structure == "column"
            else Channels(model, budget, context, self.resource, self.structure)
        )
        return StructuredAdmmPruner(model, parts, self.allocation, *settings)

    def takes_costs(self) -> bool:
        return self.structure == "weight"
