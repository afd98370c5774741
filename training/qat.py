"""Quantization-aware training as a pruner: the loop trains float weights, the model holds their integers' values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rprune.pruning.masks import Masks, enliven
from rprune.pruning.reparametrised import Substituted
from rprune.quantization.qat import FakeQuantize, fake_bias, fake_weight, scale_in_use

WEIGHT, BIAS = ".weight", ".bias"
SCALE = "scale/"  # prefix of the learned scales' names


class QuantizationAware(Substituted):
    """Float weights under held masks, a scale for each channel, and biases are learned; the model runs with integers.

    ``scales``: weight name -> the scales to start from. ``inputs``: layer name -> what quantises its input; those
    modules' scales train like any parameter of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        scales: Mapping[str, Tensor],
        inputs: Mapping[str, FakeQuantize],
        bits: int,
        portable: bool = False,
        keep: bool = True,
    ) -> None:
        super().__init__(model)
        self._masks = masks
        self.bits, self.portable, self.keep = bits, portable, keep
        self._weights = list(self._held)
        self._inputs = {f"{layer}{BIAS}": module for layer, module in inputs.items()}
        self._held |= {name: tensor for name, tensor in model.named_parameters() if name in self._inputs}
        self.learned = {name: tensor.detach().clone() for name, tensor in self._held.items()}
        for name in self._weights:
            self.learned[SCALE + name] = scales[name].detach().to(self._held[name].device, copy=True)
        self.refresh()

    def effective(self) -> dict[str, Tensor]:
        """Weights and biases in use, as a differentiable function of what is learned."""
        found = {
            name: fake_weight(self._masked(name), self.learned[SCALE + name], self.bits, self.portable, self.keep)
            for name in self._weights
        }
        for name, scale in self.scales().items():
            bias = name.removesuffix(WEIGHT) + BIAS
            if bias in self._held:
                found[bias] = fake_bias(self.learned[bias], scale, self._inputs[bias].step())
        return found

    def refresh(self) -> None:
        with torch.no_grad():
            for name, tensor in self.effective().items():
                self._held[name].copy_(tensor)

    def masks(self) -> Masks:
        return self._masks

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The float weights, none of those that the masks keep at zero, and biases."""
        found = {name: self._masked(name).detach().clone() for name in self._held}
        enliven(found, self._masks)
        return found

    @torch.no_grad()
    def scales(self) -> dict[str, Tensor]:
        """The scales in use, by weight name."""
        return {
            name: scale_in_use(self._masked(name), self.learned[SCALE + name], self.bits, self.portable)
            for name in self._weights
        }

    def _masked(self, name: str) -> Tensor:
        weight = self.learned[name]
        return weight if name not in self._masks else weight.masked_fill(~self._masks[name], 0.0)
