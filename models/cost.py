"""What a network costs: parameters, multiplications, and the FLOPs that HARP counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx, nn

from rprune.models.graph import layer, shape_of


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


def parameters(network: nn.Module) -> int:
    """Weights and biases; batch norm, too, where it is not folded."""
    return sum(parameter.numel() for parameter in network.parameters())


def macs(network: fx.GraphModule) -> int:
    """Multiply-accumulates of the conv and linear layers for one image."""
    return sum(cost.macs for cost in layer_costs(network).values())


def flops(network: fx.GraphModule) -> int:
    """FLOPs of the conv and linear layers for one image as HARP (ICLR 2023, eq. 8) counts them, on floored sizes."""
    return round(sum(cost.flops for cost in layer_costs(network).values()))
