"""A-l0: projected adversarial training, and what ATMC shares with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rprune.pruning.base import METHODS, Context, Method, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.masks import Masks, impose, top_mask
from rprune.pruning.papers import ATMC_SETTINGS, ATMC_SHARED, Settings
from rprune.pruning.reparametrised import Reparametrised


def largest(scores: Mapping[str, Tensor], kept: int, least: Mapping[str, int]) -> Masks:
    """True at the ``kept`` largest scores of all tensors together, each tensor's own ``least`` best taken first.

    A name that ``least`` lacks has no floor. Among equal scores the first in memory order win.
    """
    flat = torch.cat([score.detach().flatten() for score in scores.values()])
    sizes = [score.numel() for score in scores.values()]
    for name, part in zip(scores, torch.split(flat, sizes), strict=True):
        if name in least:
            part.masked_fill_(top_mask(part, least[name]), torch.inf)
    parts = torch.split(top_mask(flat, kept), sizes)
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


class Projected(Reparametrised):
    """Learns tensors that hold at most ``budget.kept`` non-zero entries after every step (the l0 ball).

    The model always runs with what the projection of ``learned`` makes: averages and perturbations may leave the ball,
    the model does not. Here ``learned`` are the weights themselves.
    """

    def __init__(self, model: nn.Module, budget: Budget) -> None:
        super().__init__(model, budget)
        self._start = {name: weight.detach().clone() for name, weight in self._held.items()}
        self.learned = {name: value.requires_grad_() for name, value in self.initial().items()}

    def initial(self) -> dict[str, Tensor]:
        """What is learned, such that it makes the given weights exactly."""
        return {name: weight.clone() for name, weight in self._start.items()}

    def support(self) -> Masks:
        """Entries of what is learned that the projection keeps."""
        sizes = {name: value.detach().abs() for name, value in self.learned.items()}
        return largest(sizes, self.budget.kept, self.budget.least)

    def made_of(self, learned: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights as a differentiable function of what is learned."""
        return learned

    def effective(self) -> dict[str, Tensor]:
        return self.made_of(self.learned)

    def projected(self) -> dict[str, Tensor]:
        """What is learned, on the ball."""
        support = self.support()
        return {name: value.detach().masked_fill(~support[name], 0.0) for name, value in self.learned.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        impose(self.learned, self.support())  # momentum stays: what was dropped can come back
        self._hold(self.made_of(self.learned))

    def refresh(self) -> None:
        self._hold(self.made_of(self.projected()))

    def current_masks(self) -> Masks:
        return {name: weight != 0 for name, weight in self.made_of(self.projected()).items()}

    def masks(self) -> Masks:
        return self._final()[0]

    def finish(self) -> Masks:
        masks, weights = self._final()
        self._hold(weights)
        impose(self._held, masks)
        return masks

    def _final(self) -> tuple[Masks, dict[str, Tensor]]:
        """The largest magnitudes, and the weights with no zero among these.

        Where fewer weights than the budget are not zero, the largest of those that were given fill it, at the smallest
        magnitude there is, which disturbs the net least.
        """
        weights, start = self.made_of(self.projected()), self._start
        ranks = {name: torch.where(w != 0, w.abs(), -1 / (1 + start[name].abs())) for name, w in weights.items()}
        sizes = torch.cat([weight.abs().flatten() for weight in weights.values()])
        smallest = torch.where(sizes > 0, sizes, 1.0).min()
        filled = {name: torch.where(w != 0, w, torch.copysign(smallest, start[name])) for name, w in weights.items()}
        return largest(ranks, self.budget.kept, self.budget.least), filled

    @torch.no_grad()
    def _hold(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._held[name].copy_(weight)


@METHODS.register("a-l0")
@dataclass(frozen=True, kw_only=True)
class AL0(Method):
    """Adversarial training, cut to the largest weights after every step (Gui et al., NeurIPS 2019, section 3.2).

    The paper's baseline A-l0, and in its code the stage before ATMC: projected SGD on all weights under one budget for
    the whole net. Cut weights have gradients too, so they can come back. The authors' code trains 200 epochs with SGD
    lr 0.01 on 1/2 CE(x) + 1/2 CE(x'), x' from 7 PGD steps; ``pgd-at`` is the paper's formulation, without the clean
    half. That code can empty a layer; here each keeps its floor. Costs a training step and a selection among all
    weights.
    """

    epochs: ClassVar[int] = 200
    paper: ClassVar[str] = "Gui et al., NeurIPS 2019"
    learns: ClassVar[str] = "weights, biases, batch norm"
    cost: ClassVar[str] = "a training step + 1 selection"
    lr: ClassVar[float] = 0.01
    paper_settings: ClassVar[Settings] = ATMC_SETTINGS | {
        "prune": ATMC_SHARED | {"lr": 0.01, "schedule": "piecewise:0.15,0.3,0.45,0.6"}
    }

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:  # noqa: ARG002
        return Projected(model, budget)
