"""Post-training quantization to 8 bits.

Weights: symmetric int8, one scale an output channel, zero stays exactly zero. Activations: uint8, one scale a tensor,
from the range seen on calibration data. Pixels: scale 1/255, zero point 0: an 8-bit image is represented exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from rprune.errors import WorkError
from rprune.models.graph import Add, Affine, GlobalAvgPool, layer, output_of
from rprune.quantization.simulate import LEVELS, QAdd, QAffine, QAvgPool, QInput, QKeep, QMatmul, QOutput, Scale

WEIGHT_LEVELS = 127
BIAS_LIMIT = 1 << 23  # keeps int32 biases and accumulators of dead channels far from overflow


@dataclass(frozen=True)
class Quantization:
    """Everything that turns a traced float network into its 8-bit form: what the artifact stores.

    ``activations``: node name -> scale. ``weights``, ``biases``, ``weight_scales``: layer name -> int8 (o, ...),
    int32 (o,) and float32 (o,) tensors.
    """

    activations: dict[str, Scale]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    weight_scales: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """A flat table for safetensors; :meth:`from_tensors` reads it back."""
        table = {}
        for node, scale in self.activations.items():
            table[f"{node}/scale"] = torch.tensor(scale.scale, dtype=torch.float32)
            table[f"{node}/zero_point"] = torch.tensor(scale.zero_point, dtype=torch.uint8)
        for kind in ("weights", "biases", "weight_scales"):
            table |= {f"{name}/{kind}": tensor for name, tensor in getattr(self, kind).items()}
        return table

    @classmethod
    def from_tensors(cls, table: dict[str, Tensor]) -> Quantization:
        parts: dict[str, dict[str, Any]] = {}
        for key, tensor in table.items():
            name, _, kind = key.rpartition("/")
            parts.setdefault(kind, {})[name] = tensor
        scales = {n: Scale(float(s), int(parts["zero_point"][n])) for n, s in parts["scale"].items()}
        return cls(scales, parts["weights"], parts["biases"], parts["weight_scales"])


def quantize(network: fx.GraphModule, calibration: Iterable[Float[Tensor, "_ c h w"]]) -> Quantization:
    """Scales from the ranges on ``calibration`` batches, and integer weights. ``network`` comes from ``trace``.

    Raises WorkError when an activation is not finite.
    """
    ranges = _observe(network, calibration)
    plan = _Plan(network)
    activations: dict[str, Scale] = {}
    for node in network.graph.nodes:
        if node.op == "placeholder":
            activations[node.name] = Scale(_float32(1 / LEVELS), 0)
        elif node.op == "call_module" and node not in plan.fused and node is not plan.last:
            if plan.keeps(node):
                activations[node.name] = activations[plan.source(node).name]
            else:
                activations[node.name] = _scale(*ranges[plan.result(node)])
    weights, biases, weight_scales = {}, {}, {}
    for node in network.graph.nodes:
        if node.op == "call_module" and isinstance(module := layer(network, node), nn.Conv2d | nn.Linear):
            given = activations[plan.source(node).name]
            name = str(node.target)
            weights[name], biases[name], weight_scales[name] = _integer_weights(module, given.scale)
    return Quantization(activations, weights, biases, weight_scales)


def simulated(network: fx.GraphModule, quantization: Quantization) -> fx.GraphModule:
    """The network that computes with the integers of ``quantization``: pixels in [0,1] to real logits."""
    plan = _Plan(network)
    result = copy.deepcopy(network)
    twins = {node.name: node for node in result.graph.nodes}
    scales = quantization.activations
    for node in network.graph.nodes:
        twin = twins[node.name]
        if node.op == "placeholder":
            _insert_after(result, twin, "quantize_input", QInput(scales[node.name]))
        elif node in plan.fused:
            twin.replace_all_uses_with(twin.args[0])
            result.graph.erase_node(twin)
        elif node.op == "call_module":
            name = str(node.target) if str(node.target) in quantization.weights else f"q_{node.name}"
            result.add_submodule(name, _quantized(plan, node, quantization))
            twin.target = name
    if plan.last is None:
        final = output_of(result)
        _insert_after(result, final, "dequantize_output", QOutput(scales[plan.kernel(output_of(network)).name]))
    result.delete_all_unused_submodules()
    result.recompile()
    return result.eval()


class _Plan:
    """Which nodes become one kernel: a product, sum or affine layer takes the ReLU that alone follows it."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.fused: dict[fx.Node, fx.Node] = {}  # ReLU -> the node it is part of
        for node in network.graph.nodes:
            users = list(node.users)
            if self._computes(node) and len(users) == 1 and self._is(users[0], nn.ReLU):
                self.fused[users[0]] = node
        final = output_of(network)
        # a product at the very end leaves real logits; anything else is quantised and brought back
        self.last = final if self._is(final, nn.Conv2d | nn.Linear) else None

    def _is(self, node: fx.Node, kind: Any) -> bool:
        return node.op == "call_module" and isinstance(layer(self.network, node), kind)

    def _computes(self, node: fx.Node) -> bool:
        return self._is(node, nn.Conv2d | nn.Linear | Add | Affine)

    def keeps(self, node: fx.Node) -> bool:
        return self._is(node, nn.MaxPool2d | nn.Flatten | nn.ReLU)

    def relu(self, node: fx.Node) -> bool:
        return node in self.fused.values()

    def result(self, node: fx.Node) -> str:
        """Name of the node whose values the kernel's output has."""
        return next((relu.name for relu, owner in self.fused.items() if owner is node), node.name)

    def source(self, node: fx.Node, position: int = 0) -> fx.Node:
        """The kernel that made an input of ``node``."""
        given = node.args[position]
        assert isinstance(given, fx.Node)
        return self.kernel(given)

    def kernel(self, node: fx.Node) -> fx.Node:
        """The node that stands for the kernel which computes ``node``."""
        return self.fused.get(node, node)


