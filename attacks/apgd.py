"""Auto-PGD: projected gradient ascent that chooses its own step size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.base import ATTACKS, Attack, Found, Loss, input_gradient, margin, rows_of, worth_compacting
from rprune.attacks.noise import Keyed, Noise
from rprune.attacks.norms import per_sample, project, size, steepest
from rprune.errors import UsageError
from rprune.threat import ThreatModel

LABELS = {"ce": "apgd-ce", "dlr": "apgd-dlr", "margin": "cw-apgd"}
TARGETED_LABELS = {"dlr": "apgd-t", "margin": "cw-apgd-t"}


@ATTACKS.register("apgd")
@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Ascent with momentum that halves its steps where the loss stalls (Croce and Hein, ICML 2020, algorithm 1).

    The defaults, in linf and l2, are those of AutoAttack's code: a random start on the ball's surface, steps of 2 eps,
    momentum 0.75, checkpoints after 22, 41, 57, ... of 100 steps (:func:`checkpoints`). A checkpoint halves a sample's
    step and takes it back to its best point when at most ``rho`` of the window's steps raised the loss, or when neither
    the step nor the best loss has changed since the checkpoint before. As in that code, the very first step counts as
    a rise when the loss after it is positive.

    ``loss``: "ce", "dlr" (the paper's difference of logits ratio, which the logits' scale does not matter to) or
    "margin" (Carlini and Wagner's, which stops to grow at ``kappa``; None: never). ``targets`` > 0 goes for that many
    classes (at most all others; AutoAttack: 9) one by one, in order of the clean logits, with the paper's targeted DLR
    or z_t - z_y. DLR needs three classes and targeted DLR four; below that the margin and z_t - z_y stand in. ``eot``
    averages gradient, loss and logits over that many passes, for nets that draw random numbers (AutoAttack's rand: 20).

    AutoAttack takes all steps with every sample and returns the last wrong point. Here a sample leaves once its margin
    is at most ``-overshoot`` logits (0: at the first wrong point; inf: never), and the point of lowest margin counts.
    In training one start climbs all steps on the given loss, and the point where that was highest counts.
    """

    steps: Annotated[int, Field(ge=1)] = 100
    restarts: Annotated[int, Field(ge=1)] = 1
    loss: Literal["ce", "dlr", "margin"] = "ce"
    targets: Annotated[int, Field(ge=0)] = 0
    rho: Annotated[float, Field(ge=0, le=1)] = 0.75
    kappa: Annotated[float, Field(ge=0)] | None = None
    eot: Annotated[int, Field(ge=1)] = 1
    overshoot: Annotated[float, Field(ge=0)] = 0.0

    def __post_init__(self) -> None:
        if self.targets and self.loss not in TARGETED_LABELS:
            raise UsageError(f"apgd has no targeted form of the loss {self.loss}", "with targets use dlr or margin")

    @property
    def label(self) -> str:
        return (TARGETED_LABELS if self.targets else LABELS)[self.loss]

    def queries(self, classes: int = 10) -> int:
        """One pass ranks the classes where there are targets."""
        runs = self.restarts * (min(self.targets, classes - 1) or 1)
        return runs * (self.steps + 1) * self.eot + bool(self.targets)

    def for_transfer(self) -> APGD:
        return replace(self, overshoot=math.inf)

    def perturb(self, net: nn.Module, x: Tensor, threat: ThreatModel, loss: Loss, noise: Noise) -> Tensor:
        ascent = self._start(x, threat, noise, "0/0")
        for step in range(self.steps + 1):
            self._move(ascent, step, threat)
            self._look(net, ascent, loss, step)
        return ascent.best

    def search(self, net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, noise: Keyed) -> Found:
        found = Found(x.clone(), torch.full_like(x[:, 0, 0, 0], torch.inf), torch.zeros_like(y))
        targets = y[:, None]
        if self.targets:
            with torch.no_grad():
                others = net(x).scatter(1, y[:, None], -torch.inf)
            targets = others.argsort(dim=1, descending=True, stable=True)[:, : min(self.targets, others.shape[1] - 1)]
            found.queries.add_(1)
        for rank, restart in product(range(targets.shape[1]), range(self.restarts)):
            index = torch.nonzero(found.margin > -self.overshoot).flatten()
            if len(index) == 0:
                break
            going, ascent = index >= 0, self._start(x[index], threat, noise.select(index), f"{rank}/{restart}")
            run = Run(index, y[index], targets[index, rank], going, ascent, rows_of(found, index))
            self._run(net, run, threat, found)
        return found

    def _run(self, net: nn.Module, run: Run, threat: ThreatModel, found: Found) -> None:
        """Climbs from one start towards one target; what it comes upon goes into ``found``."""
        for step in range(self.steps + 1):
            self._move(run.ascent, step, threat)
            logits = self._look(net, run.ascent, self._loss(run.y, run.target), step)
            run.watch(margin(logits, run.y), self.eot, self.overshoot)
            if step == self.steps or worth_compacting(run.going, step):
                run.report(found)
                run = rows_of(run, run.going)
                if len(run.index) == 0:
                    break

    def _loss(self, y: Tensor, target: Tensor) -> Loss:
        """DLR is -(z_y - max_other) / (z_(1) - z_(3)), targeted -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)."""

        def loss(logits: Tensor) -> Tensor:
            if self.loss == "ce":
                return nn.functional.cross_entropy(logits, y, reduction="none")
            chosen = logits.gather(1, torch.stack([target, y], 1))
            lead = chosen[:, 0] - chosen[:, 1] if self.targets else -margin(logits, y)
            if self.loss == "margin":
                return lead if self.kappa is None else lead.clamp_max(self.kappa)
            ranks = 4 if self.targets else 3
            if logits.shape[1] < ranks:
                return lead
            top = logits.topk(ranks).values
            return lead / (top[:, 0] - (top[:, 2] + top[:, -1]) / 2 + 1e-12)

        return loss

    def _start(self, x: Tensor, threat: ThreatModel, noise: Noise, run: str) -> Ascent:
        delta = (noise.uniform if threat.norm == "linf" else noise.normal)(x, f"{self.label}/{run}")
        length = threat.eps / size(delta, threat.norm).clamp_min(1e-12)
        point, zeros = project(x + per_sample(length, x) * delta, x, threat), torch.zeros_like(length)
        return Ascent(
            x=x,
            point=point,
            before=point,
            gradient=torch.zeros_like(x),
            length=zeros + 2 * threat.eps,
            loss=zeros,
            rises=zeros,
            best=point,
            best_gradient=torch.zeros_like(x),
            best_loss=zeros - torch.inf,
            checked=zeros,
            halved=zeros == 0,
        )

    def _look(self, net: nn.Module, ascent: Ascent, loss: Loss, step: int) -> Tensor:
        """Takes in loss and gradient (not of the last points, which nobody leaves); returns the logits."""
        passes = []
        for _ in range(self.eot):
            if step < self.steps:
                passes.append(input_gradient(net, ascent.point, loss))
            else:
                with torch.no_grad():
                    logits = net(ascent.point)
                passes.append((ascent.gradient, loss(logits), logits))
        means: list[Tensor] = [sum(parts[1:], parts[0]) / self.eot for parts in zip(*passes, strict=True)]
        ascent.take(means[0], means[1].nan_to_num(-torch.inf, torch.inf, -torch.inf), first=step == 0)
        return means[2]

    def _move(self, ascent: Ascent, step: int, threat: ThreatModel) -> None:
        """To the points that step reaches; step 0 is the start."""
        if step == 0:
            return
        window = checkpoints(self.steps).get(step - 1)
        if window is not None:
            ascent.check(self.rho * window)
        there = ascent.point + per_sample(ascent.length, ascent.x) * steepest(ascent.gradient, threat.norm)
        there = project(there, ascent.x, threat)
        if step > 1:
            momentum = 0.75 * (there - ascent.point) + 0.25 * (ascent.point - ascent.before)
            there = project(ascent.point + momentum, ascent.x, threat)
        ascent.before, ascent.point = ascent.point, there


