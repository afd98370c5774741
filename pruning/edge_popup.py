"""edge-popup."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Method, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.hydra import ScorePruner
from rprune.pruning.initial_scores import InitialScores
from rprune.pruning.papers import Settings
from rprune.pruning.reinitialize import reinitialize, scale_to_density
from rprune.seeds import derive


class ScoresAlone(ScorePruner):
    """Scores, while batch norm's affine parameters rest like the weights."""

    def parameters(self) -> Iterable[Tensor]:
        return list(self.scores.values())


def draw_weights(model: nn.Module, seed: int, *, signed_constant: bool) -> None:
    """A random net in place: Kaiming-normal weights (fan in, ReLU), or their standard deviation with random signs.

    Biases are 0, batch norm is as new.
    """
    reinitialize(model, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for name, weight in prunable(model).items():
            std = (2 / weight[0].numel()) ** 0.5
            generator = torch.Generator().manual_seed(derive(seed, "weights", name))
            drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.copy_(std * (torch.where(drawn < 0, -1.0, 1.0) if signed_constant else drawn))


@METHODS.register("edge-popup")
@dataclass(frozen=True, kw_only=True)
class EdgePopup(Method):
    """Find a subnet of a random net; no weight is ever trained (Ramanujan et al., CVPR 2020, section 3).

    ``weights``: a signed constant, the paper's best, or "kaiming-normal". Scores start Kaiming-uniform and are trained
    as HYDRA trains them, which took the rule from here; batch norm stays non-affine and biases are 0, as the paper's
    nets have none. 100 epochs, SGD with a cosine, the same kept share in each layer. The authors' count int((1 - k) n)
    is off by one where floats truncate, and by a weight a layer; here the budget is exact. A net without batch norm
    needs ``scale_init`` (scale_fan of their code): std is divided by the square root of the layer's kept share. The
    model given lends its shape alone. Costs a training step plus one selection a step.
    """

    epochs: ClassVar[int] = 100
    paper: ClassVar[str] = "Ramanujan et al., CVPR 2020"
    learns: ClassVar[str] = "scores"
    cost: ClassVar[str] = "a training step + 1 selection"
    paper_settings: ClassVar[Settings] = {"prune": {"objective": "benign"}}

    allocation: str = "uniform"
    initial_scores: InitialScores = "kaiming-uniform"
    weights: Literal["signed-constant", "kaiming-normal"] = "signed-constant"
    scale_init: bool = False

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        draw_weights(model, context.seed, signed_constant=self.weights == "signed-constant")
        counts = allocate(self.allocation, prunable(model), budget)
        if self.scale_init:
            scale_to_density(model, counts)
        return ScoresAlone(model, counts, self.initial_scores, context.seed)

    def takes_costs(self) -> bool:
        return True
