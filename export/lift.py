"""An ONNX classifier as a network of known layers: what is certified of it is then said of the file itself.

Float graphs become layers of :mod:`rprune.models.graph`. In graphs with QuantizeLinear and DequantizeLinear what lies
between them becomes a layer of the integer simulation, which gives the bits of ONNX Runtime's integer kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from rprune.errors import InputError, first_line
from rprune.export.constants import Constants, need
from rprune.export.session import load_onnx
from rprune.models.graph import Add, Affine, GlobalAvgPool, clipped, note_shapes
from rprune.quantization.simulate import LEVELS, QAdd, QAffine, QAvgPool, QInput, QKeep, QMatmul, QOutput, Scale

HINT = "bounds go through Conv, Gemm, MatMul, Relu, Add, batch norm, pooling, Flatten, and their 8-bit forms"


def lifted(path: Path) -> fx.GraphModule:
    """The network of a file, in eval mode. Raises InputError, naming node and operator, for what has no layer here."""
    model = load_onnx(path)
    try:
        return _Lifter(model.graph).network()
    except InputError as error:
        raise InputError(f"{path}: {error.message}", HINT) from None


@dataclass(frozen=True)
class _Value:
    """A value of the graph: of ``node``, real or, with ``scale``, integers; or of an operator on integers that waits to
    be quantised (``pending``: its layer once the scale of the result, and whether a ReLU came first, are known)."""

    node: fx.Node | None = None
    scale: Scale | None = None
    pending: Callable[[Scale | None, bool], tuple[nn.Module, tuple[fx.Node, ...]]] | None = None
    relu: bool = False
    keeps: Scale | None = None  # a pending layer that leaves integers as they are
    matmul: bool = False
    flat: bool = False  # a pending one is flattened before it is quantised


@dataclass(frozen=True)
class _Weight:
    """A constant behind DequantizeLinear."""

    numbers: NDArray[Any]
    scale: NDArray[np.float32]
    axis: int


class _Lifter:
    def __init__(self, graph: Any) -> None:
        self.source = graph
        self.constants = Constants(graph)
        self.constant = set(self.constants.tensors)
        self.root, self.graph = nn.Module(), fx.Graph()
        self.values: dict[str, _Value | _Weight] = {}
        given = [value for value in graph.input if value.name not in self.constant]
        need(len(given) == 1, f"it takes {len(given)} inputs, not one")
        _, *size = [dim.dim_value for dim in given[0].type.tensor_type.shape.dim] or [0]
        need(len(size) == 3 and min(size) > 0, "its input is not (batch, c, h, w) of one size")
        self.shape = size[0], size[1], size[2]
        self.values[given[0].name] = _Value(self.graph.placeholder("input"))

    def network(self) -> fx.GraphModule:
        for node in self.source.node:
            self._lift(node)
        last = self.values.get(self.source.output[0].name)
        need(isinstance(last, _Value), "its output does not depend on its input")
        assert isinstance(last, _Value)
        self.graph.output(self._real(last))
        network = fx.GraphModule(self.root, self.graph).eval().requires_grad_(False)
        try:
            note_shapes(network, self.shape)
        except RuntimeError as error:
            raise InputError(f"its shapes contradict each other: {first_line(error)}") from None
        return network

    def _lift(self, node: Any) -> None:
        try:
            need(node.domain in ("", "ai.onnx"), f"operators of {node.domain!r:.40} are unknown")
            if node.op_type == "Constant":
                self._constant(node)
            elif all(name in self.constant for name in node.input if name):
                self._fold(node)
            else:
                rule = RULES.get(node.op_type)
                need(rule is not None, "this operator has no layer")
                assert rule is not None
                self.values[node.output[0]] = rule(self, node)
        except (InputError, IndexError, KeyError, ValueError, TypeError) as error:
            reason = error.message if isinstance(error, InputError) else f"it makes no sense ({type(error).__name__})"
            name = node.name or next(iter(node.output), "")
            raise InputError(f"node {name!r:.80} ({node.op_type!r:.40}): {reason}") from None

    def _constant(self, node: Any) -> None:
        tensors = [entry.t for entry in node.attribute if entry.name == "value"]
        need(len(tensors) == 1, "a constant that is no tensor")
        self.constants.tensors[node.output[0]] = tensors[0]
        self.constant.add(node.output[0])

    def _fold(self, node: Any) -> None:
        if node.op_type == "DequantizeLinear":
            scale = np.atleast_1d(self.array(node.input[1]).astype(np.float32))
            if len(node.input) > 2 and node.input[2]:
                need(not self.array(node.input[2]).any(), "weights have a zero point other than 0")
            axis = _Attributes(node).get("axis", 1)
            self.values[node.output[0]] = _Weight(self.array(node.input[0]), scale, axis)
        else:
            self.constant.update(node.output)  # an expansion; computed when it is asked for

    def array(self, name: str) -> NDArray[Any]:
        return self.constants.array(name)

    def value(self, name: str) -> _Value:
        found = self.values.get(name)
        need(isinstance(found, _Value), f"{name!r:.60} does not depend on the image")
        assert isinstance(found, _Value)
        return found

    def call(self, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        name = f"layer{len(list(self.root.children()))}"
        self.root.add_module(name, module)
        return self.graph.call_module(name, inputs)

    def _real(self, value: _Value) -> fx.Node:
        """What the graph returns."""
        if value.pending is not None:
            plain = value.keeps is None and not value.relu and not value.flat
            need(plain, "its output is neither logits nor quantised")
            module, inputs = value.pending(None, False)
            return self.call(module, *inputs)
        assert value.node is not None
        return value.node if value.scale is None else self.call(QOutput(value.scale), value.node)

    def layer(self, value: _Value, module: nn.Module) -> _Value:
        """A layer on real values."""
        need(value.pending is None and value.scale is None, "it mixes quantised and real values")
        assert value.node is not None
        return _Value(self.call(module, value.node))

    def floats(self, name: str) -> NDArray[np.float32]:
        need(name in self.constant, f"{name!r:.60} is no constant")
        found: NDArray[np.float32] = self.array(name).astype(np.float32)
        return found


class _Attributes:
    def __init__(self, node: Any) -> None:
        from onnx import helper

        self.table = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}

    def get(self, name: str, default: Any) -> Any:
        found = self.table.get(name, default)
        return found.decode() if isinstance(found, bytes) else found


def _window(a: _Attributes, kernel: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(stride, padding, dilation) of a window over images."""
    need(len(kernel) == 2, "its window is not two-dimensional")
    need(a.get("auto_pad", "NOTSET") in ("NOTSET", "VALID"), "its padding depends on the image's size")
    top, left, bottom, right = a.get("pads", [0, 0, 0, 0])
    need((top, left) == (bottom, right), "its padding is not the same on both sides")
    stride, dilation = a.get("strides", [1, 1]), a.get("dilations", [1, 1])
    return (stride[0], stride[1]), (top, left), (dilation[0], dilation[1])


