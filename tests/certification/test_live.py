"""Bounds on live weights: soundness, equality with two slow implementations by matrices, gradients."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rprune.attacks.noise import Keyed
from rprune.attacks.pgd import PGD
from rprune.certification import ibp, live
from rprune.certification.live import Bounds
from rprune.errors import InputError
from rprune.models.graph import trace
from rprune.models.normalize import normalized
from rprune.threat import ThreatModel

LINF, L2 = ThreatModel("linf", "0.03"), ThreatModel("l2", "0.2")
both_norms = pytest.mark.parametrize("threat", [LINF, L2], ids=str)
DIFFERENTIABLE = ("interval", "crown", "parallel", "tightened")
KINDS = (*DIFFERENTIABLE, "optimised")
SHAPE = (2, 6, 6)
CLASSES = 4


class Residual(nn.Module):
    """Conv, batch norm, a residual sum in which a value is used twice, pooling, dropout, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(4)
        self.shortcut = nn.Conv2d(4, 4, 1, stride=2)
        self.pool = nn.AvgPool2d(2, 1)
        self.drop = nn.Dropout(0.5)
        self.fc1 = nn.Linear(16, 6)
        self.bn3 = nn.BatchNorm1d(6)
        self.fc2 = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        x = self.pool(self.relu(self.shortcut(x)))
        x = self.drop(x).view(x.size(0), -1)
        return self.fc2(self.bn3(self.fc1(x)).relu())


def strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 4, 2, 1), nn.ReLU(), nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def all_convolutional() -> nn.Module:
    """No linear layer at the end: margins cannot be merged into one."""
    return nn.Sequential(
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, CLASSES, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def pooled(pool: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), pool, nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(width, CLASSES)
    ).double()  # fmt: skip


POOLS = {
    "plain": nn.MaxPool2d(2), "overlapping": nn.MaxPool2d(3, 1), "padded": nn.MaxPool2d(3, 2, 1),
    "unequal": nn.MaxPool2d((1, 4), (2, 1)),
}  # fmt: skip


