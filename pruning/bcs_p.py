"""BCS-P."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor, nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate, global_top
from rprune.pruning.base import METHODS, Context, Method, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.masks import Masks, count, random_masks, top_mask
from rprune.pruning.papers import Settings
from rprune.pruning.reinitialize import reinitialize
from rprune.pruning.reparametrised import Reparametrised
from rprune.seeds import derive

BORN = 1e-12  # theta of a new connection, in the authors' code
DRAWS = 2**16  # places tried for new connections in a step; those that are taken already are passed over
# Kept share at the start by where a layer is, in the authors' code; half the global density elsewhere.
ENDS = 0.6
STARTS = {"layer1.": 0.2, "block1.": 0.1, "features.3.": 0.6, "features.7.": 0.2, "features.10.": 0.2}


def paper_counts(sizes: Mapping[str, int], density: float) -> dict[str, int]:
    """Connections at the start in the authors' code for VGG16, ResNets and wide ResNets; may be far off the budget."""
    names = list(sizes)
    shares = {n: next((s for part, s in STARTS.items() if f".{part}" in f".{n}"), density / 2) for n in names}
    shares |= {names[0]: ENDS, names[-1]: ENDS}
    return {name: max(1, int(shares[name] * size)) for name, size in sizes.items()}


class ConnectivityPruner(Reparametrised):
    """W = sign max(theta, 0): a weight whose theta crosses zero is disconnected, and another takes its place."""

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        connected: Masks,
        refill: Mapping[str, int],
        noise: float,
        reset_momentum: bool,
        seed: int,
    ) -> None:
        super().__init__(model, budget)
        self.noise, self.reset_momentum, self.seed = noise, reset_momentum, seed
        device = next(model.parameters()).device
        self._generator = torch.Generator(device)
        weights = {name: weight.detach() for name, weight in self._held.items()}
        self.signs = {name: torch.where(w < 0, -1.0, 1.0).to(w.dtype) for name, w in weights.items()}
        for name, w in weights.items():
            self.learned[name] = w.abs().masked_fill(~connected[name], 0.0).requires_grad_()
        sizes = list(budget.sizes.values())
        self._sizes = torch.tensor(sizes, device=device)
        self._offsets = self._sizes.cumsum(0) - self._sizes
        shares = [1e-12 if name in budget.dense else float(refill[name]) for name in budget.sizes]
        self._refill = torch.tensor(shares, device=device)
        self._connected = self.current_masks()
        self.refresh()

    def effective(self) -> dict[str, Tensor]:
        dense = self.budget.dense
        return {n: self.signs[n] * (theta if n in dense else theta.relu()) for n, theta in self.learned.items()}

    def current_masks(self) -> Masks:
        dense = self.budget.dense
        return {n: torch.full_like(t, n in dense, dtype=torch.bool) | (t > 0) for n, t in self.learned.items()}

    def before_epoch(self, epoch: int) -> None:
        self._generator.manual_seed(derive(self.seed, "connectivity", epoch))

    def after_step(self) -> None:
        assert self.optimizer is not None
        scale = self.noise * self.optimizer.param_groups[0]["lr"]
        with torch.no_grad():
            for name, theta in self.learned.items():
                drawn = torch.randn(theta.shape, generator=self._generator, device=theta.device, dtype=theta.dtype)
                theta.add_(drawn.mul_(self._connected[name]), alpha=scale)
            alive = self.current_masks()
            if self.reset_momentum:
                self._forget(alive)
            for name, born in self._born(alive).items():
                self.learned[name].masked_fill_(born, BORN)
        self._connected = self.current_masks()
        super().after_step()

    def _forget(self, alive: Masks) -> None:
        """Momentum of what has died ends, so that what is born here later has none."""
        assert self.optimizer is not None
        for name, theta in self.learned.items():
            for value in self.optimizer.state.get(theta, {}).values():
                if isinstance(value, Tensor) and value.shape == theta.shape:
                    value.masked_fill_(~alive[name], 0.0)

    def _born(self, alive: Masks) -> Masks:
        """As many new connections as are missing to the budget: layers by ``refill``, places at random.

        Without a wait for the device: the number missing is known there alone, so more places are drawn than needed,
        and the first free ones taken. What a step could not place the next one does.
        """
        taken = torch.cat([mask.flatten() for mask in alive.values()])
        missing = self.budget.kept - taken.sum()
        layer = torch.multinomial(self._refill, DRAWS, replacement=True, generator=self._generator)
        where = torch.rand(DRAWS, generator=self._generator, device=taken.device, dtype=torch.float64)
        places = self._offsets[layer] + (where * self._sizes[layer]).long()
        free = ~taken[places] & first_occurrence(places)
        chosen = free & (free.cumsum(0) <= missing)
        born = taken.new_zeros(len(taken) + 1)
        born[torch.where(chosen, places, len(taken))] = True
        parts = torch.split(born[:-1], list(self.budget.sizes.values()))
        return {name: part.view_as(alive[name]) for name, part in zip(alive, parts, strict=True)}

    def within_budget(self) -> bool:
        """False while more are connected than the budget has: nothing but training removes a surplus."""
        return count(self._connected) <= self.budget.kept  # of the net in training, also where an average is judged

    def masks(self) -> Masks:
        """The largest theta, every layer's floor included: what is connected, where that is the budget."""
        counts = global_top(self.learned, self.budget)
        return {name: top_mask(theta, counts[name]) for name, theta in self.learned.items()}

    def finish(self) -> Masks:
        masks = self.masks()
        with torch.no_grad():
            for name, mask in masks.items():
                if name not in self.budget.dense:
                    self.learned[name].masked_fill_(mask & (self.learned[name] <= 0), BORN).masked_fill_(~mask, 0.0)
        self.write(masks)
        return masks

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._connected = self.current_masks()


