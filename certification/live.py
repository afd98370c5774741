"""Differentiable bounds on the weights that a net holds at the moment: what certified training minimises.

:mod:`rprune.certification.ibp` bounds a finished network in float64; here the layers are the net's own, in their own
precision, so that gradients reach weights and biases. Batch norm enters with its running statistics, as an affine map:
the net that is bounded is the one in eval mode, whatever mode the net is in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, fx, nn
from torch.nn.grad import conv2d_input

from rprune.certification.ibp import Interval, through
from rprune.errors import InputError
from rprune.models.graph import NORMS, Add, Affine, batch_norm, layer, output_of, pair, shape_of, trace
from rprune.threat import ThreatModel

MEMORY = 1 << 28  # bytes of the rows that are substituted backward at once; a few times as much is needed
LEARNED = (nn.Conv2d, nn.Linear, *NORMS)
_graphs: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], fx.GraphModule]] = WeakKeyDictionary()


class Bounds:
    """Bounds of a net over the threat's ball, within [0, 1], around each image of a batch.

    Two linear relaxations of an unstable ReLU (l < 0 < u), both with the upper line u (z - l) / (u - l):

    * "crown": lower line z or 0, whichever leaves the smaller area (Zhang et al., NeurIPS 2018). A max pooling is at
      least its input of the highest lower bound, and at most its highest upper bound.
    * "parallel": lower line parallel to the upper one, as in Fast-Lin (Weng et al., ICML 2018), DeepZ and the symbolic
      intervals of MixTrain (Wang et al., 2018).

    With ``tighten`` the same relaxation bounds the pre-activations of every ReLU after the first; their intersection
    with the interval bounds is kept, and unstable neurons alone are computed, as many at once as fit in ``MEMORY``.
    Without, intervals bound them: "crown" is CROWN-IBP then (Zhang et al., ICLR 2020), and CROWN with it.

    ``pixels``: the interval of the image, where it is not eps around x within [0, 1]. Intervals enclose an l2 ball in
    the linf ball of the same radius; linear bounds take the dual norm at the input.

    Raises InputError: an operation that :func:`rprune.models.graph.trace` does not know.
    """

    def __init__(
        self,
        net: nn.Module,
        x: Float[Tensor, "b c h w"],
        threat: ThreatModel,
        relaxation: Literal["crown", "parallel"] = "crown",
        tighten: bool = False,
        pixels: Interval | None = None,
    ) -> None:
        network = _graph(net, x)
        self.x, self.threat, self.parallel = x, threat, relaxation == "parallel"
        self.widest = max(math.prod(shape_of(node)[1:]) for node in network.graph.nodes if node.op != "output")
        self.output = output_of(network)
        self.layers: dict[fx.Node, nn.Module] = {}
        self.intervals: dict[fx.Node, Interval] = {}
        for node in network.graph.nodes:
            if node.op == "placeholder":
                self.intervals[node] = pixels or ((x - threat.eps).clamp_min(0), (x + threat.eps).clamp_max(1))
            elif node.op == "call_module":
                module = _current(net, layer(network, node), node, x)
                if tighten and isinstance(module, nn.ReLU):
                    self._tighten(*_inputs(node))
                self.layers[node] = module
                self.intervals[node] = through(module, *(self.intervals[source] for source in _inputs(node)))

    def interval_margins(self, y: Int64[Tensor, " b"]) -> Float[Tensor, "b k"]:
        """Lower bounds of z_y - z_j for every class j, 0 at j = y: intervals, the last linear layer merged."""
        node, rows = self.output, self._specification(y)
        offset = rows.new_zeros(())
        if isinstance(head := self.layers[node], nn.Linear):
            (node,) = _inputs(node)
            rows, offset = _pull(head, rows, ())
        lo, hi = self.intervals[node]
        return (_dot(rows, (lo + hi) / 2) - _dot(rows.abs(), (hi - lo) / 2) + offset).T

    def linear_margins(self, y: Int64[Tensor, " b"]) -> Float[Tensor, "b k"]:
        """The same by linear relaxation, substituted backward to the pixels.

        Raises InputError at a max pooling in "parallel".
        """
        lower, _ = self._substitute(self.output, self._specification(y))
        return lower.T

    def optimised_margins(self, y: Int64[Tensor, " b"], steps: int = 20, lr: float = 0.1) -> Float[Tensor, "b k"]:
        """The best of "crown" margins over the slopes of the lower lines, which may be anything in [0, 1] (alpha-CROWN,
        Xu et al., ICLR 2021); each margin has its own. Pre-activations keep their bounds. Steps of Adam.
        """
        still = copy.copy(self)
        still.intervals = {node: (lo.detach(), hi.detach()) for node, (lo, hi) in self.intervals.items()}
        return still._optimised(y, steps, lr)

    def _optimised(self, y: Tensor, steps: int, lr: float) -> Tensor:
        rows, slopes = self._specification(y), {}
        for node in self._unstable():
            _, lower, _ = _relax(*self.intervals[node])
            slopes[node] = lower.expand(len(rows), *lower.shape).clone().requires_grad_()
        if not slopes:
            return self.linear_margins(y).detach()
        optimizer = torch.optim.Adam(slopes.values(), lr)
        best = rows.new_full(rows.shape[:2], -torch.inf)
        for step in range(steps + 1):
            with torch.enable_grad():
                lower, _ = self._substitute(self.output, rows, slopes)
                loss = -lower.sum()
            best = torch.fmax(best, lower.detach())  # any slope in range is sound; one that is no number is not taken
            if step < steps:
                gradients = torch.autograd.grad(loss, list(slopes.values()))
                with torch.no_grad():
                    for slope, gradient in zip(slopes.values(), gradients, strict=True):
                        slope.grad = gradient
                    optimizer.step()
                    for slope in slopes.values():
                        slope.clamp_(0, 1)
        return best.T

    def _unstable(self) -> list[fx.Node]:
        """The values in front of ReLUs of which some may be of either sign."""
        sources = [_inputs(node)[0] for node, module in self.layers.items() if isinstance(module, nn.ReLU)]
        found = {source: self.intervals[source] for source in sources}
        return [source for source, (lo, hi) in found.items() if bool(((lo < 0) & (hi > 0)).any())]

    def _specification(self, y: Tensor) -> Tensor:
        """Rows e_y - e_j: (k, b, k)."""
        unit = torch.eye(self.intervals[self.output][0].shape[1], dtype=self.x.dtype, device=self.x.device)
        return unit[y] - unit[:, None]

    def _tighten(self, node: fx.Node) -> None:
        """Intersect the interval of a value with its symbolic bounds where it is unstable for an image of the batch."""
        if self.threat.norm == "linf" and not any(isinstance(module, nn.ReLU) for module in self.layers.values()):
            return  # before the first ReLU intervals are exact, but for linear layers in a row
        lo, hi = (end.flatten(1) for end in self.intervals[node])
        unstable = ((lo < 0) & (hi > 0)).any(0).nonzero().flatten()  # waits for the device; it saves most of the rows
        if len(unstable) == 0:
            return
        shape = self.intervals[node][0].shape
        together = max(1, MEMORY // (len(lo) * self.widest * lo.element_size()))
        found = []
        for chosen in torch.split(unstable, together):
            rows = lo.new_zeros(len(chosen), 1, lo.shape[1]).scatter_(2, chosen[:, None, None], 1.0)
            rows = rows.expand(-1, len(lo), -1).reshape(-1, *shape)
            lower, upper = self._substitute(node, rows)
            found.append((lower, upper if self.parallel else -self._substitute(node, -rows)[0]))
        lower, upper = (torch.cat(ends).T for ends in zip(*found, strict=True))
        lo = lo.index_copy(1, unstable, torch.fmax(lo[:, unstable], lower))
        hi = hi.index_copy(1, unstable, torch.fmin(hi[:, unstable], upper))
        self.intervals[node] = lo.view(shape), hi.view(shape)

    def _substitute(
        self, start: fx.Node, rows: Tensor, slopes: Mapping[fx.Node, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Bounds (r, b) of rows (r, b, ...) times the value of ``start``; the upper ones hold for "parallel" alone."""
        waiting = {start: rows}
        lower = upper = rows.new_zeros(())
        for node in reversed(self.intervals):
            if node not in waiting:
                continue
            rows = waiting.pop(node)
            if node.op == "placeholder":
                middle, reach = self._reach(node, rows)
                return lower + middle - reach, upper + middle + reach
            module, (source, *_) = self.layers[node], _inputs(node)
            if isinstance(module, nn.MaxPool2d):
                if self.parallel:
                    raise InputError(
                        f"node {node.name}: max pooling has no linear bounds here",
                        "train with objective ibp, or with strided convolutions in its place",
                    )
                rows, offset = _unpool(module, rows, *self.intervals[source])
                lower = lower + offset
            elif isinstance(module, nn.ReLU):
                slope, lower_slope, offset = _relax(*self.intervals[source])
                if slopes is not None and source in slopes:
                    lo, hi = self.intervals[source]
                    lower_slope = torch.where((lo < 0) & (hi > 0), slopes[source], lower_slope)
                below = rows.clamp_max(0)
                lower = lower + _dot(below, offset)
                if self.parallel:
                    upper = upper + _dot(rows.clamp_min(0), offset)
                    rows = rows * slope
                else:
                    rows = rows.clamp_min(0) * lower_slope + below * slope
            elif not isinstance(module, Add):
                rows, offset = _pull(module, rows, self.intervals[source][0].shape[1:])
                lower, upper = lower + offset, upper + offset
            for source in _inputs(node):
                waiting[source] = waiting[source] + rows if source in waiting else rows
        raise AssertionError("the value does not depend on the input")

    def _reach(self, node: fx.Node, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Middle and half width (r, b) of the range that rows times the pixels takes."""
        if self.threat.norm == "l2":
            return _dot(rows, self.x), self.threat.eps * torch.linalg.vector_norm(rows.flatten(2), dim=2)
        lo, hi = self.intervals[node]
        return _dot(rows, (lo + hi) / 2), _dot(rows.abs(), (hi - lo) / 2)


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The values that a layer takes; one twice in x + x."""
    return [argument for argument in node.args if isinstance(argument, fx.Node)]


def _graph(net: nn.Module, x: Tensor) -> fx.GraphModule:
    """The structure of a net, traced once for images of this shape; its copies of the weights are dropped."""
    shape = (x.shape[1], x.shape[2], x.shape[3])
    known = _graphs.get(net)
    if known is None or known[0] != shape:
        known = _graphs[net] = (shape, trace(net, shape, fold=False))
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


def _relax(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope of the upper line of each ReLU, slope of CROWN's lower line, offset of the upper line."""
    unstable = (lo < 0) & (hi > 0)
    # both ends are replaced where they do not count: a neuron that pruning has emptied has width 0
    top, bottom = torch.where(unstable, hi, 1), torch.where(unstable, lo, 0)
    slope = torch.where(unstable, top / (top - bottom), (hi > 0).to(hi.dtype))
    lower = torch.where(unstable, (hi > -lo).to(hi.dtype), slope)
    return slope, lower, -slope * bottom


def _unpool(module: nn.MaxPool2d, rows: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """(rows', c) with rows . pool(z) >= rows' . z + c for lo <= z <= hi.

    The input of the highest lower bound stands for the pooling in positive rows, and in all where no other input of its
    window can be larger; elsewhere negative rows meet the highest upper bound.
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
    exact = low.gather(2, chosen) >= high.scatter(2, chosen, -torch.inf).amax(2, keepdim=True)
    numbers = torch.arange(lo.shape[2] * lo.shape[3], dtype=lo.dtype, device=lo.device).view(1, 1, *lo.shape[2:])
    places = windows(numbers.expand(lo.shape), 0).gather(2, chosen).squeeze(2).long()
    flat = rows.flatten(3)
    below = flat.clamp_max(0)
    loose = ~exact.squeeze(2)
    passed = torch.where(loose, flat - below, flat)
    back = rows.new_zeros(*flat.shape[:3], lo.shape[2] * lo.shape[3])
    back = back.scatter_add(3, places.expand(len(rows), -1, -1, -1), passed)
    offset = _dot(torch.where(loose, below, 0.0), high.amax(2))
    return back.view(*rows.shape[:3], *lo.shape[2:]), offset


def _pull(module: nn.Module, rows: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(rows', c) with rows . module(z) = rows' . z + c, for an affine layer that takes z of (b, *shape)."""
    zero = rows.new_zeros(())
    if isinstance(module, nn.Linear):
        return rows @ module.weight, zero if module.bias is None else rows @ module.bias
    if isinstance(module, Affine):
        return rows * module.scale, _dot(rows, module.shift.expand(rows.shape[1:]))
    flat = rows.flatten(0, 1)
    if isinstance(module, nn.Conv2d):
        geometry: Any = (module.stride, module.padding, module.dilation, module.groups)
        back = conv2d_input((len(flat), *shape), module.weight, flat, *geometry)  # type: ignore[no-untyped-call]
        offset = zero if module.bias is None else rows.sum((3, 4)) @ module.bias
    else:  # average pooling and flattening: linear, without an offset
        with torch.enable_grad():
            origin = flat.new_zeros(len(flat), *shape, requires_grad=True)
            (back,) = torch.autograd.grad(module(origin), origin, flat, create_graph=True)
        offset = zero
    return back.unflatten(0, rows.shape[:2]), offset


def _dot(rows: Tensor, values: Tensor) -> Tensor:
    """Product of rows (r, b, ...) with one value (b, ...) for each image: (r, b)."""
    return torch.einsum("rbi,bi->rb", rows.flatten(2), values.flatten(1))
