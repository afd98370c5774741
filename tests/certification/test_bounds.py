"""The cascade's bounds: values of other implementations, soundness under attack, float32 sums, what is no number."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rprune.attacks.noise import Keyed
from rprune.attacks.pgd import PGD
from rprune.certification import ibp
from rprune.certification.bounds import METHODS, lower_margins, rounded_margins, smallest
from rprune.certification.ibp import gamma, proved
from rprune.certification.live import Bounds
from rprune.certification.rounding import float_error
from rprune.errors import UsageError
from rprune.models.graph import trace
from rprune.threat import ThreatModel

ORACLE = np.load(Path(__file__).parent.parent / "data" / "certification-cnn-small.npz")
LINF = ThreatModel("linf", "0.02")


def cnn_small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 100),
        nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def oracle():
    """Net, images and labels of the recorded values, which were made with auto_LiRPA 0.7.1 and by hand."""
    net = cnn_small()
    prefix = "adv_0.1/w/"
    state = {k.removeprefix(prefix): torch.from_numpy(ORACLE[k]) for k in ORACLE.files if k.startswith(prefix)}
    net.load_state_dict(state)
    return net.double().eval(), torch.from_numpy(ORACLE["X"]).double(), torch.from_numpy(ORACLE["y"])


def others(margins: Tensor, y: Tensor) -> Tensor:
    """Columns of the other classes, ascending, as recorded."""
    keep = torch.ones_like(margins, dtype=torch.bool).scatter(1, y[:, None], False)
    return margins[keep].view(len(y), -1)


@pytest.mark.parametrize("eps", [0.02, 0.04])
@pytest.mark.parametrize(
    ("method", "name", "tolerance"),
    [
        ("ibp", "al_ibp", 3e-5),
        ("crown-ibp", "al_crown_ibp", 3e-5),
        ("crown", "hand_crown", 3e-5),
        ("crown", "al_crown", 3e-5),
    ],
)
def test_margins_of_other_implementations(oracle, eps: float, method: str, name: str, tolerance: float) -> None:
    net, x, y = oracle
    region = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    if method == "ibp":
        found = ibp.margins(trace(net, (1, 16, 16)), *region, y)
    else:
        with torch.no_grad():
            bounds = Bounds(net, x, ThreatModel.of("linf", eps), tighten=method == "crown", pixels=region)
            found = bounds.linear_margins(y)
    wanted = torch.from_numpy(ORACLE[f"adv_0.1/eps{eps}/{name}"]).double()
    gap = others(found, y) - wanted
    if name == "al_crown":  # without intervals in the pre-activations' bounds it can only be looser
        assert float(gap.min()) > -tolerance
        assert float(gap.abs().median()) < tolerance
    else:
        assert float(gap.abs().max()) < tolerance


@pytest.mark.parametrize("eps", [0.02, 0.04])
def test_optimised_slopes_come_as_far_as_others_do(oracle, eps: float) -> None:
    net, x, y = oracle
    with torch.no_grad():
        bounds = Bounds(net, x, ThreatModel.of("linf", eps), tighten=True)
        crown = bounds.linear_margins(y)
    found = bounds.optimised_margins(y)
    hand = torch.from_numpy(ORACLE[f"adv_0.1/eps{eps}/hand_alpha20"]).double()
    worst = torch.from_numpy(ORACLE[f"adv_0.1/eps{eps}/pgd_worst_margin"]).double()
    assert bool((found >= crown).all())
    assert float((others(found, y) - hand).mean()) > -1e-3
    assert bool((others(found, y) <= worst + 1e-6).all())


@pytest.mark.parametrize("eps", ["0.02", "0.04"])
def test_no_bound_lies_above_what_an_attack_reached(oracle, eps: str) -> None:
    net, x, y = oracle
    worst = torch.from_numpy(ORACLE[f"adv_0.1/eps{eps}/pgd_worst_margin"]).double()
    before = None
    for method in METHODS:
        found = lower_margins(trace(net, (1, 16, 16)), x.float(), y, ThreatModel("linf", eps), method)
        assert bool((others(found, y) <= worst + 1e-6).all()), method
        if method in ("crown", "alpha-crown"):
            assert before is None or bool((found >= before - 1e-9).all()), method
            before = found


@pytest.mark.parametrize("threat", [LINF, ThreatModel("l2", "0.3")], ids=str)
@pytest.mark.parametrize(
    "case", ["cnn-small", "cifar-resnet18 normalised", pytest.param("vgg4", marks=pytest.mark.slow), "lenet"]
)
@pytest.mark.parametrize("method", METHODS)
def test_bounds_hold_on_models_under_attack(load_helper, case: str, threat: ThreatModel, method: str) -> None:
    nets = load_helper("quantization/nets.py")
    network = trace(nets.make(case, 0.1), nets.SHAPE).double()
    x, y = nets.digits(3)
    y = network(x.double()).argmax(1)
    found = lower_margins(network, x, y, threat, method)
    attack = PGD(steps=20, loss="margin", overshoot=torch.inf)
    worst = attack.evaluate(network, x.double(), y, threat, Keyed(0, torch.arange(len(x)))).x
    with torch.no_grad():
        for point in (worst, x.double()):
            logits = network(point)
            margins = (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], torch.inf)
            assert bool((found <= margins + 1e-9).all())


def test_integers_have_intervals_alone(load_helper) -> None:
    nets = load_helper("quantization/nets.py")
    _, _, twin = nets.quantised(nets.make("cnn-small", 0.3))
    x, y = nets.digits(4)
    assert lower_margins(twin, x, y, LINF, "ibp").shape == (4, 10)
    with pytest.raises(UsageError, match="does not bound integers"):
        lower_margins(twin, x, y, LINF, "crown")


def test_what_is_no_number_proves_nothing() -> None:
    y = torch.tensor([0, 1])
    fine = torch.tensor([[torch.inf, 1.0, 2.0], [3.0, torch.inf, 0.5]])
    assert proved(fine, y).tolist() == [True, True]
    for bad in (torch.nan, torch.inf, -torch.inf, 0.0):
        lower = fine.clone()
        lower[1, 2] = bad
        assert proved(lower, y).tolist() == [True, False]
    assert smallest(fine, y).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_net_that_overflows_is_unknown(method: str, bad: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        net[3].weight[0, 0] = bad
        net[5].weight[:, 0] = 1
    x, y = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    assert not proved(lower_margins(trace(net, (1, 4, 4)).double(), x, y, LINF, method), y).any()


@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 3))
@settings(max_examples=30)
def test_float32_sums_lie_within_their_error(seed: int, width: int, depth: int) -> None:
    """Random perceptrons on random points, summed in random orders, against float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [16, *[width] * depth, 3]
    layers: list[nn.Module] = [nn.Flatten()]
    for given_size, made in pairwise(sizes):
        linear = nn.Linear(given_size, made)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(made, given_size, generator=generator))
            linear.bias.copy_(torch.randn(made, generator=generator))
        layers += [linear, nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    x = torch.rand(4, 1, 4, 4, generator=generator)
    network = trace(net, (1, 4, 4)).double()
    error = float_error(network, x.double(), x.double())
    value = x.flatten(1)
    for module in net[1:]:
        if isinstance(module, nn.ReLU):
            value = value.clamp_min(0)
            continue
        order = torch.randperm(value.shape[1] + 1, generator=generator)
        terms = torch.cat([value[:, None] * module.weight, module.bias.expand(len(x), -1)[..., None]], 2)[..., order]
        total = torch.zeros(terms.shape[:2])
        for term in terms.detach().unbind(2):
            total = total + term
        value = total
    with torch.no_grad():
        exact = network(x.double())
        assert bool(((value.double() - exact).abs() <= error).all())
        assert bool(((net(x).double() - exact).abs() <= error).all())
        assert bool((error <= 1e-2 * (1 + exact.abs().amax())).all())


def test_float32_errors_of_convolutional_nets(load_helper) -> None:
    nets = load_helper("quantization/nets.py")
    for case in ("cnn-small", "cifar-resnet18 normalised", "vgg4"):
        network = trace(nets.make(case, 0.3), nets.SHAPE)
        x, _ = nets.digits(6)
        exact = network.double()(x.double())
        error = float_error(network, x.double(), x.double())
        seen = (network.float()(x).double() - exact).abs()
        assert bool((seen <= error).all())
        assert float(seen.max()) > 0
        network.double()


def test_rounded_margins_are_a_little_smaller(oracle) -> None:
    net, x, y = oracle
    network = trace(net, (1, 16, 16))
    lower = lower_margins(network, x, y, LINF, "crown-ibp")
    rounded = rounded_margins(network, x, y, LINF, lower)
    gap = others(lower - rounded, y)
    assert bool((gap > 0).all())
    assert float(gap.max()) < 0.05
    assert gamma(1) > 2.0**-24