def first_occurrence(values: Tensor) -> Bool[Tensor, " n"]:
    """True where a value of a vector is met for the first time."""
    ordered, order = values.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(new).scatter_(0, order, new)


@METHODS.register("bcs-p")
@dataclass(frozen=True, kw_only=True)
class BCSP(Method):
    """Train connections of fixed sign and resample those that cross zero (Ozdenizci and Legenstein, ICML 2021).

    Bayesian connectivity sampling, sparse from the first step on: a weight is sign max(theta, 0) with a fixed random
    sign, theta drawn He-normal. After each SGD step connected theta get lr N(0, ``noise``^2), and random disconnected
    ones at 1e-12 fill up the budget. Paper: SGD lr 0.1, divided by 10 at 1/2 and 3/4 of 200 epochs, weight decay 5e-4
    (decoupled and not scaled by lr in the code), noise 1e-6.

    The code fixes the densities of the start by layer (``start`` "paper": 3.5 times the budget of ResNet-18 at 99.9 %,
    and nothing removes a surplus) and refills layers by their size (``refill`` "size"), which leaves the first layer of
    VGG16 under two weights there. The defaults start and refill by ``allocation``, on the budget. ``reset_momentum``
    clears the momentum of dead connections; the code keeps it, so that the newly born often die at once (False).
    Without ``reinitialize`` the largest given weights are connected. Costs a training step.
    """

    epochs: ClassVar[int] = 200
    paper: ClassVar[str] = "Ozdenizci and Legenstein, ICML 2021"
    learns: ClassVar[str] = "connection strengths"
    cost: ClassVar[str] = "a training step"
    paper_settings: ClassVar[Settings] = {
        "threat": {"norm": "linf", "eps": "8/255"},
        "prune": {
            "method": {"start": "paper", "refill": "size", "reset_momentum": False},
            "objective": "pgd-at",
            "weight_decay": 5e-4,
            "schedule": "piecewise:0.5,0.75",
        },
    }

    allocation: str = "erk"
    start: Literal["allocation", "paper"] = "allocation"
    refill: Literal["allocation", "size"] = "allocation"
    noise: Annotated[float, Field(ge=0)] = 1e-6
    reset_momentum: bool = True
    reinitialize: bool = True

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        if self.reinitialize:
            reinitialize(model, context.seed)
            draw_he_normal(model, context.seed)
        weights = prunable(model)
        counts = allocate(self.allocation, weights, budget)
        refill = counts if self.refill == "allocation" else budget.sizes
        if self.start == "paper":
            counts = paper_counts(budget.sizes, budget.density) | {n: budget.sizes[n] for n in budget.dense}
        if self.reinitialize:
            connected = random_masks(prunable(model), counts, context.seed)
        else:
            connected = {name: top_mask(weight.abs(), counts[name]) for name, weight in weights.items()}
        return ConnectivityPruner(model, budget, connected, refill, self.noise, self.reset_momentum, context.seed)


def draw_he_normal(model: nn.Module, seed: int) -> None:
    """N(0, 2 / fan_in) for every prunable weight, in place (He et al., ICCV 2015)."""
    generator = torch.Generator().manual_seed(derive(seed, "he normal"))
    for weight in prunable(model).values():
        with torch.no_grad():
            drawn = torch.randn(weight.shape, generator=generator) * (2 / weight[0].numel()) ** 0.5
            weight.copy_(drawn)
