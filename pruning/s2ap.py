"""S2AP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from rprune.errors import UsageError
from rprune.pruning.allocation import check_allocator
from rprune.pruning.base import METHODS, Context, Method, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.papers import HARP, Settings


@METHODS.register("s2ap")
@dataclass(frozen=True, kw_only=True)
class S2AP(Method):
    """Train a host's scores at their worst case nearby, for a stable mask (Piras et al., arXiv 2025).

    arXiv 2510.18381: min_s max L(w M(s + z)) with |z| <= gamma |s| in every layer: one ascent step z = gamma |s| g /
    |g|, the gradient taken at s + z and applied at s, with the batch's adversarial points unchanged. ``host``: harp or
    hydra, as in the paper, or any other method that learns scores. ``warmup`` 5 epochs without perturbation are the
    paper's; its gamma is tuned for every setting, 0.01 is ours. The paper fine-tunes with AWP (``awp`` of that stage).
    No code was released. Costs one forward and backward more a step, and one selection.
    """

    paper: ClassVar[str] = "Piras et al., arXiv 2025"
    learns: ClassVar[str] = "what its host learns"
    cost: ClassVar[str] = "its host + 1 forward, 1 backward"
    counted: ClassVar[tuple[str, ...]] = ("warmup",)
    paper_settings: ClassVar[Settings] = HARP | {"finetune": HARP["finetune"] | {"awp": 0.01}}

    host: str | dict[str, Any] = "harp"
    gamma: Annotated[float, Field(gt=0)] = 0.01
    warmup: Annotated[int, Field(ge=0)] = 5

    def __post_init__(self) -> None:
        """Raises UsageError for a host that does not exist or learns no scores: before any stage has run."""
        host = METHODS.build(self.host)
        if "scores" not in host.learns:
            raise UsageError(f"s2ap perturbs scores, {METHODS.name_of(host)} learns {host.learns}", "use harp or hydra")
        check_allocator(getattr(host, "allocation", "uniform"))

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        pruner = METHODS.build(self.host).bind(model, budget, context)
        pruner.radius, pruner.radius_from = self.gamma, self.warmup
        return pruner

    def takes_costs(self) -> bool:
        return METHODS.build(self.host).takes_costs()
