"""The contract of a training objective: a generator of losses.

The loop does backward and one optimizer step for each yielded loss; most objectives yield once a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxtyping import Float, Int64
from torch import Tensor, nn

from rprune.attacks.base import Attack
from rprune.attacks.noise import Noise
from rprune.registry import Configured, Registry


@dataclass(frozen=True, eq=False)
class Loss:
    """``value`` is what is minimised; ``logits`` and ``parts`` feed the log, so that no extra forward is needed."""

    value: Float[Tensor, ""]
    logits: Float[Tensor, "b k"]
    parts: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


class Objective(Configured, ABC):
    """Base of all objectives. Derived classes are frozen dataclasses; those that attack hold threat and attack."""

    @abstractmethod
    def __call__(
        self,
        net: nn.Module,
        x: Float[Tensor, "b c h w"],  # in [0,1]
        y: Int64[Tensor, " b"],
        progress: float,  # of the stage, in [0,1)
        noise: Noise,
    ) -> Iterator[Loss]:
        """Losses for one batch; ``net`` is in train mode."""

    @property
    def attack_used(self) -> Attack | None:
        """The attack of the inner maximisation, which validation uses too; None for objectives without one."""
        return getattr(self, "attack", None)


OBJECTIVES: Registry[Objective] = Registry("objective", "rprune.objectives", lambda: Objective)
