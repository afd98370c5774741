"""Groups of tied channels, and what layers cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rprune.models.channels import channel_groups
from rprune.models.cost import LayerCost, flops, layer_costs, layer_flops, macs, parameters
from rprune.models.graph import Affine, layer, trace
from rprune.models.prunable import prunable
from rprune.models.registry import Architecture, build

SHAPE = (3, 16, 16)
CASES = {
    "cnn-small": Architecture("cnn-small", 10, SHAPE),
    "lenet": Architecture("lenet", 10, SHAPE, {"width": 2}),
    "vgg4": Architecture("vgg4", 10, SHAPE),
    "cifar-resnet18": Architecture("cifar-resnet18", 10, SHAPE, {"width": 8}),
    "wrn-28-2": Architecture("wrn-28-2", 10, SHAPE),
}


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


def make(nets, case: str) -> nn.Module:
    torch.manual_seed(0)
    return nets.enliven(build(CASES[case])).double()


@pytest.mark.parametrize("case", CASES)
def test_channels_of_a_group_may_change_places(nets, case: str) -> None:
    """What is tied can be permuted together, and only together, without any effect on the logits."""
    network = trace(make(nets, case), SHAPE)
    x = torch.rand(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = network(x)
    for group in channel_groups(network):
        order = torch.arange(group.size).roll(1)
        for name in group.producers:
            module = network.get_submodule(name.removesuffix(".weight"))
            module.weight.data = module.weight.data[order]
            if module.bias is not None:
                module.bias.data = module.bias.data[order]
        for node, block in group.values:
            if isinstance(module := layer(network, node), Affine):
                assert block == 1
                module.scale, module.shift = module.scale[:, order], module.shift[:, order]
        assert not torch.allclose(network(x), wanted, rtol=1e-6)
        for name, block in group.consumers:
            weight = network.get_parameter(name)
            inputs = weight.unflatten(1, (group.size, block))
            weight.data = inputs[:, order].flatten(1, 2)
        torch.testing.assert_close(network(x), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_but_the_last_makes_one_group(nets, case: str) -> None:
    model = make(nets, case)
    groups = channel_groups(trace(model, SHAPE))
    names = list(prunable(model))
    made = [name for group in groups for name in group.producers]
    read = [name for group in groups for name, _ in group.consumers]
    assert sorted(made) == sorted(names[:-1])
    assert sorted(read) == sorted(names[1:])
    weights = prunable(model)
    for group in groups:
        assert all(len(weights[name]) == group.size for name in group.producers)
        assert all(weights[name].shape[1] == group.size * block for name, block in group.consumers)


def test_groups_of_the_tiny_resnet(load_helper) -> None:
    tiny = load_helper("pruning/tiny_net.py")
    first, second = channel_groups(trace(tiny.net(), (3, 8, 8)))
    assert (first.size, first.producers) == (16, ("conv1.weight",))
    assert first.consumers == (("conv2.weight", 1), ("shortcut.weight", 1))
    assert second.producers == ("conv2.weight", "shortcut.weight")
    assert second.consumers == (("fc.weight", 16),)
    assert (first.name, second.name) == ("conv1.weight", "conv2.weight")


class Body(nn.Module):
    """A stem of four channels, a body, and a head."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 1), body, nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(1))


class Sum(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


@pytest.mark.parametrize(
    ("body", "features", "made"),
    [
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), 4 * 16, [("stem.weight",)]),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), 4 * 64, []),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1)), 6 * 36, [("body.1.weight",)]),
        (Sum(nn.Identity(), nn.Conv2d(4, 4, 3, padding=1)), 4 * 64, [("stem.weight", "body.b.weight")]),
        (nn.Linear(8, 8), 4 * 64, []),
        (Sum(nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Linear(256, 256))), 256, []),
    ],
    ids=["one conv", "grouped", "depthwise", "residual", "linear over width", "features meet channels"],
)
def test_layers_that_tie_or_freeze(body: nn.Module, features: int, made: list[tuple[str, ...]]) -> None:
    torch.manual_seed(0)
    found = channel_groups(trace(Body(body, features), (3, 8, 8)))
    assert [group.producers for group in found] == made


def test_image_and_logits_are_no_group() -> None:
    class OnlyPooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.last = nn.Conv2d(3, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.conv(x)).mean((2, 3))

    assert channel_groups(trace(OnlyPooled(), (3, 8, 8))) == []


def test_flops(vectors) -> None:
    v = vectors["flops"]
    assert layer_flops(64, 3 * 9, 32 * 32) == v["conv 3->64 k3 s1 p1 @32"][0]
    side = v["conv 64->128 k3 s2 p1 @32 (fractional side)"]
    assert layer_flops(128, 64 * 9, side[1] ** 2) == side[0]
    assert layer_flops(10, 512, 1) == v["dense 512->10"]


def test_costs_on_the_sides_that_are_computed() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.Conv2d(64, 128, 3, 2, 1, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(8192, 7),
    )
    network = trace(model, (3, 16, 16))
    costs = layer_costs(network)
    assert costs["0.weight"] == LayerCost(64, 3, 9, 256)
    assert costs["1.weight"] == LayerCost(128, 32, 9, 64)
    assert costs["3.weight"] == LayerCost(7, 8192, 1, 1)
    assert {name: cost.weights for name, cost in costs.items()} == {n: w.numel() for n, w in prunable(model).items()}
    assert macs(network) == 64 * 27 * 256 + 128 * 288 * 64 + 7 * 8192
    assert flops(network) == 2 * macs(network) + 64 * 256 + 128 * 64 + 7
    assert parameters(network) == 64 * 27 + 64 + 128 * 288 + 7 * 8192 + 7


def test_flops_of_harps_resnet18() -> None:
    """1,130,682,826 in its code, whose stride-2 layers have 16.5, 8.5 and 4.5 rows for 16, 8 and 4."""
    costs = layer_costs(trace(build(Architecture("cifar-resnet18", 10, (3, 32, 32))), (3, 32, 32)))
    theirs = 0.0
    for cost in costs.values():
        strided = cost.positions < 1024 and cost.inputs < cost.outputs
        positions = (cost.positions**0.5 + 0.5) ** 2 if strided else cost.positions
        theirs += layer_flops(cost.outputs, cost.inputs * cost.area, positions)
    assert theirs == 1_130_682_826
