"""HARP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Method, Pruner, straight_through
from rprune.pruning.budget import Budget, apportion
from rprune.pruning.hydra import ScorePruner
from rprune.pruning.initial_scores import InitialScores
from rprune.pruning.masks import Masks, top_mask
from rprune.pruning.papers import HARP, Settings
from rprune.pruning.parts import Channels, Resource
from rprune.pruning.rates import Rated, rate
from rprune.pruning.structure import ChannelRates, Structure, check_structure

PAPER_STEPS = 391  # steps an epoch on CIFAR-10 at batch 128, for which the paper's gamma step of 0.01 was chosen
PAPER_EPOCHS = 20


def hardware_loss(a: Float[Tensor, " l"], sizes: Float[Tensor, " l"], a_t: float) -> Float[Tensor, ""]:
    """max(sum N a / (a_t sum N) - 1, 0) (HARP eq. 2 in the differentiable form of its code)."""
    return ((sizes * a).sum() / (a_t * sizes.sum()) - 1).clamp_min(0)


class HarpPruner(Rated, ScorePruner):
    """Scores s as in HYDRA, and one r a layer that sets its kept share a."""

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        a_init: dict[str, float],
        gamma_step: float,
        initial: str = "scaled",
        seed: int = 0,
    ) -> None:
        self.budget = budget
        device = next(model.parameters()).device
        self._sizes = torch.tensor(list(budget.sizes.values()), dtype=torch.float32, device=device)
        self._dense = torch.tensor([name in budget.dense for name in budget.sizes], device=device)
        start = [a_init[name] for name in budget.sizes]
        super().__init__(model, start, budget.density, gamma_step, {}, initial, seed)

    def rates(self) -> Tensor:
        return torch.where(self._dense, 1.0, super().rates())

    def hardware_loss(self) -> Tensor:
        return hardware_loss(self.rates(), self._sizes, self.budget.density)

    def counts(self) -> dict[str, int]:
        # a diverged run has NaN here; the loop reports it once the epoch is over
        shares = rate(self.r.detach().double(), self.budget.density).nan_to_num(0.0).tolist()
        return {
            name: max(n - int((1 - a) * n), self.budget.least[name])
            for (name, n), a in zip(self.budget.sizes.items(), shares, strict=True)
        }

    def effective(self) -> dict[str, Tensor]:
        # broadcasting the rate over the layer makes dL/da the SUM of dL/dw_eff * w, as in the paper's code
        rates = straight_through(self.rates())
        return {
            name: w * (straight_through(self.scores[name].abs()) + rates[index])
            for index, (name, w) in enumerate(self.weights.items())
        }

    def masks(self) -> Masks:
        """The learned rates snapped to the exact budget by largest remainder."""
        counts = apportion(
            {n: a * size for (n, size), a in zip(self.budget.sizes.items(), self.rates().tolist(), strict=True)},
            self.budget,
        )
        return {name: top_mask(score.abs(), counts[name]) for name, score in self.scores.items()}

    def log(self) -> dict[str, float]:
        return super().log() | {"kept_share": sum(self.counts().values()) / self.budget.total}


@METHODS.register("harp")
@dataclass(frozen=True, kw_only=True)
class Harp(Method):
    """Learn a kept share for every layer together with the scores (Zhao and Wressnegger, ICLR 2023, eq. 2 to 7).

    L = L_robust + gamma L_hw. gamma grows by ``gamma_step`` an epoch until the target is first met, then rests. Paper:
    SGD lr 0.1, 20 epochs, ``initial_density`` 0.1 in every layer (None here), gamma_step 0.01. None scales that step
    by the ratio of optimizer steps between the paper's run on CIFAR-10 (20 epochs of 391) and this one: short runs
    would miss the target otherwise. The rates found are snapped to the exact budget, which the authors' code leaves
    open. ``structure`` filter or channel learns a score a channel and a rate for each group of tied channels, and
    ``resource`` says what sparsity is a share of (eq. 8 for FLOPs); there rates start at 1 and gamma_step is 0.02, as
    in the paper. That is the flat end of the sigmoid: 0.9 meets the target sooner where epochs are few. Costs a
    training step plus one selection a step.
    """

    paper: ClassVar[str] = "Zhao and Wressnegger, ICLR 2023"
    learns: ClassVar[str] = "scores, rates, batch norm"
    cost: ClassVar[str] = "a training step + 1 selection"
    paper_settings: ClassVar[Settings] = HARP
    structures: ClassVar[tuple[str, ...]] = ("weight", "filter", "channel")
    pruner: ClassVar[type[HarpPruner]] = HarpPruner
    channel_pruner: ClassVar[type[ChannelRates]] = ChannelRates

    gamma_step: Annotated[float, Field(gt=0)] | None = None
    initial_density: Annotated[float, Field(gt=0, le=1)] | None = None
    allocation: str = "uniform"
    initial_scores: InitialScores = "scaled"
    structure: Structure = "weight"
    resource: Resource = "weights"

    def __post_init__(self) -> None:
        check_structure(self.structure, self.resource, self.allocation)

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        if self.structure != "weight":
            channels = Channels(model, budget, context, self.resource, self.structure)
            gamma_step = self.gamma_step or 2 * scaled_gamma_step(context)
            density = self.initial_density or 1.0
            return self.channel_pruner(model, channels, density, gamma_step, self.initial_scores, context.seed)
        weights = prunable(model)
        kept = max(budget.kept, round((self.initial_density or 0.1) * budget.total))
        start = Budget(budget.sizes, kept, budget.floor, budget.dense)
        counts = allocate(self.allocation, weights, start)
        a_init = {name: counts[name] / size for name, size in budget.sizes.items()}
        gamma_step = self.gamma_step or scaled_gamma_step(context)
        return self.pruner(model, budget, a_init, gamma_step, self.initial_scores, context.seed)


def scaled_gamma_step(context: Context) -> float:
    """The paper's 0.01, times the ratio of optimizer steps between the paper's run and this one.

    Where few epochs are few steps, less is enough, and more drives rates to where their sigmoid has no gradient left.
    """
    here = max(1, context.steps_per_epoch) * max(1, context.epochs)
    return 0.01 * max(1.0, PAPER_STEPS * PAPER_EPOCHS / here)
