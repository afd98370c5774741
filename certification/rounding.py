"""How far float32 logits can lie from real ones, whatever the order of summation (Higham, 2002, section 3.1).

A sum of n products errs by at most gamma_n = n u / (1 - n u) times the sum of their magnitudes, u = 2^-24, in any order
and with fused multiply-adds or without. It does not hold for Winograd kernels, TF32 or bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn

from rprune.certification.ibp import SMALLEST, UNIT, gamma, through
from rprune.models.graph import Add, Affine, GlobalAvgPool, pair


def float_error(
    network: fx.GraphModule, lo: Float[Tensor, "b c h w"], hi: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b k"]:
    """Bounds of |float32 logit - real logit| for float32 images in [lo, hi]; ``network``: float64, from ``trace``."""
    with torch.no_grad():
        _, _, error = _Interpreter(network).run((lo, hi, torch.zeros_like(lo)))
    found: Tensor = error
    return found


class _Interpreter(fx.Interpreter):
    """Runs a network on (lo, hi, error): real bounds, and how far the float32 value may be off."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG002
        module = self.fetch_attr(target)
        lo, hi = through(module, *((lo, hi) for lo, hi, _ in args))
        return lo, hi, _error(module, args)


def _error(module: nn.Module, inputs: tuple[tuple[Tensor, Tensor, Tensor], ...]) -> Tensor:
    sizes = [torch.maximum(lo.abs(), hi.abs()) + error for lo, hi, error in inputs]
    size, error = sizes[0], inputs[0][2]
    if isinstance(module, nn.ReLU | nn.Flatten | nn.MaxPool2d):
        same: Tensor = module(error)  # the largest error of a window bounds that of its maximum
        return same
    if isinstance(module, nn.LeakyReLU):
        return error + gamma(2) * module.negative_slope * size + SMALLEST  # the slope is rounded, and the product
    if isinstance(module, Add):
        return error + inputs[1][2] + UNIT * (sizes[0] + sizes[1]) + SMALLEST
    if isinstance(module, Affine):
        scale, shift = module.scale.to(size).abs(), module.shift.to(size).abs()
        return scale * error + gamma(2) * (scale * size + shift) + SMALLEST
    if isinstance(module, nn.AvgPool2d | GlobalAvgPool):
        height, width = pair(size.shape[2:] if isinstance(module, GlobalAvgPool) else module.kernel_size)
        mean: Tensor = module(error) + gamma(height * width + 1) * module(size) + SMALLEST
        return mean
    assert isinstance(module, nn.Conv2d | nn.Linear)
    weight = module.weight.to(size).abs()
    bias = size.new_zeros(len(weight)) if module.bias is None else module.bias.to(size).abs()
    terms = weight[0].numel() + 1
    spread = (weight, bias * gamma(terms) + terms * SMALLEST)
    reach = error + gamma(terms) * size
    if isinstance(module, nn.Linear):
        return F.linear(reach, *spread)
    return F.conv2d(reach, *spread, module.stride, module.padding, module.dilation, module.groups)
