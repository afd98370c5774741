"""What an ONNX file may not contain: checked before any runtime, or the reader of gradients, computes anything of it.

A file of a few hundred bytes can ask for gigabytes, name other files, or bring code in domains of its own. Here every
node is walked once: shapes come from onnx's shape inference of single operators, and numbers that decide over shapes
are computed where they are few. Nothing as large as a weight is computed. No torch.

Not bounded: what operators of com.microsoft make of an image, how often a Loop runs, and the size of a batch.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError
from rprune.export.constants import LARGEST, need

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
STANDARD = ("", "ai.onnx")
MOST_BYTES = 1 << 31  # where protobuf ends
MOST_NUMBERS = 32  # entries of a constant that may decide over shapes
STRING, COMPLEX = 8, (14, 15)  # TensorProto's numbers
NARROW = {21: 4, 22: 4, 23: 4, 25: 2, 26: 2}  # bits of the types that share bytes: int4, float4, int2
VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}  # hold no memory of their own
SIZED: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,), "BlackmanWindow": (0,), "CenterCropPad": (1,), "Col2Im": (1,), "ConstantOfShape": (0,),
    "DFT": (1,), "Expand": (1,), "HammingWindow": (0,), "HannWindow": (0,), "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1), "OneHot": (1,), "Pad": (1,), "Range": (0, 1, 2), "Resize": (1, 2, 3), "STFT": (1, 3),
    "Tile": (1,), "Upsample": (1,),
}  # fmt: skip
"""Operators whose results can be larger than their inputs, by the numbers in these inputs."""

ARITHMETIC = {
    "Abs", "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor",
    "Gather", "Greater", "Identity", "Less", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax",
    "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub",
    "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
"""Operators that exporters compute shapes with."""


def guard(model: Any, path: Path) -> None:
    """Raises InputError, one line that names file and node, when the model (an ``onnx.ModelProto``)

    - keeps data in other files, has functions of its own, or operators of unknown domains;
    - holds a tensor whose dimensions and bytes differ, or exceed 2 GiB;
    - has nodes out of order, or a value that is made twice;
    - makes constants of more than 2^29 entries in all, or more than that of one image in one node;
    - makes something whose size neither it nor the shape of its input tells.
    """
    hint = "nothing of it was run; export the model again from a source you trust"
    try:
        need(not model.functions, "it has functions of its own")
        _Walk(model).graph(model.graph, ChainMap())
    except InputError as error:
        raise InputError(f"{path}: {error.message}", hint) from None
    except RecursionError:
        raise InputError(f"{path}: its graphs lie too deep in each other", hint) from None


@dataclass(frozen=True)
class _Value:
    """What is known of a value. ``live``: the image or its shape decides over it; ``pixels``: the image itself."""

    kind: Any = None  # onnx.TypeProto
    numbers: NDArray[Any] | None = None
    live: bool = False
    pixels: bool = False

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Where every dimension is known."""
        kind = None if self.kind is None else self.kind.tensor_type
        if kind is None or not kind.HasField("shape") or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
            return None
        return tuple(dim.dim_value for dim in kind.shape.dim)

    @property
    def size(self) -> int | None:
        """Entries. Raises InputError for a negative dimension."""
        return None if self.shape is None else _product(self.shape)


