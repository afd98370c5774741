"""Networks with lively random statistics, pruned and quantised, for the tests of three floors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx, nn

from rprune.models.graph import trace
from rprune.models.prunable import prunable
from rprune.models.registry import Architecture, build
from rprune.quantization.ptq import Quantization, quantize, simulated

SHAPE = (1, 8, 8)
NORMAL = {"mean": (0.3,), "std": (0.4,)}
CASES: dict[str, Architecture] = {
    "cnn-small": Architecture("cnn-small", 10, SHAPE),
    "lenet": Architecture("lenet", 10, SHAPE, {"width": 2}),
    "vgg4": Architecture("vgg4", 10, SHAPE),
    "cifar-resnet18": Architecture("cifar-resnet18", 10, SHAPE, {"width": 8}),
    "wrn-28-2": Architecture("wrn-28-2", 10, SHAPE),
    "lenet normalised": Architecture("lenet", 10, SHAPE, {"width": 2}, **NORMAL),
    "cifar-resnet18 normalised": Architecture("cifar-resnet18", 10, SHAPE, {"width": 8}, **NORMAL),
}


def enliven(model: nn.Module, keep: float = 1.0) -> nn.Module:
    """Random batch norm statistics and biases; the smallest weights set to zero, the rest scaled up in return."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            sign = torch.randint(0, 2, module.weight.shape) * 2.0 - 1
            module.weight.data = sign * torch.empty_like(module.weight).uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    for weight in prunable(model).values():
        count = max(8, round(keep * weight.numel()))
        if count < weight.numel():
            largest = weight.detach().abs().flatten().topk(count).indices
            mask = torch.zeros(weight.numel()).index_fill_(0, largest, 1.0).view_as(weight)
            weight.data *= mask * (weight.numel() / count) ** 0.25
    return model.eval()


def make(case: str, keep: float = 1.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return enliven(build(CASES[case]), keep)


def digits(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.float32)[start : start + count, None] / 255
    return torch.from_numpy(images), torch.from_numpy(bunch.target[start : start + count].astype(np.int64))


def noise(count: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Tensor:
    """Images that do not lie on the grid of 8-bit pixels."""
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def quantised(
    model: nn.Module, calibration: Tensor | None = None, shape: tuple[int, int, int] = SHAPE
) -> tuple[fx.GraphModule, Quantization, fx.GraphModule]:
    """The traced network, its quantization, and the network that computes with its integers."""
    network = trace(model, shape)
    found = quantize(network, [digits(64)[0] if calibration is None else calibration])
    return network, found, simulated(network, found)
