"""What methods share that train something else in the weights' place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rprune.models.prunable import prunable
from rprune.pruning.base import Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.masks import Masks, count


class Substituted(Pruner, ABC):
    """The weights in use, and what else ``_held`` names, are a function of ``learned``; the rest trains as it is.

    Derived classes fill ``learned`` (tensors by name), write the weights in :meth:`refresh`, and call it once they are
    complete.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.learned: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = dict(prunable(model))

    @abstractmethod
    def effective(self) -> dict[str, Tensor]:
        """Weights in use, as a differentiable function of what is learned."""

    def parameters(self) -> Iterable[Tensor]:
        held = {id(tensor) for tensor in self._held.values()}
        return [*self.learned.values(), *(tensor for tensor in self.model.parameters() if id(tensor) not in held)]

    def before_step(self) -> None:
        gradients = {name: w.grad for name, w in self._held.items() if w.grad is not None}
        effective = self.effective()
        torch.autograd.backward([effective[name] for name in gradients], list(gradients.values()))

    def after_step(self) -> None:
        self.refresh()

    def state_dict(self) -> dict[str, Any]:
        return {"learned": {name: tensor.detach() for name, tensor in self.learned.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in self.learned.items():
                tensor.copy_(state["learned"][name])
        self.refresh()


class Reparametrised(Substituted, ABC):
    """Base of methods whose weights in use are cut to masks, which have to meet the budget in the end."""

    def __init__(self, model: nn.Module, budget: Budget) -> None:
        super().__init__(model)
        self.budget = budget

    @abstractmethod
    def current_masks(self) -> Masks:
        """Weights in use that are not zero now, which may be off the budget."""

    def refresh(self) -> None:
        self.write(self.current_masks())

    def write(self, masks: Masks) -> None:
        """Put the effective weights that ``masks`` keep into the model in place."""
        with torch.no_grad():
            for name, weight in self.effective().items():
                self._held[name].copy_(weight).masked_fill_(~masks[name], 0.0)

    def finish(self) -> Masks:
        masks = self.masks()
        self.write(masks)
        return masks

    def log(self) -> dict[str, float]:
        """``kept_share``: that of the search, before it is brought to the budget."""
        return {"kept_share": count(self.current_masks()) / self.budget.total}
