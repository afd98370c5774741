"""Removing channels that do nothing: a pruned network as a smaller, dense one with the same outputs.

A channel of a group of tied channels goes when no layer that reads it needs it. What nobody needs follows from bounds
of every channel that hold for any image, real numbers from -inf to inf: a channel whose ends meet is a constant, be it
that all its incoming weights are zero, or that they are such that ReLU never lets anything through. A constant moves
into the biases of the layers that read it. Where a convolution pads with zeros, a constant other than zero is not one
at the borders, and stays; several such constants of a group become one channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from rprune.models.channels import ChannelGroup, channel_groups, mixes_all
from rprune.models.graph import Add, Affine, layer, note_shapes, shape_of, trace

Bounds = dict[fx.Node, tuple[Tensor, Tensor]]
"""Node -> float64 (lo, hi) of each of its features, dimension 1."""


def compact(model: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """The network of a model in eval mode without its dead and constant channels; outputs equal to rounding.

    Layers keep their names and at least one channel. A sum of which one part has become a constant becomes an Affine
    layer, or goes. The model is not touched; the result is on the CPU, without gradients, as from ``trace``.

    Raises InputError for models that ``trace`` cannot follow.
    """
    network = trace(model, input_shape)
    _split_affine(network)
    _clear_idle_taps(network)
    while _shrink(network):
        network.graph.eliminate_dead_code()
        network.delete_all_unused_submodules()
    network.recompile()
    note_shapes(network, input_shape)
    return network


def _shrink(network: fx.GraphModule) -> bool:
    """One pass over the network; True when something was removed, so that another may find more."""
    bounds = _bounds(network)
    _settle(network, bounds)
    if _drop_sums(network, bounds):
        return True
    cut = [_cut(network, group, bounds) for group in channel_groups(network)]
    return any(cut)


def _bounds(network: fx.GraphModule) -> Bounds:
    found: Bounds = {}
    for node in network.graph.nodes:
        given = [found[source] for source in _sources(node)]
        if mixes_all(network, node):
            found[node] = _product_bounds(layer(network, node), node, *given[0])
        elif node.op == "placeholder" or _is(network, node, nn.Conv2d, nn.Linear):
            anything = torch.full((shape_of(node)[1],), torch.inf, dtype=torch.float64)
            found[node] = -anything, anything
        elif node.op == "call_module":
            found[node] = _elementwise_bounds(layer(network, node), node, given)
    return found


def _product_bounds(module: Any, node: fx.Node, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    taps, (_, everywhere) = _taps(module), _reach(module, node)
    low = high = _bias(module)
    for part, a, b in ((taps * everywhere, lo, hi), (taps * ~everywhere, lo.clamp_max(0), hi.clamp_min(0))):
        up, down = part.clamp_min(0).sum(2), part.clamp_max(0).sum(2)
        low, high = low + _times(up, a) + _times(down, b), high + _times(up, b) + _times(down, a)
    return low, high


def _reach(module: Any, node: fx.Node) -> tuple[Tensor, Tensor]:
    """Of each kernel entry: does it ever read a pixel, and does it never read padding?"""
    ever, everywhere = torch.ones(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    if isinstance(module, nn.Conv2d):
        for axis, kernel in enumerate(module.kernel_size):
            size, places = shape_of(node.args[0])[2 + axis], torch.arange(shape_of(node)[2 + axis])
            start = places * module.stride[axis] - int(module.padding[axis])
            at = torch.arange(kernel)[:, None] * module.dilation[axis] + start
            inside = (at >= 0) & (at < size)
            ever = (ever[:, None] & inside.any(1)).flatten()
            everywhere = (everywhere[:, None] & inside.all(1)).flatten()
    return ever, everywhere


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix @ x where 0 * inf is 0. Two products of equal terms are equal: the order of summation is the same."""
    return torch.where(matrix != 0, matrix * x, 0.0).sum(1)


