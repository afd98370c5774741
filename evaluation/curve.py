"""Robust accuracy over eps, and how far the nearest misclassified point is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rprune.attacks.fab import FAB
from rprune.attacks.noise import Keyed
from rprune.data.loaders import Batch
from rprune.evaluation.outcome import Robustness
from rprune.evaluation.probe import huge, reach
from rprune.evaluation.target import INVALID, Target, usual_batch
from rprune.seeds import derive
from rprune.threat import Norm, ThreatModel

Take = Callable[[Int64[Tensor, " b"]], Batch]
"""Samples by id: ``Loader.take``."""

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""The curve's points in units of the claim's eps; one at which at most one class survives is added."""
NEAREST = FAB(steps=20, targets=3)  # on the attack oracle 0.5 % above the default's 100 steps to 9 classes (median)
ROUNDING = 1e-6  # of float32 in the size of a perturbation, as attacks.norms.within


def security_curve(
    target: Target,
    take: Take,
    threat: ThreatModel,
    outcome: Robustness,
    seed: int = 0,
    *,
    factors: Sequence[float] = FACTORS,
    batch_size: int | None = None,
) -> list[tuple[float, int]]:
    """Number of samples still classified right at every eps, in ascending order of eps (pixel units in [0,1]).

    It agrees with the claim: at its eps the count is ``outcome.correct``, at 0 that of clean samples. Below, only what
    the next larger eps breaks is attacked again; above, only what the next smaller eps leaves; so the curve never
    rises. A point that breaks a sample does so at every eps that reaches it. The attacks are quick ones, so that the
    counts beside the claim's own are upper bounds, a little above what the suite would leave.
    """
    image = take(outcome.ids[:1]).x
    pixels, batch_size = image.numel(), batch_size or usual_batch(image)
    points = sorted({threat.eps * factor for factor in factors} | {0.0, threat.eps, huge(threat, pixels).eps})
    counts = {threat.eps: outcome.correct, 0.0: outcome.clean.correct}
    nearest = torch.full((len(outcome.ids),), torch.inf)  # smallest perturbation known to break each sample
    nearest[torch.isin(outcome.ids, outcome.broken_ids)] = outcome.size.to(nearest.dtype)

    def robust_at(eps: float, rows: Tensor) -> Tensor:
        """Which of ``rows`` no known point breaks at eps, after an attack on them."""
        at = ThreatModel.of(threat.norm, eps)
        for part in torch.split(torch.nonzero(rows & (nearest > eps + ROUNDING)).flatten(), batch_size):
            if len(part):
                found = reach(target, take(outcome.ids[part]), at, derive(seed, "curve")).to(nearest)
                nearest[part] = torch.minimum(nearest[part], found)
        return rows & (nearest > eps + ROUNDING)

    broken = outcome.clean.right & ~outcome.robust
    for eps in reversed([eps for eps in points if 0 < eps < threat.eps]):
        broken = broken & ~robust_at(eps, broken)
        counts[eps] = outcome.clean.correct - int(broken.sum())
    robust = outcome.robust
    for eps in [eps for eps in points if eps > threat.eps]:
        robust = robust_at(eps, robust)
        counts[eps] = int(robust.sum())
    return [(eps, counts[eps]) for eps in points]


def distances(target: Target, probe: Batch, norm: Norm, seed: int = 0, *, attack: FAB = NEAREST) -> Float[Tensor, " n"]:
    """Norm of the smallest perturbation found that the artifact misclassifies, nan where none is; an upper bound.

    0 for what it misclassifies already. Needs a search net: nan everywhere without one.
    """
    if target.search is None:
        return torch.full_like(probe.x[:, 0, 0, 0], torch.nan)
    distance, points = attack.distances(
        target.search, probe.x, probe.y, norm, Keyed(derive(seed, "distance"), probe.ids)
    )
    verdict = target.verdict(points)
    broken = (verdict != probe.y) & (verdict != INVALID) & distance.isfinite()
    return distance.masked_fill(~broken, torch.nan)