def _per_output(weight: _Weight, axis: int, outputs: int) -> NDArray[np.float32]:
    need(weight.scale.size == 1 or (weight.axis == axis and weight.scale.shape == (outputs,)), "scales of another axis")
    return np.broadcast_to(weight.scale, (outputs,)).astype(np.float32)


def _integer_product(
    given: _Value, geometry: nn.Module, numbers: NDArray[Any], scale: NDArray[np.float32], bias: Any
) -> _Value:
    """A product of integers that waits for its scale; ``bias``: a constant's name or value, or None."""
    need(given.scale is not None and given.node is not None, "its weights are quantised, its input is not")
    need(numbers.dtype == np.int8, f"weights of {numbers.dtype} are not supported")
    assert given.scale is not None
    assert given.node is not None
    step = scale * np.float32(given.scale.scale)
    whole = np.zeros(len(numbers), np.int32)
    if isinstance(bias, _Weight):
        need(bias.numbers.dtype == np.int32, "its bias is not int32")
        same = np.allclose(np.broadcast_to(bias.scale, step.shape), step, rtol=1e-6, atol=0)
        need(bool(same), "its bias has another scale than its products")
        whole = bias.numbers
    elif bias is not None:
        real = bias.astype(np.float64) / step
        need(bool((np.abs(real) < 2**31).all()), "its bias is beyond int32")
        whole = np.rint(real).astype(np.int32)
        need(bool((np.abs(real - whole) < 1e-3).all()), "its bias is no multiple of the products' scale")
    source, node, own = given.scale, given.node, torch.from_numpy(scale.copy())
    weight, offset = torch.from_numpy(numbers.copy()), torch.from_numpy(whole.reshape(-1).copy())

    def make(out: Scale | None, relu: bool) -> tuple[nn.Module, tuple[fx.Node, ...]]:
        return QMatmul(geometry, weight, offset, own, source, out, relu), (node,)  # type: ignore[arg-type]

    return _Value(pending=make)


