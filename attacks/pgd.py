"""Projected gradient descent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.base import ATTACKS, Attack, Found, Loss, cross_entropy, input_gradient, margin
from rprune.attacks.noise import Keyed, Noise
from rprune.attacks.norms import project, random_in_ball, steepest
from rprune.threat import ThreatModel


@ATTACKS.register("pgd")
@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Iterated ascent on the loss, projected into ball and box (Madry et al., ICLR 2018, section 2.1), linf and l2.

    ``step`` is in units of eps; None means ``2.5 / steps``, Madry et al.'s rule, which for 10 steps is the eps/4 of the
    HYDRA and HARP papers (2/255 at 8/255). ``start``: "ball" draws uniformly from it (PGD-AT), "near" adds 0.001 of
    Gaussian noise (TRADES), "none" starts at x. ``loss`` "margin" is Carlini and Wagner's (S&P 2017, f6), which stops
    to grow at ``-kappa`` (HARP's code: 50); None: never. In evaluation every restart works on the samples still
    unbroken; a sample leaves when its margin falls below ``-overshoot`` logits: 0 stops at the first wrong point, inf
    never.
    """

    steps: Annotated[int, Field(ge=1)] = 10
    step: Annotated[float, Field(gt=0)] | None = None
    restarts: Annotated[int, Field(ge=1)] = 1
    start: Literal["ball", "near", "none"] = "ball"
    loss: Literal["ce", "margin"] = "ce"
    kappa: Annotated[float, Field(ge=0)] | None = None
    overshoot: Annotated[float, Field(ge=0)] = 0.0

    @property
    def label(self) -> str:
        return "pgd" if self.loss == "ce" else "cw-pgd"

    def queries(self, classes: int = 10) -> int:  # noqa: ARG002
        return self.restarts * (self.steps + 1)

    def for_transfer(self) -> PGD:
        return replace(self, overshoot=math.inf)

    def perturb(self, net: nn.Module, x: Tensor, threat: ThreatModel, loss: Loss, noise: Noise) -> Tensor:
        point = self._start(x, threat, noise, 0)
        for _ in range(self.steps):
            gradient, *_ = input_gradient(net, point, loss)
            point = self._move(point, gradient, x, threat)
        return point

    def search(self, net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, noise: Keyed) -> Found:
        best = x.clone()
        lowest = torch.full_like(x[:, 0, 0, 0], torch.inf)
        queries = torch.zeros_like(y)
        for restart in range(self.restarts):
            alive = torch.nonzero(lowest > -self.overshoot).flatten()
            if len(alive) == 0:
                break
            point = self._start(x[alive], threat, noise.select(alive), restart)
            for step in range(self.steps + 1):
                gradient, _, logits = input_gradient(net, point, self._loss(y[alive]))
                margins = margin(logits, y[alive])
                queries[alive] += 1
                better = margins < lowest[alive]
                lowest[alive] = torch.where(better, margins, lowest[alive])
                best[alive[better]] = point[better]
                if step == self.steps:
                    break
                keep = margins > -self.overshoot
                point = self._move(point[keep], gradient[keep], x[alive[keep]], threat)
                alive = alive[keep]
                if len(alive) == 0:
                    break
        return Found(best, lowest, queries)

    def _loss(self, y: Tensor) -> Loss:
        if self.loss == "ce":
            return cross_entropy(y)
        least = -math.inf if self.kappa is None else -self.kappa
        return lambda logits: -margin(logits, y).clamp_min(least)

    def _start(self, x: Tensor, threat: ThreatModel, noise: Noise, restart: int) -> Tensor:
        if self.start == "none":
            return x
        purpose = f"pgd/{restart}"
        if self.start == "near":
            return project(x + 0.001 * noise.normal(x, purpose), x, threat)
        unit = noise.uniform(x, purpose)
        normal = noise.normal(x, purpose) if threat.norm == "l2" else unit
        return project(x + threat.eps * random_in_ball(unit, normal, threat.norm), x, threat)

    def _move(self, point: Tensor, gradient: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
        length = (2.5 / self.steps if self.step is None else self.step) * threat.eps
        return project(point + length * steepest(gradient, threat.norm), x, threat)
