"""The packed format: a network as one small safetensors file. docs/formats.md says which byte is where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pydantic
import torch
from torch import Tensor, fx

from rprune.errors import InputError, first_line
from rprune.export import gaps
from rprune.export.gaps import Gaps
from rprune.export.packed_table import FORMAT, MOST_LEVELS, Kind, Scale, StoredWeight
from rprune.export.streams import compress, planes, save, zigzag
from rprune.export.unpack import HINT, TABLE, Array, Packed, unpack
from rprune.files import canonical_json
from rprune.models.flat import canonical, describe, loaded
from rprune.models.graph import Affine, layer, output_of, shape_of
from rprune.quantization import simulate
from rprune.quantization.ptq import Plan, Quantization
from rprune.registry import first_problem


def pack_int8(network: fx.GraphModule, quantization: Quantization, metadata: Mapping[str, str]) -> bytes:
    """The file of an integer network. ``network``, from ``trace``, gives the layers; its float weights are left out.

    Raises InputError for more than 8 bits, and for a ``quantization`` that is not one of ``network``.
    """
    network, found = canonical_form(network, quantization)
    plan = Plan(network)
    own = {node: found.activations[node.name] for node in plan.scaled()}
    if found.bits > 8 or plan.spread({node.name: scale for node, scale in own.items()}) != found.activations:
        raise InputError("these integers have no int8 form", "quantize with --bits 8 or less")
    integers = replace(
        _content("int8", network, metadata),
        weights=_arrays(found.weights),
        biases=_arrays(found.biases),
        scales=_arrays(found.weight_scales),
        activations={str(node.target): _stored(scale) for node, scale in own.items()},
        bits=found.bits,
    )
    return pack(integers)


def pack_float(network: fx.GraphModule, metadata: Mapping[str, str]) -> bytes:
    """The file of a float32 network from ``trace``, whose zeros become +0.

    A layer of few distinct weights, such as a codebook leaves, takes one byte a weight.
    """
    network = canonical(network)
    state = network.state_dict()
    names = [str(node.target) for node, _ in Plan(network).products()]
    floats = replace(
        _content("float32", network, metadata),
        weights=_arrays({name: state[f"{name}.weight"] for name in names}),
        biases=_arrays({name: state[f"{name}.bias"] for name in names if f"{name}.bias" in state}),
    )
    return pack(floats)


def network_of(content: Packed) -> tuple[fx.GraphModule, Quantization | None]:
    """The canonical network, as from ``trace``, and its integers; with integers its float weights are zeros.

    Raises InputError for layers that are no network, and for scales that are not those of its layers.
    """
    integers = content.kind == "int8"
    try:
        network = loaded(content.classes, content.input_shape, content.layers, _state(content))
    except Exception as error:  # names of layers may be those of a module's own parts, which breaks it in many ways
        raise InputError(f"the packed layers make no network: {first_line(error, 200)}", HINT) from None
    if not integers:
        return network, None
    plan = Plan(network)
    scaled = {str(node.target): node.name for node in plan.scaled()}
    if scaled.keys() != content.activations.keys():
        raise InputError("the scales of the packed file are not those of its layers", HINT)
    own = {scaled[name]: simulate.Scale(s.scale, s.zero_point, s.top) for name, s in content.activations.items()}
    assert content.bits is not None
    weights, biases, scales = (
        {name: torch.from_numpy(array) for name, array in table.items()}
        for table in (content.weights, content.biases, content.scales)
    )
    return network, Quantization(plan.spread(own), weights, biases, scales, content.bits)


def _stored(scale: simulate.Scale) -> Scale:
    try:
        return Scale(scale=scale.scale, zero_point=scale.zero_point, top=scale.top)
    except pydantic.ValidationError as error:
        raise InputError(f"an activation has an unusable scale: {first_problem(error)}", "quantize again") from None


def _state(content: Packed) -> dict[str, Tensor]:
    """The float tensors of a packed network; of an integer one zeros."""
    state: dict[str, Tensor] = {}
    for name, (scale, shift) in content.affine.items():
        state |= {f"{name}.scale": torch.from_numpy(scale), f"{name}.shift": torch.from_numpy(shift)}
    biased = {entry["name"] for entry in content.layers if entry.get("bias")}
    for kind, table in (("weight", content.weights), ("bias", content.biases)):
        for name, array in table.items():
            if kind == "weight" or name in biased:
                zeros = content.kind == "int8"
                state[f"{name}.{kind}"] = torch.zeros(array.shape) if zeros else torch.from_numpy(array)
    return state


def canonical_form(network: fx.GraphModule, quantization: Quantization) -> tuple[fx.GraphModule, Quantization]:
    """``models.flat.canonical`` of a network with its integers: what exporters write, so that a network read from a
    packed file gives the same files. Raises InputError when ``quantization`` lacks a layer or has one too many."""
    twin = canonical(network)
    pairs = list(zip(network.graph.nodes, twin.graph.nodes, strict=True))
    nodes = {old.name: new.name for old, new in pairs}
    layers = {str(old.target): str(new.target) for old, new in pairs if old.op == "call_module"}
    plan = Plan(network)
    shapes = {str(node.target): module.weight.shape for node, module in plan.products()}
    q = quantization
    scaled = {node.name for node in plan.scaled()}
    tables = (q.weights, q.biases, q.weight_scales)
    known = {name: weight.shape for name, weight in q.weights.items()} == shapes
    known &= q.biases.keys() == q.weight_scales.keys() == shapes.keys()
    if not known or not scaled <= q.activations.keys() <= nodes.keys():
        raise InputError("the integers belong to another network", "quantize the model again")
    weights, biases, scales = ({layers[name]: tensor for name, tensor in table.items()} for table in tables)
    activations = {nodes[name]: scale for name, scale in q.activations.items()}
    return twin, Quantization(activations, weights, biases, scales, q.bits)


def pack(content: Packed) -> bytes:
    """The file of a network as arrays; zeros of weights become +0. Raises InputError for what ``unpack`` refuses."""
    content = replace(content, weights={name: weight + 0 for name, weight in content.weights.items()})
    names = [entry["name"] for entry in content.layers]
    weights, scales, biases = (
        [table[name] for name in names if name in table] for table in (content.weights, content.scales, content.biases)
    )
    affine = [part for name in names for part in content.affine.get(name, ())]
    coded = [_coded(weight) for weight in weights]
    integers = content.kind == "int8"
    scale_row, half, exact = _scales(scales)
    bias_row = _row(biases, np.int32 if integers else np.float32)
    table = {
        "format": FORMAT,
        "kind": content.kind,
        "bits": content.bits,
        "input_shape": list(content.input_shape),
        "classes": content.classes,
        "layers": content.layers,
        "weights": [entry.stored.model_dump() for entry in coded],
        "scales": ("float16" if exact else "float32") if integers else "none",
        "activations": {name: scale.model_dump() for name, scale in content.activations.items()},
        "metadata": dict(content.metadata),
    }
    text = canonical_json(table).encode()
    raw = {
        TABLE: text,
        "gaps": b"".join(entry.gaps.tobytes() for entry in coded if entry.stored.gaps == "uint8")
        + planes(_row((entry.gaps for entry in coded if entry.stored.gaps == "uint16"), np.uint16)),
        "values": b"".join(entry.codes.tobytes() for entry in coded)
        + planes(_row((entry.floats for entry in coded), np.float32)),
        "scales": planes(half if exact else scale_row),
        "biases": planes(zigzag(bias_row) if integers else bias_row),
        "affine": planes(_row(affine, np.float32)),
    }
    header = {"format": FORMAT, "kind": content.kind, "sha256": content.digest(text)}
    file = save({name: compress(stream) for name, stream in raw.items() if stream}, header)
    unpack(file)
    return file


@dataclass(frozen=True, eq=False)
class _Coded:
    """A weight as ``gaps`` and entries: bytes (integers, or codes of ``floats``), or ``floats`` themselves."""

    stored: StoredWeight
    gaps: Array
    codes: Array
    floats: Array


def _coded(weight: Array) -> _Coded:
    flat, none = weight.reshape(-1), weight[:0].reshape(-1)
    levels = none
    if flat.dtype == np.float32:
        distinct = np.unique(flat[flat != 0])
        # a code takes a byte, a level or a weight four
        if len(distinct) <= MOST_LEVELS and 4 * len(distinct) < 3 * np.count_nonzero(flat):
            levels = distinct
            flat = np.where(flat == 0, 0, np.searchsorted(levels, flat) + 1).astype(np.uint8)
    sparse = gaps.encode(flat)
    # a dense layer takes fewer bytes as it is
    kind, found = (sparse.gaps.dtype.name, sparse) if sparse.nbytes < flat.nbytes else ("none", Gaps(none, flat))
    stored = StoredWeight.model_validate({"entries": len(found.values), "gaps": kind, "levels": len(levels)})
    if found.values.itemsize == 1:
        return _Coded(stored, found.gaps, found.values, levels)
    return _Coded(stored, found.gaps, none, found.values)


def _content(kind: Kind, network: fx.GraphModule, metadata: Mapping[str, str]) -> Packed:
    """What every packed file has, of a canonical network."""
    (image,) = (node for node in network.graph.nodes if node.op == "placeholder")
    _, channels, height, width = shape_of(image)
    modules = {str(node.target): layer(network, node) for node in network.graph.nodes if node.op == "call_module"}
    return Packed(
        kind=kind,
        input_shape=(channels, height, width),
        classes=shape_of(output_of(network))[1],
        layers=describe(network),
        metadata=metadata,
        weights={},
        biases={},
        affine={n: (_array(m.scale), _array(m.shift)) for n, m in modules.items() if isinstance(m, Affine)},
        scales={},
        activations={},
        bits=None,
    )


def _scales(found: Iterable[Array]) -> tuple[Array, Array, bool]:
    """All scales, the same as float16, and whether these are exact."""
    scales = _row(found, np.float32)
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return scales, half, bool((half == scales).all())


def _row(arrays: Iterable[Array], dtype: Any) -> Array:
    return np.concatenate([np.zeros(0, dtype), *(array.reshape(-1) for array in arrays)])


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: _array(tensor) for name, tensor in tensors.items()}


def _array(tensor: Tensor) -> Array:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())
