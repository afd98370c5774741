"""Square Attack: random search from logits alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.base import ATTACKS, Attack, Found, margin, rows_of, worth_compacting
from rprune.attacks.noise import Keyed
from rprune.attacks.norms import per_sample, row_sum, steepest
from rprune.threat import Norm, ThreatModel

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which the squares' share of the image halves: the paper's schedule, for 10,000 queries."""
BLOCK = 50  # queries whose random numbers are drawn together, at a tenth of the cost of a draw for each


@ATTACKS.register("square")
@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Changes one random square of the image at a time and keeps what lowers the margin, without gradients.

    Andriushchenko et al., ECCV 2020: algorithm 1 with the squares of algorithm 2 for linf (one colour, at corners of
    the ball; start: vertical stripes) and of algorithm 3 for l2 (a square takes the norm of another; start: tiles).
    The defaults are AutoAttack's (Croce and Hein, ICML 2020). Other than there, every sample has places and colours of
    its own, and a square may lie wherever it fits, the last row and column included.

    ``budget``: queries of a restart, the one at its start included. ``p_init``: the share of the image that the first
    squares cover; it halves after 10, 50, 200, ... queries, with ``rescale`` after as many 10,000ths of the budget.
    A sample leaves once its margin is at most ``-overshoot`` logits: 0 stops at the first wrong point, inf never.
    """

    needs_gradient: ClassVar[bool] = False

    budget: Annotated[int, Field(ge=1)] = 5000
    p_init: Annotated[float, Field(gt=0, le=1)] = 0.8
    rescale: bool = False
    restarts: Annotated[int, Field(ge=1)] = 1
    overshoot: Annotated[float, Field(ge=0)] = 0.0

    def queries(self, classes: int = 10) -> int:  # noqa: ARG002
        return self.restarts * self.budget

    def for_transfer(self) -> Square:
        return replace(self, overshoot=math.inf)

    def search(self, net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, noise: Keyed) -> Found:
        found = Found(x.clone(), torch.full_like(x[:, 0, 0, 0], torch.inf), torch.zeros_like(y))
        start = stripes if threat.norm == "linf" else tiles
        for restart in range(self.restarts):
            index = torch.nonzero(found.margin > -self.overshoot).flatten()
            if len(index) == 0:
                break
            images, margins = x[index], torch.full_like(found.margin[index], torch.inf)
            point = start(images, threat.eps, rows_of(noise, index), f"square/{restart}/start")
            walk = Walk(index, images, y[index], point, margins, found.queries[index])
            with torch.no_grad():
                self._run(net, walk, threat, noise, f"square/{restart}", found)
        return found

    def _run(self, net: nn.Module, walk: Walk, threat: ThreatModel, noise: Keyed, purpose: str, found: Found) -> None:
        """Searches from one start; what it comes upon goes into ``found``."""
        propose = recolour if threat.norm == "linf" else move_mass
        height, width = walk.x.shape[2:]
        for query in range(self.budget):
            if query % BLOCK == 0:
                shares = [self.share(query + later) for later in range(BLOCK)]
                sides = [square_side(share, height, width, threat.norm) for share in shares]
                plan = draw(walk.x, threat.norm, sides, rows_of(noise, walk.index), f"{purpose}/{query // BLOCK}")
            point = walk.point
            if query > 0:
                point = propose(point, walk.x, threat.eps, sides[query % BLOCK], plan.at(query % BLOCK))
            going = walk.ask(net, point, self.overshoot)
            if worth_compacting(going, query):
                walk.report(found)
                walk, plan = rows_of(walk, going), rows_of(plan, going)
                if len(walk.index) == 0:
                    return
        walk.report(found)

    def share(self, query: int) -> float:
        """The share of the image that this query's square covers; query 0 is the start."""
        query = query * 10_000 // self.budget if self.rescale else query
        return self.p_init * 0.5 ** sum(query > end for end in HALVINGS)


@dataclass(eq=False)
class Walk:
    """The samples of one start, a row each; those that are done stay until they are dropped."""

    index: Tensor  # in the batch
    x: Tensor
    y: Tensor
    point: Tensor
    margin: Tensor
    queries: Tensor

    def ask(self, net: nn.Module, point: Tensor, overshoot: float) -> Tensor:
        """Goes to these points where that lowers the margin; tells which samples go on."""
        going = self.margin > -overshoot
        margins = margin(net(point), self.y).to(self.margin.dtype)
        better = going & (margins < self.margin)
        self.point = torch.where(per_sample(better, point), point, self.point)
        self.margin = torch.where(better, margins, self.margin)
        self.queries = self.queries + going
        return self.margin > -overshoot

    def report(self, found: Found) -> None:
        best = found.margin[self.index]
        better = per_sample(self.margin < best, self.x)
        found.x[self.index] = torch.where(better, self.point, found.x[self.index])
        found.margin[self.index] = torch.minimum(self.margin, best)
        found.queries[self.index] = self.queries


@dataclass(frozen=True, eq=False)
class Choices:
    """What the random numbers of some queries say, by sample and query; ``at`` gives those of one query."""

    signs: Float[Tensor, "b ... c"]
    corners: Int64[Tensor, "b ... k"]  # first pixel of the square, for l2 of two, counted along the rows of the image
    upright: Bool[Tensor, "b ..."]  # how l2's pattern lies

    def at(self, query: int) -> Choices:
        return Choices(self.signs[:, query], self.corners[:, query], self.upright[:, query])


