"""The architecture ``flat``: a network written down layer by layer, as a shrunk one is that no class describes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rprune.errors import InputError
from rprune.models.graph import Add, Affine, GlobalAvgPool, layer, note_shapes, output_of, shape_of

FIELDS: dict[str, tuple[str, ...]] = {
    "conv": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "linear": ("in_features", "out_features"),
    "max_pool": ("kernel_size", "stride", "padding"),
    "avg_pool": ("kernel_size", "stride"),
}
"""What is written down of a layer, under the names that torch gives it."""

KINDS: dict[str, type[nn.Module]] = {
    "conv": nn.Conv2d,
    "linear": nn.Linear,
    "max_pool": nn.MaxPool2d,
    "avg_pool": nn.AvgPool2d,
    "relu": nn.ReLU,
    "flatten": nn.Flatten,
    "global_avg_pool": GlobalAvgPool,
    "add": Add,
    "affine": Affine,
}
INPUT = "image"
NAME = re.compile(r"[\w-]+(\.[\w-]+)*")  # torch.fx writes names into code that it runs: nothing else may stand in one


def flat(num_classes: int, input_shape: tuple[int, int, int], layers: Sequence[Mapping[str, Any]] = ()) -> nn.Module:
    """The network that ``layers`` (from :func:`describe`) stand for, with fresh weights.

    Raises InputError for layers that do not make a network from ``input_shape`` to ``num_classes`` logits.
    """
    graph = fx.Graph()
    network = fx.GraphModule(nn.Module(), graph)
    graph = network.graph
    nodes = {INPUT: graph.placeholder("x")}
    try:
        for entry in layers:
            if not NAME.fullmatch(entry["name"]):
                raise ValueError(f"{entry['name']!r} cannot be the name of a layer")
            network.add_submodule(entry["name"], _module(entry))
            nodes[entry["name"]] = graph.call_module(entry["name"], tuple(nodes[name] for name in entry["inputs"]))
        graph.output(nodes[layers[-1]["name"]])
        network.recompile()
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        with torch.no_grad():
            logits = network(torch.zeros(2, *input_shape, device=device))
    except Exception as error:  # anything may be wrong with a table that a file brings
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"cannot build the flat network: {reason}", "shrink the model again") from None
    if tuple(logits.shape) != (2, num_classes):
        raise InputError(f"the flat network gives {tuple(logits.shape[1:])} logits", f"it should give {num_classes}")
    return network


def loaded(
    num_classes: int,
    input_shape: tuple[int, int, int],
    layers: Sequence[Mapping[str, Any]],
    state: Mapping[str, Tensor],
) -> fx.GraphModule:
    """:func:`flat` with the tensors of ``state`` themselves, ready for what takes a network from ``trace``.

    Nothing is computed and nothing but ``state`` takes memory. Raises InputError as :func:`flat`, and when ``state``
    does not fit.
    """
    with torch.device("meta"):
        network = flat(num_classes, input_shape, layers)
        assert isinstance(network, fx.GraphModule)
        note_shapes(network, input_shape)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InputError(f"the weights do not fit the layers: {str(error).splitlines()[-1].strip()}") from None
    network.eval().requires_grad_(False)
    return network


def canonical(network: fx.GraphModule) -> fx.GraphModule:
    """The same network, its nodes named after its layers, zeros of its tensors +0; ``network`` comes from ``trace``.

    How a forward pass is written decides what its nodes are called, and a file shows these names. Those of a canonical
    network follow from :func:`describe` alone, so that a network read from its description gives the same file.
    """
    layers = describe(network)
    (image,) = (node for node in network.graph.nodes if node.op == "placeholder")
    calls = [node for node in network.graph.nodes if node.op == "call_module"]
    state = {
        f"{entry['name']}.{key}": tensor + 0
        for entry, node in zip(layers, calls, strict=True)
        for key, tensor in layer(network, node).state_dict().items()
    }
    _, channels, height, width = shape_of(image)
    return loaded(shape_of(output_of(network))[1], (channels, height, width), layers, state)


def describe(network: fx.GraphModule) -> list[dict[str, Any]]:
    """The JSON-able layers of a network from ``trace`` or ``compact``, in the order in which they run."""
    names: dict[fx.Node, str] = {}
    found = []
    kinds = {cls: kind for kind, cls in KINDS.items()}
    for node in network.graph.nodes:
        if node.op == "placeholder":
            names[node] = INPUT
        elif node.op == "call_module":
            module = layer(network, node)
            kind = kinds[type(module)]
            entry: dict[str, Any] = {"name": _unused(str(node.target), names.values()), "kind": kind}
            entry["inputs"] = [names[argument] for argument in node.args if isinstance(argument, fx.Node)]
            entry |= {field: _plain(getattr(module, field)) for field in FIELDS.get(kind, ())}
            if isinstance(module, nn.Conv2d | nn.Linear):
                entry["bias"] = module.bias is not None
            elif isinstance(module, Affine):
                entry["shape"] = list(module.scale.shape)
            names[node] = entry["name"]
            found.append(entry)
    return found


def _unused(name: str, taken: Any) -> str:
    """A layer without weights may be called twice; each call gets a layer of its own."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def _module(entry: Mapping[str, Any]) -> nn.Module:
    kind = entry["kind"]
    if kind == "affine":
        shape = tuple(entry["shape"])
        return Affine(torch.ones(shape), torch.zeros(shape))
    values = {field: _tuple(entry[field]) for field in FIELDS.get(kind, ())}
    if kind in ("conv", "linear"):
        values["bias"] = bool(entry["bias"])
    make: Callable[..., nn.Module] = KINDS[kind]
    return make(**values)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
