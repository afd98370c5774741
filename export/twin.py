"""A differentiable network from an ONNX file: what gives attacks on any classifier file their gradients.

The graph is computed node by node in torch. What does not depend on the image (weights behind DequantizeLinear, say) is
computed once, when the file is read. Quantisers round and pass gradients straight through. The twin guides a search and
no more: its sums may round otherwise than those of ONNX Runtime, which alone says what the file answers.

Reading computes every node on torch's ``meta`` device first, where tensors have shapes but no memory: a file of absurd
or contradictory shapes ends in an InputError before anything of that size is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rprune.errors import InputError, first_line
from rprune.export.constants import LARGEST
from rprune.export.guard import VIEWS
from rprune.export.operators import NUMBERED, OPERATORS, PLAIN, need
from rprune.export.session import load_onnx

OLDEST_OPSET = 7  # before it broadcasting was an attribute
MOST_NUMBERS = 1 << 14  # entries of a node's inputs that may be read as numbers; more can only be data
FLOAT32 = 1  # TensorProto's number
DOMAINS = ("", "ai.onnx")
HINT = "attacks that need no gradient can still run on this file"


def onnx_twin(path: Path) -> nn.Module:
    """The network of a classifier file: images ``(b, c, h, w)`` float in [0,1] to logits ``(b, k)``; in eval mode.

    Raises InputError when the file is damaged, when it has an operator that is not in the tables of
    ``export.operators`` (the message names node and operator), and when it is no classifier of images of one size.
    """
    model = load_onnx(path)
    try:
        return _Reader(model).twin()
    except Exception as error:  # a file's mistakes show as errors of numpy and torch, which share no base
        raise InputError(f"{path}: {first_line(error, 300)}", HINT) from None


@dataclass(frozen=True)
class _Step:
    """A node. Inputs are names of values, or numbers themselves; ``spent`` are values that no later step reads."""

    compute: Callable[..., Any]
    inputs: list[str | Tensor | None]
    outputs: list[str]
    spent: list[str]

    def run(self, values: dict[str, Any]) -> None:
        results = self.compute(*[values[source] if isinstance(source, str) else source for source in self.inputs])
        values.update(zip(self.outputs, _tuple(results), strict=False))
        for name in self.spent:
            del values[name]


class Twin(nn.Module):
    """The steps from image to logits. Constants are buffers."""

    def __init__(self, steps: list[_Step], image: str, logits: str, constants: dict[str, Tensor]) -> None:
        super().__init__()
        self.steps, self.image, self.logits, self.names = steps, image, logits, list(constants)
        for index, value in enumerate(constants.values()):
            self.register_buffer(f"constant_{index}", value)  # a file's names may be those of a module's own parts

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Any] = dict(zip(self.names, self._buffers.values(), strict=True))
        values[self.image] = x
        for step in self.steps:
            step.run(values)
        logits: Tensor = values[self.logits]
        return logits


class _Reader:
    """Computes a checked model once. ``values``: constants, and meta tensors for what depends on the image (live)."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.opset = max((entry.version for entry in model.opset_import if entry.domain in DOMAINS), default=0)
        need(self.opset >= OLDEST_OPSET, f"operator set {self.opset} is older than {OLDEST_OPSET}")
        self.values: dict[str, Any] = {tensor.name: _tensor(tensor) for tensor in self.graph.initializer}
        given = [value for value in self.graph.input if value.name not in self.values]
        need(len(given) == 1, f"it takes {len(given)} inputs, not one")
        self.image, kind = given[0].name, given[0].type.tensor_type
        batch, *size = [dim.dim_value for dim in kind.shape.dim] or [0]
        right = kind.elem_type == FLOAT32 and len(size) == 3 and min(size) > 0
        need(right, "its input is not float32 (batch, c, h, w) of one size")
        self.values[self.image] = torch.empty(batch or 2, *size, device="meta").requires_grad_()
        self.live = {self.image}
        self.folded = 0
        _merge_relus(self.graph)

    def twin(self) -> Twin:
        nodes = [(node, self._read(node)) for node in self.graph.node]
        output = self.graph.output[0].name
        logits = self.values[output]
        need(output in self.live and logits.requires_grad, "its output has no gradient with respect to its input")
        need(logits.dim() == 2, f"its output has {logits.dim()} dimensions, not two")
        steps: list[_Step] = []
        constants: dict[str, Tensor] = {}
        needed = {output}
        for node, compute in reversed(nodes):
            made = self.live.intersection(node.output)
            if needed.isdisjoint(made):
                continue
            inputs = [self._source(node, place, constants) for place in range(len(node.input))]
            used = made | self.live.intersection(node.input)
            steps.append(_Step(compute, inputs, list(node.output), sorted(used - needed)))
            needed |= used
        return Twin(steps[::-1], self.image, output, constants).eval()

    def _read(self, node: Any) -> Callable[..., Any]:
        """The function of a node; its results become values."""
        try:
            compute = _function(node, self.opset)
            inputs = [self.values[name] if name else None for name in node.input]
            results = _tuple(compute(*[self._shadow(node, place, value) for place, value in enumerate(inputs)]))
            sizes = [result.numel() for result in results]
            need(max(sizes) <= LARGEST, "its result is too large")
            if self.live.isdisjoint(node.input):
                self.folded += 0 if node.op_type in VIEWS else sum(sizes)
                need(self.folded <= LARGEST, "the constants of the file become too large")
                results = _tuple(compute(*inputs))
            else:
                on_host = any(result.is_floating_point() and not result.is_meta for result in results)
                need(not on_host, "floats made from shapes are not supported")  # they would not follow to a GPU
                self.live.update(name for name, _ in zip(node.output, results, strict=False) if name)
            self.values.update(zip(node.output, results, strict=False))
        except Exception as error:  # as above
            name = repr(node.name or next(iter(node.output), ""))
            raise InputError(f"node {name:.80} ({node.op_type!r:.40}): {first_line(error, 300)}") from None
        return compute

    def _shadow(self, node: Any, place: int, value: Tensor | None) -> Tensor | None:
        """A value without its memory, unless the node may have to read its numbers."""
        if value is None or (_is_number(node, place, value) and value.numel() * len(node.input) <= MOST_NUMBERS):
            return value
        return value.to("meta")

    def _source(self, node: Any, place: int, constants: dict[str, Tensor]) -> str | Tensor | None:
        name: str = node.input[place]
        if not name or name in self.live:
            return name or None
        value: Tensor = self.values[name]
        if _is_number(node, place, value):
            return value
        constants[name] = value
        return name


