"""Post-training quantization to b bits: 8 are deployed, 2 to 12 can be simulated.

Weights: symmetric integers within +-(2^(b-1) - 1), one scale an output channel, zero stays exactly zero. Activations:
0..2^b - 1, one scale a tensor, from what calibration data show. This is the uniform quantization of weights and
activations of HYDRA's table 11. Pixels have scale 1/255 and zero point 0 whatever b is: an 8-bit image is represented
exactly. All other scales are float16 numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn

from rprune.models.graph import Add, Affine, GlobalAvgPool, layer, output_of
from rprune.quantization.observers import observe, scale_of
from rprune.quantization.simulate import LEVELS, QAdd, QAffine, QAvgPool, QInput, QKeep, QMatmul, QOutput, Scale
from rprune.quantization.weights import BIAS_LIMIT, Observer, full_scale, per_channel, portable_scale, stored

PIXELS = Scale(float(torch.tensor(1 / LEVELS, dtype=torch.float32)), 0)


@dataclass(frozen=True)
class Settings:
    """How a network is brought to ``bits``, 2 to 12.

    ``observer``: which range of the activations is covered (:func:`observers.scale_of`), and below 8 bits of the
    weights. ``portable``: no filter can saturate on a CPU without VNNI. ``bias_correction``: the mean error of the
    products that integer weights cause on calibration data goes into the biases. ``keep``: no weight becomes zero from
    8 bits on, so that a sparse net has the zeros that were promised; in a dense one the +-1 in place of many small
    weights add up (15 points of the samples that intervals verify: benchmarks/certified_pruning.py).
    """

    bits: int = 8
    observer: Observer = "minmax"
    percentile: float = 99.99
    portable: bool = False
    bias_correction: bool = False
    keep: bool = True


@dataclass(frozen=True)
class Quantization:
    """Everything that turns a traced float network into its integer form: what the artifact stores.

    ``activations``: node name -> scale. ``weights``, ``biases``, ``weight_scales``: layer name -> int8 (int16 beyond 8
    bits) (o, ...), int32 (o,) and float32 (o,) tensors.
    """

    activations: dict[str, Scale]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    weight_scales: dict[str, Tensor]
    bits: int = 8

    def tensors(self) -> dict[str, Tensor]:
        """A flat table for safetensors; :meth:`from_tensors` reads it back."""
        table = {"/bits": torch.tensor(self.bits, dtype=torch.uint8)}
        small = torch.uint8 if self.bits <= 8 else torch.int32
        for node, scale in self.activations.items():
            table[f"{node}/scale"] = torch.tensor(scale.scale, dtype=torch.float32)
            table[f"{node}/zero_point"] = torch.tensor(scale.zero_point, dtype=small)
            table[f"{node}/top"] = torch.tensor(scale.top, dtype=small)
        for kind in ("weights", "biases", "weight_scales"):
            table |= {f"{name}/{kind}": tensor for name, tensor in getattr(self, kind).items()}
        return table

    @classmethod
    def from_tensors(cls, table: Mapping[str, Tensor]) -> Quantization:
        """Files of earlier versions say nothing of bits: they have 8."""
        parts: dict[str, dict[str, Any]] = {"top": {}, "bits": {}}
        for key, tensor in table.items():
            name, _, kind = key.rpartition("/")
            parts.setdefault(kind, {})[name] = tensor
        scales = {
            n: Scale(float(s), int(parts["zero_point"][n]), int(parts["top"].get(n, LEVELS)))
            for n, s in parts["scale"].items()
        }
        bits = int(parts["bits"].get("", 8))
        return cls(scales, parts["weights"], parts["biases"], parts["weight_scales"], bits)


def quantize(
    network: fx.GraphModule, calibration: Iterable[Float[Tensor, "_ c h w"]], settings: Settings | None = None
) -> Quantization:
    """Scales from ``calibration`` batches, and integer weights. ``network`` comes from ``trace``.

    Raises WorkError when an activation is not finite.
    """
    settings, batches = settings or Settings(), list(calibration)
    plan = Plan(network)
    wanted = {plan.end(node).name for node in plan.scaled()}
    seen = observe(network, batches, wanted, settings.observer != "minmax")
    activations = plan.spread(
        {
            node.name: scale_of(seen[plan.end(node).name], settings.bits, settings.observer, settings.percentile)
            for node in plan.scaled()
        }
    )
    scales = {}
    for node, module in plan.products():
        given = activations[plan.source(node).name].scale
        weight = module.weight.detach()
        scale = full_scale(weight, bias_of(module), given, settings.bits, settings.observer)
        scales[str(node.target)] = portable_scale(weight, scale, settings.bits) if settings.portable else scale
    found = with_scales(network, activations, scales, settings.bits, settings.keep)
    return corrected(network, found, batches) if settings.bias_correction else found


def with_scales(
    network: fx.GraphModule,
    activations: dict[str, Scale],
    weight_scales: Mapping[str, Tensor],
    bits: int,
    keep: bool = True,
) -> Quantization:
    """The integers of a traced network at given scales."""
    plan = Plan(network)
    weights, biases = {}, {}
    for node, module in plan.products():
        name, given = str(node.target), activations[plan.source(node).name].scale
        weights[name], biases[name] = stored(
            module.weight.detach(), bias_of(module), weight_scales[name], given, bits, keep
        )
    return Quantization(activations, weights, biases, dict(weight_scales), bits)


def corrected(
    network: fx.GraphModule, quantization: Quantization, calibration: Sequence[Float[Tensor, "_ c h w"]]
) -> Quantization:
    """Biases that cancel the mean error which integer weights cause (Nagel et al., ICCV 2019, section 4.2).

    The error of an output channel is linear in the input, so that its mean over samples and positions is the mean over
    positions of the weights' error applied to the mean input. Layers are corrected in their order, each on the inputs
    that the integer network with the layers before corrected gives it.
    """
    twin = simulated(network, quantization)
    biases = dict(quantization.biases)
    values: dict[fx.Node, list[Tensor]] = {}
    uses = {node: len(node.users) for node in twin.graph.nodes}
    with torch.no_grad():
        for node in twin.graph.nodes:
            inputs = [values[argument] for argument in node.all_input_nodes]
            if node.op == "placeholder":
                values[node] = list(calibration)
            elif node.op == "call_module":
                module = layer(twin, node)
                if isinstance(module, QMatmul):
                    name = str(node.target)
                    source = network.get_submodule(name)
                    biases[name] = _corrected_bias(module, source, inputs[0])
                    module.bias.copy_(biases[name])
                values[node] = [module(*parts) for parts in zip(*inputs, strict=True)]
            for given in node.all_input_nodes:
                uses[given] -= 1
                if not uses[given]:
                    del values[given]
    return replace(quantization, biases=biases)


@torch.no_grad()
def take_biases(network: fx.GraphModule, quantization: Quantization) -> None:
    """The biases of a traced network become those of its integers: corrections included, where it has biases."""
    plan = Plan(network)
    for node, product in plan.products():
        name = str(node.target)
        if product.bias is not None:
            given = quantization.activations[plan.source(node).name].scale
            product.bias.copy_(quantization.biases[name] * (quantization.weight_scales[name] * given))


def _corrected_bias(module: QMatmul, source: Any, inputs: list[Tensor]) -> Tensor:
    """The bias without the mean error of the weights, int32 (o,)."""
    count = sum(len(part) for part in inputs)
    mean = torch.stack([module.given.dequantize(part.double()).sum(0) for part in inputs]).sum(0, keepdim=True) / count
    scale = module.weight_scale.double()
    error = module.weight.double() * per_channel(scale, module.weight) - source.weight.double()
    output = F.linear(mean, error) if module.conv is None else F.conv2d(mean, error, **module.conv).mean((2, 3))
    steps = (bias_of(source).double() - output[0]) / (scale * module.given.scale)
    return steps.round().clamp(-BIAS_LIMIT, BIAS_LIMIT).to(torch.int32)


def simulated(network: fx.GraphModule, quantization: Quantization) -> fx.GraphModule:
    """The network that computes with the integers of ``quantization``: pixels in [0,1] to real logits."""
    plan = Plan(network)
    result = copy.deepcopy(network)
    twins = {node.name: node for node in result.graph.nodes}
    scales = quantization.activations
    for node in network.graph.nodes:
        twin = twins[node.name]
        if node.op == "placeholder":
            insert_after(result, twin, "quantize_input", QInput(scales[node.name]))
        elif node in plan.fused:
            twin.replace_all_uses_with(twin.args[0])
            result.graph.erase_node(twin)
        elif node.op == "call_module":
            name = str(node.target) if str(node.target) in quantization.weights else f"q_{node.name}"
            result.add_submodule(name, _quantized(plan, node, quantization))
            twin.target = name
    if plan.last is None:
        final = output_of(result)
        insert_after(result, final, "dequantize_output", QOutput(scales[plan.kernel(output_of(network)).name]))
    result.delete_all_unused_submodules()
    result.recompile()
    return result.eval()


class Plan:
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

    def end(self, node: fx.Node) -> fx.Node:
        """The node whose values the kernel's output has."""
        return next((relu for relu, owner in self.fused.items() if owner is node), node)

    def scaled(self) -> list[fx.Node]:
        """Kernels whose output has a scale of its own: those that keep the integers have their source's."""
        return [n for n in self.kernels() if n is not self.last and not self.keeps(n)]

    def kernels(self) -> list[fx.Node]:
        return [n for n in self.network.graph.nodes if n.op == "call_module" and n not in self.fused]

    def products(self) -> list[tuple[fx.Node, Any]]:
        """Convolutions and linear layers."""
        return [(n, layer(self.network, n)) for n in self.kernels() if self._is(n, nn.Conv2d | nn.Linear)]

    def spread(self, scales: Mapping[str, Scale]) -> dict[str, Scale]:
        """The scale of every value that has one, from those of :meth:`scaled` nodes."""
        found: dict[str, Scale] = {}
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                found[node.name] = PIXELS
            elif node.name in scales:
                found[node.name] = scales[node.name]
            elif node.op == "call_module" and node not in self.fused and node is not self.last:
                found[node.name] = found[self.source(node).name]
        return found

    def source(self, node: fx.Node, position: int = 0) -> fx.Node:
        """The kernel that made an input of ``node``."""
        given = node.args[position]
        assert isinstance(given, fx.Node)
        return self.kernel(given)

    def kernel(self, node: fx.Node) -> fx.Node:
        """The node that stands for the kernel which computes ``node``."""
        return self.fused.get(node, node)


def _quantized(plan: Plan, node: fx.Node, quantization: Quantization) -> nn.Module:
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


def insert_after(network: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> None:
    network.add_submodule(name, module)
    with network.graph.inserting_after(node):
        new = network.graph.call_module(name, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def bias_of(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