def _conv(lifter: _Lifter, node: Any) -> _Value:
    a = _Attributes(node)
    given, weight = lifter.value(node.input[0]), lifter.values.get(node.input[1])
    stored = weight.numbers if isinstance(weight, _Weight) else lifter.floats(node.input[1])
    need(stored.ndim == 4, "its weight has not four dimensions")
    stride, padding, dilation = _window(a, stored.shape[2:])
    groups = int(a.get("group", 1))
    module = nn.Conv2d(
        stored.shape[1] * groups, len(stored), stored.shape[2:], stride, padding, dilation, groups, device="meta"
    )
    bias = _bias(lifter, node)
    if isinstance(weight, _Weight):
        return _integer_product(given, module, stored, _per_output(weight, 0, len(stored)), bias)
    return lifter.layer(given, _filled(module, stored, bias))


def _linear(lifter: _Lifter, node: Any) -> _Value:
    a = _Attributes(node)
    given, weight = lifter.value(node.input[0]), lifter.values.get(node.input[1])
    plain = a.get("alpha", 1.0) == 1.0 and a.get("beta", 1.0) == 1.0 and not a.get("transA", 0)
    need(plain, "alpha, beta and transA are not supported")
    stored = weight.numbers if isinstance(weight, _Weight) else lifter.floats(node.input[1])
    need(stored.ndim == 2, "its weight is no matrix")
    transposed = bool(a.get("transB", 0))
    rows = stored if transposed else np.ascontiguousarray(stored.T)
    module, bias = nn.Linear(rows.shape[1], len(rows), device="meta"), _bias(lifter, node)
    if isinstance(weight, _Weight):
        scale = _per_output(weight, 0 if transposed else 1, len(rows))
        found = _integer_product(given, module, rows, scale, bias)
        return replace(found, matmul=node.op_type == "MatMul")
    found = lifter.layer(given, _filled(module, rows, bias))
    return replace(found, matmul=node.op_type == "MatMul")


def _bias(lifter: _Lifter, node: Any) -> Any:
    if len(node.input) < 3 or not node.input[2]:
        return None
    found = lifter.values.get(node.input[2])
    return found if isinstance(found, _Weight) else lifter.floats(node.input[2])


def _filled(module: Any, weight: NDArray[Any], bias: Any) -> nn.Module:
    need(not isinstance(bias, _Weight), "its bias is quantised, its weight is not")
    module.weight = nn.Parameter(torch.from_numpy(weight.astype(np.float32)), requires_grad=False)
    offset = np.zeros(len(weight), np.float32) if bias is None else bias.reshape(-1)
    need(offset.shape == (len(weight),), "its bias does not fit")
    module.bias = nn.Parameter(torch.from_numpy(offset.copy()), requires_grad=False)
    module.eval()
    found: nn.Module = module
    return found


def _quantize(lifter: _Lifter, node: Any) -> _Value:
    given, scale = lifter.value(node.input[0]), lifter.floats(node.input[1])
    zero = lifter.array(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros((), np.uint8)
    need(scale.size == zero.size == 1, "values have scales of channels")
    need(zero.dtype in (np.uint8, np.int8), f"values of {zero.dtype} are not supported")
    shift = 128 if zero.dtype == np.int8 else 0
    out = Scale(float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]) + shift)
    if given.pending is not None:
        if given.keeps is not None:
            same = (given.keeps.scale, given.keeps.zero_point) == (out.scale, out.zero_point)
            need(same, "pooled or flattened values are quantised anew")
            out = given.keeps
        module, inputs = given.pending(out, given.relu)
        made = lifter.call(module, *inputs)
        return _Value(lifter.call(QKeep(nn.Flatten(), out), made) if given.flat else made, out)
    need(given.scale is None and given.node is not None, "it quantises integers")
    assert given.node is not None
    need(given.node.op == "placeholder", "a real layer lies in front of a quantiser")
    return _Value(lifter.call(QInput(out), given.node), out)


