"""Differentiable bounds on the weights that a net holds at the moment: what certified training minimises.

:mod:`rprune.certification.ibp` bounds a finished network in float64; here the layers are the net's own, in their own
precision, so that gradients reach weights and biases. Batch norm enters with its running statistics, as an affine map:
the net that is bounded is the one in eval mode, whatever mode the net is in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, fx, nn

from rprune.certification.ibp import Interval, through
from rprune.models.graph import NORMS, Add, Affine, batch_norm, layer, output_of, pair, shape_of, trace
from rprune.models.running import Running
from rprune.threat import ThreatModel

MEMORY = 1 << 28  # bytes of the rows that are substituted backward at once; a few times as much is needed
WINDOWS = 256  # at most, of one value's rows; a GPU takes one, as its calls cost more than zeros do
LEARNED = (nn.Conv2d, nn.Linear, *NORMS)
Relaxation = Literal["crown", "parallel"]
RELU = (nn.ReLU, nn.LeakyReLU)
_graphs: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], fx.GraphModule]] = WeakKeyDictionary()


class Bounds:
    """Bounds of a net over the threat's ball, within [0, 1], around each image of a batch.

    Two linear relaxations of an unstable ReLU (l < 0 < u), both with the upper line u (z - l) / (u - l):

    * "crown": lower line z or 0, whichever leaves the smaller area (Zhang et al., NeurIPS 2018). A max pooling is at
      least its input of the highest lower bound, and at most its highest upper bound.
    * "parallel": lower line parallel to the upper one, as in Fast-Lin (Weng et al., ICML 2018), DeepZ and the symbolic
      intervals of MixTrain (Wang et al., 2018). A max pooling is its input of the highest lower bound, or more by what
      the others may exceed that bound.

    With ``tighten`` the same relaxation bounds the pre-activations of every ReLU after the first; their intersection
    with the interval bounds is kept. Neurons unstable in an image are computed for that image alone, those of one place
    together, on the window of the image that they see, as many at once as fit in ``MEMORY``. Without, intervals bound
    them: "crown" is CROWN-IBP then (Zhang et al., ICLR 2020), and CROWN with it.

    ``pixels``: the interval of the image, where it is not eps around x within [0, 1]. Intervals enclose an l2 ball in
    the linf ball of the same radius; linear bounds take the dual norm at the input.

    Raises InputError: an operation that :func:`rprune.models.graph.trace` does not know.
    """

    def __init__(
        self,
        net: nn.Module,
        x: Float[Tensor, "b c h w"],
        threat: ThreatModel,
        relaxation: Relaxation = "crown",
        tighten: bool = False,
        pixels: Interval | None = None,
    ) -> None:
        net = net.net if isinstance(net, Running) else net  # bounds keep the precision of the weights
        network = _graph(net, x)
        self.x, self.threat, self.parallel = x, threat, relaxation == "parallel"
        self.widest = max(math.prod(shape_of(node)[1:]) for node in network.graph.nodes if node.op != "output")
        self.output = output_of(network)
        self.layers: dict[fx.Node, nn.Module] = {}
        self.intervals: dict[fx.Node, Interval] = {}
        self.relaxed: dict[fx.Node, tuple[Tensor, Tensor, Tensor]] = {}
        for node in network.graph.nodes:
            if node.op == "placeholder":
                self.intervals[node] = pixels or ((x - threat.eps).clamp_min(0), (x + threat.eps).clamp_max(1))
            elif node.op == "call_module":
                module = _current(net, layer(network, node), node, x)
                if tighten and isinstance(module, RELU):
                    self._tighten(*_inputs(node))
                self.layers[node] = module
                self.intervals[node] = through(module, *(self.intervals[source] for source in _inputs(node)))

    def interval_margins(self, y: Int64[Tensor, " b"]) -> Float[Tensor, "b k"]:
        """Lower bounds of z_y - z_j for every class j, 0 at j = y: intervals, the last linear layer merged."""
        node, rows = self.output, self._specification(y)
        offset = rows.new_zeros(())
        if isinstance(head := self.layers[node], nn.Linear):
            (node,) = _inputs(node)
            rows, offset = rows @ head.weight, offset if head.bias is None else rows @ head.bias
        lo, hi = self.intervals[node]
        return (_dot(rows, (lo + hi) / 2) - _dot(rows.abs(), (hi - lo) / 2) + offset).T

    def linear_margins(self, y: Int64[Tensor, " b"]) -> Float[Tensor, "b k"]:
        """The same by linear relaxation, substituted backward to the pixels."""
        lower, _ = self._substitute(self.output, _Rows(self._specification(y)))
        return lower.T

    def optimised_margins(self, y: Int64[Tensor, " b"], steps: int = 20, lr: float = 0.1) -> Float[Tensor, "b k"]:
        """The best of "crown" margins over the slopes of the lower lines, which may be anything in [0, 1] (alpha-CROWN,
        Xu et al., ICLR 2021); each margin has its own. Pre-activations keep their bounds. Steps of Adam.
        """
        still = copy.copy(self)
        still.intervals = {node: (lo.detach(), hi.detach()) for node, (lo, hi) in self.intervals.items()}
        still.relaxed = {}
        return still._optimised(y, steps, lr)

    def _optimised(self, y: Tensor, steps: int, lr: float) -> Tensor:
        rows, slopes = self._specification(y), {}
        for node in self._unstable():
            _, lower, _ = self._relaxation(node)
            slopes[node] = lower.expand(len(rows), *lower.shape).clone().requires_grad_()
        if not slopes:
            return self.linear_margins(y).detach()
        optimizer = torch.optim.Adam(slopes.values(), lr)
        best = rows.new_full(rows.shape[:2], -torch.inf)
        for step in range(steps + 1):
            with torch.enable_grad():
                lower, _ = self._substitute(self.output, _Rows(rows), slopes)
                loss = -lower.sum()
            best = torch.fmax(best, lower.detach())  # any slope in range is sound; one that is no number is not taken
            if step < steps:
                gradients = torch.autograd.grad(loss, list(slopes.values()))
                with torch.no_grad():
                    for slope, gradient in zip(slopes.values(), gradients, strict=True):
                        slope.grad = gradient
                    optimizer.step()
                    for node, slope in slopes.items():
                        slope.clamp_(_leak(self.layers[node]), 1)
        return best.T

    def _unstable(self) -> list[fx.Node]:
        """The ReLUs of which some inputs may be of either sign."""
        found = {
            node: self.intervals[_inputs(node)[0]] for node, layer in self.layers.items() if isinstance(layer, RELU)
        }
        return [node for node, (lo, hi) in found.items() if bool(((lo < 0) & (hi > 0)).any())]

    def _relaxation(self, node: fx.Node) -> tuple[Tensor, Tensor, Tensor]:
        if node not in self.relaxed:
            (source,) = _inputs(node)
            self.relaxed[node] = _relax(*self.intervals[source], _leak(self.layers[node]))
        return self.relaxed[node]

    def _specification(self, y: Tensor) -> Tensor:
        """Rows e_y - e_j: (k, b, k)."""
        unit = torch.eye(self.intervals[self.output][0].shape[1], dtype=self.x.dtype, device=self.x.device)
        return unit[y] - unit[:, None]

    def _tighten(self, node: fx.Node) -> None:
        """Intersect the interval of a value with its symbolic bounds where it is unstable."""
        if self.threat.norm == "linf" and not any(isinstance(module, RELU) for module in self.layers.values()):
            return  # before the first ReLU intervals are exact, but for linear layers in a row
        lo, hi = self.intervals[node]
        unstable = ((lo < 0) & (hi > 0)).nonzero()  # waits for the device; it saves most of the rows
        if len(unstable) == 0:
            return
        together = max(1, MEMORY // (2 * self.widest * lo.element_size()))
        chosen, found = [], []
        for origin, places in _windows(unstable, lo):
            for part in torch.split(places, together):
                rows = _Rows(_units(part, lo, origin), origin, part[:, 0] if len(lo) > 1 else None)
                if self.parallel:
                    lower, upper = self._substitute(node, rows)
                else:  # lower bounds of the value, and of its negative
                    lower, upper = self._substitute(node, rows.and_negative())[0].view(2, -1)
                    upper = -upper
                chosen.append(part)
                found.append((lower.flatten(), upper.flatten()))
        at = tuple(torch.cat(chosen).T)
        lower, upper = (torch.cat(ends) for ends in zip(*found, strict=True))
        self.intervals[node] = (
            lo.index_put(at, torch.fmax(lo[at], lower)), hi.index_put(at, torch.fmin(hi[at], upper))
        )  # fmt: skip

    def _substitute(
        self, start: fx.Node, rows: _Rows, slopes: Mapping[fx.Node, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Bounds (r, p) of rows times the value of ``start``; the upper ones hold for "parallel" alone."""
        waiting = {start: rows}
        lower = upper = rows.values.new_zeros(())
        for node in reversed(self.intervals):
            if node not in waiting:
                continue
            rows = waiting.pop(node)
            if node.op == "placeholder":
                middle, reach = self._reach(node, rows)
                return lower + middle - reach, upper + middle + reach
            module, (source, *_) = self.layers[node], _inputs(node)
            if isinstance(module, nn.MaxPool2d):
                whole = rows.spread(self.intervals[node][0].shape)
                lo, hi = (whole.of(end, everywhere=True) for end in self.intervals[source])
                values, below, above = _unpool(module, whole.values, lo, hi, self.parallel)
                rows, lower, upper = whole.with_(values), lower + below, upper + above
            elif isinstance(module, RELU):
                slope, lower_slope, offset = (rows.of(line) for line in self._relaxation(node))
                if slopes is not None and node in slopes:
                    lo, hi = (rows.of(end) for end in self.intervals[source])
                    lower_slope = torch.where((lo < 0) & (hi > 0), rows.of(slopes[node]), lower_slope)
                below = rows.values.clamp_max(0)
                lower = lower + _dot(below, offset)
                if self.parallel:
                    upper = upper + _dot(rows.values.clamp_min(0), offset)
                    rows = rows.with_(rows.values * slope)
                else:
                    rows = rows.with_(rows.values.clamp_min(0) * lower_slope + below * slope)
            elif not isinstance(module, Add):
                rows, offset = _pull(module, rows, self.intervals[node][0].shape, self.intervals[source][0].shape)
                lower, upper = lower + offset, upper + offset
            for source in _inputs(node):
                waiting[source] = waiting[source].plus(rows) if source in waiting else rows
        raise AssertionError("the value does not depend on the input")

    def _reach(self, node: fx.Node, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Middle and half width (r, p) of the range that rows times the pixels takes."""
        values = rows.values
        if self.threat.norm == "l2":
            return _dot(values, rows.of(self.x)), self.threat.eps * torch.linalg.vector_norm(values.flatten(2), dim=2)
        lo, hi = (rows.of(end) for end in self.intervals[node])
        return _dot(values, (lo + hi) / 2), _dot(values.abs(), (hi - lo) / 2)


class _Rows(NamedTuple):
    """Rows (r, p, ...) of linear functions of a value, each for one image of the batch.

    Of an image-like value they hold the window (r, p, c, h, w) that starts at ``origin``; all else is zero. ``images``
    (p): the image of the batch that each p is about; None where p is the batch.
    """

    values: Tensor
    origin: tuple[int, int] = (0, 0)
    images: Tensor | None = None

    def with_(self, values: Tensor, origin: tuple[int, int] | None = None) -> _Rows:
        return _Rows(values, self.origin if origin is None else origin, self.images)

    def and_negative(self) -> _Rows:
        """The rows, and behind them their negatives."""
        axis = 0 if self.images is None else 1
        images = None if self.images is None else self.images.repeat(2)
        return _Rows(torch.cat([self.values, -self.values], axis), self.origin, images)

    def of(self, value: Tensor, everywhere: bool = False) -> Tensor:
        """What the rows meet of a value (..., b, c, h, w) or (..., b, n)."""
        if self.values.dim() == 5 and not everywhere:
            (top, left), (height, width) = self.origin, self.values.shape[3:]
            value = value[..., top : top + height, left : left + width]
        return value if self.images is None else value.index_select(0, self.images)

    def spread(self, shape: tuple[int, ...]) -> _Rows:
        """The same with the whole of a value of this shape as window."""
        return self if self.values.dim() < 5 else self._within((0, 0), shape[2], shape[3])

    def plus(self, other: _Rows) -> _Rows:
        """The sum, on a window that holds both."""
        if self.values.dim() < 5:
            return self.with_(self.values + other.values)
        top, left = (min(ends) for ends in zip(self.origin, other.origin, strict=True))
        bottom, right = (
            max(rows.origin[axis] + rows.values.shape[3 + axis] for rows in (self, other)) for axis in (0, 1)
        )
        mine, others = (rows._within((top, left), bottom - top, right - left) for rows in (self, other))
        return mine.with_(mine.values + others.values)

    def _within(self, origin: tuple[int, int], height: int, width: int) -> _Rows:
        top, left = self.origin[0] - origin[0], self.origin[1] - origin[1]
        inner = self.values.shape[3:]
        around = (left, width - left - inner[1], top, height - top - inner[0])
        return self.with_(F.pad(self.values, around) if any(around) else self.values, origin)


def _windows(places: Tensor, value: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Places (p, 1 + dims) in a value, those of one square of the image together, with the corner of the square."""
    if value.dim() < 4:
        yield (0, 0), places
        return
    height, width = value.shape[2:]
    side = max(height, width) if value.is_cuda else 1
    while -(-height // side) * -(-width // side) > WINDOWS:
        side *= 2
    across = -(-width // side)
    square = places[:, 2] // side * across + places[:, 3] // side
    numbers, counts = torch.unique(square, return_counts=True)
    parts = torch.split(places[square.argsort()], counts.tolist())
    for number, part in zip(numbers.tolist(), parts, strict=True):
        yield (number // across * side, number % across * side), part


def _units(places: Tensor, value: Tensor, origin: tuple[int, int]) -> Tensor:
    """Rows of the value at each place, on the smallest window from ``origin`` on that holds them.

    (1, p, ...), and (p, 1, ...) of a batch of one, whose rows need no choice of the image.
    """
    if value.dim() < 4:
        rows = F.one_hot(places[:, 1], value.shape[1]).to(value.dtype)
    else:
        down, right = places[:, 2] - origin[0], places[:, 3] - origin[1]
        rows = value.new_zeros(len(places), value.shape[1], int(down.max()) + 1, int(right.max()) + 1)
        rows[torch.arange(len(places), device=value.device), places[:, 1], down, right] = 1
    return rows[None] if len(value) > 1 else rows[:, None]


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The values that a layer takes; one twice in x + x."""
    return [argument for argument in node.args if isinstance(argument, fx.Node)]


def _graph(net: nn.Module, x: Tensor) -> fx.GraphModule:
    """The structure of a net, traced once for images of this shape; its copies of the weights are dropped."""
    shape = (x.shape[1], x.shape[2], x.shape[3])
    known = _graphs.get(net)
    if known is None or known[0] != shape:
        known = _graphs[net] = (shape, trace(net, shape, fold=False, real=True))
        for module in known[1].modules():
            if isinstance(module, LEARNED):
                module.to("meta")
    return known[1]


def _current(net: nn.Module, module: nn.Module, node: fx.Node, x: Tensor) -> nn.Module:
    """The layer of a node with the weights of the moment; batch norm as its affine map."""
    if isinstance(module, LEARNED):
        module = net.get_submodule(str(node.target))
    if isinstance(module, NORMS):
        scale, shift = batch_norm(module, node.name)
        sides = (1,) * (len(shape_of(node)) - 2)
        return Affine(scale.view(1, -1, *sides), shift.view(1, -1, *sides))
    return module.to(x) if isinstance(module, Affine) else module  # normalisation is constant: the graph's own


def _leak(module: nn.Module) -> float:
    """Slope of a ReLU below zero, at most 1."""
    return module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.0


def _relax(lo: Tensor, hi: Tensor, leak: float) -> tuple[Tensor, Tensor, Tensor]:
    """Slope of the upper line of each ReLU, slope of CROWN's lower line, offset of the upper line."""
    unstable = (lo < 0) & (hi > 0)
    # both ends are replaced where they do not count: a neuron that pruning has emptied has width 0
    top, bottom = torch.where(unstable, hi, 1), torch.where(unstable, lo, 0)
    stable = torch.where(hi > 0, 1, hi.new_tensor(leak))
    slope = torch.where(unstable, (top - leak * bottom) / (top - bottom), stable)
    lower = torch.where(unstable, torch.where(hi > -lo, 1, hi.new_tensor(leak)), slope)
    return slope, lower, (leak - slope) * bottom


def _unpool(
    module: nn.MaxPool2d, rows: Tensor, lo: Tensor, hi: Tensor, parallel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows', c, d) with rows' . z + c <= rows . pool(z) for lo <= z <= hi, and <= rows' . z + d if ``parallel``.

    The input of the highest lower bound stands for the pooling in positive rows, and in all where no other input of its
    window can be larger; elsewhere negative rows meet the highest upper bound, or, in "parallel", the same input with
    what others may add.
    """
    pad = pair(module.padding)

    def windows(values: Tensor, filling: float) -> Tensor:
        """(b, c, window, positions)"""
        padded = F.pad(values, (pad[1], pad[1], pad[0], pad[0]), value=filling)
        columns = F.unfold(padded, module.kernel_size, stride=module.stride)
        return columns.view(len(columns), values.shape[1], -1, columns.shape[2])

    outside = torch.finfo(lo.dtype).min
    low, high = windows(lo, outside), windows(hi, outside)
    chosen = low.argmax(2, keepdim=True)
    more = (high.scatter(2, chosen, -torch.inf).amax(2) - low.gather(2, chosen).squeeze(2)).clamp_min(0)
    numbers = torch.arange(lo.shape[2] * lo.shape[3], dtype=lo.dtype, device=lo.device).view(1, 1, *lo.shape[2:])
    places = windows(numbers.expand(lo.shape), 0).gather(2, chosen).squeeze(2).long()
    flat = rows.flatten(3)
    below = flat.clamp_max(0)
    if parallel:
        passed, lower, upper = flat, _dot(below, more), _dot(flat.clamp_min(0), more)
    else:
        loose = more > 0
        passed = torch.where(loose, flat - below, flat)
        lower = upper = _dot(torch.where(loose, below, 0.0), high.amax(2))
    back = rows.new_zeros(*flat.shape[:3], lo.shape[2] * lo.shape[3])
    back = back.scatter_add(3, places.expand(len(rows), -1, -1, -1), passed)
    return back.view(*rows.shape[:3], *lo.shape[2:]), lower, upper


def _pull(module: nn.Module, given: _Rows, after: tuple[int, ...], before: tuple[int, ...]) -> tuple[_Rows, Tensor]:
    """(rows', c) with rows . module(z) = rows' . z + c, for an affine layer from shape ``before`` to ``after``."""
    rows, zero = given.values, given.values.new_zeros(())
    if isinstance(module, nn.Linear):
        return given.with_(rows @ module.weight), zero if module.bias is None else rows @ module.bias
    if isinstance(module, Affine):
        return given.with_(rows * module.scale), _dot(rows, module.shift.expand(rows.shape[1:]))
    if isinstance(module, nn.Conv2d):
        stride, padding = pair(module.stride), pair(module.padding)
        if any(reach <= side for reach, side in zip(module.kernel_size, padding, strict=True)):
            given = given.spread(after)  # else a window may lie in the padding as a whole
            rows = given.values
        flat = rows.flatten(0, 1)
        back = F.conv_transpose2d(flat, module.weight, None, stride, 0, 0, module.groups, module.dilation)
        cuts = []
        for axis in (0, 1):  # the window may reach into the padding, where the value is zero
            start = given.origin[axis] * stride[axis] - padding[axis]
            end = min(start + back.shape[2 + axis], before[2 + axis])
            cuts.append((max(start, 0), max(-start, 0), end - start))
        (top, *rows_kept), (left, *columns_kept) = cuts
        back = back[..., slice(*rows_kept), slice(*columns_kept)]
        offset = zero if module.bias is None else rows.sum((3, 4)) @ module.bias
        return given.with_(back.view(*rows.shape[:2], *back.shape[1:]), (top, left)), offset
    flat = given.spread(after).values.flatten(0, 1)
    with torch.enable_grad():  # average pooling and flattening: linear, without an offset
        origin = flat.new_zeros(len(flat), *before[1:], requires_grad=True)
        (back,) = torch.autograd.grad(module(origin), origin, flat, create_graph=True)
    return given.with_(back.view(*rows.shape[:2], *before[1:]), (0, 0)), zero


def _dot(rows: Tensor, values: Tensor) -> Tensor:
    """Product of rows (r, b, ...) with one value (b, ...) for each image: (r, b)."""
    return torch.einsum("rbi,bi->rb", rows.flatten(2), values.flatten(1))