def _quantized(plan: _Plan, node: fx.Node, quantization: Quantization) -> nn.Module:
    module = layer(plan.network, node)
    scales, name, relu = quantization.activations, str(node.target), plan.relu(node)
    given = scales[plan.source(node).name]
    out = scales.get(node.name)
    if isinstance(module, nn.Conv2d | nn.Linear):
        q = quantization
        return QMatmul(module, q.weights[name], q.biases[name], q.weight_scales[name], given, out, relu)
    if plan.keeps(node):
        return QKeep(module, given)
    assert out is not None
    if isinstance(module, Add):
        return QAdd(given, scales[plan.source(node, 1).name], out, relu)
    if isinstance(module, Affine):
        return QAffine(module.scale, module.shift, given, out, relu)
    assert isinstance(module, nn.AvgPool2d | GlobalAvgPool)
    return QAvgPool(module if isinstance(module, nn.AvgPool2d) else None, given, out)


def _insert_after(network: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> None:
    network.add_submodule(name, module)
    with network.graph.inserting_after(node):
        new = network.graph.call_module(name, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


class _Observer(fx.Interpreter):
    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.ranges: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            if not bool(torch.isfinite(value).all()):
                raise WorkError(f"activation {n.name} is not finite on the calibration data", "the model has diverged")
            low, high = self.ranges.get(n.name, (0.0, 0.0))  # zero is always representable
            self.ranges[n.name] = (min(low, value.min().item()), max(high, value.max().item()))
        return value


def _observe(network: fx.GraphModule, calibration: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
    observer = _Observer(network)
    with torch.no_grad():
        for batch in calibration:
            observer.run(batch.cpu())
    return observer.ranges


def _scale(low: float, high: float) -> Scale:
    scale = _float32(max(high - low, 1e-6) / LEVELS)
    return Scale(scale, min(max(round(-low / scale), 0), LEVELS))


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _integer_weights(module: nn.Conv2d | nn.Linear, given: float) -> tuple[Tensor, Tensor, Tensor]:
    """int8 weight, int32 bias, float32 scale of each channel.

    The scale has a floor that holds the bias below 2^23: a dead channel would otherwise overflow its int32 bias. A kept
    weight never rounds to zero (it becomes +-1), so that the integers have exactly the zeros of the float weights.
    """
    weight = module.weight.detach()
    bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach()
    largest = weight.flatten(1).abs().amax(1)
    scale = torch.maximum(largest / WEIGHT_LEVELS, bias.abs() / (given * BIAS_LIMIT))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    shape = (-1, *(1,) * (weight.dim() - 1))
    steps = weight / scale.view(shape)
    integers = (
        torch.where(steps.abs() < 1, steps.sign(), steps.round()).clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS).to(torch.int8)
    )
    return integers, (bias.double() / (scale.double() * given)).round().to(torch.int32), scale
