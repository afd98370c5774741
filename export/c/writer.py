"""A model as C source that depends on nothing: one .c and one .h, weights as constant tables, no allocation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from rprune.export.c.layout import LANES, Reach, Tiling, distance, entries
from rprune.export.c.plan import plan_of
from rprune.export.c.steps import Dequantize, Elementwise, Flatten, Plan, Pool, Product, Step, Value
from rprune.export.c.templates import HEADER, RUN
from rprune.quantization.simulate import LEVELS

EXACT = 1 << 24  # integers below it are exact in float32
LARGEST_GAP = 65535
OVER = 2 * LANES  # cells behind the last that whole chunks may touch
A_LINE = 110


@dataclass(frozen=True)
class CSource:
    """Two files' texts. ``ram``: bytes of static memory with vectors, and without."""

    header: str
    source: str
    ram: tuple[int, int]


def c_source(network: fx.GraphModule, input_shape: tuple[int, int, int], name: str = "model") -> CSource:
    """The C form of a network from ``trace`` or ``compact`` (floats) or from ``simulated`` (8 bits).

    ``name`` is that of the two files, without a suffix. Raises InputError for layers without a C form.
    """
    return _Writer(plan_of(network, input_shape), name).write()


class _Writer:
    def __init__(self, plan: Plan, name: str) -> None:
        self.plan, self.name = plan, name
        self.tables: list[str] = []
        self.body: list[str] = []
        self.entries: dict[Product, tuple[int, bool]] = {}
        self.bytes = [0, 0]  # of tables, with bytes for weights and with floats
        self.scratch = self.tile = 1
        self.wide = False
        self.needed: set[str] = set()  # parts of the kernels
        self.masks: set[str] = set()

    def write(self) -> CSource:
        named = {f"s{index}": step for index, step in enumerate(self.plan.steps)}
        for name, step in named.items():
            if isinstance(step, Product):
                self.entries[step] = self._entries(name, step)
        self.body = [self._step(name, step) for name, step in named.items()]
        source = "\n".join(
            [
                f'#include "{self.name}.h"', "",
                f"#define MODEL_WIDE {int(self.wide)}",
                f"#define MODEL_ARENA {self.plan.arena + OVER}",
                f"#define MODEL_SCRATCH {self.scratch + OVER}",
                f"#define MODEL_TILE {self.tile}", "",
                self._kernels(),
                *self.tables, "",
                self._run(),
            ]
        )  # fmt: skip
        cells = self.plan.arena + self.scratch + 2 * OVER
        sums = 4 * self.tile * (1 + self.wide) if self.plan.integers else 0
        vector, scalar = 4 * cells + sums, (1 if self.plan.integers else 4) * cells + sums
        return CSource(self._header(vector, scalar), source, (vector, scalar))

    def _kernels(self) -> str:
        first, *parts = files("rprune.export.c").joinpath("kernels.c").read_text().split("//! ")
        named = {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}
        return "".join([first, *(text for name, text in named.items() if name in self.needed)])

    def _step(self, name: str, step: Step) -> str:
        if isinstance(step, Product):
            return self._linear(name, step) if step.linear else self._conv(name, step)
        given, out = step.given[0], step.out
        a, made = self._place(given), self._place(out)
        if isinstance(step, Flatten):
            self.needed.add("flatten")
            return f"flatten({a}, &{self._image(name + '_in', given)}, {made});"
        if isinstance(step, Dequantize):
            value = f"(float)(({a})[i * {given.plane}] - ZERO({given.zero})) * {_float(step.scale)}"
            return f"for (int i = 0; i < {out.channels}; i++) logits[i] = {value};"
        both = f"&{self._image(name + '_in', given)}, {made}, &{self._image(name + '_out', out)}"
        if isinstance(step, Pool):
            self.needed |= {"window", step.kind}
            numbers = _numbers([*step.kernel, *step.stride, *step.padding])
            self.tables.append(f"static const window {name} = {{{numbers}, {_float(step.scale)}}};")
            return f"{step.kind}_pool({a}, {both}, &{name});"
        assert isinstance(step, Elementwise)
        self.needed.add(step.kind)
        if step.kind == "relu":
            return f"relu({a}, {both});"
        if step.kind == "affine":
            layer: dict[str, Any] = {"scale": self._table(f"{name}_scale", "float", step.scale)}
            layer |= {"shift": self._table(f"{name}_shift", "float", step.shift), "clip": int(step.relu)}
            layer |= {"given": _float(step.given_scale), "made": _float(step.out_scale)}
            self.tables.append(f"static const scaling {name} = {{{_fields(layer)}}};")
            return f"affine({a}, {both}, &{name});"
        assert step.sum is not None
        self.needed.add("settled")
        numbers = f"{_float(step.sum.r1)}, {_float(step.sum.r2)}, {_float(step.sum.offset)}"
        zeros = _numbers([given.zero, step.given[1].zero, step.sum.relu or step.relu])
        self.tables.append(f"static const addition {name} = {{{numbers}, {zeros}}};")
        first, images = both.split(", ", 1)
        return f"add({a}, {first}, {self._place(step.given[1])}, {images}, &{name});"

    def _conv(self, name: str, step: Product) -> str:
        tiling, held = Tiling.of(step), step.shares or step
        reach, channel = Reach.of(held), distance(step)
        given, out, own, add = step.given[0], step.out, step.own or step.out, step.sum
        self.tile = max(self.tile, tiling.tile)
        if not tiling.even:
            self.scratch = max(self.scratch, given.channels * len(reach.phases) * channel)
        layer: dict[str, Any] = self._shared(name, step) | {
            "filters": len(step.weight), "groups": self.entries[step][0], "positions": tiling.positions,
            "tile": tiling.tile, "before": tiling.before, "ready": int(tiling.even or held is not step),
            "in_place": int(tiling.even), "channels": given.channels, "channel": channel,
            "in_pitch": given.pitch, "in_plane": given.plane, "in_zero": given.zero, "phases": len(reach.phases),
            "stride_y": step.stride[0], "stride_x": step.stride[1],
            "phase": self._table(f"{name}_phase", "int16_t", _phases(step, reach)),
            "read": self._table(f"{name}_read", "uint8_t", self._read(step, reach)),
            "inside": f"INSIDE({self._inside(out, tiling)})",
            "pitch": out.pitch, "plane": out.plane, "zero": own.zero, "top": own.top,
            "relu": int(step.relu if add is None or self.plan.integers else add.relu),
        }  # fmt: skip
        if add is not None:
            layer |= {"add": 1, "own_first": int(add.own_first), "other_zero": add.other.zero}
            layer |= {"add_zero": out.zero, "add_top": out.top, "add_relu": int(add.relu)}
            layer |= {"r1": _float(add.r1), "r2": _float(add.r2), "offset": _float(add.offset)}
        self.tables.append(f"static const conv_layer {name} = {{{_fields(layer)}}};")
        self.needed |= {"conv", "settled"}
        other = "0" if add is None else self._place(add.other)
        return f"conv(&{name}, {self._place(given)}, &{self._image(name + '_out', out)}, {self._place(out)}, {other});"

    def _read(self, step: Product, reach: Reach) -> NDArray[Any]:
        """Of each channel's phases: does an entry of a layer that works on them read it?"""
        layers = [step, *(other for other in self.entries if other.shares is step)]
        read = np.zeros((step.given[0].channels, len(reach.phases)), np.uint8)
        for layer in layers:
            read |= _alive(layer, reach) | self.entries[layer][1]  # fillers read anything
        return read

    def _inside(self, out: Value, tiling: Tiling) -> str:
        """The table of which positions are pixels; layers of one size share it."""
        cells = -(-tiling.positions // tiling.tile) * tiling.tile + LANES
        name = f"inside_{out.height}_{out.width}_{out.pitch}_{cells}"
        if name not in self.masks:
            self.masks.add(name)
            y, x = np.divmod(np.arange(cells), out.pitch)
            self.tables.append("#if DOT || VECTOR")
            self._table(name, "lane", -((y < out.height) & (x < out.width)).astype(np.int8))
            self.tables.append("#endif")
        return name

    def _linear(self, name: str, step: Product) -> str:
        given, out = step.given[0], step.out
        layer = self._shared(name, step) | {
            "filters": len(step.weight), "in_zero": given.zero, "relu": int(step.relu),
        }  # fmt: skip
        self.tables.append(f"static const linear_layer {name} = {{{_fields(layer)}}};")
        self.needed |= {"linear", "logits" if step.logits else "hidden"}
        call = f"&{name}, {self._place(given)}, {self._place(out)}"
        return f"linear_logits({call});" if step.logits else f"linear({call}, &{self._image(name + '_out', out)});"

    def _shared(self, name: str, step: Product) -> dict[str, Any]:
        kind = "int32_t" if self.plan.integers else "float"
        found = {"gap": f"{name}_gap", "count": f"{name}_count", "weight": f"{name}_weight"}
        found["bias"] = self._table(f"{name}_bias", kind, step.bias)
        if step.scale is not None:
            found["scale"] = self._table(f"{name}_scale", "float", step.scale)
        return found

    def _entries(self, name: str, step: Product) -> tuple[int, bool]:
        """The tables of gaps, values and counts; returns the groups of a filter, and whether fillers are among them."""
        exact = self.plan.integers and not step.linear  # linear layers add up integers
        filters = []
        for (offsets, values), bias in zip(entries(step), step.bias, strict=True):
            cuts = _cuts(values, int(bias)) if exact else []
            parts = zip(np.split(offsets, cuts), np.split(values, cuts), strict=True)
            filters.append([_filled(*part) for part in parts])
        groups = max(len(found) for found in filters)
        self.wide = self.wide or groups > 1
        nothing = [(np.zeros(0, np.int64), np.zeros(0, step.weight.dtype))]
        flat = [group for found in filters for group in found + nothing * (groups - len(found))]
        self._table(f"{name}_gap", "uint16_t", np.concatenate([gaps for gaps, _ in flat]))
        weights = np.concatenate([values for _, values in flat])
        self._table(f"{name}_weight", "tap", weights)
        self._table(f"{name}_count", "int32_t", np.array([len(values) for _, values in flat]))
        return groups, not weights.all()

    def _table(self, name: str, kind: str, values: NDArray[Any]) -> str:
        size = {"uint8_t": 1, "int16_t": 2, "uint16_t": 2}.get(kind, 4)
        if kind != "lane":  # of vectors only
            self.bytes[0] += values.size * (1 if kind == "tap" and self.plan.integers else size)
        self.bytes[1] += values.size * size
        flat = values.reshape(-1)
        words = [str(int(v)) for v in flat] if flat.dtype.kind in "iu" else [_float(v) for v in flat]
        words = words or ["0"]
        self.tables.append(f"static const {kind} {name}[] = {{\n{_wrapped(words)}}};")
        return name

    def _image(self, name: str, value: Value) -> str:
        numbers = [value.channels, value.height, value.width, value.pad, value.plane, value.zero, value.top]
        self.tables.append(f"static const image {name} = {{{_numbers(numbers)}}};")
        return name

    def _place(self, value: Value) -> str:
        return "logits" if value is self.plan.logits else f"arena + {value.place + value.lead}"

    def _run(self) -> str:
        image = self.plan.image
        pixels = [*self.plan.input_shape, image.pad, image.plane, image.zero, image.top]
        if self.plan.integers:
            step = _float(np.float32(1 / LEVELS))
            byte, real = "(cell)*pixels", f"(cell)between(nearest(*pixels / {step}), 0.0f, {LEVELS}.0f)"
        else:
            byte, real = "(float)*pixels / 255.0f", "*pixels"
        return RUN.format(
            image=_numbers(pixels), steps="\n    ".join(self.body), first=self._place(image), byte=byte, real=real
        )

    def _header(self, vector: int, scalar: int) -> str:
        channels, height, width = self.plan.input_shape
        kind = "8-bit integers, the same as the int8 ONNX file to the bit" if self.plan.integers else "32-bit floats"
        return HEADER.format(
            channels=channels, height=height, width=width, classes=self.plan.logits.channels, kind=kind,
            vector=vector, scalar=scalar, tables=self.bytes[0], tables_vector=self.bytes[1], version=FORMAT,
            integers=int(self.plan.integers),
        )  # fmt: skip


FORMAT = 1  # of the files: what a loader may rely on


def _fields(table: dict[str, Any]) -> str:
    return ", ".join(f".{key} = {value}" for key, value in table.items())


def _phases(step: Product, reach: Reach) -> NDArray[Any]:
    """Of each phase: its first row and column in the input, and how many of its rows and columns are read."""
    given, out = step.given[0], step.out
    rows = [min(-(-(given.height - y) // step.stride[0]), out.height + reach.down) for y, _ in reach.phases]
    columns = [min(-(-(given.width - x) // step.stride[1]), out.width + reach.extra) for _, x in reach.phases]
    return np.array([[*phase, *sides] for phase, *sides in zip(reach.phases, rows, columns, strict=True)])


def _alive(step: Product, reach: Reach) -> NDArray[np.uint8]:
    """Of each channel's phases: does a weight that is not zero read it?"""
    filters, fan_in = step.weight.shape[:2]
    taps = Reach.of(step).taps.values()
    alive = step.weight.reshape(step.groups, filters // step.groups, fan_in, -1).any(1).reshape(-1, len(taps))
    phases = [[tap[:2] == phase for tap in taps] for phase in reach.phases]
    return np.array([(alive & np.array(found)).any(1) for found in phases]).T.astype(np.uint8)


def _filled(offsets: NDArray[Any], values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Offsets as gaps of at most 65535; a filler of value 0 stands where one is wider."""
    gaps = np.diff(offsets, prepend=0)
    fillers = np.maximum(-(-gaps // LARGEST_GAP) - 1, 0)
    last = np.cumsum(fillers + 1) - 1
    found = np.full(len(gaps) + int(fillers.sum()), LARGEST_GAP, np.int64)
    filled = np.zeros(len(found), values.dtype)
    found[last] = gaps - fillers * LARGEST_GAP
    filled[last] = values
    return found, filled


def _cuts(values: NDArray[Any], bias: int) -> list[int]:
    """Where to part entries so that no part's sum passes 2^24, whatever the pixels are; the first takes in the bias."""
    reach = LEVELS * np.abs(values).cumsum()
    cuts: list[int] = []
    base = -abs(bias)
    while len(reach) and int(reach[-1]) - base >= EXACT:
        cuts.append(int(np.searchsorted(reach, base + EXACT)))
        base = int(reach[cuts[-1] - 1])
    return cuts


def _float(value: Any) -> str:
    text = str(np.float32(value))
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(str(int(value)) for value in values)


def _wrapped(words: list[str]) -> str:
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) > A_LINE:
            lines.append(line)
            line = ""
        line += word + ","
    return "\n".join([*lines, line])
