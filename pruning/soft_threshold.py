"""STR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Method, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.masks import Masks, top_mask
from rprune.pruning.papers import Settings
from rprune.pruning.reinitialize import reinitialize
from rprune.pruning.reparametrised import Reparametrised

Kind = Literal["sigmoid", "exp"]
WIDTH = 0.25  # 0.1 to 1 made no difference to accuracy on a small net
THRESHOLDS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "exp": torch.exp}


def soft_threshold(w: Float[Tensor, ...], threshold: Float[Tensor, ""]) -> Float[Tensor, ...]:
    """sign(w) max(|w| - threshold, 0) (Kusupati et al., ICML 2020, section 3)."""
    return w.sign() * (w.abs() - threshold).relu()


def level(kind: Kind, magnitude: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """s such that g(s) = magnitude; finite, with magnitudes held in [1e-30, 1) where g is the sigmoid."""
    magnitude = magnitude.clamp_min(1e-30)
    return magnitude.log() if kind == "exp" else magnitude.clamp_max(1 - 2**-24).logit()


class SoftThresholdPruner(Reparametrised):
    """Weights w and one s a layer; the threshold of layer l is g(s_l + start_l + c), with one c for all layers.

    c is solved for after every step, so that exactly the number of weights wanted by then stays. Gradients know that c
    answers to s: dc/ds_l = -p_l, p_l the layer's share of the weights about to cross their thresholds.
    """

    def __init__(self, model: nn.Module, budget: Budget, kind: Kind, counts: dict[str, int], ramp: int) -> None:
        super().__init__(model, budget)
        self.kind, self.ramp = kind, ramp
        self.step = 0
        self.weights = {name: w.detach().clone().requires_grad_() for name, w in self._held.items()}
        self.s = torch.zeros(len(self.weights), device=next(model.parameters()).device, requires_grad=True)
        self.learned = self.weights | {"s": self.s}
        smallest = torch.stack([_smallest(w.detach().abs(), counts[name]) for name, w in self.weights.items()])
        dense = torch.tensor([name in budget.dense for name in self.weights], device=self.s.device)
        self._start = level(kind, smallest).masked_fill(dense, -torch.inf)  # a threshold of 0 in dense layers
        self.refresh()

    def wanted(self) -> int:
        """Weights that stay at this step: from all to the budget, by a cubic over ``ramp`` steps."""
        left = max(0.0, 1 - self.step / self.ramp) ** 3 if self.ramp else 0.0
        return self.budget.kept + round(left * (self.budget.total - self.budget.kept))

    def effective(self) -> dict[str, Tensor]:
        offset = self._offset - (self._marginal * (self.s - self.s.detach())).sum()
        thresholds = THRESHOLDS[self.kind](self._start + self.s + offset)
        effective = {}
        for (name, w), threshold in zip(self.weights.items(), thresholds, strict=True):
            # a layer that only its floor keeps alive has the largest of its other weights as threshold
            magnitude, mask = w.detach().abs(), self._masks[name]
            inside = magnitude.masked_fill(~mask, torch.inf).min()
            outside = magnitude.masked_fill(mask, 0.0).max()
            effective[name] = soft_threshold(w, torch.where(inside > threshold, threshold, outside))
        return effective

    def current_masks(self) -> Masks:
        return self._masks

    def after_step(self) -> None:
        self.step += 1
        super().after_step()

    def refresh(self) -> None:
        self._masks, self._offset, self._marginal = self._selected(self.wanted())
        super().refresh()

    def _selected(self, kept: int) -> tuple[Masks, Tensor, Tensor]:
        """The masks of exactly ``kept`` weights, every layer's floor included, the c that makes them, and p.

        p weighs each weight by the logistic density of its distance from the threshold, in units of s, at ``WIDTH``.
        """
        with torch.no_grad():
            levels = []
            for (name, w), own in zip(self.weights.items(), self._start + self.s, strict=True):
                above = level(self.kind, w.abs()) - own
                levels.append(above.masked_fill(top_mask(above, self.budget.least[name]), torch.inf).flatten())
            joined = torch.cat(levels)
            mask = top_mask(joined, kept)
            parts = torch.split(mask, [len(part) for part in levels])
            masks = {name: part.view_as(w) for (name, w), part in zip(self.weights.items(), parts, strict=True)}
            offset = joined.masked_fill(mask, -torch.inf).max()
            away = [(part - offset) / WIDTH for part in levels]
            near = torch.stack([x.sigmoid().mul((-x).sigmoid()).sum() for x in away])
            return masks, offset, (near / near.sum()).nan_to_num()

    def within_budget(self) -> bool:
        return self.wanted() == self.budget.kept

    def masks(self) -> Masks:
        return self._masks if self.within_budget() else self._selected(self.budget.kept)[0]

    def finish(self) -> Masks:
        self.step = max(self.step, self.ramp)  # a stage that ended early is brought to the budget
        self.refresh()
        return self._masks

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        super().load_state_dict(state)


def _smallest(magnitude: Tensor, kept: int) -> Tensor:
    return magnitude.masked_fill(~top_mask(magnitude, kept), torch.inf).min()


@METHODS.register("str")
@dataclass(frozen=True, kw_only=True)
class STR(Method):
    """Soft-threshold reparameterisation: weights sign(w) max(|w| - g(s_l), 0) (Kusupati et al., ICML 2020, section 3).

    Weights w and one s a layer are trained together: survivors pass their gradients on to w, and dL/ds_l is -g'(s_l)
    times the sum of these gradients, signed by w; so the loss decides how the budget is shared. ``threshold`` g:
    sigmoid, the paper's for CNNs, or exp, which needs a lower learning rate.

    In the paper sparsity emerges from s_init and weight decay and has no target. What steers it to the budget is ours:
    g sees s_l + start_l + c, where the one c of all layers is solved for after every step so that exactly the wanted
    number of weights is above its threshold. That number falls from all to the budget by a cubic (Zhu and Gupta, 2017)
    over ``ramp`` of the stage. The gradient of s runs along the budget: a layer pays for raising the thresholds of the
    others, without which the last layer takes everything. start_l shares the budget by ``allocation`` at first, and is
    what weight decay on s returns to; magnitude is the paper's start, equal s in all layers. Floors are held by
    lowering a layer's threshold. Costs a training step plus one selection.
    """

    epochs: ClassVar[int] = 100
    paper: ClassVar[str] = "Kusupati et al., ICML 2020"
    learns: ClassVar[str] = "weights, thresholds"
    cost: ClassVar[str] = "a training step + 1 selection"
    paper_settings: ClassVar[Settings] = {
        "prune": {
            "objective": {"name": "benign", "label_smoothing": 0.1},
            "lr": 0.256,
            "momentum": 0.875,
            "weight_decay": 2.25e-5,
            "warmup": 5,
        }
    }

    threshold: Kind = "sigmoid"
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.5
    allocation: str = "erk"
    reinitialize: bool = True

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        if self.reinitialize:
            reinitialize(model, context.seed)
        counts = allocate(self.allocation, prunable(model), budget)
        ramp = round(self.ramp * context.epochs * context.steps_per_epoch)
        return SoftThresholdPruner(model, budget, self.threshold, counts, ramp)
