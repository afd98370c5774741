"""What attacks did to a data set: counts by attack, verdicts by sample, and the points that break samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rprune.evaluation.accuracy import Predictions

Kind = Literal["white-box", "black-box", "transfer"]


@dataclass(frozen=True)
class Tally:
    """One attack of a suite: how many samples it tried and broke, after the attacks before it."""

    name: str
    kind: Kind
    tried: int
    broken: int  # by the artifact's verdict
    misses: int  # the search net's success that the artifact did not share
    invalid: int  # points at which the artifact has no finite logits
    queries: int  # forward passes


@dataclass(frozen=True, eq=False)
class Robustness:
    """Outcome for n samples of a split, in order of ``ids``. A sample is robust when the artifact is right on it and on
    every point found.

    ``points`` and ``adversarial`` belong to the samples in ``broken_ids``: the points that the artifact misclassifies,
    and what it calls them. Where ``exact``, the point is on the grid of 8-bit pixels.
    """

    ids: Int64[Tensor, " n"]
    clean: Predictions
    broken_ids: Int64[Tensor, " m"]
    points: Float[Tensor, "m c h w"]
    adversarial: Int64[Tensor, " m"]
    exact: Bool[Tensor, " m"]
    broken_by: list[str]
    tallies: tuple[Tally, ...]
    margin: Float[Tensor, " n"]  # lowest that any search found, nan where none ran
    queries: Int64[Tensor, " n"]  # forward passes of all searches
    size: Float[Tensor, " m"]  # norm of the perturbation
    certified: Bool[Tensor, " n"]  # skipped, because proved
    complete: bool  # every attack ran on every sample that it had to; transfers only where there are parents

    @property
    def robust(self) -> Bool[Tensor, " n"]:
        return self.clean.right & ~torch.isin(self.ids, self.broken_ids)

    @property
    def correct(self) -> int:
        return int(self.robust.sum())
