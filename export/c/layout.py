"""Where the cells of images lie, and how convolutions run over them.

Images lie as planes with shared borders: a row of ``width`` pixels is followed by ``pad`` border cells, which stand for
the end of this row and the start of the next, and a plane by ``pad`` border rows. A kernel entry of a convolution is
then one offset, the same for every position, and a convolution a sum of shifted, contiguous runs of memory: one
multiply-add of whole vectors for each weight that is not zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rprune.export.c.steps import Elementwise, Plan, Product, Value, reads

LANES = 16  # cells of the widest vector; tiles are multiples of it
WORKING_SET = 11_000  # cells that one tile of a convolution reads: what fits a first-level cache of 48 KiB
LARGEST_TILE = 12 * LANES
CALL, ENTRY, SECOND = 25.0, 1.5, 1.5  # cycles, roughly: a filter, an entry, a vector that the first level lacks


@dataclass(frozen=True)
class Reach:
    """What a convolution reads around a position of its output, in rows and columns of one phase of its input.

    With stride s the input falls into s x s phases, images of every s-th row and column, in which neighbouring outputs
    read neighbouring pixels. ``taps``: kernel entry -> (phase row, phase column, dy, dx). ``extra``: real columns of a
    phase that lie right of the output's last.
    """

    taps: dict[tuple[int, int], tuple[int, int, int, int]]
    up: int
    down: int
    left: int
    right: int
    extra: int

    @property
    def columns(self) -> int:
        """Border cells that must lie between two rows."""
        return max(self.right, self.extra + self.left)

    @property
    def phases(self) -> list[tuple[int, int]]:
        return sorted({tap[:2] for tap in self.taps.values()})

    def even(self, step: Product) -> bool:
        """Do input and output lie alike, so that the planes can be read in place?"""
        given, out = step.given[0], step.out
        return step.stride == (1, 1) and (given.height, given.width) == (out.height, out.width)

    @classmethod
    def of(cls, step: Product) -> Reach:
        taps = {}
        for ky, kx in product(range(step.weight.shape[2]), range(step.weight.shape[3])):
            y, x = ky * step.dilation[0] - step.padding[0], kx * step.dilation[1] - step.padding[1]
            taps[ky, kx] = (y % step.stride[0], x % step.stride[1], y // step.stride[0], x // step.stride[1])
        dy, dx = [tap[2] for tap in taps.values()], [tap[3] for tap in taps.values()]
        right, width = max(0, *dx), step.out.width
        real = max((step.given[0].width - 1 - tap[1]) // step.stride[1] for tap in taps.values())
        extra = min(right, max(0, real - (width - 1)))
        return cls(taps, max(0, -min(dy)), max(0, *dy), max(0, -min(dx)), right, extra)


@dataclass(frozen=True)
class Tiling:
    """How a convolution runs over its ``positions``, ``tile`` at a time.

    It reads cells from ``before`` a position to ``after`` it. With ``even`` the input lies as the output does.
    """

    positions: int
    tile: int
    rows: int  # cells of the output's rows
    before: int
    after: int
    even: bool

    @property
    def reached(self) -> int:
        """Cells of one channel, or of one phase of it, that are read; they hold its last row to the end."""
        return self.before + max(self.rows, -(-self.positions // self.tile) * self.tile) + self.after + LANES

    @classmethod
    def of(cls, step: Product) -> Tiling:
        reach, given, out = Reach.of(step), step.given[0], step.out
        positions = (out.height - 1) * out.pitch + out.width
        before, after = reach.up * out.pitch + reach.left, reach.down * out.pitch + reach.right
        runs, per_filter = given.channels * len(reach.phases), np.count_nonzero(step.weight) / len(step.weight)

        def cost(tile: int) -> float:
            """Cycles of a filter, roughly: calls, entries, and vectors from the first or the second level of cache."""
            vectors = tile / LANES
            fits = runs * (before + tile + after) <= WORKING_SET
            each = CALL + per_filter * (ENTRY + vectors * (1.0 if fits else SECOND)) + 3 * vectors
            return -(-positions // tile) * each

        most = min(LARGEST_TILE, -(-positions // LANES) * LANES)
        tile = min(range(LANES, most + 1, LANES), key=cost)
        return cls(positions, tile, out.height * out.pitch, before, after, reach.even(step))


def share_phases(plan: Plan) -> None:
    """A 1x1 convolution with a stride, as in a shortcut, reads what the last one made of the same input, if it can."""
    last: Product | None = None
    for step in plan.steps:
        if not isinstance(step, Product) or step.linear or Tiling.of(step).even:
            continue
        if last is not None and _holds(last, step):
            step.shares = last
        else:
            last = step


def _holds(last: Product, step: Product) -> bool:
    """Do the phases that ``last`` made hold all that ``step`` reads?"""
    ours, mine = Tiling.of(last), Tiling.of(step)
    alike = last.given[0] is step.given[0] and last.stride == step.stride and last.out.pitch == step.out.pitch
    alone = step.weight.shape[2:] == (1, 1) and mine.before == mine.after == 0
    within = mine.reached <= ours.reached - ours.before and mine.positions == ours.positions
    return alike and alone and within and set(Reach.of(step).phases) <= set(Reach.of(last).phases)


def distance(step: Product) -> int:
    """Cells from one input channel, or one phase of it, to the next in what is read."""
    return step.given[0].plane if step.linear or Tiling.of(step).even else Tiling.of(step.shares or step).reached


def entries(step: Product) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """For each filter, the offsets of its non-zero weights from the first cell that is read, ascending; and values."""
    reach, pitch, held, channel = Reach.of(step), step.out.pitch, step.shares or step, distance(step)
    before = Tiling.of(held).before
    phases = {phase: index for index, phase in enumerate(Reach.of(held).phases)}
    inner = [phases[tap[:2]] * channel + before + tap[2] * pitch + tap[3] for tap in reach.taps.values()]
    filters, fan_in = step.weight.shape[:2]
    for index, weight in enumerate(step.weight.reshape(filters, fan_in, -1)):
        first = index // (filters // step.groups) * fan_in
        place, entry = weight.nonzero()
        offsets = (first + place) * len(phases) * channel + np.array(inner)[entry]
        order = np.argsort(offsets, kind="stable")
        yield offsets[order], weight[place, entry][order]


def settle_borders(plan: Plan) -> None:
    """One border width and one distance of planes for all values that lie alike: what the steps on any of them need."""
    leader: dict[Value, Value] = {}

    def find(value: Value) -> Value:
        while leader.get(value, value) is not value:
            value = leader[value]
        return value

    products = [step for step in plan.steps if isinstance(step, Product) and not step.linear]
    for step in plan.steps:
        alike = isinstance(step, Elementwise) or step in products
        for value in [step.out, *reads(step)] if alike else []:
            if (value.height, value.width) == (step.out.height, step.out.width):
                leader[find(value)] = find(step.out)
    pads: dict[Value, int] = {}
    for step in products:
        reach, group = Reach.of(step), find(step.out)
        pads[group] = max(pads.get(group, 0), reach.columns)
        if reach.even(step):  # read in place: rows above and below are border rows of the planes themselves
            pads[group] = max(pads[group], reach.up, reach.down)
    values = [plan.image, *(step.out for step in plan.steps)]
    for value in values:
        value.pad = pads.get(find(value), 0)
    planes = {find(value): value.pitch * (value.height + value.pad) for value in values}
    for step in products:
        tiling, group = Tiling.of(step), find(step.out)
        planes[group] = max(planes[group], -(-tiling.positions // tiling.tile) * tiling.tile)
    for value in values:
        value.plane = planes[find(value)]


def place(plan: Plan) -> None:
    """Offsets in one arena: a value's cells are free again after its last reader."""
    for step in plan.steps:
        if isinstance(step, Product) and not step.linear:
            tiling, given = Tiling.of(step), step.given[0]
            given.slack = max(given.slack, tiling.reached - tiling.before - given.plane)
    last = {value: index for index, step in enumerate(plan.steps) for value in reads(step)}
    live: list[Value] = [plan.image]
    plan.arena = plan.image.cells
    for index, step in enumerate(plan.steps):
        if step.out is plan.logits:
            continue
        place = 0
        for value in sorted(live, key=lambda v: v.place):
            if place + step.out.cells <= value.place:
                break
            place = max(place, value.place + value.cells)
        step.out.place = place
        plan.arena = max(plan.arena, place + step.out.cells)
        live = [value for value in [*live, step.out] if last.get(value, -1) > index]
