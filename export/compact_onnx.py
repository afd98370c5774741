"""The compact, self-expanding form of an ONNX file: sparse weights as gaps and values, which standard operators expand.

A weight is stored as ``export.gaps`` says and rebuilt in the graph itself: Cast, Add 1, CumSum, Sub 1 make places of
gaps, ScatterElements writes the values into zeros, Reshape gives the shape. Runtimes fold these constants as they load
the file and then hold the dense network: the same kernels, logits and speed. What repeats is left out as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, defs, helper, numpy_helper

from rprune.errors import WorkError
from rprune.export import gaps
from rprune.export.constants import PRODUCTS, Constants

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
COST = 256  # bytes of the nodes, names and shapes that expand one weight
MANY = 16  # entries from which on a node more takes fewer bytes than 16 bits more an entry
CODES = 256  # of a uint8
IMPLIED = {"strides": 1, "dilations": 1, "pads": 0}  # defaults of Conv that its schema has in words alone


def expanding(model: onnx.ModelProto) -> onnx.ModelProto:
    """The compact form of a finished dense model (``export.qdq``, ``export.onnx``), which stays as it is.

    Conv and linear weights (int8, float32) become gaps and values wherever that takes fewer bytes; zeros lose their
    sign. Float weights of few values become codes and a codebook. A weight's name stays on its values or codes. Scales
    of biases are computed from those of input and weight where the product has the same bits. Zero points that ONNX
    Runtime does without, names, and attributes at their defaults are left out. Same model, same bytes.

    Raises WorkError when the model has control flow or functions.
    """
    nested = any(entry.g.node or entry.graphs for node in model.graph.node for entry in node.attribute)
    if nested or model.functions:
        raise WorkError("a model with control flow or functions has no compact form", "export the dense file alone")
    compact = onnx.ModelProto()
    compact.CopyFrom(model)
    _Compactor(compact).run()
    return compact


class _Compactor:
    """Rewrites a model in place. ``made``: nodes that make constants, which stand before all others."""

    def __init__(self, model: onnx.ModelProto) -> None:
        _strip(model)
        self.graph = model.graph
        self.weights = sorted(Constants(self.graph).weights())
        self.names = _names({value.name for value in (*self.graph.input, *self.graph.output)}.union(self.weights))
        self.tensors: dict[str, TensorProto] = {}
        self.made: list[onnx.NodeProto] = []
        self.known: dict[Any, str] = {}

    def run(self) -> None:
        self._rename()
        self.makers = {name: node for node in self.graph.node for name in node.output}
        for node in self.graph.node:
            if node.op_type in PRODUCTS:
                self._zero_points(node)
                self._scales(node)
        for name in self.weights:
            self._replace({name: self._expand(name)})
        nodes = [*self.made, *self.graph.node]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}.union(value.name for value in self.graph.output)
        self.graph.initializer.extend(tensor for name, tensor in self.tensors.items() if name in used)

    def _rename(self) -> None:
        """Short names, and one for constants that are alike; inputs, outputs and weights keep theirs."""
        short = {value.name: value.name for value in (*self.graph.input, *self.graph.output)}
        for tensor in self.graph.initializer:
            if tensor.name in self.weights:
                self.tensors[tensor.name] = tensor
            else:
                short[tensor.name] = self._constant(numpy_helper.to_array(tensor))
        for node in self.graph.node:
            node.output[:] = [name and short.setdefault(name, next(self.names)) for name in node.output]
        self._replace(short)

    def _replace(self, names: dict[str, str]) -> None:
        for node in self.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]

    def _zero_points(self, product: onnx.NodeProto) -> None:
        """Zeros are the default. ONNX Runtime makes no QGemm of a weight without them."""
        for place in range(1 if product.op_type == "Conv" else 2, len(product.input)):
            source = self._dequantizer(product, place)
            zero = self._array(source.input[2]) if source is not None and len(source.input) == 3 else None
            if source is not None and zero is not None and not zero.any():
                del source.input[2]

    def _scales(self, product: onnx.NodeProto) -> None:
        given, weight, bias = (self._dequantizer(product, place) for place in range(3))
        scale = None if weight is None else self._array(weight.input[1])
        if weight is None or scale is None:
            return
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16)
        if scale.size > MANY and np.array_equal(half.astype(np.float32), scale):
            weight.input[1] = self._made("Cast", self._constant(half), to=TensorProto.FLOAT)
        if given is None or bias is None:
            return
        pixels, wanted = self._array(given.input[1]), self._array(bias.input[1])
        if pixels is not None and wanted is not None and (pixels * scale).tobytes() == wanted.tobytes():
            bias.input[1] = self._made("Mul", given.input[1], weight.input[1])

    def _expand(self, name: str) -> str:
        """The value that is the weight: the initializer itself where its gaps and values would take more bytes."""
        array = self._array(name)
        if array is None or array.dtype not in (np.int8, np.float32):
            return name
        entries = gaps.encode(array)
        book, codes = np.unique(entries.values, return_inverse=True)
        coded = len(book) <= CODES and codes.size + book.nbytes + MANY < entries.values.nbytes
        if entries.gaps.nbytes + (codes.size + book.nbytes if coded else entries.values.nbytes) + COST >= array.nbytes:
            return name
        one, axis = self._constant(np.array(1)), self._constant(np.array(0))
        places = self._made("Cast", self._constant(entries.gaps), to=TensorProto.INT64)
        places = self._made("Sub", self._made("CumSum", self._made("Add", places, one), axis), one)
        self.tensors[name] = numpy_helper.from_array(codes.astype(np.uint8) if coded else entries.values, name)
        values = name
        if coded:
            values = self._made("Gather", self._constant(book), self._made("Cast", name, to=TensorProto.INT32))
        zero = numpy_helper.from_array(np.zeros(1, array.dtype))
        ground = self._made("ConstantOfShape", self._constant(np.array([array.size])), value=zero)
        flat = self._made("ScatterElements", ground, places, values)
        return self._made("Reshape", flat, self._constant(np.array(array.shape)))

    def _constant(self, array: NDArray[Any]) -> str:
        """The name of a constant, one for all that are alike.

        Not so int8: with session.x64quantprecision ONNX Runtime replaces zero points of weights, and fails at a second.
        """
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self.known or array.dtype == np.int8:
            name = self.known[key] = next(self.names)
            self.tensors[name] = numpy_helper.from_array(array, name)
        return self.known[key]

    def _made(self, kind: str, *inputs: str, **attributes: Any) -> str:
        node = helper.make_node(kind, inputs, [""], **attributes)
        key = node.SerializeToString()
        if key not in self.known:
            self.known[key] = node.output[0] = next(self.names)
            self.made.append(node)
        return self.known[key]

    def _array(self, name: str) -> NDArray[Any] | None:
        return numpy_helper.to_array(self.tensors[name]) if name in self.tensors else None

    def _dequantizer(self, node: onnx.NodeProto, place: int) -> onnx.NodeProto | None:
        maker = self.makers.get(node.input[place]) if place < len(node.input) else None
        return maker if maker is not None and maker.op_type == "DequantizeLinear" else None


def _strip(model: onnx.ModelProto) -> None:
    """Remove what says nothing: names of nodes, doc strings, shapes that can be inferred, attributes at defaults."""
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    graph = model.graph
    del graph.value_info[:]
    parts: list[Any] = [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output]
    for part in parts:
        part.doc_string = ""
    for node in graph.node:
        node.name = ""
        told = [entry for entry in node.attribute if not _implied(node, entry, opset)]
        del node.attribute[:]
        node.attribute.extend(told)


def _implied(node: onnx.NodeProto, entry: onnx.AttributeProto, opset: int) -> bool:
    if node.op_type == "Conv" and entry.name in IMPLIED:
        return set(entry.ints) == {IMPLIED[entry.name]}
    default = defs.get_schema(node.op_type, opset, node.domain).attributes[entry.name].default_value
    return default.type == entry.type and helper.get_attribute_value(default) == helper.get_attribute_value(entry)


def _names(taken: set[str]) -> Iterator[str]:
    """a, b, ..., Z, aa, ab, ... without those that are taken."""
    words = (letters for length in itertools.count(1) for letters in itertools.product(LETTERS, repeat=length))
    return (name for name in map("".join, words) if name not in taken)