def _dequantize(lifter: _Lifter, node: Any) -> _Value:
    given, scale = lifter.value(node.input[0]), lifter.floats(node.input[1])
    need(given.scale is not None, "it dequantises what is not quantised")
    assert given.scale is not None
    zero = int(lifter.array(node.input[2]).reshape(-1)[0]) if len(node.input) > 2 and node.input[2] else 0
    signed = len(node.input) > 2 and node.input[2] and lifter.array(node.input[2]).dtype == np.int8
    same = scale.size == 1 and float(scale.reshape(-1)[0]) == given.scale.scale
    need(same and zero + (128 if signed else 0) == given.scale.zero_point, "values are dequantised by another scale")
    return given


def _clip(lifter: _Lifter, node: Any) -> _Value:
    """Of integers, fewer than 8 bits: they are cut at their largest."""
    given = lifter.value(node.input[0])
    need(given.node is not None, "Clip in front of a quantiser")
    if given.scale is None:
        return _clip_real(lifter, given, node)
    low = len(node.input) > 1 and node.input[1]
    top = int(lifter.array(node.input[2]).reshape(-1)[0]) if len(node.input) > 2 and node.input[2] else LEVELS
    assert given.scale is not None
    assert given.node is not None
    need(not low or int(lifter.array(node.input[1]).reshape(-1)[0]) == 0, "Clip has a lower end")
    need(given.scale.zero_point <= top <= LEVELS, "Clip ends below zero")
    scale = replace(given.scale, top=top)
    module = lifter.root.get_submodule(str(given.node.target))
    need(hasattr(module, "out") and not given.node.users, "Clip cuts what others read")
    module.out = scale  # type: ignore[assignment]
    return _Value(given.node, scale)


def _clip_real(lifter: _Lifter, given: _Value, node: Any) -> _Value:
    a, ends = _Attributes(node), []
    for place, (name, none) in enumerate((("min", -math.inf), ("max", math.inf)), 1):
        constant = lifter.floats(node.input[place]) if len(node.input) > place and node.input[place] else None
        ends.append(float(a.get(name, none) if constant is None else constant.reshape(-1)[0]))
    for step in clipped(*ends):
        given = lifter.layer(given, step)
    return given


def _leaky(lifter: _Lifter, node: Any) -> _Value:
    slope = float(_Attributes(node).get("alpha", 0.01))
    need(0 <= slope <= 1, f"its slope {slope:g} is not in [0, 1]")
    return lifter.layer(lifter.value(node.input[0]), nn.LeakyReLU(slope))


def _relu(lifter: _Lifter, node: Any) -> _Value:
    given = lifter.value(node.input[0])
    if given.pending is not None:
        need(given.keeps is None, "a ReLU behind a layer that keeps integers")
        return replace(given, relu=True)
    return _kept(lifter, given, nn.ReLU())


def _kept(lifter: _Lifter, given: _Value, module: nn.Module) -> _Value:
    """A layer that acts on integers as on real numbers."""
    if given.scale is None:
        return lifter.layer(given, module)
    scale, source = given.scale, given.node
    assert source is not None
    return _Value(pending=lambda out, relu: (QKeep(module, scale), (source,)), keeps=scale)


def _max_pool(lifter: _Lifter, node: Any) -> _Value:
    a = _Attributes(node)
    kernel = a.get("kernel_shape", ())
    stride, padding, dilation = _window(a, kernel)
    need(dilation == (1, 1) and not a.get("ceil_mode", 0) and len(node.output) == 1, "dilation, ceil_mode or indices")
    return _kept(lifter, lifter.value(node.input[0]), nn.MaxPool2d(tuple(kernel), stride, padding))