@dataclass(eq=False)
class Ascent:
    """Samples on their way up, a row each: images, numbers and flags."""

    x: Tensor
    point: Tensor
    before: Tensor  # the point of the step before
    gradient: Tensor
    length: Tensor  # of the next step
    loss: Tensor  # at the point
    rises: Tensor  # steps of this window that raised the loss
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    checked: Tensor  # best loss at the last checkpoint
    halved: Tensor  # whether that one halved the step

    def take(self, gradient: Tensor, loss: Tensor, first: bool) -> None:
        if not first:  # the first step is compared with 0, and not with the loss at the start
            self.rises, self.loss = self.rises + (loss > self.loss), loss
        better = loss > self.best_loss
        rows = per_sample(better, self.x)
        self.gradient = gradient
        self.best = torch.where(rows, self.point, self.best)
        self.best_gradient = torch.where(rows, gradient, self.best_gradient)
        self.best_loss = torch.where(better, loss, self.best_loss)

    def check(self, enough: float) -> None:
        """Halves the step of samples whose loss did not rise often enough in this window, or whose best is the old."""
        halve = (self.rises <= enough) | (~self.halved & (self.best_loss <= self.checked))
        rows = per_sample(halve, self.x)
        self.length = torch.where(halve, self.length / 2, self.length)
        self.point = torch.where(rows, self.best, self.point)
        self.gradient = torch.where(rows, self.best_gradient, self.gradient)
        self.rises, self.checked, self.halved = torch.zeros_like(self.rises), self.best_loss, halve


@dataclass(eq=False)
class Run:
    """The samples of one start towards one target, a row each. Those that are done stay until they are dropped."""

    index: Tensor  # in the batch
    y: Tensor
    target: Tensor
    going: Tensor
    ascent: Ascent
    found: Found

    def watch(self, margins: Tensor, passes: int, overshoot: float) -> None:
        best, better = self.found, self.going & (margins < self.found.margin)
        self.found = Found(
            torch.where(per_sample(better, best.x), self.ascent.point, best.x),
            torch.where(better, margins, best.margin),
            best.queries + passes * self.going,
        )
        self.going = self.going & (margins > -overshoot)

    def report(self, found: Found) -> None:
        found.x[self.index] = self.found.x
        found.margin[self.index] = self.found.margin
        found.queries[self.index] = self.found.queries


@cache
def checkpoints(steps: int) -> dict[int, int]:
    """Step -> length of the window that it ends: 22 % of the steps, then always 3 % less, but not below 6 %."""
    window, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    ends, end = {}, window
    while end <= steps:
        ends[end] = window
        window = max(window - less, least)
        end += window
    return ends
