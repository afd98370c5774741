"""Positions and multiply-accumulates: by hand, against the traced graph, and for models that no tracer follows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rprune.models.cost import count_macs, layer_costs, macs, positions, sparse_macs
from rprune.models.graph import trace
from rprune.models.prunable import prunable
from rprune.models.registry import Architecture, build

SHAPE = (3, 16, 16)


@pytest.mark.parametrize("name", ["cnn-small", "lenet", "vgg4", "cifar-resnet18", "wrn-28-2"])
def test_positions_are_those_of_the_traced_graph(name: str) -> None:
    model = build(Architecture(name, 10, SHAPE, {"width": 8} if name == "cifar-resnet18" else {}))
    network = trace(model, SHAPE)
    assert positions(model, SHAPE) == {weight: cost.positions for weight, cost in layer_costs(network).items()}
    assert count_macs(model, SHAPE)["dense"] == macs(network)


def test_macs_of_hand_counted_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 8, 3, 2, 1, groups=2, bias=False),
        nn.Linear(8, 5),  # over the last axis: 8 channels x 8 rows
        nn.Flatten(),
        nn.Linear(320, 2),
    )
    assert positions(model, SHAPE) == {"0.weight": 256, "1.weight": 64, "2.weight": 64, "4.weight": 1}
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.fill_(1.0).view(-1)[2:].zero_()
    dense = 256 * 108 + 64 * 144 + 64 * 40 + 640
    assert count_macs(model, SHAPE) == {"dense": dense, "sparse": 2 * (256 + 64 + 64 + 1)}
    assert sparse_macs({"a": 10, "b": 3}, {"a": 2, "b": 0}) == 20


def test_sparse_macs_are_the_products_of_a_loop() -> None:
    """Every product of a convolution with a non-zero weight, counted one by one; padding counts as any input does."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.masked_fill_(torch.rand_like(conv.weight) < 0.6, 0.0)
    products = 0
    for _row in range(0, 7 + 2 - 3 + 1, 2):
        for _column in range(0, 5 + 2 - 3 + 1, 2):
            products += sum(1 for value in conv.weight.flatten().tolist() if value)
    assert count_macs(conv, (2, 7, 5))["sparse"] == products


class Odd(nn.Module):
    """A branch on values, a layer that is used twice, one that is shared, one that rests, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.twin = nn.Conv2d(3, 3, 3, padding=1)
        self.twin.weight = self.conv.weight
        self.idle = nn.Linear(3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.conv(x)))
        if float(x.sum()) > 1e9:
            x = -x
        return self.fc(self.twin(x).mean((2, 3)))


def test_any_model_is_counted_and_left_as_it_was() -> None:
    model = Odd()
    model.norm.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert positions(model, SHAPE) == {"conv.weight": 3 * 256, "idle.weight": 0, "fc.weight": 1}
    assert model.training
    assert not model.norm.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_fails_is_left_as_it_was() -> None:
    model = Odd()
    with pytest.raises(RuntimeError):
        positions(model, (4, 16, 16))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