def _average_pool(lifter: _Lifter, node: Any) -> _Value:
    a = _Attributes(node)
    given = lifter.value(node.input[0])
    if node.op_type == "AveragePool":
        kernel = a.get("kernel_shape", ())
        stride, padding, _ = _window(a, kernel)
        need(padding == (0, 0) and not a.get("ceil_mode", 0), "padding or ceil_mode")
        module: Any = nn.AvgPool2d(tuple(kernel), stride)
    else:
        if node.op_type == "ReduceMean":
            named = len(node.input) > 1 and node.input[1]
            axes = lifter.array(node.input[1]).tolist() if named else a.get("axes", [])
            need([axis % 4 for axis in axes] == [2, 3] and a.get("keepdims", 1) == 1, "a mean over other axes")
        module = GlobalAvgPool()
    if given.scale is None:
        return lifter.layer(given, module)
    scale, source = given.scale, given.node
    assert source is not None
    window = None if isinstance(module, GlobalAvgPool) else module

    def make(out: Scale | None, relu: bool) -> tuple[nn.Module, tuple[fx.Node, ...]]:
        need(out is not None and not relu, "averages of integers end in a quantiser")
        assert out is not None
        return QAvgPool(window, scale, out), (source,)

    return _Value(pending=make)


def _flatten(lifter: _Lifter, node: Any) -> _Value:
    a = _Attributes(node)
    given = lifter.value(node.input[0])
    if node.op_type == "Flatten":
        need(a.get("axis", 1) == 1, "it flattens other axes")
    else:
        shape = lifter.array(node.input[1]).tolist()
        need(len(shape) == 2 and (shape[0] in (0, -1) or shape[1] == -1), "it reshapes to other than (batch, features)")
    if given.pending is not None and given.keeps is None:
        return replace(given, flat=True)
    return _kept(lifter, given, nn.Flatten())


def _add(lifter: _Lifter, node: Any) -> _Value:
    live = [name for name in node.input if isinstance(lifter.values.get(name), _Value)]
    if len(live) == 1:
        return _shifted(lifter, node, live[0])
    first, second = (lifter.value(name) for name in node.input)
    if first.scale is None and second.scale is None:
        real = first.pending is None and second.pending is None
        need(real, "a sum of values that are not quantised")
        assert first.node is not None
        assert second.node is not None
        return _Value(lifter.call(Add(), first.node, second.node))
    need(first.scale is not None and second.scale is not None, "it mixes quantised and real values")
    scales, sources = (first.scale, second.scale), (first.node, second.node)

    def make(out: Scale | None, relu: bool) -> tuple[nn.Module, tuple[fx.Node, ...]]:
        need(out is not None, "sums of integers end in a quantiser")
        return QAdd(*scales, out, relu), sources  # type: ignore[arg-type,return-value]

    return _Value(pending=make)


def _shifted(lifter: _Lifter, node: Any, live: str) -> _Value:
    """The sum of a value and a constant: a bias behind MatMul, or a shift by channel."""
    given, (other,) = lifter.value(live), [name for name in node.input if name != live]
    constant = lifter.values.get(other)
    if given.matmul:
        bias = constant if isinstance(constant, _Weight) else lifter.floats(other).reshape(-1)
        if given.pending is None:
            need(not isinstance(bias, _Weight), "its bias is quantised, its weight is not")
            assert not isinstance(bias, _Weight)
            assert given.node is not None
            module: Any = lifter.root.get_submodule(str(given.node.target))
            need(not given.node.users, "others read the product without its bias")
            return replace(given, node=_with_bias(module, bias, given.node), matmul=False)
        need(not given.relu, "a bias behind a ReLU")
        raw, _ = given.pending(None, False)
        assert isinstance(raw, QMatmul)
        return _rebiased(given, raw, bias)
    return _scaled(lifter, given, 1.0, lifter.floats(other))


def _with_bias(module: Any, bias: NDArray[np.float32], node: fx.Node) -> fx.Node:
    need(bias.shape == tuple(module.bias.shape), "its bias does not fit")
    module.bias.copy_(torch.from_numpy(bias.copy()))
    return node


