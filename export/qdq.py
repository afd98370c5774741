"""The int8 network as an ONNX file in QDQ form (QuantizeLinear / DequantizeLinear around float operators).

U8S8: uint8 activations, int8 weights per channel, int32 biases, explicit zero points everywhere: the form that ONNX
Runtime fuses to integer kernels on every platform. Fewer than 8 bits are the same file with smaller integers: a Clip of
the uint8 values stands where QuantizeLinear saturates at 255 only, behind the fused kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from torch import fx, nn

from rprune.errors import InputError
from rprune.export.graphs import Writer, array_of, conv_attributes, keep_op, pool_op
from rprune.quantization.simulate import LEVELS, QAdd, QAffine, QAvgPool, QInput, QKeep, QMatmul, QOutput, Scale


def qdq_model(network: fx.GraphModule, input_shape: tuple[int, int, int], classes: int) -> onnx.ModelProto:
    """The ONNX model of a network from ``quantization.simulated``: input ``(batch, c, h, w)`` in [0,1], logits out.

    Raises InputError for a network of more than 8 bits.
    """
    return _IntegerWriter().model(network, input_shape, classes)


class _IntegerWriter(Writer):
    def layer(self, module: nn.Module, name: str, inputs: list[str], target: str) -> str:
        if isinstance(module, QInput):
            return self._requantize(inputs[0], module.out, target)
        if isinstance(module, QOutput):
            return self.op("Identity", inputs, target, exact=True)
        if isinstance(module, QMatmul):
            return self._matmul(module, name, inputs[0], target)
        if isinstance(module, QAdd):
            return self._finish(self.op("Add", inputs, target), module.relu, module.out, target)
        if isinstance(module, QAvgPool):
            return self._requantize(self.op(*pool_op(module.source), inputs, target), module.out, target)
        if isinstance(module, QAffine):
            scaled = self.op("Mul", [inputs[0], self.constant(f"{target}.scale", module.scale)], f"{target}_scaled")
            shifted = self.op("Add", [scaled, self.constant(f"{target}.shift", module.shift)], target)
            return self._finish(shifted, module.relu, module.out, target)
        assert isinstance(module, QKeep)
        # the pair of Q and DQ around a layer that keeps the integers is what lets ONNX Runtime run it on integers
        return self._requantize(self.op(*keep_op(module.source), [inputs[0]], target), module.given, target, True)

    def _matmul(self, module: QMatmul, name: str, given: str, target: str) -> str:
        zeros = np.zeros(len(module.bias))
        weight = self._dequantized(
            f"{name}.weight", array_of(module.weight, np.int8), array_of(module.weight_scale), zeros.astype(np.int8)
        )
        bias_scale = array_of(module.weight_scale) * np.float32(module.given.scale)
        bias = self._dequantized(f"{name}.bias", array_of(module.bias, np.int32), bias_scale, zeros.astype(np.int32))
        raw = target if module.out is None else f"{target}_raw"
        if module.conv is None:
            self.op("Gemm", {"transB": 1}, [given, weight, bias], raw, exact=True)
        else:
            self.op(
                "Conv", conv_attributes(module.weight.shape[2:], module.conv), [given, weight, bias], raw, exact=True
            )
        return raw if module.out is None else self._finish(raw, module.relu, module.out, target)

    def _finish(self, value: str, relu: bool, out: Scale, target: str) -> str:
        return self._requantize(self.op("Relu", [value], f"{target}_relu") if relu else value, out, target)

    def _requantize(self, value: str, scale: Scale, target: str, within: bool = False) -> str:
        """``within``: the values are of this scale already, so that none is above its top."""
        if scale.top > LEVELS:
            raise InputError("more than 8 bits have no int8 file", "quantize with --bits 8 or less to export")
        parts = [
            self.constant(f"{target}.x_scale", scale.scale),
            self.constant(f"{target}.x_zero_point", np.uint8(scale.zero_point)),
        ]
        quantized = self.op("QuantizeLinear", [value, *parts], f"{target}_q", exact=True)
        if scale.top < LEVELS and not within:
            quantized = self.op("Clip", [quantized, "", self.constant("top", np.uint8(scale.top))], f"{target}_q")
        return self.op("DequantizeLinear", [quantized, *parts], f"{target}_dq", exact=True)

    def _dequantized(self, name: str, values: Any, scale: Any, zero: Any) -> str:
        parts = [
            self.constant(name, values),
            self.constant(f"{name}_scale", scale),
            self.constant(f"{name}_zero_point", zero),
        ]
        return self.op("DequantizeLinear", {"axis": 0}, parts, f"{name}_dq", exact=True)
