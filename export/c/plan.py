"""A network as the steps that a C program takes: which tensors there are, where they lie, and what makes each of them.

Images lie as planes with shared borders: a row of ``width`` pixels is followed by ``pad`` border cells, which stand for
the end of this row and the start of the next, and a plane by ``pad`` border rows. A kernel entry of a convolution is
then one offset, the same for every position, and a convolution a sum of shifted, contiguous runs of memory: one
multiply-add of whole vectors for each weight that is not zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from rprune.errors import InputError
from rprune.models.graph import Add, Affine, GlobalAvgPool, layer, note_shapes, output_of, shape_of
from rprune.quantization.simulate import LEVELS, QAdd, QAffine, QAvgPool, QInput, QKeep, QMatmul, QOutput, Scale

LANES = 16  # cells of the widest vector; tiles are multiples of it
WORKING_SET = 11_000  # cells that one tile of a convolution reads: what fits a first-level cache of 48 KiB
LARGEST_TILE = 12 * LANES
CALL, ENTRY, SECOND = 25.0, 1.5, 1.5  # cycles, roughly: a filter, an entry, a vector that the first level lacks


@dataclass(eq=False)
class Value:
    """A tensor between two steps: ``channels`` planes of height x width, or a vector where both are 1.

    ``pad`` and ``plane``, the distance of two planes, are settled once all readers are known; ``zero`` is the integer
    that stands for 0, ``top`` the largest; ``place`` is its offset in the arena, in cells.
    """

    channels: int
    height: int
    width: int
    zero: int = 0
    top: int = LEVELS
    pad: int = 0
    plane: int = 0
    place: int = 0
    slack: int = 0  # cells that readers may touch behind the last plane

    @property
    def pitch(self) -> int:
        return self.width + self.pad

    @property
    def lead(self) -> int:
        """Border cells in front of the first plane."""
        return self.pad * self.pitch + self.pad

    @property
    def cells(self) -> int:
        return self.lead + self.channels * self.plane + self.slack


@dataclass(eq=False)
class Step:
    """What makes ``out`` of ``given``."""

    given: tuple[Value, ...]
    out: Value


@dataclass(eq=False)
class Sum:
    """A residual sum that the convolution before it takes in.

    Integers: rint(first * r1 + (second * r2 + offset)), where the convolution's own result is ``first`` or second.
    """

    other: Value
    relu: bool
    own_first: bool = True
    r1: float = 1.0
    r2: float = 1.0
    offset: float = 0.0


@dataclass(eq=False)
class Product(Step):
    """Convolution or linear layer. ``weight`` (o, c, kh, kw) holds floats, or integers as int64; ``bias`` likewise.

    ``scale`` (o,) brings integer sums to the output's integers, or to real logits where ``logits``; None for floats.
    """

    weight: NDArray[Any]
    bias: NDArray[Any]
    relu: bool
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    scale: NDArray[np.float32] | None = None
    own: Value | None = None  # the result before the sum, where there is one
    sum: Sum | None = None
    logits: bool = False

    @property
    def linear(self) -> bool:
        """Is there one position, of which every output may read every input?"""
        images = self.given[0], self.out
        sides = *self.weight.shape[2:], *(side for image in images for side in (image.height, image.width))
        return self.groups == 1 and all(side == 1 for side in sides)


@dataclass(eq=False)
class Elementwise(Step):
    """``kind``: add, with the numbers of QAdd in ``sum``; relu; affine, with ``scale`` and ``shift``."""

    kind: str
    relu: bool = False
    sum: Sum | None = None
    scale: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    shift: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    given_scale: float = 1.0
    out_scale: float = 1.0


@dataclass(eq=False)
class Pool(Step):
    """``kind``: max, average. ``scale`` multiplies the sum of an average."""

    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    scale: float = 1.0


@dataclass(eq=False)
class Flatten(Step):
    """Planes to a vector, channel by channel."""


@dataclass(eq=False)
class Dequantize(Step):
    """Integers to real logits."""

    scale: float


@dataclass(eq=False)
class Plan:
    """``steps`` from ``image`` to ``logits``. ``integers``: 8-bit arithmetic; ``arena``: cells for all values."""

    image: Value
    logits: Value
    steps: list[Step]
    integers: bool
    input_shape: tuple[int, int, int]
    arena: int = 0


def plan_of(network: fx.GraphModule, input_shape: tuple[int, int, int]) -> Plan:
    """The plan of a float network from ``trace`` or ``compact``, or of an 8-bit one from ``simulated``.

    Raises InputError for integers beyond 8 bits, for a result that is no vector, and for a layer with no C form.
    """
    note_shapes(network, input_shape)
    result = shape_of(output_of(network))
    if len(result) != 2:
        raise InputError(f"the model returns images of {result[1:]}, not logits", "end it with nn.Flatten()")
    planner = _Planner(network)
    plan = planner.plan(input_shape)
    _fuse(plan)
    _settle_pads(plan)
    _place(plan)
    return plan


class _Planner:
    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.values: dict[fx.Node, Value] = {}
        self.steps: list[Step] = []
        self.integers = any(isinstance(module, QInput) for module in network.modules())

    def plan(self, input_shape: tuple[int, int, int]) -> Plan:
        last = output_of(self.network)
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = image = Value(*input_shape)
            elif node.op == "call_module":
                self.values[node] = self._layer(node, layer(self.network, node))
        return Plan(image, self.values[last], self.steps, self.integers, input_shape)

    def _layer(self, node: fx.Node, module: nn.Module) -> Value:
        given = tuple(self.values[source] for source in node.args if isinstance(source, fx.Node))
        if isinstance(module, QInput):
            return given[0]
        if isinstance(module, nn.Linear) and (given[0].height, given[0].width) != (1, 1):
            raise InputError(f"{node.target}: a linear layer on an image has no C form", "flatten the image before it")
        if isinstance(module, QOutput):
            return self._add(Dequantize(given, self._value(node), module.given.scale))
        make = self._integer_step if self.integers else self._float_step
        return self._add(make(node, module, given))

    def _add(self, step: Step) -> Value:
        self.steps.append(step)
        return step.out

    def _value(self, node: fx.Node, scale: Scale | None = None) -> Value:
        if scale is not None and scale.top > LEVELS:
            raise InputError("integers beyond 8 bits have no C form", "quantize with --bits 8 or less")
        _, channels, height, width = (*shape_of(node), 1, 1)[:4]
        return Value(channels, height, width, *(() if scale is None else (scale.zero_point, scale.top)))

    def _float_step(self, node: fx.Node, module: nn.Module, given: tuple[Value, ...]) -> Step:
        out = self._value(node)
        if isinstance(module, nn.Conv2d | nn.Linear):
            bias = np.zeros(len(module.weight), np.float32) if module.bias is None else _array(module.bias)
            return Product(given, out, _four(_array(module.weight)), bias, relu=False, **_conv_options(module))
        if isinstance(module, Add):
            return Elementwise(given, out, "add", sum=Sum(given[1], relu=False))
        if isinstance(module, Affine):
            size = out.channels
            scale, shift = (np.broadcast_to(_array(v).reshape(-1), size) for v in (module.scale, module.shift))
            return Elementwise(given, out, "affine", scale=scale, shift=shift)
        if isinstance(module, GlobalAvgPool | nn.AvgPool2d):
            kernel, stride = _window(module, given[0])
            return Pool(given, out, "average", kernel, stride, scale=1 / math.prod(kernel))
        return self._keep(module, given, out)

    def _integer_step(self, node: fx.Node, module: nn.Module, given: tuple[Value, ...]) -> Step:
        if isinstance(module, QMatmul):
            out = self._value(node, module.out)
            weight, bias = (_array(v, np.int64) for v in (module.weight, module.bias))
            return Product(
                given, out, _four(weight), bias, module.relu, **_pairs(module.conv or {}),
                scale=_array(module.multiplier()), logits=module.out is None,
            )  # fmt: skip
        if isinstance(module, QAdd):
            out = self._value(node, module.out)
            numbers = module.ra, module.rb, module.offset
            return Elementwise(given, out, "add", sum=Sum(given[1], module.relu, True, *numbers))
        if isinstance(module, QAffine):
            out = self._value(node, module.out)
            size = out.channels
            scale, shift = (np.broadcast_to(_array(v).reshape(-1), size) for v in (module.scale, module.shift))
            return Elementwise(
                given, out, "affine", module.relu, None, scale, shift, module.given.scale, module.out.scale
            )
        if isinstance(module, QAvgPool):
            kernel, stride = _window(module.source, given[0])
            return Pool(
                given, self._value(node, module.out), "average", kernel, stride,
                scale=float(module.multiplier(math.prod(kernel))),
            )  # fmt: skip
        assert isinstance(module, QKeep)
        return self._keep(module.source, given, self._value(node, module.given))

    def _keep(self, module: nn.Module, given: tuple[Value, ...], out: Value) -> Step:
        if isinstance(module, nn.ReLU):
            return Elementwise(given, out, "relu", relu=True)
        if isinstance(module, nn.Flatten):
            return Flatten(given, out)
        if isinstance(module, nn.MaxPool2d):
            kernel, stride = _window(module, given[0])
            return Pool(given, out, "max", kernel, stride, _pair(module.padding))
        raise InputError(f"{type(module).__name__} has no C form", "export it as ONNX")


def _fuse(plan: Plan) -> None:
    """Products take in a ReLU, and a residual sum, that nothing else reads their result of."""
    steps = plan.steps
    for step in list(steps):
        if isinstance(step, Elementwise) and step.kind == "relu" and not plan.integers:
            maker = _maker(plan, step.given[0])
            if maker is not None:
                if isinstance(maker, Product) and maker.sum is not None:
                    maker.sum.relu = True
                else:
                    maker.relu = True
                maker.out = step.out
                steps.remove(step)
        elif isinstance(step, Elementwise) and step.kind == "add":
            _fuse_sum(plan, step)


def _fuse_sum(plan: Plan, step: Elementwise) -> None:
    makers = [_maker(plan, value) for value in step.given]
    ready = [made for made in makers if isinstance(made, Product) and made.sum is None and not made.linear]
    ready = [made for made in ready if plan.integers or not made.relu]
    if not ready or step.given[0] is step.given[1]:
        return
    assert step.sum is not None
    maker = max(ready, key=plan.steps.index)
    own_first = maker.out is step.given[0]
    other = step.given[1] if own_first else step.given[0]
    made = [index for index, found in enumerate(plan.steps) if found.out is other]
    if made and made[0] > plan.steps.index(maker):
        return  # the other part is not there yet
    step.sum.other, step.sum.own_first = other, own_first
    maker.own, maker.sum, maker.out = maker.out, step.sum, step.out
    plan.steps.remove(step)


def _maker(plan: Plan, value: Value) -> Any:
    """The product or sum that made ``value`` if one step alone reads it."""
    readers = [step for step in plan.steps for read in reads(step) if read is value]
    if len(readers) != 1 or value is plan.logits:
        return None
    found = [step for step in plan.steps if step.out is value]
    fits = found and (isinstance(found[0], Product) or (isinstance(found[0], Elementwise) and found[0].kind == "add"))
    return found[0] if fits else None


def reads(step: Step) -> list[Value]:
    """Every value that a step reads."""
    more = [step.sum.other] if isinstance(step, Product) and step.sum is not None else []
    return [*step.given, *more]


def _settle_pads(plan: Plan) -> None:
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


def entries(step: Product, channel: int) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """For each filter, the offsets of its non-zero weights from the first cell that is read, ascending; and values.

    ``channel`` is the distance of two input channels, or of two phases of one, in what is read.
    """
    reach, pitch, before = Reach.of(step), step.out.pitch, Tiling.of(step).before
    phases = {phase: index for index, phase in enumerate(reach.phases)}
    inner = [phases[tap[:2]] * channel + before + tap[2] * pitch + tap[3] for tap in reach.taps.values()]
    filters, fan_in = step.weight.shape[:2]
    for index, weight in enumerate(step.weight.reshape(filters, fan_in, -1)):
        first = index // (filters // step.groups) * fan_in
        place, entry = weight.nonzero()
        offsets = (first + place) * len(phases) * channel + np.array(inner)[entry]
        order = np.argsort(offsets, kind="stable")
        yield offsets[order], weight[place, entry][order]


def _place(plan: Plan) -> None:
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


def _window(module: Any, given: Value) -> tuple[tuple[int, int], tuple[int, int]]:
    if module is None or isinstance(module, GlobalAvgPool):
        whole = given.height, given.width
        return whole, whole
    return _pair(module.kernel_size), _pair(module.stride)


def _conv_options(module: nn.Conv2d | nn.Linear) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups")
    return _pairs({name: getattr(module, name) for name in names}) if isinstance(module, nn.Conv2d) else {}


def _pairs(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value if name == "groups" else _pair(value) for name, value in options.items()}


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _four(weight: NDArray[Any]) -> NDArray[Any]:
    return weight.reshape(*weight.shape, *(1,) * (4 - weight.ndim))


def _array(values: Tensor, dtype: Any = np.float32) -> NDArray[Any]:
    return values.detach().cpu().numpy().astype(dtype)
