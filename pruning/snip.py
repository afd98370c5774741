"""SNIP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from rprune.data.loaders import Batch
from rprune.errors import UsageError
from rprune.models.prunable import prunable
from rprune.pruning.allocation import global_top
from rprune.pruning.base import METHODS, Context, Method, Moving, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.masks import top_mask
from rprune.pruning.papers import Settings
from rprune.pruning.reinitialize import reinitialize
from rprune.seeds import derive


def sensitivity(
    model: nn.Module, batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor]
) -> dict[str, Float[Tensor, ...]]:
    """|w dL/dw| of every prunable weight, L the mean loss over all samples (SNIP, eq. 6, not normalised).

    Batch norm uses its running statistics, which do not move.
    """
    weights = prunable(model)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    was_training = model.training
    model.eval()
    for batch in batches:
        value = loss(model, batch) * len(batch.y)
        gradients = torch.autograd.grad(value, list(weights.values()), materialize_grads=True)
        torch._foreach_add_(list(total.values()), gradients)
    model.train(was_training)
    return {name: (weight.detach() * total[name]).abs() for name, weight in weights.items()}


def benign_loss(net: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(net(batch.x), batch.y)


@METHODS.register("snip")
@dataclass(frozen=True, kw_only=True)
class SNIP(Method):
    """Keep the connections whose removal changes the loss most, before training (Lee et al., ICLR 2019, eq. 6).

    The globally largest |w dL/dw| stay, each layer's floor first (the paper has none). L is the loss that training
    minimises: the stage's objective, or benign cross-entropy where ``adversarial`` is false. ``batches`` 1, as in the
    authors' code. As there, weights are fresh (``reinitialize``) when scored, and drawn once more to be trained; false
    scores and keeps the weights that are given. Unlike there, biases are neither ranked nor counted. 100 epochs as
    HYDRA trains from scratch. Costs a gradient a batch, then a training step.
    """

    epochs: ClassVar[int] = 100
    paper: ClassVar[str] = "Lee et al., ICLR 2019"
    learns: ClassVar[str] = "weights"
    cost: ClassVar[str] = "a training step"
    paper_settings: ClassVar[Settings] = {"prune": {"objective": "benign"}}

    adversarial: bool = True
    batches: Annotated[int, Field(ge=1)] = 1
    reinitialize: bool = True

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        loss = context.loss if self.adversarial else benign_loss
        if loss is None:
            raise UsageError("this method scores weights by the training loss", "bind it with a Context that has one")
        if self.reinitialize:
            reinitialize(model, derive(context.seed, "score"))
        scores = sensitivity(model, islice(context.data(), self.batches), loss)
        if self.reinitialize:
            reinitialize(model, context.seed)
        counts = global_top(scores, budget)
        return Moving(model, {name: top_mask(score, counts[name]) for name, score in scores.items()})

    def takes_costs(self) -> bool:
        return True
