"""HYDRA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Method, Pruner, Scored, straight_through
from rprune.pruning.budget import Budget
from rprune.pruning.initial_scores import InitialScores, initial_scores
from rprune.pruning.masks import Masks, top_mask
from rprune.pruning.papers import HYDRA, Settings
from rprune.pruning.parts import Channels, Resource
from rprune.pruning.structure import ChannelScores, Structure, check_structure


class ScorePruner(Scored):
    """Scores s of a fixed number of kept weights a layer; the mask m is 1 at the largest |s|."""

    def __init__(self, model: nn.Module, counts: dict[str, int], initial: str = "scaled", seed: int = 0) -> None:
        super().__init__(model)
        self._counts = counts
        self.scores = initial_scores(initial, self.weights, seed)
        for score in self.scores.values():
            score.requires_grad_()
        self.write(self.current_masks())

    def parameters(self) -> Iterable[Tensor]:
        return [*self.scores.values(), *self._norms]

    def counts(self) -> dict[str, int]:
        return self._counts

    def current_masks(self) -> Masks:
        counts = self.counts()
        return {name: top_mask(score.abs(), counts[name]) for name, score in self.scores.items()}

    def effective(self) -> Iterator[tuple[str, Tensor]]:
        # the mask is piecewise constant: what counts is the straight-through term, whose value is 0
        return ((name, w * straight_through(self.scores[name].abs())) for name, w in self.weights.items())

    def masks(self) -> Masks:
        return self.current_masks()

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self.weights), "scores": {n: s.detach() for n, s in self.scores.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name in self.weights:
                self.weights[name].copy_(state["weights"][name])
                self.scores[name].copy_(state["scores"][name])
        self.write(self.current_masks())


@METHODS.register("hydra")
@dataclass(frozen=True, kw_only=True)
class Hydra(Method):
    """Learn which connections to keep under the robust objective (Sehwag et al., NeurIPS 2020, Algorithm 1).

    Importance scores are initialised in proportion to the pretrained weights and trained by the objective through a
    straight-through top-k mask: dL/ds = dL/dw_eff * w * sign(s) for every entry. Weights and biases rest, batch-norm
    affine parameters train. Paper: SGD lr 0.1, 20 epochs, the same kept share in each layer. ``allocation``: erk and
    lamp are the non-uniform variants that HARP compares with. ``initial_scores``: the paper's ablation of its scaled
    initialisation. ``structure`` filter or channel learns one score a channel and removes whole ones (the paper's Table
    13 has filters, its code has none); ``resource`` says what sparsity is a share of then. Costs a training step plus
    one selection a step.
    """

    paper: ClassVar[str] = "Sehwag et al., NeurIPS 2020"
    learns: ClassVar[str] = "scores, batch norm"
    cost: ClassVar[str] = "a training step + 1 selection"
    paper_settings: ClassVar[Settings] = HYDRA
    structures: ClassVar[tuple[str, ...]] = ("weight", "filter", "channel")

    allocation: str = "uniform"
    initial_scores: InitialScores = "scaled"
    structure: Structure = "weight"
    resource: Resource = "weights"

    def __post_init__(self) -> None:
        check_structure(self.structure, self.resource, self.allocation)

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        if self.structure != "weight":
            channels = Channels(model, budget, context, self.resource, self.structure)
            return ChannelScores(model, channels, self.allocation, self.initial_scores, context.seed)
        counts = allocate(self.allocation, prunable(model), budget)
        return ScorePruner(model, counts, self.initial_scores, context.seed)

    def takes_costs(self) -> bool:
        return self.structure == "weight"
