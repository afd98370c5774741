"""Quantization-aware training as a pruner: the loop trains float weights, the model holds their integers' values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rprune.pruning.masks import Masks, enliven
from rprune.pruning.reparametrised import Substituted
from rprune.quantization.qat import fake_weight, scale_in_use

SCALE = "scale/"  # prefix of the learned scales' names


class QuantizationAware(Substituted):
    """Float weights under held masks, and one scale an output channel, are learned; the model runs with their integers.

    ``scales``: weight name -> the scales to start from. Activations are quantised by modules in the model, whose scales
    train like its biases.
    """

    def __init__(
        self, model: nn.Module, masks: Masks, scales: Mapping[str, Tensor], bits: int, portable: bool = False
    ) -> None:
        super().__init__(model)
        self._masks = masks
        self.bits, self.portable = bits, portable
        self.learned = {name: weight.detach().clone() for name, weight in self._held.items()}
        self.learned |= {SCALE + name: scales[name].to(weight.device) for name, weight in self._held.items()}
        self.refresh()

    def effective(self) -> dict[str, Tensor]:
        """Weights in use, as a differentiable function of what is learned."""
        return {
            name: fake_weight(self._masked(name), self.learned[SCALE + name], self.bits, self.portable)
            for name in self._held
        }

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

    def _masked(self, name: str) -> Tensor:
        weight = self.learned[name]
        return weight if name not in self._masks else weight.masked_fill(~self._masks[name], 0.0)
