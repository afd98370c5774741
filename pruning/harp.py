"""HARP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from rprune.errors import UsageError
from rprune.models.cost import positions
from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Method, Pruner, straight_through
from rprune.pruning.budget import Budget, apportion
from rprune.pruning.hydra import ScorePruner
from rprune.pruning.initial_scores import InitialScores
from rprune.pruning.masks import Masks, top_mask
from rprune.pruning.papers import HARP, Settings
from rprune.pruning.parts import Channels, Resource
from rprune.pruning.rates import ALPHA, Rated, initial_r, rate
from rprune.pruning.structure import ChannelRates, Structure, check_structure

PAPER_STEPS = 391  # steps an epoch on CIFAR-10 at batch 128, for which the paper's gamma step of 0.01 was chosen
PAPER_EPOCHS = 20
FIRST_STEP = 0.3  # of an r, before momentum; the paper's is below 0.1 up to a sparsity of 0.999


def hardware_loss(a: Float[Tensor, " l"], sizes: Float[Tensor, " l"], a_t: float) -> Float[Tensor, ""]:
    """max(sum N a / (a_t sum N) - 1, 0) (HARP eq. 2 in the differentiable form of its code).

    N are weights, or what all weights of a layer cost where the budget weighs them (eq. 8 for multiply-accumulates).
    """
    return ((sizes * a).sum() / (a_t * sizes.sum()) - 1).clamp_min(0)


def macs_per_weight(
    a: Float[Tensor, " l"], sizes: Float[Tensor, " l"], places: Float[Tensor, " l"]
) -> Float[Tensor, ""]:
    """(sum N P a / sum N a) / (sum N P / sum N): multiply-accumulates of a kept weight beside those of any weight.

    P are the positions that a layer's weights are applied at (``models.cost``). 1 where all shares are equal. It does
    not change when all shares grow by one factor, so it moves weights to cheaper layers and leaves their number alone.
    """
    kept = sizes * a
    return (kept * places).sum() / kept.sum() * (sizes.sum() / (sizes * places).sum())


class HarpPruner(Rated, ScorePruner):
    """Scores s as in HYDRA, and one r a layer that sets its kept share a.

    ``places``: positions by tensor name, for which ``macs_weight`` times :func:`macs_per_weight` joins the penalty.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        a_init: dict[str, float],
        gamma_step: float,
        initial: str = "scaled",
        seed: int = 0,
        macs_weight: float = 0.0,
        places: Mapping[str, int] | None = None,
    ) -> None:
        self.budget, self.macs_weight = budget, macs_weight
        device = next(model.parameters()).device
        sizes = [size * budget.cost(name) for name, size in budget.sizes.items()]
        self._sizes = torch.tensor(sizes, dtype=torch.float32, device=device)
        self._places = torch.tensor([(places or {}).get(n, 1) for n in budget.sizes], device=device).to(self._sizes)
        self._dense = torch.tensor([name in budget.dense for name in budget.sizes], device=device)
        start = [a_init[name] for name in budget.sizes]
        super().__init__(model, start, budget.density, gamma_step, {}, initial, seed)

    def rates(self) -> Tensor:
        return torch.where(self._dense, 1.0, super().rates())

    def hardware_loss(self) -> Tensor:
        return hardware_loss(self.rates(), self._sizes, self.budget.density)

    def penalty(self) -> Tensor:
        pressure = self.macs_weight * macs_per_weight(self.rates(), self._sizes, self._places)
        return self.gamma * (self.hardware_loss() + pressure)

    def counts(self) -> dict[str, int]:
        # a diverged run has NaN here; the loop reports it once the epoch is over
        shares = rate(self.r.detach().double(), self.budget.density).nan_to_num(0.0).tolist()
        return {
            name: max(n - int((1 - a) * n), self.budget.least[name])
            for (name, n), a in zip(self.budget.sizes.items(), shares, strict=True)
        }

    def effective(self) -> Iterator[tuple[str, Tensor]]:
        # broadcasting the rate over the layer makes dL/da the SUM of dL/dw_eff * w, as in the paper's code
        rates = straight_through(self.rates())
        return (
            (name, w * (straight_through(self.scores[name].abs()) + rates[index]))
            for index, (name, w) in enumerate(self.weights.items())
        )

    def masks(self) -> Masks:
        """The learned rates snapped to the exact budget by largest remainder."""
        counts = apportion(
            {n: a * size for (n, size), a in zip(self.budget.sizes.items(), self.rates().tolist(), strict=True)},
            self.budget,
        )
        return {name: top_mask(score.abs(), counts[name]) for name, score in self.scores.items()}

    def log(self) -> dict[str, float]:
        return super().log() | {"kept_share": self.budget.spent(self.counts()) / self.budget.total}


