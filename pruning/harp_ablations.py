"""HARP's two ablations: rates alone, scores alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rprune.pruning.base import METHODS
from rprune.pruning.harp import Harp, HarpPruner
from rprune.pruning.hydra import Hydra
from rprune.pruning.papers import HARP, Settings
from rprune.pruning.rates import Rated
from rprune.pruning.structure import ChannelRates


class Resting(Rated):
    """Scores that rest: the rates alone are learned."""

    scores: dict[str, Tensor]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for score in self.scores.values():
            score.requires_grad_(False)

    def parameters(self) -> Iterable[Tensor]:
        return [*self._norms, self.r]


class RatePruner(Resting, HarpPruner):
    """HARP whose scores rest."""


class ChannelRatePruner(Resting, ChannelRates):
    """The same on channels."""


@METHODS.register("harp-r")
@dataclass(frozen=True, kw_only=True)
class HarpR(Harp):
    """HARP-r: learn the rates alone (Zhao and Wressnegger, ICLR 2023, Table 1; rate_prune of its code).

    The scores rest at their initial values, so that a layer keeps its largest weights, as many as its rate says.
    Options and defaults are HARP's.
    """

    learns: ClassVar[str] = "rates, batch norm"
    pruner: ClassVar[type[HarpPruner]] = RatePruner
    channel_pruner: ClassVar[type[ChannelRates]] = ChannelRatePruner


@METHODS.register("harp-s")
@dataclass(frozen=True, kw_only=True)
class HarpS(Hydra):
    """HARP-S: learn the scores alone, at the target's kept share a_t in every layer (Zhao and Wressnegger, ICLR 2023).

    Table 1 of the paper. Its released code never sets r in this mode and keeps 73 % whatever is asked; here the target
    is met exactly, which makes it HYDRA by another name. Options and defaults are HYDRA's.
    """

    paper: ClassVar[str] = "Zhao and Wressnegger, ICLR 2023"
    paper_settings: ClassVar[Settings] = HARP
