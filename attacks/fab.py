"""Fast adaptive boundary attack: the nearest misclassified point, by linear models of the boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.base import (
    ATTACKS,
    Attack,
    Found,
    Loss,
    frozen,
    input_gradient,
    margin,
    rows_of,
    worth_compacting,
)
from rprune.attacks.noise import Keyed
from rprune.attacks.norms import per_sample, row_sum, size
from rprune.threat import Norm, ThreatModel

NEWTON = 30  # steps at most: 27 were needed in 10^5 problems with weights over dozens of decades, 6 for a trained net's


@dataclass(frozen=True, eq=False)
class _Run:
    """The samples that one run towards one class still works on; ``rows`` are their places in the batch."""

    rows: Int64[Tensor, " b"]
    x: Float[Tensor, "b c h w"]
    y: Int64[Tensor, " b"]
    target: Int64[Tensor, " b"]
    at: Float[Tensor, "b c h w"]


@ATTACKS.register("fab")
@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """Steps onto the linearised boundary to one other class, drawn back towards the image (targeted FAB, linf and l2).

    Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML 2020,
    algorithm 1, with its alpha_max, eta and beta. The targeted form and the defaults are AutoAttack's (Croce and Hein,
    "Reliable evaluation of adversarial robustness", ICML 2020): a run of ``steps`` towards each of the ``targets``
    classes ranked next to the true one in the clean logits, from the image itself; in later ``restarts`` from a random
    point, half as far as the nearest found or as eps. The final search between point and image is left out, as there.

    It seeks the nearest point, not the deepest: no ``overshoot`` leads it past the boundary; for transfer it runs as it
    is. In evaluation a sample leaves at its first misclassified point inside the threat, where AutoAttack goes on to
    the last step; the verdict is the same. Where there is none, the result is the image itself, with its margin.
    """

    steps: Annotated[int, Field(ge=1)] = 100
    targets: Annotated[int, Field(ge=1)] = 9
    restarts: Annotated[int, Field(ge=1)] = 1
    alpha_max: Annotated[float, Field(ge=0, le=1)] = 0.1
    eta: Annotated[float, Field(ge=1)] = 1.05
    beta: Annotated[float, Field(gt=0, le=1)] = 0.9

    @property
    def label(self) -> str:
        return "fab-t"

    def queries(self, classes: int = 10) -> int:
        """One for the ranking of classes; in every step one with and one without gradient."""
        return 1 + self.restarts * min(self.targets, classes - 1) * 2 * self.steps

    def search(self, net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, noise: Keyed) -> Found:
        return self._nearest(net, x, y, threat.norm, threat.eps, noise, early=True)[0]

    def distances(
        self, net: nn.Module, x: Float[Tensor, "b c h w"], y: Int64[Tensor, " b"], norm: Norm, noise: Keyed
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b c h w"]]:
        """Distance of the nearest point in [0,1] found that the net misclassifies, and the point; never stops early.

        0 and the image itself where the net is wrong already, inf and the image where nothing was found. An upper bound
        of the true distance, on a linear net by less than 1 %. Costs :meth:`queries` forward passes for every sample
        that the net gets right. Later restarts begin within the whole box where nothing was found yet.
        """
        widest = 1.0 if norm == "linf" else math.sqrt(x[0].numel())
        with frozen(net):
            found, distance = self._nearest(net, x, y, norm, widest, noise, early=False)
        return distance, found.x

    def _nearest(
        self, net: nn.Module, x: Tensor, y: Tensor, norm: Norm, reach: float, noise: Keyed, early: bool
    ) -> tuple[Found, Tensor]:
        """The nearest misclassified point at most ``reach`` away (``early``: the first), and its distance."""
        with torch.no_grad():
            logits = net(x)
        lowest, point, queries = margin(logits, y), x.clone(), torch.ones_like(y)
        distance = torch.where(lowest <= 0, torch.zeros_like(lowest), torch.full_like(lowest, torch.inf))
        ranked = logits.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
        everyone = torch.arange(len(x), device=x.device)
        enough = reach if early else 0.0
        for restart, rank in product(range(self.restarts), range(min(self.targets, logits.shape[1] - 1))):
            start = x
            if restart > 0:
                start = _around(x, distance.clamp_max(reach) / 2, norm, noise, f"{self.label}/{restart}/{rank}")
            run = rows_of(_Run(everyone, x, y, ranked[:, rank], start), distance > enough)
            for step in range(self.steps):
                if len(run.rows) == 0:
                    break
                new = self._step(net, run, norm)
                with torch.no_grad():
                    margins = margin(net(new), run.y)
                before, length = distance[run.rows], size(new - run.x, norm)
                going, wrong = before > enough, margins <= 0
                nearer = going & wrong & (length <= reach) & (length < before)
                queries[run.rows] += 2 * going
                distance[run.rows] = torch.where(nearer, length, before)
                lowest[run.rows] = torch.where(nearer, margins, lowest[run.rows])
                point[run.rows] = torch.where(per_sample(nearer, new), new, point[run.rows])
                back = run.x + self.beta * (new - run.x)
                run = replace(run, at=torch.where(per_sample(wrong, new), back, new))
                going = distance[run.rows] > enough
                if worth_compacting(going, step):
                    run = rows_of(run, going)
        return Found(point, lowest, queries), distance

    def _step(self, net: nn.Module, run: _Run, norm: Norm) -> Tensor:
        """From where the run is towards the boundary, and towards the boundary from the image."""
        gradient, value, _ = input_gradient(net, run.at, _gap(run.y, run.target))
        at_x = value + row_sum(gradient * (run.x - run.at))  # of the linear model
        both = torch.cat([run.at, run.x]), torch.cat([gradient, gradient]), torch.cat([value, at_x])
        here, there = onto_plane(*both, norm).chunk(2)
        near, far = size(here, norm).clamp_min(1e-8), size(there, norm).clamp_min(1e-8)
        alpha = per_sample((near / (near + far)).clamp_max(self.alpha_max), run.x)
        return ((1 - alpha) * (run.at + self.eta * here) + alpha * (run.x + self.eta * there)).clamp(0.0, 1.0)


def onto_plane(
    point: Float[Tensor, "b ..."], weights: Float[Tensor, "b ..."], value: Float[Tensor, " b"], norm: Norm
) -> Float[Tensor, "b ..."]:
    """The smallest ``move`` with ``value + <weights, move> = 0`` and ``point + move`` in [0,1]; ``point`` is in it.

    Where no such move exists, the move to the corner that comes nearest to it. Pixels of weight 0 never move.

    The best move lets every pixel go by ``min(r pace, room)`` in its useful direction: ``room`` is the way to the box,
    ``pace`` 1 (linf) or |weight| (l2). What this gains, sum |weight| min(r pace, room), is concave and piecewise linear
    in r, so Newton's method from r = 0 climbs to the r that gains |value|, and stays there once on the right piece.
    """
    tiny, endless = torch.finfo(weights.dtype).tiny, torch.finfo(weights.dtype).max
    value = value.nan_to_num(0.0)
    way = weights.sign().mul_(per_sample(-value.sign(), weights))
    room = way.clamp_min(0.0).sub_(way * point)
    weight, need = weights.abs(), value.abs()
    gains = weight * room
    pace: Tensor | float = 1.0
    full_at, slopes = room, weight
    if norm == "l2":  # over the largest that can move: squares would leave float's range
        most = (weight * room.sign()).flatten(1).amax(1).clamp_min(tiny)
        pace = (weight / per_sample(most, weight)).clamp_max_(1.0)
        full_at, slopes = room / pace, weight * pace
    r = torch.where(row_sum(gains) < need, endless, torch.zeros_like(need))
    part = torch.empty_like(gains)  # comparisons write 0.0 and 1.0 to it: masks of bool are slow on a CPU
    for _ in range(NEWTON):
        at = per_sample(r, weight)
        slope = row_sum(torch.gt(full_at, at, out=part).mul_(slopes))
        missing = need - row_sum(torch.le(full_at, at, out=part).mul_(gains))
        further = torch.where(slope > 0, torch.maximum(r, missing / slope).clamp_max(endless), r)
        if r.device.type == "cpu" and torch.equal(further, r):  # for good: more steps change no bit
            break
        r = further
    return torch.minimum(pace * per_sample(r, weight), room, out=part).mul_(way)


def _gap(y: Tensor, target: Tensor) -> Loss:
    """z_target - z_y: negative where the true class is ahead."""
    return lambda logits: (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def _around(x: Tensor, radius: Tensor, norm: Norm, noise: Keyed, purpose: str) -> Tensor:
    """A point of the sphere of that radius around x in a random direction, clipped to the box."""
    way = noise.uniform(x, purpose) if norm == "linf" else noise.normal(x, purpose)
    return (x + way * per_sample(radius / size(way, norm), x)).clamp(0.0, 1.0)