@METHODS.register("harp")
@dataclass(frozen=True, kw_only=True)
class Harp(Method):
    """Learn a kept share for every layer together with the scores (Zhao and Wressnegger, ICLR 2023, eq. 2 to 7).

    L = L_robust + gamma L_hw. gamma grows by ``gamma_step`` an epoch until the target is first met, then rests. Paper:
    SGD lr 0.1, 20 epochs, ``initial_density`` 0.1 in every layer (None here), gamma_step 0.01. None scales that step
    by the ratio of optimizer steps between the paper's run on CIFAR-10 (20 epochs of 391) and this one: short runs
    would miss the target otherwise. It stops where some r would move more than 0.3 in the first step: at 0.999 rates
    ran into the flat ends of their sigmoid within an epoch, and stayed there. The rates found are snapped to the exact
    budget, which the authors' code leaves open. ``structure`` filter or channel learns a score a channel and a rate for
    each group of tied channels, and ``resource`` says what sparsity is a share of (eq. 8 for FLOPs); there rates start
    at 1 and gamma_step is 0.02, as in the paper. That is the flat end of the sigmoid: 0.9 meets the target sooner where
    epochs are few.

    A budget in MACs puts N_l P_l in the place of N_l in L_hw, P_l the positions that the layer's weights are applied
    at. ``macs_weight`` (ours) keeps the budget of weights and presses for cheaper ones: gamma (L_hw + macs_weight M),
    M = (sum a N P / sum a N) / (sum N P / sum N), the multiply-accumulates of a kept weight beside those of any. 0 is
    the paper; at 1 a layer pays N_l (1 + (P_l - P) / P_dense) where it paid N_l, P the mean of kept weights. Costs a
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
    macs_weight: Annotated[float, Field(ge=0)] = 0.0

    def __post_init__(self) -> None:
        check_structure(self.structure, self.resource, self.allocation)
        if self.macs_weight and self.structure != "weight":
            raise UsageError("macs_weight moves single weights", "use resource flops for whole channels")

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        if self.structure != "weight":
            channels = Channels(model, budget, context, self.resource, self.structure)
            gamma_step = self.gamma_step or 2 * scaled_gamma_step(context)
            density = self.initial_density or 1.0
            return self.channel_pruner(model, channels, density, gamma_step, self.initial_scores, context.seed)
        weights, places = prunable(model), None
        if self.macs_weight:
            assert not budget.costs, "takes_costs() says so"
            places = positions(model, context.shape())
        kept = max(budget.kept, round((self.initial_density or 0.1) * budget.total))
        counts = allocate(self.allocation, weights, budget.inside(budget.sizes, kept))
        a_init = {name: counts[name] / size for name, size in budget.sizes.items()}
        gentle = FIRST_STEP / (context.lr * first_slope(a_init, budget))
        gamma_step = self.gamma_step or min(scaled_gamma_step(context), gentle)
        return self.pruner(
            model, budget, a_init, gamma_step, self.initial_scores, context.seed, self.macs_weight, places
        )

    def takes_costs(self) -> bool:
        return self.structure == "weight" and not self.macs_weight


def scaled_gamma_step(context: Context) -> float:
    """The paper's 0.01, times the ratio of optimizer steps between the paper's run and this one.

    Where few epochs are few steps, less is enough, and more drives rates to where their sigmoid has no gradient left.
    """
    here = max(1, context.steps_per_epoch) * max(1, context.epochs)
    return 0.01 * max(1.0, PAPER_STEPS * PAPER_EPOCHS / here)


def first_slope(a_init: Mapping[str, float], budget: Budget) -> float:
    """The largest dL_hw/dr, N (1 - a_min) sigmoid'(r) / (a_t sum N), of a layer whose rate starts at ``a_init``."""
    a_t = budget.density
    r = torch.tensor([initial_r(a, a_t) for name, a in a_init.items() if name not in budget.dense])
    sizes = torch.tensor([n * budget.cost(name) for name, n in budget.sizes.items() if name not in budget.dense])
    slope = (1 - ALPHA * a_t) * r.sigmoid() * (-r).sigmoid()
    return float((sizes * slope).max()) / (a_t * budget.total)
