"""DNR."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rprune.errors import UsageError
from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Method, Moving, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.masks import Masks, random_masks, top_mask
from rprune.pruning.papers import EPS, Settings
from rprune.pruning.reinitialize import reinitialize


def layer_shares(momentum: Mapping[str, Tensor], masks: Masks) -> dict[str, float]:
    """Mean |momentum| of a layer's kept weights, over the sum of these means (equal shares where all are 0)."""
    means = torch.stack([m.abs().mul(masks[name]).sum() / masks[name].sum() for name, m in momentum.items()]).double()
    total = means.sum()
    shares = means / total if total > 0 else torch.full_like(means, 1 / len(means))
    return dict(zip(momentum, shares.tolist(), strict=True))


def share_out(total: int, shares: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """``total`` in parts proportional to ``shares``, by largest remainder; what exceeds ``room`` goes to the others."""
    counts: dict[str, int] = {}
    wanted: dict[str, float] = {}
    left = dict(room)
    while left:
        scale = (total - sum(counts.values())) / sum(max(shares[name], 1e-12) for name in left)
        wanted = {name: max(shares[name], 1e-12) * scale for name in left}
        full = {name: left.pop(name) for name in wanted if wanted[name] >= left[name]}
        if not full:
            break
        counts |= full
    counts |= {name: math.floor(wanted[name]) for name in left}
    missing = total - sum(counts.values())
    for name in sorted(left, key=lambda name: counts[name] - wanted[name])[:missing]:
        counts[name] += 1
    return {name: counts[name] for name in room}


class RegrowPruner(Moving):
    """A mask that drops small weights and regrows where the momentum is large, between epochs."""

    def __init__(self, model: nn.Module, masks: Masks, budget: Budget, epochs: int, rate: float, rho: float) -> None:
        super().__init__(model, masks)
        self.budget, self.epochs, self.rate, self.rho = budget, epochs, rate, rho
        self._anchor: dict[str, Tensor] = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        super().attach(optimizer)
        if not optimizer.param_groups[0].get("momentum", True):
            raise UsageError("dnr regrows by momentum, the optimizer has none", "set momentum above 0")

    def penalty(self) -> Tensor | None:
        """rho/2 |w - z|^2, z the masked weights that the epoch began with."""
        if not self.rho or not self._anchor:
            return None
        return (
            self.rho / 2 * torch.stack([(w - self._anchor[n]).square().sum() for n, w in self._weights.items()]).sum()
        )

    def before_step(self) -> None:
        """Gradients stay dense: the momentum of weights that are out says where to grow."""

    def before_epoch(self, epoch: int) -> None:
        # At the start of an epoch, not the end of the one before: what is validated has been trained.
        if epoch:
            self._masks = self._rewired(self.rate * (1 - epoch / max(1, self.epochs)))
            self.refresh()
        if self.rho:
            self._anchor = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def _rewired(self, rate: float) -> Masks:
        momentum = {name: self._momentum(weight) for name, weight in self._weights.items()}
        held, room = {}, {}
        for name, weight in self._weights.items():
            mask = self._masks[name]
            kept = int(mask.sum())
            stay = max(kept - math.floor(rate * kept), self.budget.least[name])
            held[name] = top_mask(weight.detach().abs().masked_fill(~mask, -1.0), stay)
            room[name] = mask.numel() - stay
        freed = self.budget.kept - sum(self.budget.sizes[name] - room[name] for name in room)
        grown = share_out(freed, layer_shares(momentum, self._masks), room)
        return {n: m | top_mask(momentum[n].abs().masked_fill(m, -1.0), grown[n]) for n, m in held.items()}

    def _momentum(self, weight: Tensor) -> Tensor:
        assert self.optimizer is not None
        state: Mapping[str, Any] = self.optimizer.state.get(weight, {})
        found = state.get("momentum_buffer", state.get("exp_avg"))  # of SGD, of Adam
        return torch.zeros_like(weight) if found is None else found


@METHODS.register("dnr")
@dataclass(frozen=True, kw_only=True)
class DNR(Method):
    """Dynamic network rewiring: prune by magnitude, regrow by momentum, each epoch (Kundu et al., ASP-DAC 2021).

    Starts from a random mask of fresh weights. After each epoch every layer loses its ``rate`` of smallest weights,
    falling linearly from 0.5 to 0; the freed number is shared among layers by the mean |momentum| of their kept weights
    and grown where |momentum| is largest. The loss gains ``rho``/2 |w - z|^2, z the masked weights that the epoch
    began with (dynamic l2). The training code is not public: ``rate`` and growth are those of the sparse-momentum code
    that it builds on (Dettmers and Zettlemoyer, 2019), but the budget is exact, by largest remainder, where counts
    wobble there; rho is ours. ``allocation`` of the start: uniform as there; erk is kinder to the first layer at
    99.9 %. The paper's objective is the mean of a clean and an adversarial loss. Costs a training step.
    """

    epochs: ClassVar[int] = 200
    paper: ClassVar[str] = "Kundu et al., ASP-DAC 2021"
    learns: ClassVar[str] = "weights, mask"
    cost: ClassVar[str] = "a training step"
    paper_settings: ClassVar[Settings] = {
        "threat": EPS,
        "prune": {"objective": {"name": "pgd-at", "attack": {"steps": 7, "step": 0.01 / 0.031}}},
    }

    rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    rho: Annotated[float, Field(ge=0)] = 1e-4
    allocation: str = "uniform"
    reinitialize: bool = True

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        if self.reinitialize:
            reinitialize(model, context.seed)
        counts = allocate(self.allocation, prunable(model), budget)
        masks = random_masks(prunable(model), counts, context.seed)
        return RegrowPruner(model, masks, budget, context.epochs, self.rate, self.rho)
