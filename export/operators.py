"""ONNX operators in torch, for ``export.twin``: functions of a node's attributes and inputs, in tables by name.

Integers of quantised tensors are held in floating tensors, as in ``quantization.simulate``; those of shapes, axes and
positions in integer tensors on the host, as are the bounds of Clip and the filling of Pad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from rprune.errors import InputError
from rprune.evaluation.target import steady_product
from rprune.quantization.simulate import to_integers

FLOATS, BOOL = (1, 10, 11, 16), 9  # TensorProto's numbers of float32, float16, float64 and bfloat16; of bool
BYTES = {2: torch.uint8, 3: torch.int8}
EVERY = slice(None)

Attributes: TypeAlias = dict[str, Any]


def need(condition: bool, message: str) -> None:
    """Raises InputError, to which the reader adds the node."""
    if not condition:
        raise InputError(message)


def numbers(a: Attributes, name: str, given: Tensor | None) -> Any:
    """Integers that newer operator sets pass as an input and older ones as an attribute; or None."""
    return a.get(name) if given is None else given.flatten().tolist()


def number(a: Attributes, name: str, given: Tensor | None) -> Any:
    return a.get(name) if given is None else given.item()


def along(a: Attributes, values: Tensor, x: Tensor) -> Tensor:
    """One value for all of x, or one for each index of the axis."""
    if values.numel() == 1:
        return values.reshape(())
    need(values.dim() == 1, "scales of blocks are not supported")
    shape = [1] * x.dim()
    shape[a.get("axis", 1)] = -1
    return values.reshape(shape)


def quantize(a: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """``relu``, which the reader sets, is a Relu in front: a lower end of the integers, as in the fused kernels."""
    kind = BYTES.get(a.get("output_dtype") or 2) if zero is None else zero.dtype
    need(kind in BYTES.values(), "only 8 bits are supported")
    first = 0 if zero is None else int(zero.flatten()[0])
    need(zero is None or zero.numel() == 1 or bool((zero == first).all()), "unequal zero points are not supported")
    shift = 128 if kind == torch.int8 else 0
    integers = to_integers(x / along(a, scale, x), first + shift, first + shift if a.get("relu") else 0)
    return integers - shift if shift else integers


def dequantize(a: Attributes, q: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    q = q.to(scale)
    if zero is not None and zero.numel() > 1:
        q = q - along(a, zero.to(scale), q)
    elif zero is not None and (shift := zero.item()):
        q = q - shift
    return q * along(a, scale, q)


def pads_of(a: Attributes, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Padding around images for a window: top, left, bottom, right."""
    need(len(size) == len(kernel) == 2, "only windows over images are supported")
    mode, none = a.get("auto_pad", "NOTSET"), [0, 0, 0, 0]
    if not mode.startswith("SAME"):
        return a.get("pads", none) if mode == "NOTSET" else none
    axes = zip(size, kernel, a.get("strides", [1, 1]), a.get("dilations", [1, 1]), strict=True)
    totals = [max((-(-n // step) - 1) * step + spread * (k - 1) + 1 - n, 0) for n, k, step, spread in axes]
    less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return less + more if mode == "SAME_UPPER" else more + less


def padded(x: Tensor, pads: Sequence[int], value: float) -> Tensor:
    top, left, bottom, right = pads
    return F.pad(x, (left, right, top, bottom), value=value)


def conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    pads = pads_of(a, x.shape[2:], weight.shape[2:])
    if pads[:2] != pads[2:]:
        x, pads = padded(x, pads, 0.0), [0, 0, 0, 0]
    return F.conv2d(x, weight, bias, a.get("strides", 1), pads[:2], a.get("dilations", 1), a.get("group", 1))


def pool(a: Attributes, x: Tensor, average: bool) -> Tensor:
    kernel, strides, dilations = a["kernel_shape"], a.get("strides", [1, 1]), a.get("dilations", [1, 1])
    pads, ceil, all_count = pads_of(a, x.shape[2:], kernel), bool(a.get("ceil_mode")), bool(a.get("count_include_pad"))
    need(not average or dilations == [1, 1], "dilations are not supported")
    if pads[:2] == pads[2:] and all(2 * pad <= k for pad, k in zip(pads, kernel, strict=False)):
        if average:
            return F.avg_pool2d(x, kernel, strides, pads[:2], ceil, all_count)
        return F.max_pool2d(x, kernel, strides, pads[:2], dilations, ceil)
    need(not ceil, "ceil_mode with these pads is not supported")
    if not average:
        return F.max_pool2d(padded(x, pads, -math.inf), kernel, strides, 0, dilations)
    real = padded(torch.ones_like(x[:1, :1]), pads, float(all_count))
    return F.avg_pool2d(padded(x, pads, 0.0), kernel, strides) / F.avg_pool2d(real, kernel, strides)


def gemm(a: Attributes, x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    x, y = x.t() if a.get("transA") else x, y.t() if a.get("transB") else y
    product: Tensor = a.get("alpha", 1.0) * steady_product(x, y)
    return product if bias is None else product + a.get("beta", 1.0) * bias


def matmul(x: Tensor, y: Tensor) -> Tensor:
    return steady_product(x, y) if y.dim() == 2 and x.dim() > 1 else x @ y


def batch_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    need(not a.get("training_mode") and a.get("spatial", 1) == 1, "only inference by channel is supported")
    return F.batch_norm(x, mean, variance, weight, bias, eps=a.get("epsilon", 1e-5))


def layer_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[a.get("axis", -1) :], weight, bias, a.get("epsilon", 1e-5))


def softmax(a: Attributes, x: Tensor) -> Tensor:
    if a["opset"] >= 13:
        return x.softmax(a.get("axis", -1))
    return x.flatten(a.get("axis", 1)).softmax(-1).view_as(x)


def clip(a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    bounds = number(a, "min", low), number(a, "max", high)
    return x if bounds == (None, None) else x.clamp(*bounds)


def reduce(function: Callable[..., Tensor], a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = numbers(a, "axes", axes) or ([] if a.get("noop_with_empty_axes") else list(range(x.dim())))
    return function(x, chosen, keepdim=bool(a.get("keepdims", 1))) if chosen else x


def flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    return x.flatten(1) if axis == 1 else x.reshape(math.prod(x.shape[:axis]), -1)


def reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    return x.reshape(sizes if a.get("allowzero") else [n or x.shape[axis] for axis, n in enumerate(sizes)])


def squeeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = numbers(a, "axes", axes)
    return x.squeeze() if chosen is None else x.squeeze(chosen)


def unsqueeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = numbers(a, "axes", axes)
    for axis in sorted(axis % (x.dim() + len(chosen)) for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    return torch.split(x, numbers(a, "split", sizes) or -(-x.shape[axis] // a["outputs"]), axis)


def pad(a: Attributes, x: Tensor, widths: Tensor | None = None, value: Tensor | None = None, *axes: Tensor) -> Tensor:
    need(x.is_floating_point(), "only floats are supported")
    found, chosen = numbers(a, "pads", widths), axes[0].tolist() if axes else range(x.dim())
    ends = {axis % x.dim(): (found[place], found[place + len(chosen)]) for place, axis in enumerate(chosen)}
    last_first = [width for axis in reversed(range(x.dim())) for width in ends.get(axis, (0, 0))]
    mode = a.get("mode", "constant")
    if mode == "constant":
        return F.pad(x, last_first, value=number(a, "value", value) or 0.0)
    need(x.dim() == 4 and not any(last_first[4:]), "only images are padded with their own pixels")
    return F.pad(x, last_first[:4], {"reflect": "reflect", "edge": "replicate"}[mode])


def positions(index: Tensor, count: int) -> Tensor:
    """Checked here, since one that is out of range stops a GPU for good."""
    need(index.is_meta or bool(((index >= -count) & (index < count)).all()), "an index is out of range")
    return index


def gather(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.dim()
    return x[(EVERY,) * axis + (positions(index, x.shape[axis]),)]


def gather_nd(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    need(not a.get("batch_dims"), "batch_dims is not supported")
    return x[tuple(positions(part, count) for part, count in zip(index.unbind(-1), x.shape, strict=False))]


def scatter(a: Attributes, x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Ascending places of a row, as compact files have them: others would write twice, in an order of their own."""
    need(x.dim() == 1 and index.dim() == 1 and index.shape == values.shape, "only rows are supported")
    need(a.get("reduction", "none") == "none", "reductions are not supported")
    if x.is_meta or index.is_meta or values.is_meta:
        return x.to("meta")
    ascends = bool((index[1:] > index[:-1]).all()) and (not len(index) or 0 <= index[0] <= index[-1] < len(x))
    need(bool(ascends), "an index is out of range or not above the one before")
    return x.scatter(0, index, values)


def running_sum(a: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    need(not a.get("exclusive") and not a.get("reverse"), "only plain sums are supported")
    return x.cumsum(int(axis))


def sliced(a: Attributes, x: Tensor, *given: Tensor | None) -> Tensor:
    named = zip(("starts", "ends", "axes", "steps"), (*given, None, None, None, None), strict=False)
    starts, ends, axes, steps = (numbers(a, name, value) for name, value in named)
    for axis, *bounds in zip(axes or range(len(starts)), starts, ends, steps or [1] * len(starts), strict=True):
        start, stop, step = slice(*bounds).indices(x.shape[axis])
        if step > 0:
            x = x[(EVERY,) * (axis % x.dim()) + (slice(start, stop, step),)]
        else:
            x = x.index_select(axis, torch.arange(start, stop, step, device=x.device))
    return x


def constant(a: Attributes) -> Tensor:
    names = ("value", "value_float", "value_floats", "value_int", "value_ints")
    return torch.as_tensor(next(a[name] for name in names if name in a))


def cast(a: Attributes, x: Tensor) -> Tensor:
    """Floats of any width are one type here, and so are integers."""
    if a["to"] in FLOATS:
        return x if x.is_floating_point() else x.float()
    return x.bool() if a["to"] == BOOL else x.long()


def divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def expand(x: Tensor, shape: Tensor) -> Tensor:
    target: Any = torch.broadcast_shapes(x.shape, shape.tolist())  # type: ignore[no-untyped-call]
    return x.expand(target)


PLAIN: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "Div": divide,
    "Dropout": lambda x, *_: x,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": expand,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax((2, 3), keepdim=True),
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "MatMul": matmul,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "PRelu": lambda x, slope: torch.where(x < 0, slope * x, x),
    "Pow": torch.pow,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Where": lambda condition, x, y: torch.where(condition.to(x.device), x, y),
}
"""Operators without attributes: functions of the inputs alone."""

OPERATORS: dict[str, Callable[..., Any]] = {
    "AveragePool": partial(pool, average=True),
    "BatchNormalization": batch_norm,
    "Cast": cast,
    "Clip": clip,
    "Concat": lambda a, *parts: torch.cat(parts, a["axis"]),
    "Constant": constant,
    "ConstantOfShape": lambda a, shape: a.get("value", torch.zeros(1)).reshape(()).expand(shape.tolist()),
    "Conv": conv,
    "CumSum": running_sum,
    "DequantizeLinear": dequantize,
    "Elu": lambda a, x: F.elu(x, a.get("alpha", 1.0)),
    "Flatten": flatten,
    "Gather": gather,
    "GatherND": gather_nd,
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", "none")),
    "Gemm": gemm,
    "HardSigmoid": lambda a, x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1),
    "LayerNormalization": layer_norm,
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "MaxPool": partial(pool, average=False),
    "Pad": pad,
    "QuantizeLinear": quantize,
    "ReduceMax": partial(reduce, torch.amax),
    "ReduceMean": partial(reduce, torch.mean),
    "ReduceSum": partial(reduce, torch.sum),
    "Reshape": reshape,
    "ScatterElements": scatter,
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")]),
    "Slice": sliced,
    "Softmax": softmax,
    "Split": split,
    "Squeeze": squeeze,
    "Transpose": lambda a, x: x.permute(a.get("perm", list(range(x.dim()))[::-1])),
    "Unsqueeze": unsqueeze,
}
"""Operators with attributes, which come first; with them ``opset`` and ``outputs``, how many outputs the node has."""

NUMBERED = {"Clip", "Pad"}
"""Operators whose floating inputs other than the first are read as numbers."""
