"""Robust accuracy over a split: found on the search net, counted on the artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from rprune.attacks.base import ATTACKS, Attack
from rprune.attacks.noise import Keyed
from rprune.data.loaders import Loader
from rprune.evaluation.accuracy import Predict, Predictions
from rprune.threat import ThreatModel


@dataclass(frozen=True, eq=False)
class Robustness:
    """Outcome for the first n samples. A sample is robust when the artifact is right on it and on every point found.

    ``points`` and ``adversarial`` belong to the samples in ``broken_ids``: the points that the artifact misclassifies,
    and what it calls them. ``misses`` are points that fooled the search net but not the artifact.
    """

    clean: Predictions
    broken_ids: Int64[Tensor, " m"]
    points: Float[Tensor, "m c h w"]
    adversarial: Int64[Tensor, " m"]
    broken_by: list[str]
    queries: int
    misses: int

    @property
    def robust(self) -> Bool[Tensor, " n"]:
        robust = self.clean.right.clone()
        robust[self.broken_ids] = False
        return robust

    @property
    def correct(self) -> int:
        return int(self.robust.sum())


def robustness(
    search: Sequence[nn.Module],
    verify: Predict,
    data: Loader,
    threat: ThreatModel,
    attacks: Sequence[Attack],
    *,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 250,
    on_progress: Callable[[int, int, int], None] = lambda done, robust, total: None,
) -> Robustness:
    """Attack the first ``limit`` samples, each attack on those that the artifact still gets right.

    Args:
        search: differentiable networks whose gradients guide the attacks: the artifact's own twin first, then others
            (the float parent of an 8-bit net) whose points are tried on the artifact as they transfer.
        verify: the artifact's predicted classes; only its verdict counts.
    """
    total = min(limit or len(data), len(data))
    plan = [(ATTACKS.name_of(attack), attack, search[0]) for attack in attacks]
    plan += [(f"{ATTACKS.name_of(a)} transferred", a.for_transfer(), net) for net in search[1:] for a in attacks]
    labels, clean, ids, points, adversarial, names = [], [], [], [], [], []
    queries = misses = robust = done = 0
    for batch in data.ordered(batch_size, limit):
        predicted = verify(batch.x).to(batch.y.device)
        alive = torch.nonzero(predicted == batch.y).flatten()
        labels.append(batch.y.cpu())
        clean.append(predicted.cpu())
        for name, attack, net in plan:
            if len(alive) == 0:
                break
            x, y, keys = batch.x[alive], batch.y[alive], batch.ids[alive]
            found = attack.evaluate(net, x, y, threat, Keyed(seed, keys))
            point, verdict = found.x, verify(found.x).to(y.device)
            queries += int(found.queries.sum())
            missed = torch.nonzero(found.broken & (verdict == y)).flatten()
            if len(missed):  # over the search net's boundary, not over the artifact's: go on instead of stopping there
                again = attack.for_transfer().evaluate(net, x[missed], y[missed], threat, Keyed(seed, keys[missed]))
                point[missed], verdict[missed] = again.x, verify(again.x).to(y.device)
                queries += int(again.queries.sum())
            fooled = verdict != y
            misses += int((found.broken & ~fooled).sum())
            ids.append(keys[fooled].cpu())
            points.append(point[fooled].cpu())
            adversarial.append(verdict[fooled].cpu())
            names += [name] * int(fooled.sum())
            alive = alive[~fooled]
        robust += len(alive)
        done += len(batch.y)
        on_progress(done, robust, total)
    predictions = Predictions(torch.cat(labels), torch.cat(clean))
    if not ids:
        nothing = torch.zeros(0, dtype=torch.int64)
        return Robustness(predictions, nothing, batch.x[:0].cpu(), nothing, [], queries, misses)
    order = torch.cat(ids).argsort()
    return Robustness(
        predictions,
        torch.cat(ids)[order],
        torch.cat(points)[order],
        torch.cat(adversarial)[order],
        [names[i] for i in order.tolist()],
        queries,
        misses,
    )