def _merge_relus(graph: Any) -> None:
    """A Relu in front of QuantizeLinear becomes the lower end of its integers, as in the kernels that ship.

    The results are the same. The gradient then stops where the integer is clamped, not up to half a step above that.
    """
    from onnx import helper

    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if maker is not None and maker.op_type == "Relu":
            node.input[0] = maker.input[0]
            node.attribute.append(helper.make_attribute("relu", 1))


def _is_number(node: Any, place: int, value: Tensor) -> bool:
    return not value.is_floating_point() or (place > 0 and node.op_type in NUMBERED)


def _function(node: Any, opset: int) -> Callable[..., Any]:
    if node.domain in DOMAINS and node.op_type in PLAIN:
        return PLAIN[node.op_type]
    known = node.domain in DOMAINS and node.op_type in OPERATORS
    need(known, "no differentiable form of this operator is known")
    attributes = {entry.name: _attribute(entry) for entry in node.attribute}
    return partial(OPERATORS[node.op_type], attributes | {"opset": opset, "outputs": len(node.output)})


def _attribute(entry: Any) -> Any:
    from onnx import TensorProto, helper

    value = helper.get_attribute_value(entry)
    if isinstance(value, bytes):
        return value.decode()
    return _tensor(value) if isinstance(value, TensorProto) else value


def _tensor(proto: Any) -> Tensor:
    """Floats of any width become float32; integers other than int8, uint8 and int32 become int64."""
    from onnx import numpy_helper

    array = numpy_helper.to_array(proto)
    name = array.dtype.name
    kind = "int64" if name.startswith(("int", "uint")) else "float32"
    return torch.from_numpy(array.astype(name if name in ("bool", "int8", "uint8", "int32") else kind))


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
