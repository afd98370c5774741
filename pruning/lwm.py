"""Least weight magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Fixed, Method, Moving, Pruner
from rprune.pruning.budget import Budget, apportion
from rprune.pruning.masks import Masks, top_mask
from rprune.pruning.papers import HYDRA, Settings
from rprune.pruning.parts import Channels, Resource
from rprune.pruning.structure import Structure, check_structure, largest_channels


def largest(weights: dict[str, Tensor], counts: dict[str, int]) -> Masks:
    """Each tensor's ``counts`` largest magnitudes."""
    return {name: top_mask(weight.abs(), counts[name]) for name, weight in weights.items()}


@METHODS.register("lwm")
@dataclass(frozen=True, kw_only=True)
class LWM(Method):
    """Keep the weights of largest magnitude, in one shot (Han et al., NeurIPS 2015, section 3).

    The baseline of HYDRA and HARP. ``allocation``: uniform, as those papers' baseline. ``structure`` filter or channel
    keeps the channels of the largest mean magnitude instead (HYDRA's Table 13 for filters); ``resource`` says what
    sparsity is a share of then. Learns nothing; costs one selection.
    """

    epochs: ClassVar[int] = 0
    paper: ClassVar[str] = "Han et al., NeurIPS 2015"
    cost: ClassVar[str] = "1 selection"
    paper_settings: ClassVar[Settings] = HYDRA
    structures: ClassVar[tuple[str, ...]] = ("weight", "filter", "channel")

    allocation: str = "uniform"
    structure: Structure = "weight"
    resource: Resource = "weights"

    def __post_init__(self) -> None:
        check_structure(self.structure, self.resource, self.allocation)

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        if self.structure != "weight":
            channels = Channels(model, budget, context, self.resource, self.structure)
            return largest_channels(model, channels, self.allocation)
        weights = prunable(model)
        return Fixed(model, largest(weights, allocate(self.allocation, weights, budget)))

    def takes_costs(self) -> bool:
        return self.structure == "weight"


class Gradual(Moving):
    """A mask that loses the same share of its weights at every step, and keeps to it in between."""

    def __init__(self, model: nn.Module, budget: Budget, allocation: str, steps: int, epochs: int) -> None:
        self.budget, self.allocation, self.epochs = budget, allocation, epochs
        self.steps = min(steps, epochs) or 1  # every epoch is trained with a mask of its own at most
        self.step = 0
        self.counts = dict(budget.sizes)
        super().__init__(model, {})
        self._weights = prunable(model)
        self._cut(self._due(0))

    def before_epoch(self, epoch: int) -> None:
        self._cut(self._due(epoch))

    def within_budget(self) -> bool:
        return self.step == self.steps

    def masks(self) -> Masks:
        return self._masks if self.step == self.steps else largest(self._weights, self._counts_at(self.steps))

    def finish(self) -> Masks:
        self._cut(self.steps)
        return self._masks

    def log(self) -> dict[str, float]:
        return {"kept_share": sum(self.counts.values()) / self.budget.total}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"counts": dict(self.counts), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.counts = state["step"], dict(state["counts"])
        super().load_state_dict(state)

    def _due(self, epoch: int) -> int:
        return 1 + epoch * self.steps // max(1, self.epochs)

    def _counts_at(self, step: int) -> dict[str, int]:
        """What is left after this step; no layer grows, whatever the allocator says of the weights that are left."""
        kept = self.budget.kept
        if step < self.steps:
            kept = max(kept, round(self.budget.total * self.budget.density ** (step / self.steps)))
        target = Budget(self.budget.sizes, kept, self.budget.floor, self.budget.dense)
        shares = {n: float(count) for n, count in allocate(self.allocation, self._weights, target).items()}
        return apportion(shares, Budget(self.counts, kept, dense=self.budget.dense))

    def _cut(self, step: int) -> None:
        if step > self.step:
            self.step, self.counts = step, self._counts_at(step)
            self._masks = largest(self._weights, self.counts)
            self.refresh()


@METHODS.register("lwm-multistep")
@dataclass(frozen=True, kw_only=True)
class LWMMultistep(Method):
    """Prune by magnitude a little at a time and train in between (Han et al., NeurIPS 2015, section 3.4).

    20 ``steps``, as HYDRA compares with (NeurIPS 2020, Table 12): each keeps the same share of what is left, and the
    last is exact. They are spread over the stage's epochs, the first before any training; a stage of fewer epochs takes
    as many. What is pruned stays pruned. Only states after the last step can be selected. lr 0.01 is that of HYDRA's
    fine-tuning. Costs a training step.
    """

    epochs: ClassVar[int] = 20
    lr: ClassVar[float] = 0.01
    paper: ClassVar[str] = "Han et al., NeurIPS 2015"
    learns: ClassVar[str] = "weights"
    cost: ClassVar[str] = "a training step"
    paper_settings: ClassVar[Settings] = HYDRA

    allocation: str = "uniform"
    steps: Annotated[int, Field(ge=1)] = 20

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        return Gradual(model, budget, self.allocation, self.steps, context.epochs)