def _rebiased(given: _Value, raw: QMatmul, bias: Any) -> _Value:
    assert given.pending is not None
    _, (source,) = given.pending(None, False)
    module = nn.Linear(raw.weight.shape[1], len(raw.weight), device="meta")
    numbers = raw.weight.to(torch.int8).numpy()
    return _integer_product(_Value(source, raw.given), module, numbers, raw.weight_scale.numpy(), bias)


def _arithmetic(lifter: _Lifter, node: Any) -> _Value:
    live = [name for name in node.input if isinstance(lifter.values.get(name), _Value)]
    need(len(live) == 1 and (node.op_type == "Mul" or live[0] == node.input[0]), "it is no scale of a value")
    other = next(name for name in node.input if name != live[0])
    constant, given = lifter.floats(other), lifter.value(live[0])
    if node.op_type == "Sub":
        return _scaled(lifter, given, 1.0, -constant)
    need(node.op_type == "Mul" or bool((constant != 0).all()), "it divides by zero")
    return _scaled(lifter, given, constant if node.op_type == "Mul" else 1 / constant, 0.0)


def _batch_norm(lifter: _Lifter, node: Any) -> _Value:
    a = _Attributes(node)
    weight, bias, mean, variance = (lifter.floats(name).astype(np.float64) for name in node.input[1:5])
    need(not a.get("training_mode", 0), "it is in training mode")
    scale = weight / np.sqrt(variance + a.get("epsilon", 1e-5))
    sides = (-1, 1, 1)
    return _scaled(
        lifter, lifter.value(node.input[0]), scale.reshape(sides).astype(np.float32),
        (bias - mean * scale).reshape(sides).astype(np.float32),
    )  # fmt: skip


def _scaled(lifter: _Lifter, given: _Value, scale: Any, shift: Any) -> _Value:
    """scale * x + shift by channel; on integers in two operators, of which the first leaves its part pending."""
    factors = [np.asarray(part, np.float32) for part in (scale, shift)]
    for part in factors:
        flat = [side for side in part.shape if side != 1]
        channel = part.ndim < 3 or part.shape[-2:] == (1, 1)
        need(len(flat) <= 1 and channel, "its constant is not one number a channel")
    shapes = [() if part.size == 1 else (1, -1, *(1,) * (2 if part.ndim >= 3 else 0)) for part in factors]
    tensors = [torch.from_numpy(part.reshape(shape).copy()) for part, shape in zip(factors, shapes, strict=True)]
    if given.pending is None and given.scale is None:
        return lifter.layer(given, Affine(*tensors))
    before: tuple[Any, Any] = (torch.ones(()), torch.zeros(()))
    if given.pending is not None:
        raw, (source,) = given.pending(Scale(1.0, 0), False)
        need(isinstance(raw, QAffine) and not given.relu, "it scales values that are not quantised")
        assert isinstance(raw, QAffine)
        need(not raw.shift.any() and bool((tensors[0] == 1).all()), "a scale behind a shift")
        before, given = (raw.scale, tensors[1]), _Value(source, raw.given)
    else:
        before = tensors[0], tensors[1]
    quantised, node, (factor, offset) = given.scale, given.node, before
    assert quantised is not None
    assert node is not None

    def make(out: Scale | None, relu: bool) -> tuple[nn.Module, tuple[fx.Node, ...]]:
        need(out is not None, "scaled integers end in a quantiser")
        assert out is not None
        return QAffine(factor, offset, quantised, out, relu), (node,)

    return _Value(pending=make)


def _same(lifter: _Lifter, node: Any) -> _Value:
    return lifter.value(node.input[0])


RULES: dict[str, Callable[[_Lifter, Any], _Value]] = {
    "Add": _add, "AveragePool": _average_pool, "BatchNormalization": _batch_norm, "Clip": _clip, "Conv": _conv,
    "DequantizeLinear": _dequantize, "Div": _arithmetic, "Dropout": _same, "Flatten": _flatten, "Gemm": _linear,
    "GlobalAveragePool": _average_pool, "Identity": _same, "LeakyRelu": _leaky,
    "MatMul": _linear, "MaxPool": _max_pool, "Mul": _arithmetic,
    "QuantizeLinear": _quantize, "ReduceMean": _average_pool, "Relu": _relu, "Reshape": _flatten, "Sub": _arithmetic,
}  # fmt: skip
