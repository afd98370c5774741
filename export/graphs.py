"""What the writers of ONNX files share: a network's nodes one after the other, constants, and the model around them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from rprune.models.graph import layer, output_of, pair

OPSET = 18
IR_VERSION = 10
INPUT, OUTPUT = "input", "logits"


class Writer(ABC):
    """Appends the nodes of a network's layers; what is written depends on nothing else, so equal networks give equal
    bytes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    @abstractmethod
    def layer(self, module: nn.Module, name: str, inputs: list[str], target: str) -> str:
        """Append the nodes of one layer; returns the name of its real-valued output."""

    def model(self, network: fx.GraphModule, input_shape: tuple[int, int, int], classes: int) -> onnx.ModelProto:
        names: dict[fx.Node, str] = {}
        last = output_of(network)
        for node in network.graph.nodes:
            if node.op == "placeholder":
                names[node] = INPUT
            elif node.op == "call_module":
                inputs = [names[argument] for argument in node.args if isinstance(argument, fx.Node)]
                target = OUTPUT if node is last else node.name
                names[node] = self.layer(layer(network, node), str(node.target), inputs, target)
        given = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *input_shape])
        logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", classes])
        graph = helper.make_graph(self.nodes, "rprune", [given], [logits], list(self.initializers.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="rprune")
        model.ir_version = IR_VERSION
        return model

    def op(self, kind: str, *rest: Any, exact: bool = False) -> str:
        """A node of ``([attributes,] inputs, output)``; its output gets its kind behind its name unless ``exact``."""
        attributes, inputs, output = rest if len(rest) == 3 else ({}, *rest)
        output = output if exact else f"{output}_{kind.lower()}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}_{output}", **attributes))
        return str(output)

    def constant(self, name: str, value: Any) -> str:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        array = np.float32(array) if isinstance(array, float) else array
        self.initializers[name] = numpy_helper.from_array(np.asarray(array), name)
        return name


def array_of(tensor: Tensor, dtype: Any = np.float32) -> Any:
    return tensor.detach().cpu().numpy().astype(dtype)


def pool_op(source: nn.AvgPool2d | None) -> tuple[str, dict[str, Any]]:
    """Operator and attributes of average pooling; None pools the whole image."""
    if source is None:
        return "GlobalAveragePool", {}
    return "AveragePool", {"kernel_shape": pair(source.kernel_size), "strides": pair(source.stride)}


def keep_op(source: nn.Module) -> tuple[str, dict[str, Any]]:
    """Operator and attributes of max pooling, flattening and ReLU."""
    if isinstance(source, nn.MaxPool2d):
        pads = pair(source.padding) * 2
        return "MaxPool", {"kernel_shape": pair(source.kernel_size), "strides": pair(source.stride), "pads": pads}
    return ("Flatten", {"axis": 1}) if isinstance(source, nn.Flatten) else ("Relu", {})


def conv_attributes(kernel: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options``: stride, padding, dilation and groups, as torch names them."""
    return {
        "kernel_shape": list(kernel),
        "strides": pair(options["stride"]),
        "pads": pair(options["padding"]) * 2,
        "dilations": pair(options["dilation"]),
        "group": options["groups"],
    }
