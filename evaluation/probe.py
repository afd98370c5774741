"""Short attacks on a few samples: evidence beside that of a suite, for checks and plots."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rprune.attacks.apgd import APGD
from rprune.attacks.base import Attack, Found, margin
from rprune.attacks.fgsm import FGSM
from rprune.attacks.noise import Keyed
from rprune.attacks.norms import project, size, steepest
from rprune.attacks.square import Square
from rprune.data.loaders import Batch
from rprune.evaluation.outcome import Robustness
from rprune.evaluation.target import INVALID, Target
from rprune.seeds import derive
from rprune.threat import ThreatModel

CE, MARGIN = APGD(steps=20), APGD(steps=20, loss="margin")
"""The quick attacks: the loss that all know, and the strongest single one for its cost."""
SHORT, LONG = APGD(steps=10), APGD(steps=100)
BLIND = Square(budget=300, rescale=True)


def corner(x: Float[Tensor, "b c h w"], threat: ThreatModel, noise: Keyed, draw: int) -> Float[Tensor, "b c h w"]:
    """A random point at distance eps: a corner of the ball for linf, in a random direction for l2."""
    return project(x + threat.eps * steepest(noise.normal(x, f"corner/{draw}"), threat.norm), x, threat)


@dataclass(frozen=True, kw_only=True)
class Corners(Attack):
    """No attack at all: the worst of a few random points at distance eps."""

    needs_gradient: ClassVar[bool] = False
    draws: int = 5

    def queries(self, classes: int = 10) -> int:  # noqa: ARG002
        return self.draws

    def search(self, net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, noise: Keyed) -> Found:
        found = Found(x.clone(), torch.full_like(x[:, 0, 0, 0], torch.inf), torch.full_like(y, self.draws))
        for draw in range(self.draws):
            point = corner(x, threat, noise, draw)
            with torch.no_grad():
                margins = margin(net(point), y)
            better = margins < found.margin
            found.margin[better], found.x[better] = margins[better], point[better]
        return found


class Run(NamedTuple):
    """What an attack did to samples, a row each."""

    broken: Bool[Tensor, " n"]  # by the artifact's verdict; False where it was not run
    margin: Float[Tensor, " n"]  # lowest of the net that it searched on, inf where it was not run
    size: Float[Tensor, " n"]  # norm of the perturbation that breaks the sample, inf where none does


def run(
    target: Target,
    net: nn.Module,
    attack: Attack,
    batch: Batch,
    threat: ThreatModel,
    seed: int,
    rows: Bool[Tensor, " n"] | None = None,
) -> Run:
    """Search on ``net`` for points around ``rows`` (None: all) of the batch; the artifact says which break a sample."""
    inf = torch.full_like(batch.x[:, 0, 0, 0], torch.inf)
    result = Run(torch.zeros_like(inf, dtype=torch.bool), inf, inf.clone())
    index = torch.nonzero(torch.ones_like(inf) if rows is None else rows).flatten()
    if len(index) > 0:
        x, y, ids = (part[index] for part in batch)
        found = attack.evaluate(net, x, y, threat, Keyed(seed, ids))
        verdict = target.verdict(found.x)
        broken = (verdict != y) & (verdict != INVALID)
        result.broken[index], result.margin[index] = broken, found.margin
        result.size[index[broken]] = size(found.x - x, threat.norm)[broken]
    return result


@torch.no_grad()
def logits_of(net: nn.Module, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
    """On the device of ``x``, as the artifact's may come from elsewhere."""
    logits: Tensor = net(x)
    return logits.to(x.device)


def reach(target: Target, batch: Batch, threat: ThreatModel, seed: int) -> Float[Tensor, " n"]:
    """Size of a perturbation within ``threat`` that breaks each sample, inf where the quick attacks find none."""
    nearest = torch.full_like(batch.x[:, 0, 0, 0], torch.inf)
    net, attacks = (target.artifact, (BLIND,)) if target.search is None else (target.search, (CE, MARGIN))
    for attack in attacks:
        nearest = torch.minimum(nearest, run(target, net, attack, batch, threat, seed, nearest.isinf()).size)
    return nearest


def huge(threat: ThreatModel, pixels: int) -> ThreatModel:
    """The same norm with an eps at which the uniform grey image lies in every ball, so that at most one class survives.

    linf: 0.5. l2: half the diagonal of the box of ``pixels`` values, and no less than 16 eps.
    """
    eps = max(0.5, threat.eps) if threat.norm == "linf" else max(0.5 * pixels**0.5, 16 * threat.eps)
    return ThreatModel.of(threat.norm, eps)


