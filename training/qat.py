"""Quantization-aware training as a pruner: the loop trains float weights, the model holds their integers' values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rprune.models.prunable import prunable
from rprune.pruning.base import Pruner
from rprune.pruning.masks import Masks, enliven
from rprune.quantization.qat import fake_weight, scale_in_use

SCALE = "scale/"  # prefix of the learned scales' names


class QuantizationAware(Pruner):
    """Float weights under held masks, and one scale an output channel, are learned; the model runs with their integers.

    ``scales``: weight name -> the scales to start from. Activations are quantised by modules in the model, whose scales
    train like its biases.
    """

    def __init__(
        self, model: nn.Module, masks: Masks, scales: Mapping[str, Tensor], bits: int, portable: bool = False
    ) -> None:
        super().__init__(model)
        self._held, self._masks = prunable(model), masks
        self.bits, self.portable = bits, portable
        self.learned = {name: weight.detach().clone() for name, weight in self._held.items()}
        self.learned |= {SCALE + name: scales[name].to(weight.device) for name, weight in self._held.items()}
        held = {id(weight) for weight in self._held.values()}
        self._others = [parameter for parameter in model.parameters() if id(parameter) not in held]
        self.refresh()

    def parameters(self) -> Iterable[Tensor]:
        return [*self.learned.values(), *self._others]

    def effective(self) -> dict[str, Tensor]:
        """Weights in use, as a differentiable function of what is learned."""
        return {
            name: fake_weight(self._masked(name), self.learned[SCALE + name], self.bits, self.portable)
            for name in self._held
        }

    def before_step(self) -> None:
        gradients = {name: w.grad for name, w in self._held.items() if w.grad is not None}
        effective = self.effective()
        torch.autograd.backward([effective[name] for name in gradients], list(gradients.values()))

    def after_step(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        with torch.no_grad():
            for name, weight in self.effective().items():
                self._held[name].copy_(weight)

    def masks(self) -> Masks:
        return self._masks

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The float weights, none of those that the masks keep at zero."""
        found = {name: self._masked(name).detach().clone() for name in self._held}
        enliven(found, self._masks)
        return found

    @torch.no_grad()
    def scales(self) -> dict[str, Tensor]:
        """The scales in use, by weight name."""
        return {
            name: scale_in_use(self._masked(name), self.learned[SCALE + name], self.bits, self.portable)
            for name in self._held
        }

    def state_dict(self) -> dict[str, Any]:
        return {"learned": {name: tensor.detach() for name, tensor in self.learned.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in self.learned.items():
                tensor.copy_(state["learned"][name])
        self.refresh()

    def _masked(self, name: str) -> Tensor:
        weight = self.learned[name]
        return weight if name not in self._masks else weight.masked_fill(~self._masks[name], 0.0)
