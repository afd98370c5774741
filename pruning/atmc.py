"""ATMC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from rprune.pruning.a_l0 import Projected, largest
from rprune.pruning.base import METHODS, Context, Method, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.codebook import quantize, size_in_bits
from rprune.pruning.masks import Masks
from rprune.pruning.papers import ATMC_SETTINGS, ATMC_SHARED, Settings

SQUARE, REST = "square/", "rest/"  # prefixes of the names of the factors; the main factor has the weight's own name


def factored(
    main: Float[Tensor, "out inner"], square: Float[Tensor, "r r"], rest: Float[Tensor, "out inner"]
) -> Float[Tensor, "out inner"]:
    """W = U V + C with the identity added to the square one of U and V: (I + square) main + rest, or main (I + square).

    r is the smaller side. square = rest = 0 makes main, exactly.
    """
    product = main @ square if len(square) == main.shape[1] else square @ main
    return main + product + rest


class AtmcPruner(Projected):
    """The three factors of every layer on the l0 ball; with 8 bits drawn to quantized copies Z, with scaled duals u."""

    def __init__(self, model: nn.Module, budget: Budget, bits: int, rho: float, every: int) -> None:
        self.bits, self.rho, self.every = bits, rho, every
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        self._grouped = {id(m.weight) for m in convolutions if m.groups > 1}
        super().__init__(model, budget)
        self.steps = 0
        quantized = self.learned if bits == 8 else {}
        self.copies = {name: value.detach().clone() for name, value in quantized.items()}
        self.duals = {name: torch.zeros_like(value) for name, value in self.copies.items()}

    def initial(self) -> dict[str, Tensor]:
        learned = {}
        for name, weight in self._start.items():
            learned[name] = weight.clone()
            if self._factored(name):
                out, inner = weight.flatten(1).shape
                learned[SQUARE + name] = weight.new_zeros(min(out, inner), min(out, inner))
                learned[REST + name] = torch.zeros_like(weight)
        return learned

    def support(self) -> Masks:
        # floors hold for main and rest together: an entry of the square factor alone makes no weight
        scores = {}
        for name in self._held:
            scores[name] = self.learned[name].detach().abs()
            if self._factored(name):
                scores[name] = torch.stack([scores[name], self.learned[REST + name].detach().abs()])
                scores[SQUARE + name] = self.learned[SQUARE + name].detach().abs()
        masks = largest(scores, self.budget.kept, self.budget.least)
        for name in self._held:
            if self._factored(name):
                masks[name], masks[REST + name] = masks[name].unbind()
        return masks

    def made_of(self, learned: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = {}
        for name in self._held:
            weights[name] = main = learned[name]
            if self._factored(name):
                made = factored(main.flatten(1), learned[SQUARE + name], learned[REST + name].flatten(1))
                weights[name] = made.view(main.shape)
        return weights

    def penalty(self) -> Tensor | None:
        if self.bits == 32:
            return None
        return self.rho / 2 * distance(self.learned, self.copies, self.duals)

    def after_step(self) -> None:
        super().after_step()
        if self.copies and self.steps % self.every == 0:
            self.quantize()
        self.steps += 1

    @torch.no_grad()
    def quantize(self) -> None:
        """Z <- the codebook form of theta + u on theta's support, u <- u + theta - Z there (ADMM)."""
        for name, value in self.learned.items():
            support = value != 0
            moved = (self.duals[name] + value).masked_fill_(~support, 0.0)
            self.copies[name] = quantize(moved, support)
            self.duals[name] = moved - self.copies[name]

    def finish(self) -> Masks:
        masks = super().finish()
        if self.bits == 8:
            with torch.no_grad():
                for name, weight in self._held.items():
                    weight.copy_(quantize(weight.detach(), masks[name]))
        return masks

    def log(self) -> dict[str, float]:
        held = sum(int(value.count_nonzero()) for value in self.projected().values())
        figures = super().log() | {"factor_share": held / self.budget.total}
        if self.bits == 8:
            bits = sum(size_in_bits(int(z.count_nonzero()), len(torch.unique(z[z != 0]))) for z in self.copies.values())
            figures["size_share"] = bits / (32 * self.budget.total)
        return figures

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"copies": self.copies, "duals": self.duals, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.copies:
            self.copies[name] = state["copies"][name].to(self.copies[name])
            self.duals[name] = state["duals"][name].to(self.duals[name])
        self.steps = state["steps"]
        super().load_state_dict(state)

    def _factored(self, name: str) -> bool:
        return name not in self.budget.dense and id(self._held[name]) not in self._grouped


def distance(values: dict[str, Tensor], copies: dict[str, Tensor], duals: dict[str, Tensor]) -> Float[Tensor, ""]:
    """The sum of |theta - Z + u|^2 over all tensors."""
    return torch.stack([(v - copies[n] + duals[n]).square().sum() for n, v in values.items()]).sum()


@METHODS.register("atmc")
@dataclass(frozen=True, kw_only=True)
class ATMC(Method):
    """Train sparse factors W = U V + C of every layer, with learned codebooks if wished (Gui et al., NeurIPS 2019).

    After every step the factors of all layers are cut to the largest magnitudes, |U|_0 + |V|_0 + |C|_0 <= k (sections
    2.2, 2.3). ``bits`` 8 adds the ADMM splitting (section 2.4): rho/2 |theta - Z + u|^2, Z the factors at no more than
    255 learned non-zero levels each; Z and u are updated every ``quantize_every`` steps. Defaults are the authors'
    code's, which trains with SGD lr 0.005 for 200 epochs (150 with 8 bits) from an A-l0 net of the same budget, on
    1/2 CE(x) + 1/2 CE(x'), x' from 7 PGD steps; ``pgd-at`` is the paper's formulation, without the clean half.

    As in that code the square one of U and V carries a constant identity outside the budget, so that the net starts
    unchanged; grouped convolutions, and layers that stay dense, are not factored. Unlike there, each layer keeps its
    floor, and quantization revives no entry and fits a byte (256 levels and a zero do not).

    What ships is a plain net. The product has more non-zero entries than its factors, or fewer, so at the end it is
    cut, or filled up, to exactly the budget; epochs are selected before that. With 8 bits each tensor is then put on
    one codebook, which fine-tuning undoes. The log has ``kept_share`` of the product and ``factor_share``, and with 8
    bits ``size_share``, ATMC's size of Z over dense 32-bit weights. Costs a training step, a product with a square
    matrix a layer and a selection among all factors.
    """

    epochs: ClassVar[int] = 200
    paper: ClassVar[str] = "Gui et al., NeurIPS 2019"
    learns: ClassVar[str] = "factors, biases, batch norm"
    cost: ClassVar[str] = "a training step + 1 matrix product a layer + 1 selection"
    lr: ClassVar[float] = 0.005
    paper_settings: ClassVar[Settings] = ATMC_SETTINGS | {
        "prune": ATMC_SHARED | {"lr": 0.005, "schedule": "piecewise:0.3,0.4,0.6"}
    }

    bits: Literal[32, 8] = 32
    rho: Annotated[float, Field(gt=0)] = 0.1
    quantize_every: Annotated[int, Field(ge=1)] = 10

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:  # noqa: ARG002
        return AtmcPruner(model, budget, self.bits, self.rho, self.quantize_every)
