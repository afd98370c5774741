from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rprune.errors import InputError
from rprune.models.graph import LAYERS, Add, Affine, GlobalAvgPool, layer, trace
from rprune.models.registry import Architecture, build

CASES = ("cnn-small", "lenet", "vgg4", "cifar-resnet18", "wrn-28-2", "lenet normalised", "cifar-resnet18 normalised")
SHAPE = (2, 8, 8)


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


class Net(nn.Module):
    """conv, then whatever ``body`` does with (module, activations), then a linear layer if ``features`` is given."""

    def __init__(self, body, features: int = 0, **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(SHAPE[0], 4, 3, padding=1)
        self.body = body
        for name, module in modules.items():
            setattr(self, name, module)
        self.fc = nn.Linear(features, 5) if features else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self, self.conv(x))
        return x if self.fc is None else self.fc(x)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def kinds(network) -> list[type]:
    return [type(layer(network, node)) for node in network.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("keep", [1.0, 0.01])
@pytest.mark.parametrize("case", CASES)
def test_traced_network_equals_the_model(nets, case: str, keep: float) -> None:
    model = nets.make(case, keep)
    x = torch.cat([nets.digits(8)[0], nets.noise(8)])
    with torch.no_grad():
        wanted, got = model(x), trace(model, nets.SHAPE)(x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_only_known_layers_remain(nets, case: str) -> None:
    network = trace(nets.make(case), nets.SHAPE)
    assert {node.op for node in network.graph.nodes} == {"placeholder", "call_module", "output"}
    assert set(kinds(network)) <= set(LAYERS)
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("case", ["vgg4", "cifar-resnet18 normalised"])
def test_conv_and_linear_layers_keep_their_names(nets, case: str) -> None:
    model = nets.make(case)
    network = trace(model, nets.SHAPE)
    wanted = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    got = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(got) == sorted(wanted)


def test_model_is_not_touched(nets) -> None:
    model = nets.make("cifar-resnet18 normalised").train()
    before, training = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    network = trace(model, nets.SHAPE)
    for parameter in network.parameters():
        parameter.zero_()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [m.training for m in model.modules()] == training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batch_norm_folding_keeps_zeros_and_their_sign(nets) -> None:
    model = nets.make("cifar-resnet18", 0.01)
    network = trace(model, nets.SHAPE)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            zeros = model.get_submodule(name).weight == 0
            assert torch.equal(module.weight == 0, zeros)
            assert not torch.signbit(module.weight[zeros]).any()


FLAT = 4 * 8 * 8
REWRITTEN = {
    "F.relu": (lambda m, x: F.relu(x).flatten(1), FLAT, [nn.ReLU, nn.Flatten]),
    "torch.relu": (lambda m, x: torch.flatten(torch.relu(x), 1), FLAT, [nn.ReLU, nn.Flatten]),
    "x.relu": (lambda m, x: x.relu().flatten(1), FLAT, [nn.ReLU, nn.Flatten]),
    "view with size": (lambda m, x: x.view(x.size(0), -1), FLAT, [nn.Flatten]),
    "view with shape": (lambda m, x: x.view(x.shape[0], FLAT), FLAT, [nn.Flatten]),
    "view -1": (lambda m, x: x.view(-1, FLAT), FLAT, [nn.Flatten]),
    "reshape": (lambda m, x: x.reshape(x.shape[0], -1), FLAT, [nn.Flatten]),
    "mean": (lambda m, x: x.mean((2, 3)), 4, [GlobalAvgPool, nn.Flatten]),
    "mean negative": (lambda m, x: x.mean(dim=(-1, -2)), 4, [GlobalAvgPool, nn.Flatten]),
    "mean keepdim": (lambda m, x: torch.mean(x, [2, 3], keepdim=True).flatten(1), 4, [GlobalAvgPool, nn.Flatten]),
    "F.avg_pool2d": (lambda m, x: F.avg_pool2d(x, 2).flatten(1), 64, [nn.AvgPool2d, nn.Flatten]),
    "F.avg_pool2d stride": (lambda m, x: F.avg_pool2d(x, 4, stride=2).flatten(1), 36, [nn.AvgPool2d, nn.Flatten]),
    "F.max_pool2d": (lambda m, x: F.max_pool2d(x, 3, 2, 1).flatten(1), 64, [nn.MaxPool2d, nn.Flatten]),
    "adaptive to 1": (lambda m, x: F.adaptive_avg_pool2d(x, 1).flatten(1), 4, [GlobalAvgPool, nn.Flatten]),
    "adaptive to 2x4": (lambda m, x: F.adaptive_avg_pool2d(x, (2, 4)).flatten(1), 32, [nn.AvgPool2d, nn.Flatten]),
    "adaptive to itself": (lambda m, x: F.adaptive_avg_pool2d(x, (8, None)).flatten(1), FLAT, [nn.Flatten]),
    "adaptive module": (lambda m, x: m.pool(x).flatten(1), 16, [nn.AvgPool2d, nn.Flatten]),
    "dropout": (lambda m, x: F.dropout(m.drop(x), 0.5, m.training).flatten(1), FLAT, [nn.Flatten]),
    "torch.add": (lambda m, x: torch.add(x, F.relu(x)).flatten(1), FLAT, [nn.ReLU, Add, nn.Flatten]),
    "sum": (lambda m, x: (x + x).flatten(1), FLAT, [Add, nn.Flatten]),
    "in-place sum": (lambda m, x: operator.iadd(x.relu(), x).flatten(1), FLAT, [nn.ReLU, Add, nn.Flatten]),
}


@pytest.mark.parametrize("form", REWRITTEN)
def test_functional_forms_are_rewritten(form: str) -> None:
    body, features, wanted = REWRITTEN[form]
    model = Net(body, features, pool=nn.AdaptiveAvgPool2d(2), drop=nn.Dropout2d()).eval()
    network = trace(model, SHAPE)
    assert kinds(network) == [nn.Conv2d, *wanted, nn.Linear]
    with torch.no_grad():
        torch.testing.assert_close(network(images()), model(images()), rtol=1e-5, atol=1e-6)


def test_batch_norm_without_convolution_becomes_affine() -> None:
    norm, flat = nn.BatchNorm2d(4), nn.BatchNorm1d(FLAT)
    for module in (norm, flat):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    model = Net(lambda m, x: m.flat(m.norm(F.relu(x)).flatten(1)), FLAT, norm=norm, flat=flat).eval()
    network = trace(model, SHAPE)
    assert kinds(network) == [nn.Conv2d, nn.ReLU, Affine, nn.Flatten, Affine, nn.Linear]
    with torch.no_grad():
        torch.testing.assert_close(network(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_convolution_used_beside_its_batch_norm_is_not_folded() -> None:
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    model = Net(lambda m, x: (x + m.norm(x)).flatten(1), FLAT, norm=norm).eval()
    with torch.no_grad():
        torch.testing.assert_close(trace(model, SHAPE)(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_in_place_relu_that_other_nodes_see_is_never_computed_differently() -> None:
    def body(_: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(x, inplace=True)
        return (x + y).flatten(1)

    model = Net(body, FLAT).eval()
    try:
        network = trace(model, SHAPE)
    except InputError:
        return
    with torch.no_grad():
        torch.testing.assert_close(network(images()), model(images()), rtol=1e-5, atol=1e-5)


def shared(m: nn.Module, x: Tensor) -> Tensor:
    return m.again(m.again(x)).flatten(1)


UNSUPPORTED = {
    "module": (lambda m, x: m.act(x).flatten(1), {"act": nn.Sigmoid()}, r"node act: .*Sigmoid"),
    "function": (lambda m, x: torch.tanh(x).flatten(1), {}, r"node tanh: .*tanh"),
    "method": (lambda m, x: x.abs().flatten(1), {}, r"node abs_?\w*: .*abs"),
    "product": (lambda m, x: (x * x).flatten(1), {}, r"node mul: .*mul"),
    "shared layer": (shared, {"again": nn.Conv2d(4, 4, 1)}, r"node again_1: .*again is used twice"),
    "ceil_mode": (lambda m, x: m.p(x).flatten(1), {"p": nn.MaxPool2d(3, ceil_mode=True)}, r"node p: .*MaxPool2d"),
    "dilation": (lambda m, x: m.p(x).flatten(1), {"p": nn.MaxPool2d(3, dilation=2)}, r"node p: .*MaxPool2d"),
    "padded mean": (lambda m, x: m.p(x).flatten(1), {"p": nn.AvgPool2d(2, padding=1)}, r"node p: .*AvgPool2d"),
    "divisor": (lambda m, x: m.p(x).flatten(1), {"p": nn.AvgPool2d(2, divisor_override=3)}, r"node p: .*AvgPool2d"),
    "circular": (
        lambda m, x: m.c(x).flatten(1),
        {"c": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")},
        r"node c: .*Conv2d .*circular",
    ),
    "same": (lambda m, x: m.c(x).flatten(1), {"c": nn.Conv2d(4, 4, 3, padding="same")}, r"node c: .*Conv2d .*same"),
    "uneven adaptive": (lambda m, x: F.adaptive_avg_pool2d(x, 3).flatten(1), {}, r"node adaptive_avg_pool2d: "),
    "broadcast sum": (lambda m, x: (x + x.mean((2, 3), keepdim=True)).flatten(1), {}, r"node add: .*add"),
    "constant sum": (lambda m, x: (x + 1).flatten(1), {}, r"node add: .*add"),
    "scaled sum": (lambda m, x: torch.add(x, x, alpha=2).flatten(1), {}, r"node add: .*add"),
    "mean over channels": (lambda m, x: x.mean((1, 2)), {}, r"node mean: .*mean"),
    "mean over one axis": (lambda m, x: x.mean(1).flatten(1), {}, r"node mean: .*mean"),
    "partial flatten": (lambda m, x: x.flatten(2), {}, r"node flatten: .*flatten"),
    "F.max_pool2d ceil_mode": (
        lambda m, x: F.max_pool2d(x, 3, ceil_mode=True).flatten(1),
        {},
        r"node \w*max_pool2d: .*(?i:max_?pool)",
    ),
    "F.max_pool2d dilation": (
        lambda m, x: F.max_pool2d(x, 3, dilation=2).flatten(1),
        {},
        r"node \w*max_pool2d: .*(?i:max_?pool)",
    ),
    "F.avg_pool2d ceil_mode": (
        lambda m, x: F.avg_pool2d(x, 3, ceil_mode=True).flatten(1),
        {},
        r"node \w*avg_pool2d: .*(?i:avg_?pool)",
    ),
    "F.avg_pool2d divisor": (
        lambda m, x: F.avg_pool2d(x, 2, divisor_override=3).flatten(1),
        {},
        r"node \w*avg_pool2d: .*(?i:avg_?pool)",
    ),
    "batch statistics": (
        lambda m, x: m.norm(x).flatten(1),
        {"norm": nn.BatchNorm2d(4, track_running_stats=False)},
        r"norm.*(?i:batch)",
    ),
    "two outputs": (lambda m, x: (x.flatten(1), x), {}, "more than one"),
}


@pytest.mark.parametrize("form", UNSUPPORTED)
def test_unsupported_operations_are_named(form: str) -> None:
    body, modules, message = UNSUPPORTED[form]
    with pytest.raises(InputError, match=message) as caught:
        trace(Net(body, **modules), SHAPE)
    assert caught.value.hint


def test_control_flow_on_values_is_an_input_error() -> None:
    with pytest.raises(InputError, match="cannot follow the forward pass of Net"):
        trace(Net(lambda m, x: x if x.sum() > 0 else -x), SHAPE)


def test_mobilenet_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"ReLU6|Hardtanh"):
        trace(build(Architecture("torchvision:mobilenet_v2", 10, (3, 32, 32))), (3, 32, 32))
