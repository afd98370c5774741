"""Weights as a file stores them: in an initializer, or expanded from one by the operators that compact files use.

The expansion is computed here in numpy, apart from any runtime, and more strictly than runtimes do: places must ascend
and lie inside, and nothing grows by broadcasting. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError

PRODUCTS = ("Conv", "Gemm", "MatMul")
LARGEST = 1 << 29  # entries: as many float32 weights as fill a protobuf file, which ends at 2 GiB
MOST_STEPS = 32  # between a product and what its weight is stored in


class Constants:
    """The initializers of a checked graph and what its nodes make of them."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}

    def weights(self) -> dict[str, str]:
        """Conv and linear weights: the initializer that holds the values -> the value of the graph that is the weight.

        They are one and the same where the weight is not expanded.
        """
        found = (self._weight(node.input[1]) for node in self.graph.node if node.op_type in PRODUCTS)
        return {stored: value for stored, value in found if stored in self.tensors}

    def array(self, value: str) -> NDArray[Any]:
        """A constant in numpy. Raises InputError where its nodes are not those of an expansion, or contradict it."""
        begun: list[str] = []
        done: dict[str, NDArray[Any]] = {}

        def compute(name: str) -> NDArray[Any]:
            if name not in done:
                begun.append(name)
                need(len(begun) <= MOST_STEPS, "it takes too many steps to expand")
                done[name] = self._stored(name) if name in self.tensors else self._made(name, compute)
            return done[name]

        return compute(value)

    def _weight(self, value: str) -> tuple[str, str]:
        name, expanded = value, False
        for _ in range(MOST_STEPS):
            maker = self.makers.get(name)
            if name in self.tensors or maker is None or not maker.input or maker.op_type == "ConstantOfShape":
                break
            kind, place = maker.op_type, 0
            if kind == "ScatterElements":
                expanded, place = True, 2
            elif expanded:
                place = int(kind == "Gather")  # values of a codebook are named by their codes
            elif kind != "Reshape":  # DequantizeLinear, say
                value = maker.input[0]
            name = maker.input[place]
        return name, value if expanded else name

    def _stored(self, name: str) -> NDArray[Any]:
        from onnx import numpy_helper

        array: NDArray[Any] = numpy_helper.to_array(self.tensors[name])
        return array

    def _made(self, name: str, compute: Callable[[str], NDArray[Any]]) -> NDArray[Any]:
        from onnx import helper

        node = self.makers.get(name)
        if node is None:
            raise InputError(f"{name!r:.80} is no constant")
        operator = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        if operator is None:
            raise InputError(f"{name!r:.80} is made by {node.op_type!r:.40}, which expands no weight")
        return operator(attributes, *[compute(source) for source in node.input])


def need(condition: bool, message: str) -> None:
    """Raises InputError, to which the caller adds the place."""
    if not condition:
        raise InputError(message)


def _cast(a: dict[str, Any], x: NDArray[Any]) -> NDArray[Any]:
    from onnx import helper

    kind: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(a["to"])
    return x.astype(kind)


def _elementwise(function: Callable[..., NDArray[Any]], a: dict[str, Any], x: Any, y: Any) -> NDArray[Any]:
    need(not a and x.dtype == y.dtype and (x.shape == y.shape or 1 in (x.size, y.size)), "an expansion broadcasts")
    return function(x, y)


def _cumsum(a: dict[str, Any], x: NDArray[Any], axis: NDArray[Any]) -> NDArray[Any]:
    need(not a and x.ndim == 1 and axis.size == 1 and not axis.any(), "an expansion sums in another way")
    return np.cumsum(x, dtype=x.dtype)


def _zeros(a: dict[str, Any], shape: NDArray[Any]) -> NDArray[Any]:
    from onnx import numpy_helper

    value = numpy_helper.to_array(a["value"]) if "value" in a else np.zeros(1, np.float32)
    sizes = [int(n) for n in shape]
    need(min(sizes, default=0) >= 0 and math.prod(sizes) <= LARGEST, "an expanded weight is too large")
    need(not value.any(), "an expanded weight has another ground than zero")
    zeros: NDArray[Any] = np.zeros(sizes, value.dtype)
    return zeros


def _scatter(a: dict[str, Any], x: NDArray[Any], places: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    right = not a and x.ndim == 1 and places.shape == values.shape and x.dtype == values.dtype
    need(right and places.dtype.kind == "i", "places and values of an expanded weight do not fit")
    ascend = places.ndim == 1 and bool((places[1:] > places[:-1]).all())
    inside = places.size == 0 or (places[0] >= 0 and places[-1] < x.size)
    need(ascend and bool(inside), "places of an expanded weight do not ascend or lie outside")
    x = x.copy()
    x[places] = values
    return x


def _gather(a: dict[str, Any], x: NDArray[Any], index: NDArray[Any]) -> NDArray[Any]:
    need(not a and x.ndim == 1 and bool(((index >= 0) & (index < x.size)).all()), "a code is not in its codebook")
    found: NDArray[Any] = x[index]
    return found


def _reshape(a: dict[str, Any], x: NDArray[Any], shape: NDArray[Any]) -> NDArray[Any]:
    need(not a and bool((shape > 0).all()), "an expanded weight has no fixed shape")
    return x.reshape(shape)


OPERATORS: dict[str, Callable[..., NDArray[Any]]] = {
    "Add": lambda a, x, y: _elementwise(np.add, a, x, y),
    "Cast": _cast,
    "ConstantOfShape": _zeros,
    "CumSum": _cumsum,
    "Gather": _gather,
    "Mul": lambda a, x, y: _elementwise(np.multiply, a, x, y),
    "Reshape": _reshape,
    "ScatterElements": _scatter,
    "Sub": lambda a, x, y: _elementwise(np.subtract, a, x, y),
}
