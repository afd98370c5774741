"""Whether a C source is rprune's own: then it computes a network that an ONNX file states, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import fx

from rprune.errors import InputError
from rprune.export.c.engine import INCLUDE, read_source, stated
from rprune.export.c.writer import c_source
from rprune.export.lift import lifted
from rprune.models.graph import Affine, layer, shape_of

BESIDE = ("model.int8.onnx", "model.onnx")


def is_written_of(source: Path, network: Path) -> bool:
    """Whether rprune writes this C source, and the header beside it, of the network of an ONNX file.

    Nothing is compiled. Such a source holds no word of a stranger's: its text follows from the network.
    Raises InputError when a file cannot be read, or the network has no C form.
    """
    text, header = read_source(source), read_source(source.with_suffix(".h"))
    include = INCLUDE.search(text)
    graph = _joined(lifted(network))
    image = next(node for node in graph.graph.nodes if node.op == "placeholder")
    _, channels, height, width = shape_of(image)
    made = c_source(graph, (channels, height, width), include[1].removesuffix(".h") if include else "model")
    return (made.source, made.header) == (text, header)


def _joined(network: fx.GraphModule) -> fx.GraphModule:
    """Mul and Add, two operators of a file, as the one layer that they were written of."""
    for node in list(network.graph.nodes):
        before: Any = node.args[0] if node.args else None
        if not (_is_affine(network, node) and _is_affine(network, before) and len(before.users) == 1):
            continue
        scale: Any = layer(network, before)
        shift: Any = layer(network, node)
        if not bool(scale.shift.any()) and bool((shift.scale == 1).all()):
            scale.shift = shift.shift
            node.replace_all_uses_with(before)
            network.graph.erase_node(node)
    return network


def _is_affine(network: fx.GraphModule, node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module" and isinstance(layer(network, node), Affine)


def need_origin(source: Path) -> None:
    """Raises InputError unless an ONNX file beside a C source proves that it is rprune's own."""
    stated(source)
    read_source(source)
    for beside in map(source.with_name, BESIDE):
        try:
            if is_written_of(source, beside):
                return
        except InputError:  # not there, damaged, or of operators that have no C form
            continue
    raise InputError(
        f"{source} is code, and not what this version of rprune writes of an ONNX file beside it",
        f"put its {' or '.join(BESIDE)} beside it, write it again (rprune unpack --format c), or run it "
        "as it is, if you know who wrote it: --trust-c",
    )
