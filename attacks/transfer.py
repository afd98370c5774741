"""Points found on another net, tried on the artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, field_validator
from torch import Tensor, nn

from rprune.attacks.base import ATTACKS, Attack, Found
from rprune.attacks.noise import Keyed
from rprune.attacks.pgd import PGD
from rprune.threat import ThreatModel


@ATTACKS.register("transfer")
@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """Another attack on the nets that the artifact was made from, going on past their boundary (Papernot et al., 2016).

    For an 8-bit file: on its float parent, whose gradients rounding does not mask. ``attack`` is a name of
    ``rprune list attacks`` or a table with its options; it runs in its form that does not stop at the boundary.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    attack: Attack = PGD()

    @field_validator("attack", mode="before")
    @classmethod
    def _built(cls, value: Any) -> Attack:
        return value if isinstance(value, Attack) else ATTACKS.build(value)

    @property
    def label(self) -> str:
        return f"transfer {self.attack.label}"

    def queries(self, classes: int = 10) -> int:
        return self.attack.for_transfer().queries(classes)

    def search(self, net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, noise: Keyed) -> Found:
        """``net`` is the parent. What it finds says nothing of the artifact before the artifact was asked."""
        return self.attack.for_transfer().search(net, x, y, threat, noise)