@dataclass(frozen=True, eq=False)
class Probe:
    """Samples that the artifact gets right, and what attacks do to them. Each runs once, when it is first asked for.

    All but ``noise`` and ``blind`` need a search net.
    """

    target: Target
    batch: Batch
    threat: ThreatModel
    outcome: Robustness
    seed: int

    @property
    def n(self) -> int:
        return len(self.batch.y)

    @property
    def functions(self) -> tuple[nn.Module, ...]:
        """The nets that must be one and the same function."""
        return tuple(net for net in (self.target.artifact, self.target.search) if net is not None)

    @property
    def net(self) -> nn.Module:
        """The search net, or where there is none the artifact."""
        return self.target.artifact if self.target.search is None else self.target.search

    @cached_property
    def logits(self) -> Float[Tensor, "n k"]:
        return logits_of(self.net, self.batch.x)

    @cached_property
    def margin(self) -> Float[Tensor, " n"]:
        return margin(self.logits, self.batch.y)

    @cached_property
    def left(self) -> Bool[Tensor, " n"]:
        """Samples that the suite did not break."""
        return ~torch.isin(self.batch.ids, self.outcome.broken_ids.to(self.batch.ids))

    @cached_property
    def white_box(self) -> Bool[Tensor, " n"]:
        """Samples that gradients of the search net break: in the suite or here."""
        kinds = {tally.name: tally.kind for tally in self.outcome.tallies}
        by = dict(zip(self.outcome.broken_ids.tolist(), self.outcome.broken_by, strict=True))
        suite = [kinds.get(by.get(i, "")) == "white-box" for i in self.batch.ids.tolist()]
        return torch.tensor(suite, device=self.left.device) | self.ce.broken | self.cw.broken | self.long.broken

    @cached_property
    def places(self) -> tuple[Float[Tensor, "n c h w"], ...]:
        """The images, random points at distance eps, and those one gradient step away: what a net must cope with."""
        x, y, ids = self.batch
        places = (x, corner(x, self.threat, Keyed(self.seed, ids), 0))
        if self.target.search is None:
            return places
        return (*places, FGSM().evaluate(self.target.search, x, y, self.threat, Keyed(self.seed, ids)).x)

    @cached_property
    def ce(self) -> Run:
        return self._guided(CE, self.threat)

    @cached_property
    def cw(self) -> Run:
        return self._guided(MARGIN, self.threat)

    @cached_property
    def half(self) -> Run:
        return self._guided(CE, self.threat.scaled(0.5))

    @cached_property
    def twice(self) -> Run:
        return self._guided(CE, self.threat.scaled(2.0))

    @cached_property
    def short(self) -> Run:
        return self._guided(SHORT, self.threat, self.left, "again")

    @cached_property
    def long(self) -> Run:
        """The same start as ``short``, other than that of ``ce``."""
        return self._guided(LONG, self.threat, self.left, "again")

    @cached_property
    def doomed(self) -> Bool[Tensor, " n"]:
        """Samples that the artifact certainly gets wrong within :func:`huge`: it gives the grey image another class."""
        grey = torch.full_like(self.batch.x[:1], 0.5)
        return self.batch.y != self.target.verdict(grey)

    @cached_property
    def far(self) -> Bool[Tensor, " n"]:
        """Which of these the quick attacks break within :func:`huge`."""
        x, y, ids = (part[self.doomed] for part in self.batch)
        found = torch.zeros_like(self.doomed)
        found[self.doomed] = reach(
            self.target, Batch(x, y, ids), huge(self.threat, x.shape[1:].numel()), self.seed
        ).isfinite()
        return found

    @cached_property
    def blind(self) -> Run:
        """Square on the artifact, where gradients found nothing."""
        return run(self.target, self.target.artifact, BLIND, self.batch, self.threat, self.seed, ~self.white_box)

    @cached_property
    def transfer(self) -> Bool[Tensor, " n"]:
        """Samples that points of the parents break."""
        runs = [
            run(self.target, net, MARGIN.for_transfer(), self.batch, self.threat, self.seed)
            for net in self.target.parents
        ]
        return torch.stack([each.broken for each in runs]).any(0)

    @cached_property
    def noise(self) -> Run:
        return run(self.target, self.target.artifact, Corners(), self.batch, self.threat, self.seed)

    def _guided(self, attack: Attack, threat: ThreatModel, rows: Tensor | None = None, start: str = "") -> Run:
        assert self.target.search is not None
        return run(self.target, self.target.search, attack, self.batch, threat, derive(self.seed, start), rows)