class Leaky(Residual):
    """The same with leaks, and with one value that is clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.clip = nn.LeakyReLU(0.2, inplace=True), nn.Hardtanh(-0.3, 0.9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.clip(self.bn2(self.conv2(x)) + x)
        x = self.pool(F.leaky_relu(self.shortcut(x), 0.05))
        x = self.drop(x).view(x.size(0), -1)
        return self.fc2(F.relu6(self.bn3(self.fc1(x))))


NETS = {
    "residual": Residual,
    "leaky": Leaky,
    "strided": strided,
    "all convolutional": all_convolutional,
    "normalised": lambda: normalized(strided(), (0.4, 0.6), (0.3, 0.2)),
}
every_net = pytest.mark.parametrize("name", NETS)


def make(name: str, seed: int = 0) -> nn.Module:
    """A float64 net in train mode with lively batch norm."""
    torch.manual_seed(seed)
    net = NETS[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return net.double().train()


def batch(n: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *SHAPE, generator=generator, dtype=torch.float64).mul_(1.2).sub_(0.1).clamp_(0, 1)
    return x, torch.arange(n) % CLASSES


def lower(kind: str, net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
    parallel = kind == "parallel"
    bounds = Bounds(net, x, threat, "parallel" if parallel else "crown", tighten=kind not in ("interval", "crown"))
    if kind == "optimised":
        return bounds.optimised_margins(y)
    return bounds.interval_margins(y) if kind == "interval" else bounds.linear_margins(y)


def margins(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]) - logits


def ball(x: Tensor, threat: ThreatModel, count: int) -> list[Tensor]:
    """Random points and far corners of the ball around each image, within [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        step = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if threat.norm == "linf":
            step = step.sign() if index % 2 else step.clamp(-1, 1)
        else:
            step = step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        found.append((x + threat.eps * step).clamp(0, 1))
    return found


# -- soundness --------------------------------------------------------------------------------------------------------
@every_net
@both_norms
@pytest.mark.parametrize("kind", KINDS)
def test_no_point_of_the_ball_has_a_smaller_margin(name: str, threat: ThreatModel, kind: str) -> None:
    net, (x, y) = make(name), batch()
    found = lower(kind, net, x, y, threat)
    net.eval()
    attacks = [
        PGD(steps=20, loss=loss, overshoot=torch.inf).evaluate(net, x, y, threat, Keyed(0, torch.arange(len(x)))).x
        for loss in ("ce", "margin")
    ]
    with torch.no_grad():
        for point in [*ball(x, threat, 60), *attacks]:
            assert bool((found <= margins(net(point), y) + 1e-10).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_bounds_hold_on_a_grid_of_two_pixels(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.rand(1, 1, 1, 2, dtype=torch.float64), torch.tensor([1])
    low, high = ((x + side).clamp(0, 1).flatten() for side in (-0.2, 0.2))
    axes = [torch.linspace(float(a), float(b), 101, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    logits = net(torch.cartesian_prod(*axes).view(-1, 1, 1, 2))
    exact = (logits[:, 1:2] - logits).amin(0)
    assert bool((lower(kind, net, x, y, ThreatModel("linf", "0.2"))[0] <= exact + 1e-12).all())


@every_net
@pytest.mark.parametrize("kind", KINDS)
def test_margins_without_a_threat_are_the_real_margins(name: str, kind: str) -> None:
    net, (x, y) = make(name), batch()
    for norm in ("linf", "l2"):
        found = lower(kind, net, x, y, ThreatModel(norm, "0"))
        torch.testing.assert_close(found, margins(net.eval()(x), y), rtol=1e-9, atol=1e-9)


@every_net
def test_linear_bounds_are_exact_where_no_relu_is_unstable(name: str) -> None:
    net, (x, y) = make(name), batch()
    threat = ThreatModel("linf", "0.0001")
    stable = Bounds(net, x, threat)
    inputs = [node.args[0] for node, module in stable.layers.items() if isinstance(module, nn.ReLU)]
    assert not any(((low < 0) & (high > 0)).any() for low, high in (stable.intervals[node] for node in inputs))
    net.eval()
    wanted = torch.empty(len(x), CLASSES, dtype=x.dtype)
    for other in range(CLASSES):
        points = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(margins(net(points), y)[:, other].sum(), points)
        corner = (x - threat.eps * gradient.sign()).clamp(0, 1)
        wanted[:, other] = margins(net(corner), y)[:, other].detach()
    for kind in KINDS[1:]:
        found = lower(kind, net, x, y, threat)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        assert bool((found >= lower("interval", net, x, y, threat) - 1e-12).all())


@both_norms
@every_net
@pytest.mark.parametrize("relaxation", ["crown", "parallel"])
def test_symbolic_bounds_only_tighten_intervals(name: str, threat: ThreatModel, relaxation: str) -> None:
    net, (x, y) = make(name), batch()
    loose, tight = Bounds(net, x, threat), Bounds(net, x, threat, relaxation, tighten=True)
    for node, (low, high) in tight.intervals.items():
        assert bool((low >= loose.intervals[node][0] - 1e-12).all())
        assert bool((high <= loose.intervals[node][1] + 1e-12).all())
        assert bool((low <= high + 1e-12).all())
    assert bool((tight.interval_margins(y) >= loose.interval_margins(y) - 1e-12).all())
    assert bool((tight.interval_margins(y) > loose.interval_margins(y) + 1e-6).any()) or name == "all convolutional"


# -- against other implementations -----------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["wrn-28-2", "vgg4", "lenet normalised", "cnn-small"])
def test_interval_margins_are_those_of_the_finished_network(load_helper, case: str) -> None:
    nets = load_helper("quantization/nets.py")
    net = nets.make(case, 0.3)
    x, y = nets.digits(6)
    region = (x - LINF.eps).clamp_min(0).double(), (x + LINF.eps).clamp_max(1).double()
    wanted = ibp.margins(trace(net, nets.SHAPE), *region, y).scatter(1, y[:, None], 0)
    found = Bounds(net.train(), x, LINF).interval_margins(y)
    assert found.dtype == torch.float32
    assert not found.gather(1, y[:, None]).any()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def matrices(net: nn.Module) -> list[tuple[Tensor, Tensor] | None]:
    """Every affine layer of a sequence as a matrix and an offset, found by probing; None for a ReLU."""
    found: list[tuple[Tensor, Tensor] | None] = []
    value = torch.zeros(1, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        for module in copy.deepcopy(net).eval():
            after = module(value)
            if isinstance(module, nn.ReLU):
                found.append(None)
            else:
                units = torch.eye(value.numel(), dtype=torch.float64).view(-1, *value.shape[1:])
                offset = module(torch.zeros_like(value)).flatten()
                found.append(((module(units).flatten(1) - offset).T, offset))
            value = after
    return found


def zonotope(layers: list[tuple[Tensor, Tensor] | None], lo: Tensor, hi: Tensor, y: int) -> Tensor:
    """Lower margins of one image by DeepZ: an affine form pushed forward, one generator more for each unstable ReLU.

    The form is intersected with interval arithmetic before every ReLU, where it is unstable.
    """
    centre, generators = (lo + hi) / 2, torch.diag((hi - lo) / 2)
    for index, affine in enumerate(layers):
        if affine is not None:
            weight, offset = affine
            if index == len(layers) - 1:
                weight, offset = weight[y] - weight, offset[y] - offset
            centre, generators = weight @ centre + offset, weight @ generators
            middle, radius = weight @ ((lo + hi) / 2) + offset, weight.abs() @ ((hi - lo) / 2)
            lo, hi = middle - radius, middle + radius
            continue
        width = generators.abs().sum(1)
        unstable = (lo < 0) & (hi > 0)
        lo = torch.where(unstable, torch.maximum(lo, centre - width), lo)
        hi = torch.where(unstable, torch.minimum(hi, centre + width), hi)
        new = torch.zeros(len(lo), len(lo), dtype=torch.float64)
        for i in range(len(lo)):
            slope = float(hi[i] > 0)
            if lo[i] < 0 < hi[i]:
                slope = float(hi[i] / (hi[i] - lo[i]))
                new[i, i] = -slope * lo[i] / 2
            centre[i] = slope * centre[i] + new[i, i]
            generators[i] *= slope
        generators = torch.cat([generators, new], 1)
        lo, hi = lo.clamp_min(0), hi.clamp_min(0)
    return centre - generators.abs().sum(1)


def crown(layers: list[tuple[Tensor, Tensor] | None], lo: Tensor, hi: Tensor, y: int) -> Tensor:
    """Lower margins of one image by CROWN over interval bounds, one class and one neuron after the other."""
    before, region = [], (lo, hi)
    for affine in layers:
        before.append((lo, hi))
        if affine is None:
            lo, hi = lo.clamp_min(0), hi.clamp_min(0)
        else:
            middle, radius = affine[0] @ ((lo + hi) / 2) + affine[1], affine[0].abs() @ ((hi - lo) / 2)
            lo, hi = middle - radius, middle + radius
    found = []
    for other in range(CLASSES):
        row, constant = torch.zeros(CLASSES, dtype=torch.float64), 0.0
        row[y] += 1
        row[other] -= 1
        for affine, (low, high) in zip(reversed(layers), reversed(before), strict=True):
            if affine is not None:
                constant += float(row @ affine[1])
                row = row @ affine[0]
                continue
            for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
                if b <= 0:
                    row[i] = 0
                elif a < 0 and row[i] < 0:
                    constant -= float(row[i]) * b * a / (b - a)
                    row[i] *= b / (b - a)
                elif a < 0 and b <= -a:
                    row[i] = 0
        low, high = region
        constant += float(row.clamp_min(0) @ low + row.clamp_max(0) @ high)
        found.append(constant)
    return torch.tensor(found, dtype=torch.float64)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(72, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(),
        nn.Linear(8, CLASSES),
    ).double()  # fmt: skip


@pytest.mark.parametrize("eps", ["0.01", "0.06", "0.3"])
@pytest.mark.parametrize("name", ["perceptron", "strided"])
@pytest.mark.parametrize(("kind", "slow"), [("parallel", zonotope), ("crown", crown)])
def test_linear_margins_are_those_of_matrices(kind: str, slow, name: str, eps: str) -> None:
    torch.manual_seed(3)
    net = perceptron() if name == "perceptron" else make(name)
    x, y = batch()
    found = lower(kind, net, x, y, ThreatModel("linf", eps))
    layers = matrices(net)
    for image, target, row in zip(x.flatten(1), y.tolist(), found, strict=True):
        lo, hi = (image - float(eps)).clamp_min(0), (image + float(eps)).clamp_max(1)
        torch.testing.assert_close(row.detach(), slow(layers, lo, hi, target), rtol=1e-9, atol=1e-9)


@every_net
@both_norms
@pytest.mark.parametrize("relaxation", ["crown", "parallel"])
def test_rows_on_windows_are_rows_on_the_whole_image(
    monkeypatch: pytest.MonkeyPatch, name: str, threat: ThreatModel, relaxation: live.Relaxation
) -> None:
    net, (x, y) = make(name), batch()
    found = []
    for windows in (1, 5, 256):
        monkeypatch.setattr(live, "WINDOWS", windows)
        bounds = Bounds(net, x, threat, relaxation, tighten=True)
        found.append([bounds.linear_margins(y), *(end for ends in bounds.intervals.values() for end in ends)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_windows_that_see_padding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 1, padding=1), nn.ReLU(), nn.Conv2d(3, 2, (1, 2), padding=(0, 2)), nn.ReLU(),
        nn.Conv2d(2, 2, 1, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES),
    ).double()  # fmt: skip
    x, y = batch()
    net(x)
    found = Bounds(net, x, LINF, tighten=True).linear_margins(y)
    monkeypatch.setattr(live, "WINDOWS", 1)
    torch.testing.assert_close(found, Bounds(net, x, LINF, tighten=True).linear_margins(y), rtol=1e-9, atol=1e-9)


def test_images_of_a_batch_do_not_change_each_others_bounds() -> None:
    net, (x, y) = make("residual"), batch()
    together = Bounds(net, x, LINF, tighten=True).linear_margins(y)
    alone = [Bounds(net, x[i : i + 1], LINF, tighten=True).linear_margins(y[i : i + 1]) for i in range(len(x))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_l2_margins_of_one_hidden_layer_by_hand() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[3.0, 4.0]]))
        net[1].bias.fill_(-3.0)
        net[3].weight.copy_(torch.tensor([[0.0], [1.0]]))
        net[3].bias.zero_()
    x, y = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.tensor([0])
    # z = 0.5 +- 0.1 * 5 in l2, at most 0.5 +- 0.1 * 7 in the box: u = 1.2, l = -0.2, and in l2 l = 0, u = 1
    threat, wanted = ThreatModel("l2", "0.1"), {"interval": -1.2, "crown": -(1.2 / 1.4) * (1 + 0.2), "parallel": -1.0}
    with torch.no_grad():
        for kind, value in wanted.items():
            assert lower(kind, net, x, y, threat).tolist() == [[0, pytest.approx(value)]]


# -- gradients --------------------------------------------------------------------------------------------------------
@every_net
@both_norms
@pytest.mark.parametrize("kind", DIFFERENTIABLE)
def test_gradient_by_finite_differences(name: str, threat: ThreatModel, kind: str) -> None:
    net, (x, y) = make(name), batch(3)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(-lower(kind, net, x, y, threat), y)

    loss().backward()
    parameters = list(net.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
    torch.manual_seed(7)
    direction = [torch.randn_like(parameter) for parameter in parameters]
    ends = []
    for step in (1e-7, -2e-7):
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter.add_(way, alpha=step)
            ends.append(float(loss()))
    slope = (ends[0] - ends[1]) / 2e-7
    wanted = sum(float((p.grad * way).sum()) for p, way in zip(parameters, direction, strict=True))
    assert wanted == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", DIFFERENTIABLE)
def test_channels_that_pruning_has_emptied_keep_gradients_finite(kind: str) -> None:
    net, (x, y) = make("strided"), batch()
    with torch.no_grad():
        for layer in (net[0], net[6]):
            layer.weight[0] = 0
            layer.bias[0] = 0
        net[8].weight.zero_()
    lower(kind, net, x, y, LINF).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def test_bounds_need_no_gradient_mode() -> None:
    net, (x, y) = make("residual"), batch()
    with torch.no_grad():
        found = lower("parallel", net, x, y, LINF)
    assert not found.requires_grad
    torch.testing.assert_close(found, lower("parallel", net, x, y, LINF).detach(), rtol=0, atol=0)


# -- the live net -----------------------------------------------------------------------------------------------------
def test_bounds_leave_no_trace_in_the_net() -> None:
    net, (x, y) = make("residual"), batch()
    net.bn1.eval()
    modes = [module.training for module in net.modules()]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.get_rng_state()
    for kind in KINDS:
        lower(kind, net, x, y, LINF)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.relu.inplace
    assert torch.equal(torch.get_rng_state(), state)


def test_a_net_is_traced_once_and_its_weights_are_followed(monkeypatch) -> None:
    net, (x, y) = make("residual"), batch()
    calls = []
    monkeypatch.setattr(live, "trace", lambda *args, **options: calls.append(1) or trace(*args, **options))
    first = lower("crown", net, x, y, LINF)
    with torch.no_grad():
        net.conv2.weight.mul_(0.5)
        net.bn1.running_mean.add_(0.1)
    net.fc2 = nn.Linear(6, CLASSES).double()
    found = lower("crown", net, x, y, LINF)
    assert calls == [1]
    assert not torch.equal(found, first)
    assert torch.equal(found, lower("crown", copy.deepcopy(net), x, y, LINF))
    assert calls == [1, 1]


def test_another_image_shape_is_traced_anew() -> None:
    net = all_convolutional().double()
    for side in (6, 9, 6):
        x = torch.rand(2, 2, side, side, dtype=torch.float64)
        assert Bounds(net, x, LINF).interval_margins(torch.zeros(2, dtype=torch.int64)).shape == (2, CLASSES)


def test_the_graph_does_not_keep_a_net_alive() -> None:
    net, (x, _) = make("residual"), batch()
    gc.collect()
    count = len(live._graphs)
    Bounds(net, x, LINF)
    assert len(live._graphs) == count + 1
    del net
    gc.collect()
    assert len(live._graphs) == count


@both_norms
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_through_max_pooling(pool: str, kind: str, threat: ThreatModel) -> None:
    torch.manual_seed(0)
    layer = POOLS[pool]
    net = pooled(layer, 2 * layer(torch.zeros(1, 1, 4, 4)).numel())
    x, y = batch()
    found, worst = lower(kind, net, x, y, threat), torch.full((len(x), CLASSES), torch.inf, dtype=x.dtype)
    with torch.no_grad():
        for point in ball(x, threat, 200):
            worst = torch.minimum(worst, margins(net(point), y))
    assert bool((found <= worst + 1e-10).all())
    none = lower(kind, net, x, y, ThreatModel(threat.norm, "0"))
    torch.testing.assert_close(none, margins(net(x), y), rtol=1e-9, atol=1e-9)
    if kind != "interval" and threat.norm == "linf":
        assert bool((found >= lower("interval", net, x, y, threat) - 0.05).all())


@pytest.mark.parametrize(
    "clip",
    [lambda x: F.leaky_relu(x, 0.1, inplace=True), lambda x: F.relu6(x, inplace=True), nn.Hardtanh(inplace=True)],
)
def test_what_changes_a_value_that_is_read_again_is_refused(clip) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.clip, self.fc = nn.Conv2d(2, 2, 1), clip, nn.Linear(72, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc((self.clip(x) + x).flatten(1))

    with pytest.raises(InputError, match="in-place"):
        Bounds(Twice(), batch()[0].float(), LINF)


def test_batch_norm_without_statistics_is_refused() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(), nn.Linear(32, 4)
    )
    with pytest.raises(InputError, match="running statistics"):
        Bounds(net, batch()[0].float(), LINF)
