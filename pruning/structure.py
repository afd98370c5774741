"""Structured pruning: the options that several methods share, and their pruners of whole channels.

A channel goes with the rows of the weights that make it and the slices of those that read it, in all layers that are
tied to it by residual sums, so that the network becomes smaller by as much (``export.compact``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from rprune.errors import UsageError
from rprune.pruning.base import Fixed, Scored, straight_through
from rprune.pruning.initial_scores import initial_scores
from rprune.pruning.masks import Masks
from rprune.pruning.parts import ALLOCATIONS, Channels, Keep, Kept, along
from rprune.pruning.rates import Rated

Structure: TypeAlias = Literal["weight", "filter", "channel"]
"""What is removed as one. Filters and channels are the same parts, scored by the weights that make or read them."""


def check_structure(structure: str, resource: str, allocation: str) -> None:
    """Raises UsageError for options that do not go together."""
    if structure == "weight" and resource != "weights":
        raise UsageError("single weights are counted, not their FLOPs", "use structure filter or channel")
    if structure != "weight" and allocation not in ALLOCATIONS:
        raise UsageError(
            f"allocation {allocation} shares out single weights", f"structure {structure} has {', '.join(ALLOCATIONS)}"
        )


class Held(Fixed):
    """A mask of whole parts that is held."""

    exact = False


def largest_channels(model: nn.Module, channels: Channels, allocation: str) -> Held:
    """Keeps the channels of the largest mean magnitude (Li et al., ICLR 2017, for filters)."""
    scores = channels.scores(channels.weights)
    return Held(model, channels.masks(channels.best(scores, channels.allocate(allocation, scores))))


class ChannelScores(Scored):
    """One learned score a channel where HYDRA has one a weight; a fixed number of each group stays.

    While it searches, the slices that read a removed channel are masked, and the rows that make it are not: the net
    computes what it would without the channel, and dL/ds is what the channel would contribute. Masked rows would leave
    nothing to learn from, and a batch norm behind them hides the size of a row from the loss. They go at the end.
    """

    exact = False

    def __init__(
        self, model: nn.Module, channels: Channels, allocation: str, initial: str = "scaled", seed: int = 0
    ) -> None:
        super().__init__(model)
        self.channels = channels
        magnitudes = channels.scores(self.weights)
        self._kept = channels.allocate(allocation, magnitudes)
        # two dimensions: what perturbs or averages tells scores from scales and rates by that
        columns = {name: values[:, None] for name, values in magnitudes.items()}
        self.scores = self._scaled(columns) if initial == "scaled" else initial_scores(initial, columns, seed)
        for score in self.scores.values():
            score.requires_grad_()
        self.write(self.current_masks())

    def _scaled(self, magnitudes: dict[str, Tensor]) -> dict[str, Tensor]:
        """sqrt(6 / fan_in) times the magnitude's share of the group's largest (HARP eq. 9)."""
        found = {}
        for name, values in magnitudes.items():
            fan_in = self.weights[self.channels.scored(name)[0]][0].numel()
            found[name] = (6 / fan_in) ** 0.5 * values / values.max().clamp_min(torch.finfo(values.dtype).tiny)
        return found

    def parameters(self) -> Iterable[Tensor]:
        return [*self.scores.values(), *self._norms]

    def kept(self) -> Kept:
        """Channels of each group that the search keeps now."""
        return self._kept

    def final(self) -> Kept:
        """Channels of each group that stay."""
        return self._kept

    def gates(self) -> dict[str, Tensor]:
        """Of each channel (channels, 1): value 0, derivative 1 with regard to what is learned of it."""
        return {name: straight_through(score.abs()) for name, score in self.scores.items()}

    def effective(self) -> Iterator[tuple[str, Tensor]]:
        gates = self.gates()
        return (
            (weight, self.weights[weight] * along(gates[name].repeat_interleave(block), 1, self.weights[weight].dim()))
            for name, group in self.channels.groups.items()
            for weight, block in group.consumers
        )

    def best(self, kept: Kept) -> Keep:
        return self.channels.best({name: score.detach().abs() for name, score in self.scores.items()}, kept)

    def current_masks(self) -> Masks:
        return self.channels.side(self.best(self.kept()), made=False, read=True)

    def counts(self) -> dict[str, int]:
        return {name: int(mask.sum()) for name, mask in self.channels.masks(self.best(self.kept())).items()}

    def masks(self) -> Masks:
        return self.channels.masks(self.best(self.final()))

    def log(self) -> dict[str, float]:
        return {"kept_share": self.channels.cost(self.kept()) / self.channels.total}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self.weights), "scores": {n: s.detach() for n, s in self.scores.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
            for name, score in self.scores.items():
                score.copy_(state["scores"][name])
        self.write(self.current_masks())


class ChannelRates(Rated, ChannelScores):
    """HARP on channels: a score for each, a rate for each group, and the target in weights or FLOPs (eq. 8).

    L_hw is max(spent(a) / target - 1, 0), where a layer costs by the rates of both groups it lies between. HARP's code
    asks for the cost of a net with a_t of all channels in its place, which is about a_t squared of the whole; counts
    the neighbour in module order as the next layer, which on a ResNet is a shortcut; and lets shortcuts follow another
    layer's rate. Here sparsity is what is removed, and layers that share channels share a rate. Once the rates meet the
    target, the search keeps what the end will: the most that fits in their proportions, rounding included.
    """

    def __init__(
        self,
        model: nn.Module,
        channels: Channels,
        initial_density: float,
        gamma_step: float,
        initial: str = "scaled",
        seed: int = 0,
    ) -> None:
        self._sizes = torch.tensor(list(channels.sizes.values()), device=next(model.parameters()).device)
        start = [initial_density] * len(channels.sizes)
        super().__init__(model, start, channels.even_share(), gamma_step, channels, "uniform", initial, seed)

    def hardware_loss(self) -> Tensor:
        spent = self.channels.spent(self.rates() * self._sizes)
        return (spent / self.channels.limit - 1).clamp_min(0).to(self.r.dtype)

    def kept(self) -> Kept:
        if self.within_budget():
            return self.final()
        shares = self.rates().detach().double().nan_to_num(0.0).tolist()  # NaN in a run that has diverged
        return {
            name: max(size - int((1 - a) * size), self.channels.least[name])
            for (name, size), a in zip(self.channels.sizes.items(), shares, strict=True)
        }

    def final(self) -> Kept:
        """The most that fits with shares in proportion to the learned rates."""
        rates = self.rates().detach().nan_to_num(1.0).tolist()
        return self.channels.fit(dict(zip(self.channels.sizes, rates, strict=True)))

    def gates(self) -> dict[str, Tensor]:
        rates = straight_through(self.rates())
        return {name: gate + rates[index] for index, (name, gate) in enumerate(super().gates().items())}