class _Walk:
    """Goes through a model once. ``made``: entries of constants so far."""

    def __init__(self, model: Any) -> None:
        from onnx import helper

        self.versions = {"" if e.domain in STANDARD else e.domain: e.version for e in model.opset_import}
        self.opsets = [helper.make_opsetid(domain, version) for domain, version in self.versions.items()]
        self.made = 0

    def graph(self, graph: Any, scope: ChainMap[str, _Value], outermost: bool = True) -> None:
        for value in (*graph.input, *graph.output):
            _text(value.name, *(dim.dim_param for dim in value.type.tensor_type.shape.dim))
        for value in graph.input:
            scope[value.name] = _image(value) if outermost else _Value(live=True, pixels=True)
        for tensor in graph.initializer:
            _at(f"tensor {tensor.name!r:.80}", _check, tensor)
            scope[tensor.name] = _stored(tensor)
        for tensor in graph.sparse_initializer:
            _at(f"tensor {tensor.values.name!r:.80}", self._sparse, tensor)
            scope[tensor.values.name] = _Value(_kind(tensor.values.data_type, tensor.dims))
        for node in graph.node:
            name = node.name or next(iter(node.output), "")
            _at(f"node {name!r:.80} ({node.op_type!r:.40})", self._node, node, scope)

    def _sparse(self, tensor: Any) -> None:
        _check(tensor.values)
        _check(tensor.indices)
        self._count(_product(tensor.dims))

    def _count(self, entries: int) -> None:
        self.made += entries
        need(entries <= LARGEST, "its result is too large")
        need(self.made <= LARGEST, "the constants of the file become too large")

    def _node(self, node: Any, scope: ChainMap[str, _Value]) -> None:
        need(node.domain in DOMAINS, f"operators of the domain {node.domain!r:.40} are not known")
        _text(node.op_type, *node.input, *node.output)
        nested = False
        for entry in node.attribute:
            for tensor in (*([entry.t] if entry.HasField("t") else []), *entry.tensors):
                _check(tensor)
            for sparse in (*([entry.sparse_tensor] if entry.HasField("sparse_tensor") else []), *entry.sparse_tensors):
                self._sparse(sparse)
            for graph in (*([entry.g] if entry.HasField("g") else []), *entry.graphs):
                nested = True
                self.graph(graph, scope.new_child(), outermost=False)
        for name in node.input:
            need(not name or name in scope, f"its input {name!r:.80} is not made before it")
        inputs = [scope[name] if name else None for name in node.input]
        results = self._results(node, inputs, nested)
        for name, result in results.items():
            need(name not in scope.maps[0], f"its result {name!r:.80} was made before")
            scope[name] = result

    def _results(self, node: Any, inputs: list[_Value | None], nested: bool) -> dict[str, _Value]:
        given = [value for value in inputs if value is not None]
        live = nested or any(value.live for value in given)
        pixels = live and node.op_type not in ("Shape", "Size")
        pixels = nested or (pixels and any(value.pixels for value in given))
        sizing = [inputs[place] for place in SIZED.get(node.op_type, ()) if place < len(inputs)]
        for value in sizing:
            known = value is None or value.numbers is not None or (value.live and not value.pixels)
            need(known, "the size of its result is not known before it runs")
        kinds = self._kinds(node, inputs)
        results = {name: _Value(kinds.get(name), None, live, pixels) for name in node.output if name}
        sizes = [result.size for result in results.values()]
        if None in sizes:
            # a shape that the caller of a file with an open input shape chooses, or an operator that nobody infers
            is_open = any(value.live and value.shape is None for value in given)
            is_open |= any(value is not None and value.numbers is None for value in sizing)
            need(live and (is_open or not sizing), "the size of its result is not known before it runs")
        entries = sum(size or 0 for size in sizes)
        if live:
            need(entries <= LARGEST, "its result is too large")
        elif node.op_type not in VIEWS:
            self._count(entries)
        if None in sizes or entries > MOST_NUMBERS or node.domain not in STANDARD or node.op_type not in ARITHMETIC:
            return results
        numbers = self._numbers(node, inputs, results)
        return {name: replace(value, numbers=numbers.get(name)) for name, value in results.items()}

    def _kinds(self, node: Any, inputs: list[_Value | None]) -> dict[str, Any]:
        """Types of results, by onnx's inference; empty where it knows the operator or its inputs too little."""
        from onnx import numpy_helper, shape_inference

        known = {name: value for name, value in zip(node.input, inputs, strict=True) if value is not None}
        types = {name: value.kind for name, value in known.items()}
        data = {n: numpy_helper.from_array(v.numbers, n) for n, v in known.items() if v.numbers is not None}
        try:
            found: dict[str, Any] = shape_inference.infer_node_outputs(
                self._schema(node), node, types, data, opset_imports=self.opsets
            )
        except Exception:  # what is wrong with the node, the checker or the runtime says better
            return {}
        return found

    def _schema(self, node: Any) -> Any:
        """An operator of com.microsoft that is named as a standard one makes what that makes."""
        from onnx import defs

        standard = node.domain in STANDARD
        if not standard and defs.has(node.op_type, node.domain):
            return defs.get_schema(node.op_type, self.versions[node.domain], node.domain)
        return defs.get_schema(node.op_type, self.versions[""]) if standard else defs.get_schema(node.op_type)

    def _numbers(self, node: Any, inputs: list[_Value | None], results: dict[str, _Value]) -> dict[str, Any]:
        """The few numbers of a node's results, by onnx's reference; empty where those of its inputs are not known."""
        from onnx import ValueInfoProto, helper
        from onnx.reference import ReferenceEvaluator

        given = {n: _numbers(node, v) for n, v in zip(node.input, inputs, strict=True) if v is not None}
        if any(value is None for value in given.values()):
            return {}
        ins, outs = ([ValueInfoProto(name=name) for name in part] for part in (given, results))
        model = helper.make_model(helper.make_graph([node], "node", ins, outs), opset_imports=self.opsets)
        try:
            with np.errstate(all="ignore"):
                return dict(zip(results, ReferenceEvaluator(model).run(None, given), strict=True))
        except Exception:  # as above
            return {}


