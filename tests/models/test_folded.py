"""Nets with batch norm folded for attacks give logits and input gradients of the net itself, at its weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from rprune.attacks.base import at_rest, cross_entropy, input_gradient
from rprune.models.folded import folded
from rprune.models.registry import Architecture, build

SHAPE, CLASSES = (3, 16, 16), 5
NETS = {
    "vgg4": {}, "wrn-28-2": {}, "cnn-small": {},
    "cifar-resnet18": {"kwargs": {"width": 8}, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2)},
}  # fmt: skip


@torch.no_grad()
def randomised(net: nn.Module) -> nn.Module:
    """Statistics and affine parameters as after training, so that folding changes something."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                module.weight.copy_(torch.randn(module.num_features, generator=generator))
                module.bias.copy_(torch.randn(module.num_features, generator=generator))
    return net


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(build(Architecture(name, CLASSES, SHAPE, **NETS.get(name, {}))))


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, *SHAPE, generator=generator), torch.randint(CLASSES, (6,), generator=generator)


def assert_same(net: nn.Module, still: nn.Module) -> None:
    x, y = images()
    x = x.to(next(net.parameters()).dtype)
    (gradient, _, logits), (wanted, _, expected) = (input_gradient(one, x, cross_entropy(y)) for one in (still, net))
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


class Odd(nn.Module):
    """What can be folded beside what cannot: a shared convolution, one that others read, batch norm in front."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0, self.conv1, self.bn1 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2, self.bn3 = nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv4, self.bn4 = nn.Conv2d(4, 8, 3, 2, groups=2, bias=False), nn.BatchNorm2d(8, affine=False)
        self.fc1, self.bn5, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.fc2 = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(self.bn0(x))))
        y = self.conv2(x)
        x = torch.relu(self.bn2(y) + y + self.bn3(self.conv2(x)))
        x = torch.relu(self.bn4(self.conv4(x))).mean((2, 3))
        return self.fc2(self.drop(torch.relu(self.bn5(self.fc1(x)))))


@pytest.mark.parametrize("name", NETS)
def test_logits_and_gradients_are_the_nets(name: str) -> None:
    net, (x, _) = made(name), images()
    with at_rest(net, x) as still:
        assert (still is not net) == (name != "cnn-small")  # it has nothing to fold
        assert_same(net, still)
        assert not any(parameter.requires_grad for parameter in still.parameters())
    assert net.training
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_only_what_can_be_folded_is() -> None:
    net, (x, _) = randomised(Odd()), images()
    with at_rest(net, x) as still:
        left = [module for module in still.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
        assert left == [net.bn0, net.bn2, net.bn3]
        assert_same(net, still)


def test_weights_of_the_moment_count() -> None:
    net, (x, _) = made("vgg4"), images()
    with at_rest(net, x) as first:
        pass
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.3)
    with at_rest(net, x) as second:
        assert second is first
        assert_same(net, second)


def test_a_changed_net_is_followed_anew() -> None:
    net, (x, _) = randomised(Odd()), images()
    with at_rest(net, x) as first:
        pass
    net.bn1 = nn.BatchNorm2d(4)
    with at_rest(net, x) as second:
        assert second is not first
        assert_same(net, second)
    net.double()
    with at_rest(net, x.double()) as third:
        assert third is not second
        assert_same(net, third)


def test_a_net_with_hooks_stays_itself() -> None:
    net, (x, _) = randomised(Odd()), images()
    with at_rest(net, x) as still:
        assert still is not net
    for module in (net, net.conv1):
        handle = module.register_forward_hook(lambda *_: None)
        with at_rest(net, x) as still:
            assert still is net
        handle.remove()


class Branching(Odd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if float(x.sum()) else x


class Drawing(Odd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.rand(())


@pytest.mark.parametrize("kind", [Branching, Drawing])
def test_what_is_no_graph_stays_itself(kind: type[nn.Module]) -> None:
    net, (x, _) = randomised(kind()), images()
    with at_rest(net, x) as still:
        assert still is net


def test_a_snapshot_keeps_no_net_alive() -> None:
    net, (x, _) = made("vgg4"), images()
    folded(net.eval(), x)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
