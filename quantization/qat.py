"""Fake quantization: a float network that computes, to rounding, what its integers will, and has gradients.

Ranges are learned as in LSQ (Esser et al., ICLR 2020): rounding passes gradients straight through where nothing is
clamped, and the scale of n values of top t gets its gradient (eq. 3) times 1 / sqrt(n t) (section 2.2). Here a tenth of
that: scales share the weights' learning rate, and at rates that fine-tune a sparse net well they would overshoot.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from rprune.quantization.ptq import Plan, Quantization, bias_of, insert_after, with_scales
from rprune.quantization.simulate import Scale
from rprune.quantization.weights import half_up, integers, least_scale, per_channel, portable_scale, top_weight

SMALLEST = 2.0**-24  # of a scale: float16's least number
# the net of benchmarks/bits.py at 0.99, seed 0, of 359 samples under APGD: 247 left with 8 bits, 218 with 4; by LSQ's
# own steps 240, which is what calibration leaves, and 217
SLOWER = 0.1


class FakeQuantize(nn.Module):
    """Values on the grid of a scale; the scale is learned where ``learned``."""

    scale: Tensor

    def __init__(self, start: Scale, learned: bool) -> None:
        super().__init__()
        self.start = start
        scale = torch.tensor(start.scale)
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        start = self.start
        scale = self.scale
        if isinstance(scale, nn.Parameter):
            scale = damped(_with_gradient(self.step(), scale), x[0].numel(), start.top)
        rounded = (x.detach() / scale.detach()).round_()
        numbers = rounded.clamp(-start.zero_point, start.top - start.zero_point)
        return on_grid(x, scale, numbers, numbers == rounded)

    def step(self) -> Tensor:
        """The scale in use now, a number."""
        found: Tensor = self.scale.detach()
        return half_up(found.clamp_min(SMALLEST)) if isinstance(self.scale, nn.Parameter) else found

    def in_use(self) -> Scale:
        return Scale(float(self.step()), self.start.zero_point, self.start.top)


def fake_weight(
    weight: Float[Tensor, "o ..."], scale: Float[Tensor, " o"], bits: int, portable: bool, keep: bool = True
) -> Float[Tensor, "o ..."]:
    """``weight`` on the grid of its integers, differentiable in weight and scale."""
    used = scale_in_use(weight, scale, bits, portable)
    used = per_channel(damped(used, weight[0].numel(), top_weight(bits)), weight)
    inside = (weight.detach() / used.detach()).round().abs() <= top_weight(bits)
    return on_grid(weight, used, integers(weight.detach(), used.detach(), bits, keep), inside)


def fake_bias(bias: Float[Tensor, " o"], scale: Float[Tensor, " o"], given: Float[Tensor, ""]) -> Float[Tensor, " o"]:
    """``bias`` as its integers hold it: in steps of the weights' ``scale`` times that of the layer's input.

    Few bits make them wide. Gradients pass straight through.
    """
    steps = scale.detach().double() * given
    return _with_gradient(((bias.detach().double() / steps).round() * steps).float(), bias)


def scale_in_use(
    weight: Float[Tensor, "o ..."], scale: Float[Tensor, " o"], bits: int, portable: bool
) -> Float[Tensor, " o"]:
    """A learned scale as a float16 number, and wide enough for ``portable``; with the gradient of the learned one."""
    value = half_up(scale.detach().clamp_min(SMALLEST))
    if portable:
        value = portable_scale(weight.detach(), value, bits)
    return _with_gradient(value, scale)


def damped(scale: Tensor, count: int, top: int) -> Tensor:
    """``scale`` with its gradient times SLOWER / sqrt(count top)."""
    return _with_gradient(scale.detach(), scale * (SLOWER / math.sqrt(count * top)))


def _with_gradient(value: Tensor, source: Tensor) -> Tensor:
    """``value`` exactly, with the gradient of ``source``."""
    return value + (source - source.detach())


class _OnGrid(torch.autograd.Function):
    """scale * numbers. Derivative by x: 1 where ``inside``; by scale: numbers - x / scale there, numbers elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, numbers: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, numbers, inside)
        return scale * numbers

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, scale, numbers, inside = ctx.saved_tensors
        (grad,) = grads
        by_scale = None
        if ctx.needs_input_grad[1]:
            by_scale = (grad * (numbers - torch.where(inside, x / scale, 0.0))).sum_to_size(scale.shape)
        return grad * inside, by_scale, None, None


def on_grid(x: Tensor, scale: Tensor, numbers: Tensor, inside: Tensor) -> Tensor:
    """``x`` moved to ``numbers`` (integers) times ``scale``; gradients as in LSQ."""
    moved: Tensor = _OnGrid.apply(x, scale, numbers, inside)
    return moved


def fake_quantized(network: fx.GraphModule, start: Quantization) -> fx.GraphModule:
    """A copy of a traced network that puts every value on a grid where its integer form has one; weights are float.

    Scales start at those of ``start`` and are parameters; the image's is fixed. Zero points stay. All parameters take
    gradients.
    """
    plan = Plan(network)
    result = copy.deepcopy(network)
    twins = {node.name: node for node in result.graph.nodes}
    for node in network.graph.nodes:
        pixels = node.op == "placeholder"
        if pixels or node in plan.scaled():
            module = FakeQuantize(start.activations[node.name], learned=not pixels)
            insert_after(result, twins[plan.end(node).name], fake_name(node), module)
    result.recompile()
    return result.requires_grad_(True)


def inputs(network: fx.GraphModule, fake: nn.Module) -> dict[str, FakeQuantize]:
    """What puts the input of each convolution and linear layer of a traced network on its grid, by the layer's name."""
    plan = Plan(network)
    found = {}
    for node, _ in plan.products():
        source = plan.source(node)
        while plan.keeps(source):
            source = plan.source(source)
        module = fake.get_submodule(fake_name(source))
        assert isinstance(module, FakeQuantize)
        found[str(node.target)] = module
    return found


def trained(
    network: fx.GraphModule, fake: nn.Module, weight_scales: Mapping[str, Tensor], bits: int, keep: bool = True
) -> Quantization:
    """The integers of a traced network that holds the trained weights, at the scales that training ended with.

    ``weight_scales`` by layer name. A dead channel whose bias they do not hold gets a wider one.
    """
    plan = Plan(network)
    scales = {}
    for node in plan.scaled():
        module = fake.get_submodule(fake_name(node))
        assert isinstance(module, FakeQuantize)
        scales[node.name] = module.in_use()
    activations = plan.spread(scales)
    wide = {}
    for node, product in plan.products():
        least = least_scale(bias_of(product), activations[plan.source(node).name].scale)
        wide[str(node.target)] = half_up(torch.maximum(weight_scales[str(node.target)], least))
    return with_scales(network, activations, wide, bits, keep)


def fake_name(node: fx.Node) -> str:
    return f"fake_{node.name}"