def _at(place: str, check: Callable[..., None], *given: Any) -> None:
    try:
        check(*given)
    except InputError as error:
        raise InputError(f"{place}: {error.message}") from None


def _text(*names: str | bytes) -> None:
    """protobuf hands out what is no UTF-8 as bytes; ONNX Runtime fails on it where nobody expects an error."""
    need(all(isinstance(name, str) for name in names), "a name in it is not UTF-8")


def _product(dims: Iterable[int]) -> int:
    """The entries of a tensor, in Python's integers, which do not overflow."""
    sizes = list(dims)
    need(min(sizes, default=0) >= 0, "a dimension is negative")
    return math.prod(sizes)


def _check(tensor: Any) -> None:
    """A TensorProto holds what its dimensions say, in this file."""
    from onnx import TensorProto, helper

    need(tensor.data_location == 0 and not tensor.external_data, "its data lies in another file")
    entries, kind = _product(tensor.dims), tensor.data_type
    need(kind != 0 and kind in TensorProto.DataType.values(), f"its type {kind} is not known")
    bits = NARROW.get(kind) or 8 * helper.tensor_dtype_to_np_dtype(kind).itemsize
    need(entries * bits <= 8 * MOST_BYTES, "it is larger than 2 GiB")
    if tensor.HasField("raw_data"):
        held, wanted = len(tensor.raw_data), -(-entries * bits // 8)
    else:
        held = len(getattr(tensor, helper.tensor_dtype_to_field(kind)))
        wanted = -(-entries * bits // 8) if kind in NARROW else entries * (2 if kind in COMPLEX else 1)
    need(held == wanted, f"its dimensions ask for {wanted} numbers or bytes, it holds {held}")


def _kind(element: int, dims: Iterable[int | None]) -> Any:
    from onnx import helper

    return helper.make_tensor_type_proto(element, list(dims))


def _stored(tensor: Any) -> _Value:
    from onnx import numpy_helper

    few = math.prod(tensor.dims) <= MOST_NUMBERS and tensor.data_type != STRING
    return _Value(_kind(tensor.data_type, tensor.dims), numpy_helper.to_array(tensor) if few else None)


def _image(value: Any) -> _Value:
    """An input of the model; an open batch is of one image."""
    kind = type(value.type)()
    kind.CopyFrom(value.type)
    dims = kind.tensor_type.shape.dim
    if dims and not dims[0].HasField("dim_value"):
        dims[0].dim_value = 1
    found = _Value(kind, None, live=True, pixels=True)
    need((found.size or 0) <= LARGEST, f"its input {value.name!r:.80} is too large")
    return found


def _numbers(node: Any, value: _Value) -> NDArray[Any] | None:
    """What Shape and Size read has a shape without memory."""
    if node.op_type in ("Shape", "Size"):
        return None if value.shape is None else np.broadcast_to(np.int8(0), value.shape)
    return value.numbers
