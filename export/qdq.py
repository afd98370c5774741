"""The int8 network as an ONNX file in QDQ form (QuantizeLinear / DequantizeLinear around float operators).

U8S8: uint8 activations, int8 weights per channel, int32 biases, explicit zero points everywhere: the form that ONNX
Runtime fuses to integer kernels on every platform.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from rprune.models.graph import layer, output_of
from rprune.quantization.simulate import QAdd, QAffine, QAvgPool, QInput, QKeep, QMatmul, QOutput, Scale

OPSET = 18
IR_VERSION = 10
INPUT, OUTPUT = "input", "logits"


def qdq_model(network: fx.GraphModule, input_shape: tuple[int, int, int], classes: int) -> onnx.ModelProto:
    """The ONNX model of a network from ``quantization.simulated``: input ``(batch, c, h, w)`` in [0,1], logits out."""
    writer = _Writer()
    names: dict[fx.Node, str] = {}
    last = output_of(network)
    for node in network.graph.nodes:
        if node.op == "placeholder":
            names[node] = INPUT
        elif node.op == "call_module":
            inputs = [names[argument] for argument in node.args if isinstance(argument, fx.Node)]
            target = OUTPUT if node is last else node.name
            names[node] = writer.layer(layer(network, node), str(node.target), inputs, target)
    given = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *input_shape])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", classes])
    graph = helper.make_graph(writer.nodes, "rprune", [given], [logits], list(writer.initializers.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="rprune")
    model.ir_version = IR_VERSION
    return model


class _Writer:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def layer(self, module: nn.Module, name: str, inputs: list[str], target: str) -> str:
        """Append the nodes of one layer; returns the name of its real-valued output."""
        if isinstance(module, QInput):
            return self._requantize(inputs[0], module.out, target)
        if isinstance(module, QOutput):
            return self._op("Identity", inputs, target, exact=True)
        if isinstance(module, QMatmul):
            return self._matmul(module, name, inputs[0], target)
        if isinstance(module, QAdd):
            return self._finish(self._op("Add", inputs, target), module.relu, module.out, target)
        if isinstance(module, QAvgPool):
            return self._requantize(self._average(module, inputs[0], target), module.out, target)
        if isinstance(module, QAffine):
            scaled = self._op("Mul", [inputs[0], self._constant(f"{target}.scale", module.scale)], f"{target}_scaled")
            shifted = self._op("Add", [scaled, self._constant(f"{target}.shift", module.shift)], target)
            return self._finish(shifted, module.relu, module.out, target)
        assert isinstance(module, QKeep)
        # the pair of Q and DQ around a layer that keeps the integers is what lets ONNX Runtime run it on integers
        return self._requantize(self._op(*_keep_op(module.source), [inputs[0]], target), module.given, target)

    def _matmul(self, module: QMatmul, name: str, given: str, target: str) -> str:
        zeros = np.zeros(len(module.bias))
        weight = self._dequantized(
            f"{name}.weight", _array(module.weight, np.int8), _array(module.weight_scale), zeros.astype(np.int8)
        )
        bias_scale = _array(module.weight_scale) * np.float32(module.given.scale)
        bias = self._dequantized(f"{name}.bias", _array(module.bias, np.int32), bias_scale, zeros.astype(np.int32))
        raw = target if module.out is None else f"{target}_raw"
        if module.conv is None:
            self._op("Gemm", {"transB": 1}, [given, weight, bias], raw, exact=True)
        else:
            self._op("Conv", _conv_attributes(module), [given, weight, bias], raw, exact=True)
        return raw if module.out is None else self._finish(raw, module.relu, module.out, target)

    def _average(self, module: QAvgPool, given: str, target: str) -> str:
        if module.source is None:
            return self._op("GlobalAveragePool", [given], target)
        kernel, stride = _pair(module.source.kernel_size), _pair(module.source.stride)
        return self._op("AveragePool", {"kernel_shape": kernel, "strides": stride}, [given], target)

    def _finish(self, value: str, relu: bool, out: Scale, target: str) -> str:
        return self._requantize(self._op("Relu", [value], f"{target}_relu") if relu else value, out, target)

    def _requantize(self, value: str, scale: Scale, target: str) -> str:
        parts = [
            self._constant(f"{target}.x_scale", scale.scale),
            self._constant(f"{target}.x_zero_point", np.uint8(scale.zero_point)),
        ]
        quantized = self._op("QuantizeLinear", [value, *parts], f"{target}_q", exact=True)
        return self._op("DequantizeLinear", [quantized, *parts], f"{target}_dq", exact=True)

    def _dequantized(self, name: str, values: Any, scale: Any, zero: Any) -> str:
        parts = [
            self._constant(name, values),
            self._constant(f"{name}_scale", scale),
            self._constant(f"{name}_zero_point", zero),
        ]
        return self._op("DequantizeLinear", {"axis": 0}, parts, f"{name}_dq", exact=True)

    def _op(self, kind: str, *rest: Any, exact: bool = False) -> str:
        attributes, inputs, output = rest if len(rest) == 3 else ({}, *rest)
        output = output if exact else f"{output}_{kind.lower()}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}_{output}", **attributes))
        return str(output)

    def _constant(self, name: str, value: Any) -> str:
        array = value.numpy() if isinstance(value, Tensor) else value
        array = np.float32(array) if isinstance(array, float) else array
        self.initializers[name] = numpy_helper.from_array(np.asarray(array), name)
        return name


def _array(tensor: Tensor, dtype: Any = np.float32) -> Any:
    return tensor.detach().cpu().numpy().astype(dtype)


def _keep_op(source: nn.Module) -> tuple[str, dict[str, Any]]:
    if isinstance(source, nn.MaxPool2d):
        pads = _pair(source.padding) * 2
        return "MaxPool", {"kernel_shape": _pair(source.kernel_size), "strides": _pair(source.stride), "pads": pads}
    return ("Flatten", {"axis": 1}) if isinstance(source, nn.Flatten) else ("Relu", {})


def _conv_attributes(module: QMatmul) -> dict[str, Any]:
    assert module.conv is not None
    conv = module.conv
    return {
        "kernel_shape": list(module.weight.shape[2:]),
        "strides": _pair(conv["stride"]),
        "pads": _pair(conv["padding"]) * 2,
        "dilations": _pair(conv["dilation"]),
        "group": conv["groups"],
    }


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
