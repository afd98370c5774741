"""What structured pruning removes: channels and columns in groups, their cost, and how many of them fit a budget."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from rprune.errors import InputError, UsageError
from rprune.models.channels import channel_groups
from rprune.models.cost import LayerCost, layer_costs
from rprune.models.graph import trace
from rprune.models.prunable import prunable
from rprune.pruning.allocation import lamp_scores
from rprune.pruning.base import Context
from rprune.pruning.budget import Budget
from rprune.pruning.masks import Masks, top_mask

Resource: TypeAlias = Literal["weights", "flops"]
"""What sparsity is a share of; FLOPs are HARP's (``models.cost``)."""

ALLOCATIONS = ("uniform", "magnitude", "lamp")

Kept = dict[str, int]
"""Name of a group -> how many of its parts stay."""

Keep = Mapping[str, Tensor]
"""Name of a group -> bool (parts,), True for those that stay."""


class Axis(NamedTuple):
    """One side of a layer: the group that it is cut with, None for none, and its size for each part that is kept."""

    group: str | None
    size: int


class Parts(ABC):
    """Parts of a model that can be removed, in groups, and what the model costs without some of them.

    A budget's sparsity is a share of the resource. What is kept is the most that does not exceed it when parts are
    taken in the order of the allocation, and at least one part of each group: enough for the budget's floor where that
    is above one weight (its square root on both sides of a layer that is cut on both). Layers that are to stay dense
    keep all their parts.
    """

    sizes: Kept
    """Groups in the order of the forward pass, and how many parts each has."""

    def __init__(self, model: nn.Module, budget: Budget, context: Context, resource: Resource) -> None:
        """Raises UsageError without an input shape, parts, or a set of them that fits; InputError for odd models."""
        self.resource, self.dense = resource, budget.dense
        self.weights = prunable(model)
        network = trace(model, context.shape())
        costs = layer_costs(network)
        if set(costs) != set(self.weights):
            odd = min(set(costs) ^ set(self.weights))
            raise InputError(f"{odd} is shared between layers, or not used", "prune single weights of this model")
        self.axes = self._find(network, costs)
        if not self.sizes:
            raise UsageError("the model has nothing of this structure to remove", "prune single weights")
        place = {name: index for index, name in enumerate([*self.sizes, None])}
        self._table = torch.tensor(
            [
                (place[made.group], made.size, place[read.group], read.size, costs[name].positions)
                for name, (made, read) in self.axes.items()
            ]
        ).unbind(1)
        self.least = self._least(budget)
        self.total = self.cost(self.sizes)
        self.limit = self.total * budget.kept // budget.total
        needed = self.cost(self.least)
        if needed > self.limit:
            kept = -(-needed * budget.total // self.total)  # rounded up
            raise UsageError(
                f"a budget of {self.limit} of {self.total} {resource} leaves a layer empty: {needed} are needed",
                f"use a sparsity of at most {math.floor((1 - kept / budget.total) * 1e6) / 1e6:.6f}",
            )

    @abstractmethod
    def _find(self, network: torch.fx.GraphModule, costs: Mapping[str, LayerCost]) -> dict[str, tuple[Axis, Axis]]:
        """Fills ``sizes``; the sides of every layer: outputs, and fan-in."""

    @abstractmethod
    def scores(self, values: Mapping[str, Tensor], power: int = 1) -> dict[str, Tensor]:
        """The mean of |value|^power over the weights that a part is scored by, to the 1 / power: (parts,) each."""

    @abstractmethod
    def masks(self, keep: Keep) -> Masks:
        """Masks of all weights without the parts that are False."""

    def own(self, keep: Keep) -> Masks:
        """Masks of the weights by which parts are scored, without those that are False."""
        return self.masks(keep)

    def spent(self, kept: Shaped[Tensor, " groups"]) -> Float[Tensor, ""]:
        """Weights or FLOPs with so many parts in each group, which need not be whole; float64, differentiable."""
        made, outputs, read, fan_in, positions = (column.to(kept.device) for column in self._table)
        whole = torch.cat([kept.double(), kept.new_ones(1, dtype=torch.float64)])  # the last is of what no group cuts
        outputs, fan_in = outputs * whole[made], fan_in * whole[read]
        return (outputs * (fan_in if self.resource == "weights" else positions * (2 * fan_in + 1))).sum()

    def cost(self, kept: Kept) -> int:
        """The same for whole numbers, exactly."""
        return int(self.spent(torch.tensor(list(kept.values()))))

    def even_share(self) -> float:
        """The share of parts, the same in each group and not rounded, that costs as much as may be spent."""
        sizes = torch.tensor(list(self.sizes.values()), dtype=torch.float64)
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.spent(middle * sizes) <= self.limit else (low, middle)
        return high

    def allocate(self, allocation: str, scores: Mapping[str, Tensor]) -> Kept:
        """How many parts of each group stay: the same share, or those of the largest scores or LAMP scores of all."""
        assert allocation in ALLOCATIONS
        if allocation == "uniform":
            return self.fit(dict.fromkeys(self.sizes, 1.0))
        ordered = {name: score.detach().double().sort(descending=True).values for name, score in scores.items()}
        return self._longest({n: lamp_scores(s) if allocation == "lamp" else s for n, s in ordered.items()})

    def fit(self, shares: Mapping[str, float]) -> Kept:
        """How many parts stay where groups keep shares in these proportions: group g the share t * shares[g]."""
        return self._longest(
            {
                n: -torch.arange(1.0, size + 1, dtype=torch.float64) / (size * shares[n])
                for n, size in self.sizes.items()
            }
        )

    def best(self, scores: Mapping[str, Tensor], kept: Kept) -> Keep:
        """True at the ``kept`` largest scores of each group."""
        return {name: top_mask(score.flatten(), kept[name]) for name, score in scores.items()}

    def _longest(self, order: Mapping[str, Tensor]) -> Kept:
        """The most that fits when parts are taken in falling order over all groups, after each has its least.

        ``order`` falls within each group. A longer list of parts costs more, so that bisection finds the end.
        """
        raised = [
            values.cpu().index_fill(0, torch.arange(self.least[name]), torch.inf) for name, values in order.items()
        ]
        owner = torch.repeat_interleave(torch.arange(len(raised)), torch.tensor([len(values) for values in raised]))
        owner = owner[torch.cat(raised).argsort(descending=True, stable=True)]

        def counts(length: int) -> Tensor:
            return torch.bincount(owner[:length], minlength=len(raised))

        low, high = sum(self.least.values()), len(owner)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.spent(counts(middle)) <= self.limit else (low, middle - 1)
        return dict(zip(self.sizes, counts(low).tolist(), strict=True))

    def _least(self, budget: Budget) -> Kept:
        least = dict.fromkeys(self.sizes, 1)
        for name, (made, read) in self.axes.items():
            groups = [axis.group for axis in (made, read) if axis.group is not None]
            if budget.least[name] > made.size * read.size:
                share = (budget.least[name] / budget.sizes[name]) ** (1 / max(1, len(groups)))
                for group in groups:
                    least[group] = max(least[group], math.ceil(share * self.sizes[group] - 1e-9))
        return least


class Channels(Parts):
    """Channels in groups of tied ones, with the weights that make them and those that read them.

    ``structure`` says by which of the two a channel is scored: "filter" by the rows of its producers, "channel" by the
    slices of its consumers. A group has the name of the first weight that makes it.
    """

    def __init__(self, model: nn.Module, budget: Budget, context: Context, resource: Resource, structure: str) -> None:
        assert structure in ("filter", "channel")
        self.structure = structure
        super().__init__(model, budget, context, resource)

    def _find(self, network: torch.fx.GraphModule, costs: Mapping[str, LayerCost]) -> dict[str, tuple[Axis, Axis]]:
        self.groups = {
            group.name: group
            for group in channel_groups(network)
            if not self.dense & {*group.producers, *dict(group.consumers)}
        }
        self.sizes = {name: group.size for name, group in self.groups.items()}
        made = {weight: Axis(name, 1) for name, group in self.groups.items() for weight in group.producers}
        read = {
            weight: Axis(name, block * costs[weight].area)
            for name, group in self.groups.items()
            for weight, block in group.consumers
        }
        return {
            weight: (
                made.get(weight, Axis(None, cost.outputs)),
                read.get(weight, Axis(None, cost.inputs * cost.area)),
            )
            for weight, cost in costs.items()
        }

    def scored(self, name: str) -> list[str]:
        """The weights by which the channels of a group are scored."""
        group = self.groups[name]
        return list(group.producers if self.structure == "filter" else dict(group.consumers))

    def scores(self, values: Mapping[str, Tensor], power: int = 1) -> dict[str, Tensor]:
        found = {}
        for name, size in self.sizes.items():
            rows = [
                values[weight].detach() if self.structure == "filter" else values[weight].detach().transpose(0, 1)
                for weight in self.scored(name)
            ]
            flat = torch.cat([row.reshape(size, -1) for row in rows], 1)
            found[name] = flat.abs().pow(power).mean(1).pow(1 / power)
        return found

    def masks(self, keep: Keep) -> Masks:
        return self.side(keep, made=True, read=True)

    def own(self, keep: Keep) -> Masks:
        return self.side(keep, made=self.structure == "filter", read=self.structure == "channel")

    def side(self, keep: Keep, made: bool, read: bool) -> Masks:
        """Masks of the rows that make removed channels, of the slices that read them, or of both."""
        masks = {weight: torch.ones_like(value, dtype=torch.bool) for weight, value in self.weights.items()}
        for name, group in self.groups.items():
            for weight in group.producers if made else ():
                masks[weight] &= along(keep[name], 0, masks[weight].dim())
            for weight, block in group.consumers if read else ():
                masks[weight] &= along(keep[name].repeat_interleave(block), 1, masks[weight].dim())
        return masks


class Columns(Parts):
    """Columns of each weight as a matrix (outputs, inputs * kernel), one group a weight; nothing is tied.

    The zeros are in one place in every filter of a layer; they make no layer smaller.
    """

    def _find(self, network: torch.fx.GraphModule, costs: Mapping[str, LayerCost]) -> dict[str, tuple[Axis, Axis]]:  # noqa: ARG002
        self.sizes = {name: cost.inputs * cost.area for name, cost in costs.items() if name not in self.dense}
        return {
            name: (
                Axis(None, cost.outputs),
                Axis(name, 1) if name in self.sizes else Axis(None, cost.inputs * cost.area),
            )
            for name, cost in costs.items()
        }

    def scores(self, values: Mapping[str, Tensor], power: int = 1) -> dict[str, Tensor]:
        return {name: values[name].detach().flatten(1).abs().pow(power).mean(0).pow(1 / power) for name in self.sizes}

    def masks(self, keep: Keep) -> Masks:
        return {
            name: keep[name].view(1, *weight.shape[1:]).expand(weight.shape).clone()
            if name in keep
            else torch.ones_like(weight, dtype=torch.bool)
            for name, weight in self.weights.items()
        }


def along(values: Tensor, axis: int, dimensions: int) -> Tensor:
    """A vector as a tensor that broadcasts along ``axis``."""
    return values.view([-1 if d == axis else 1 for d in range(dimensions)])
