"""The contract of a training objective: a generator of losses.

An objective prepares what a step needs, its adversarial points for instance, and yields a function that computes the
loss at the weights of the moment. The loop calls it, does backward, and steps; where the weights are perturbed on the
way (AWP, S2AP) it calls it again. Most objectives yield once a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, TypeAlias

from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.base import Attack
from rprune.attacks.noise import Stream
from rprune.registry import Configured, Registry


@dataclass(frozen=True, eq=False)
class Loss:
    """``value`` is what is minimised; ``logits`` and ``parts`` feed the log, so that no extra forward is needed."""

    value: Float[Tensor, ""]
    logits: Float[Tensor, "b k"]
    parts: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


Step: TypeAlias = Callable[[], Loss]
"""The loss of one optimizer step, computed with the weights that the net holds when it is called."""


@dataclass(frozen=True, kw_only=True)
class Objective(Configured, ABC):
    """Base of all objectives. Derived classes are frozen dataclasses; those that attack hold threat and attack.

    ``label_smoothing`` (Szegedy et al., CVPR 2016) acts in every cross-entropy against labels.
    """

    paper: ClassVar[str] = ""
    cost: ClassVar[str] = ""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @abstractmethod
    def __call__(
        self,
        net: nn.Module,
        x: Float[Tensor, "b c h w"],  # in [0,1]
        y: Int64[Tensor, " b"],
        progress: float,  # of the stage, in [0,1)
        noise: Stream,
    ) -> Iterator[Step]:
        """The steps of one batch; ``net`` is in train mode. ``noise.memory`` keeps tensors until the epoch ends."""

    @property
    def attack_used(self) -> Attack | None:
        """The attack of validation: ``validation_attack`` of objectives whose own search is no full attack, otherwise
        that of the inner maximisation; None for objectives without one."""
        return getattr(self, "validation_attack", None) or getattr(self, "attack", None)

    def cross_entropy(self, logits: Float[Tensor, "b k"], y: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
        return nn.functional.cross_entropy(logits, y, label_smoothing=self.label_smoothing)


OBJECTIVES: Registry[Objective] = Registry("objective", "rprune.objectives", lambda: Objective)
