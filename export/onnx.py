"""The float model as an ONNX file.

A traced network is written node by node, the same bytes for the same network. What cannot be traced goes through
torch's own exporter, without the traces that it leaves of this machine.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import onnx
import torch
from torch import fx, nn

from rprune.errors import WorkError
from rprune.export.graphs import INPUT, OPSET, OUTPUT, Writer, conv_attributes, keep_op, pool_op
from rprune.models.graph import Add, Affine, GlobalAvgPool


def plain_model(network: fx.GraphModule, input_shape: tuple[int, int, int], classes: int) -> onnx.ModelProto:
    """The ONNX model of a network from ``trace``: input ``(batch, c, h, w)`` in [0,1] to logits, names kept."""
    return _FloatWriter().model(network, input_shape, classes)


class _FloatWriter(Writer):
    def layer(self, module: nn.Module, name: str, inputs: list[str], target: str) -> str:
        if isinstance(module, nn.Conv2d | nn.Linear):
            parts = [*inputs, self.constant(f"{name}.weight", module.weight)]
            if module.bias is not None:
                parts.append(self.constant(f"{name}.bias", module.bias))
            if isinstance(module, nn.Linear):
                return self.op("Gemm", {"transB": 1}, parts, target, exact=True)
            return self.op("Conv", conv_attributes(module.kernel_size, vars(module)), parts, target, exact=True)
        if isinstance(module, Add):
            return self.op("Add", inputs, target, exact=True)
        if isinstance(module, Affine):
            scaled = self.op("Mul", [*inputs, self.constant(f"{name}.scale", module.scale)], target)
            return self.op("Add", [scaled, self.constant(f"{name}.shift", module.shift)], target, exact=True)
        if isinstance(module, nn.AvgPool2d | GlobalAvgPool):
            return self.op(*pool_op(module if isinstance(module, nn.AvgPool2d) else None), inputs, target, exact=True)
        return self.op(*keep_op(module), inputs, target, exact=True)


def float_model(model: nn.Module, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """The ONNX model of a module in eval mode: input ``(batch, c, h, w)`` in [0,1] to logits, weights inside the file.

    Batch norm is folded by the exporter; weights keep their tensor names. Raises WorkError when torch cannot export it.
    """
    example = torch.zeros(2, *input_shape)
    batch = torch.export.Dim.DYNAMIC
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations are nothing a user can act on
            program: Any = torch.onnx.export(
                model.cpu().eval(), (example,), dynamo=True, external_data=False, verbose=False, opset_version=OPSET,
                input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=({0: batch},),
            )  # fmt: skip
    except Exception as error:  # the exporter raises many kinds
        raise WorkError(
            f"torch cannot export this model to ONNX: {str(error).splitlines()[0]}", "simplify its forward"
        ) from error
    finally:
        logger.setLevel(level)
    proto: onnx.ModelProto = program.model_proto
    _strip(proto)
    return proto


def stamp(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Set the file's metadata: labels, input range, where it comes from."""
    del model.metadata_props[:]
    for key, value in sorted(metadata.items()):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value


def _strip(model: onnx.ModelProto) -> None:
    """Remove doc strings and metadata: torch writes source lines and local paths into them."""
    graph = model.graph
    parts: Iterable[Any] = (graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info)
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    del model.metadata_props[:]
    model.doc_string = ""
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    model.producer_name, model.producer_version = "rprune", ""