def _elementwise_bounds(module: nn.Module, node: fx.Node, given: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    lo, hi = given[0]
    if isinstance(module, nn.ReLU):
        return lo.clamp_min(0), hi.clamp_min(0)
    if isinstance(module, Add):
        return lo + given[1][0], hi + given[1][1]
    if isinstance(module, Affine):
        scale, shift = (values.double().flatten() for values in (module.scale, module.shift))
        a, b = (torch.where(scale != 0, scale * end, 0.0) + shift for end in (lo, hi))
        return torch.minimum(a, b), torch.maximum(a, b)
    if isinstance(module, nn.Flatten):
        return lo.repeat_interleave(_block(node)), hi.repeat_interleave(_block(node))
    return lo, hi  # pooling


def _needed(network: fx.GraphModule, bounds: Bounds) -> dict[fx.Node, Tensor]:
    """Features of each node on which something depends that is not a constant."""
    needed = {node: torch.zeros(len(lo), dtype=torch.bool) for node, (lo, _) in bounds.items()}
    for node in reversed(network.graph.nodes):
        if node.op == "output":
            needed[node.args[0]].fill_(True)
            continue
        wanted = needed[node] & ~_constant(*bounds[node])
        for source in _sources(node):
            if mixes_all(network, node):
                needed[source] |= _taps(layer(network, node))[wanted].ne(0).any(2).any(0)
            elif _is(network, node, nn.Conv2d, nn.Linear):
                needed[source].fill_(True)
            elif _is(network, node, nn.Flatten):
                needed[source] |= wanted.view(-1, _block(node)).any(1)
            else:
                needed[source] |= wanted
    return needed


def _settle(network: fx.GraphModule, bounds: Bounds) -> None:
    """Move constant inputs into biases; set the weights of outputs that are constant, or not needed, to zero.

    An output that is not needed may still be added to one that is a constant by its bounds: it becomes a constant
    within its own bounds, so that all bounds go on to hold.
    """
    needed = _needed(network, bounds)
    for node in network.graph.nodes:
        if not mixes_all(network, node):
            continue
        module: Any = layer(network, node)
        taps, bias = _taps(module), _bias(module)
        value, _ = given = bounds[_source(node)]
        pads = (taps * ~_reach(module, node)[1]).ne(0).any(2).any(0)
        folded = _constant(*given) & (~pads | (value == 0))
        bias = bias + taps[:, folded].sum(2) @ value[folded]
        idle = ~needed[node] | _constant(*bounds[node])
        bias = torch.where(idle, torch.zeros_like(bias).clamp(*bounds[node]), bias)
        gone = (idle[:, None] | folded[None]).view(*taps.shape[:2], *[1] * (module.weight.dim() - 2))
        _set(module, module.weight.masked_fill(gone, 0.0), bias)


def _drop_sums(network: fx.GraphModule, bounds: Bounds) -> bool:
    """Replace one sum of which one part is a constant in every channel."""
    for node in network.graph.nodes:
        if not _is(network, node, Add):
            continue
        for kept, part in (node.args, node.args[::-1]):
            if bool(_constant(*bounds[part]).all()):
                node.replace_all_uses_with(_shifted(network, node, kept, bounds[part][0]))
                network.graph.erase_node(node)
                return True
    return False


def _shifted(network: fx.GraphModule, node: fx.Node, value: fx.Node, shift: Tensor) -> fx.Node:
    """``value`` plus a constant for each channel, in place of the sum ``node``."""
    if not shift.any():
        return value
    if mixes_all(network, value) and len(value.users) == 1:
        module: Any = layer(network, value)
        _set(module, module.weight, _bias(module) + shift)
        return value
    dtype = next(network.parameters()).dtype
    shape = (1, -1, *[1] * (len(shape_of(node)) - 2))
    name = f"affine_{node.name}"
    network.add_submodule(name, Affine(torch.ones_like(shift, dtype=dtype).view(shape), shift.to(dtype).view(shape)))
    with network.graph.inserting_before(node):
        new = network.graph.call_module(name, (value,))
    new.meta = dict(node.meta)
    return new


def _cut(network: fx.GraphModule, group: ChannelGroup, bounds: Bounds) -> bool:
    """Remove the channels of a group that no consumer reads; all its unmovable constants become one channel."""
    readers = [(_node(network, name), block) for name, block in group.consumers]
    read = torch.zeros(group.size, dtype=torch.bool)
    varies = torch.zeros(group.size, dtype=torch.bool)
    for node, block in readers:
        used = _taps(layer(network, node)).ne(0).any(2).any(0)
        read |= used.view(-1, block).any(1)
        varies |= (used & ~_constant(*bounds[_source(node)])).view(-1, block).any(1)
    keep, constant = read.clone(), read & ~varies
    if constant.sum() > 1:
        first = int(constant.nonzero()[0])
        _merge(network, group, constant, first, bounds)
        keep[constant], keep[first] = False, True
    if not keep.any():
        keep[0] = True  # no layer is left without channels
    if keep.all():
        return False
    index = keep.nonzero().flatten()
    for name in group.producers:
        module: Any = layer(network, _node(network, name))
        _set(module, module.weight[index], _bias(module)[index])
    for node, block in readers:
        module = layer(network, node)
        _set(module, module.weight[:, _features(index, block)], _bias(module))
    for node, block in group.values:
        if _is(network, node, Affine):
            module = layer(network, node)
            module.scale, module.shift = (x[:, _features(index, block)] for x in (module.scale, module.shift))
    return True


def _merge(network: fx.GraphModule, group: ChannelGroup, constant: Tensor, first: int, bounds: Bounds) -> None:
    """Make channel ``first`` a constant that stands for all of ``constant`` in the padded convolutions that read them.

    Every producer gives the same, so that a value has that as many times as producers add up in it.
    """
    parts: dict[fx.Node, int] = {}
    for node, _ in group.values:
        parts[node] = 1 if mixes_all(network, node) else sum(parts[source] for source in _sources(node))
    values = {}
    for name, _ in group.consumers:
        node = _node(network, name)
        if isinstance(layer(network, node), nn.Conv2d):  # linear layers have none of them left
            lo, hi = bounds[_source(node)]
            values[node] = torch.where(_constant(lo, hi), lo, 0.0)[constant]
    largest = max(float(value.abs().max()) for value in values.values())
    unit = largest / max(parts.values())  # within the range that the values have anyway
    for node, value in values.items():
        module: Any = layer(network, node)
        weight = module.weight.double()
        weight[:, first] = torch.einsum("oc...,c->o...", weight[:, constant], value / (unit * parts[_source(node)]))
        _set(module, weight, _bias(module))
    for name in group.producers:
        module = layer(network, _node(network, name))
        bias = _bias(module)
        weight, bias[first] = module.weight.clone(), unit
        weight[first] = 0.0
        _set(module, weight, bias)
    for node, _ in group.values:
        if _is(network, node, Affine):
            module = layer(network, node)
            module.scale[:, first], module.shift[:, first] = 1.0, 0.0


def _clear_idle_taps(network: fx.GraphModule) -> None:
    """Set weights to zero that read nothing but padding, as the outer ones of a 3x3 kernel on a 1x1 image do."""
    for node in network.graph.nodes:
        if mixes_all(network, node) and _is(network, node, nn.Conv2d):
            module: Any = layer(network, node)
            ever, _ = _reach(module, node)
            _set(module, module.weight.masked_fill(~ever.view(module.weight.shape[2:]), 0.0), _bias(module))


def _split_affine(network: fx.GraphModule) -> None:
    """Give every call of an affine layer a layer of its own, with a scale and a shift for each feature."""
    seen: set[str] = set()
    for node in network.graph.nodes:
        if _is(network, node, Affine):
            module: Any = layer(network, node)
            size = (1, shape_of(node)[1], *[1] * (len(shape_of(node)) - 2))
            name = f"affine_{node.name}" if node.target in seen else str(node.target)
            network.add_submodule(name, Affine(module.scale.expand(size).clone(), module.shift.expand(size).clone()))
            node.target = name
            seen.add(name)


def _set(module: Any, weight: Tensor, bias: Tensor) -> None:
    dtype = module.weight.dtype
    # a sum with +0.0 leaves no negative zeros, which cost bytes and break hashes
    module.weight = nn.Parameter(weight.to(dtype) + 0.0, requires_grad=False)
    if module.bias is not None or bool(bias.any()):
        module.bias = nn.Parameter(bias.to(dtype) + 0.0, requires_grad=False)
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = weight.shape[:2]
    else:
        module.out_features, module.in_features = weight.shape


def _taps(module: Any) -> Tensor:
    """float64 weight (outputs, inputs, kernel entries)."""
    weight: Tensor = module.weight.double()
    return weight.reshape(*weight.shape[:2], -1)


def _bias(module: Any) -> Tensor:
    """float64 bias, a copy; zeros where there is none."""
    return torch.zeros(len(module.weight), dtype=torch.float64) if module.bias is None else module.bias.double().clone()


def _constant(lo: Tensor, hi: Tensor) -> Tensor:
    return lo == hi


def _features(channels: Tensor, block: int) -> Tensor:
    return (channels[:, None] * block + torch.arange(block)).flatten()


def _block(node: fx.Node) -> int:
    """Features a channel that a Flatten makes."""
    return math.prod(shape_of(node.args[0])[2:])


def _node(network: fx.GraphModule, name: str) -> fx.Node:
    """The one call of the layer that has a weight of this name."""
    found: fx.Node = next(n for n in network.graph.nodes if n.op == "call_module" and f"{n.target}.weight" == name)
    return found


def _source(node: fx.Node) -> fx.Node:
    return _sources(node)[0]


def _sources(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.args if isinstance(argument, fx.Node)]


def _is(network: fx.GraphModule, node: fx.Node, *kinds: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(layer(network, node), kinds)
