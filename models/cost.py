"""What a network costs: parameters, multiplications, and the FLOPs that HARP counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rprune.models.graph import layer, shape_of
from rprune.models.prunable import prunable


@dataclass(frozen=True)
class LayerCost:
    """A conv or linear layer: ``outputs`` channels at ``positions`` places, each from ``inputs`` channels x ``area``.

    ``area`` is the number of kernel entries, 1 for a linear layer; ``inputs`` are those of one group.
    """

    outputs: int
    inputs: int
    area: int
    positions: int

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs * self.area

    @property
    def macs(self) -> int:
        return self.weights * self.positions

    @property
    def flops(self) -> float:
        return layer_flops(self.outputs, self.inputs * self.area, self.positions)


def layer_flops(outputs: float, fan_in: float, positions: float) -> float:
    """HARP's FLOPs of a layer, outputs * positions * (2 * fan_in + 1): a bias counts whether there is one or not.

    Its code does not floor the sides of an output: a 3x3 convolution of stride 2 has 16.5 rows on 32 there. Here the
    positions count that are computed.
    """
    return outputs * positions * (2 * fan_in + 1)


def layer_costs(network: fx.GraphModule) -> dict[str, LayerCost]:
    """The cost of each layer of a network from ``trace`` by the name of its weight, for one image."""
    found = {}
    for node in network.graph.nodes:
        module = layer(network, node) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            area, positions = math.prod(module.kernel_size), math.prod(shape_of(node)[2:])
            found[f"{node.target}.weight"] = LayerCost(
                module.out_channels, module.in_channels // module.groups, area, positions
            )
        elif isinstance(module, nn.Linear):
            positions = math.prod(shape_of(node)[1:-1])
            found[f"{node.target}.weight"] = LayerCost(module.out_features, module.in_features, 1, positions)
    return found


def positions(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, int]:
    """How often each entry of a prunable weight is multiplied for one image, by the weight's name (``prunable``).

    Counted in one forward pass of a black image in eval mode, so that any model will do, traced or not. A weight that
    several calls share counts them all; one that no conv or linear layer is called with has 0.
    """
    weights = prunable(model)
    found = dict.fromkeys(weights, 0)
    names = {id(weight): name for name, weight in weights.items()}

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
        weight = module.get_parameter("weight")
        found[names[id(weight)]] += output.numel() // len(weight)

    modules = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(count) for module in modules]
    training = [module for module in model.modules() if module.training]
    some = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape, dtype=some.dtype, device=some.device))
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return found


def sparse_macs(places: Mapping[str, int], nonzero: Mapping[str, int]) -> int:
    """Multiply-accumulates for one image when weights that are zero are left out: sum over layers of nonzero * places.

    ``places``: :func:`positions` by weight name; ``nonzero``: how many entries of each weight are not zero. With the
    sizes of the weights it is the dense network's count.
    """
    return sum(count * places[name] for name, count in nonzero.items())


def count_macs(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, int]:
    """Multiply-accumulates of the conv and linear layers for one image: ``dense``, and ``sparse`` without the zeros."""
    places, weights = positions(model, input_shape), prunable(model)
    return {
        "dense": sparse_macs(places, {name: weight.numel() for name, weight in weights.items()}),
        "sparse": sparse_macs(places, {name: int(weight.count_nonzero()) for name, weight in weights.items()}),
    }


def parameters(network: nn.Module) -> int:
    """Weights and biases; batch norm, too, where it is not folded."""
    return sum(parameter.numel() for parameter in network.parameters())


def macs(network: fx.GraphModule) -> int:
    """Multiply-accumulates of the conv and linear layers for one image."""
    return sum(cost.macs for cost in layer_costs(network).values())


def flops(network: fx.GraphModule) -> int:
    """FLOPs of the conv and linear layers for one image as HARP (ICLR 2023, eq. 8) counts them, on floored sizes."""
    return round(sum(cost.flops for cost in layer_costs(network).values()))