def draw(x: Tensor, norm: Norm, sides: Sequence[int], noise: Keyed, purpose: str) -> Choices:
    """The choices of BLOCK queries, whose squares have these sides; all places where a square fits are as likely."""
    (height, width), channels = x.shape[2:], x.shape[1]
    squares = 1 if norm == "linf" else 2
    count = channels + (2 if norm == "linf" else 5)
    numbers = noise.uniform(x.new_empty(len(x), BLOCK, count, dtype=torch.float64), purpose)
    places = torch.tensor([[height - side + 1, width - side + 1] for side in sides], device=x.device)[:, None]
    where = numbers[..., channels : channels + 2 * squares].view(len(x), BLOCK, squares, 2)
    top, left = ((where + 1) * (0.5 * places)).long().minimum(places - 1).unbind(-1)
    return Choices(_signs(numbers[..., :channels], x), top * width + left, numbers[..., -1] >= 0)


def square_side(share: float, height: int, width: int, norm: Norm) -> int:
    """Side of a square that covers this share of the image, as far as it fits; for l2 odd and at least 3."""
    side, most = max(round(math.sqrt(share * height * width)), 1), min(height, width)
    if norm == "linf":
        return min(side, most)
    return min(max(side + 1 - side % 2, 3), most - 1 + most % 2)


def stripes(x: Tensor, eps: float, noise: Keyed, purpose: str) -> Tensor:
    """Where linf starts: every column of a channel is at one side of the ball."""
    return (x + eps * _signs(noise.uniform(x[:, :, :1], purpose), x)).clamp(0.0, 1.0)


def recolour(point: Tensor, x: Tensor, eps: float, side: int, choices: Choices) -> Tensor:
    """Algorithm 2: a square goes to one corner of the ball, cut off at the box."""
    (window,) = windows(choices.corners, side, x)
    corner = x.flatten(2).gather(2, window) + eps * choices.signs[..., None]
    return point.flatten(2).scatter(2, window, corner.clamp(0.0, 1.0)).view_as(x)


def tiles(x: Tensor, eps: float, noise: Keyed, purpose: str) -> Tensor:
    """Where l2 starts: a grid of patterns, each a fifth of the image wide, turned and signed at random."""
    batch, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    signs = _signs(noise.uniform(x.new_empty(batch, channels + 1, rows, columns, 1, 1), purpose), x)
    patterns = signs[:, 1:] * torch.where(signs[:, :1] > 0, *pattern(side, x.dtype, x.device))
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    delta = torch.zeros_like(x)
    delta[:, :, top : top + rows * side, left : left + columns * side] = patterns.transpose(3, 4).reshape(
        batch, channels, rows * side, columns * side
    )
    return (x + eps * steepest(delta, "l2")).clamp(0.0, 1.0)


def move_mass(point: Tensor, x: Tensor, eps: float, side: int, choices: Choices) -> Tensor:
    """Algorithm 3: one square adds a pattern to its perturbation and gets the norm of another, which loses its own.

    Every channel of the one also gets an equal part of what was cut off at the box.
    """
    first, second = windows(choices.corners, side, x)
    upright, turned = pattern(side, x.dtype, x.device)
    added = torch.where(choices.upright[:, None, None], upright.flatten(), turned.flatten())
    added = choices.signs[..., None] * added
    delta = (point - x).flatten(2)
    unused = (eps**2 - row_sum(delta.square())).clamp_min(0.0) / x.shape[1]
    mine = delta.gather(2, first)
    delta.scatter_(2, first, 0.0)
    size = (_square_sum(mine) + _square_sum(delta.gather(2, second)) + unused[:, None, None]).sqrt()
    delta.scatter_(2, second, 0.0).scatter_(2, first, size * _unit(added + _unit(mine)))
    return (x + eps * steepest(delta.view_as(x), "l2")).clamp(0.0, 1.0)


@cache
def pattern(side: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Equation 2's eta at norm 1, and its transpose: a hill beside a hollow, each half a square.

    d rings away from a half's middle it is 1/(d+1)^2 + ... + 1/(n+1)^2, n = side // 2.
    """
    rings = torch.arange(1, side // 2 + 2, dtype=torch.float64).square().reciprocal()
    heights = rings.flip(0).cumsum(0).flip(0)
    down, *across = ((torch.arange(n) - n // 2).abs() for n in (side, side // 2, side - side // 2))
    hill, hollow = (heights[torch.maximum(down[:, None], part)] for part in across)
    eta = torch.cat([hill, -hollow], 1)
    eta = (eta / eta.square().sum().sqrt()).to(device, dtype)
    return eta, eta.T.contiguous()


def windows(corners: Int64[Tensor, "b k"], side: int, x: Float[Tensor, "b c h w"]) -> list[Int64[Tensor, "b c s"]]:
    """Pixels of each of the k squares of a sample, counted along the rows of the image; the same for all channels."""
    pixels = corners[..., None] + _inside(side, x.shape[3], x.device)
    return [part.expand(-1, x.shape[1], -1) for part in torch.split(pixels, 1, dim=1)]


@cache
def _inside(side: int, width: int, device: torch.device) -> Int64[Tensor, " s"]:
    span = torch.arange(side, device=device)
    return (span[:, None] * width + span).flatten()


def _signs(numbers: Tensor, like: Tensor) -> Tensor:
    return (numbers >= 0).to(like.dtype) * 2 - 1


def _unit(values: Float[Tensor, "b c s"]) -> Float[Tensor, "b c s"]:
    """Every channel divided by its norm; zero stays zero."""
    return steepest(values.flatten(0, 1), "l2").view_as(values)


def _square_sum(values: Float[Tensor, "b c s"]) -> Float[Tensor, "b c 1"]:
    return row_sum(values.square().flatten(0, 1)).view(*values.shape[:2], 1)
