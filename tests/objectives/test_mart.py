"""MART against its vector, a slow implementation, finite differences, and where the net is sure of itself."""

import math

import pytest
import torch
from torch import nn

from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.objectives.mart import MART, boost
from rprune.threat import ThreatModel

LINF = ThreatModel.of("linf", "8/255")


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


class Two(nn.Module):
    """The natural logits at x = 0.5 exactly, the adversarial ones elsewhere."""

    def __init__(self, natural, adversarial, dtype=torch.float64):
        super().__init__()
        self.natural = nn.Parameter(torch.tensor([natural], dtype=dtype))
        self.adversarial = nn.Parameter(torch.tensor([adversarial], dtype=dtype))

    def forward(self, x):
        here = (x == 0.5).flatten(1).all(1)[:, None]
        return torch.where(here, self.natural, self.adversarial) + 0 * x.sum()


def loss_of(objective, net, x, y):
    """Loss after its backward, and the adversarial point."""
    points = []
    handle = net.register_forward_pre_hook(lambda module, given: points.append(given[0].detach().clone()))
    (compute,) = objective(net, x, y, 0.0, Stream(torch.Generator().manual_seed(3)))
    loss = compute()
    loss.value.backward()
    handle.remove()
    return loss, points[-1]


def loss_of_logits(natural, adversarial, y, dtype=torch.float64):
    net = Two(natural, adversarial, dtype)
    loss, _ = loss_of(MART(threat=LINF), net, torch.full((1, 1, 1, 1), 0.5, dtype=dtype), torch.tensor([y]))
    return loss, net


@pytest.fixture
def from_vector(vectors):
    """The vector and the loss of its logits. The vector holds the constants of the authors' code."""
    v = vectors["losses"]
    return v, loss_of_logits(v["nat_logits"], v["adv_logits"], v["y"])[0]


def constants(v):
    """What the 1.0001 + 1e-12 of the code adds to BCE, and the 1.0000001 to the weighted KL."""
    p = torch.tensor(v["adv_logits"], dtype=torch.float64).softmax(0)[1].item()
    return math.log(1 - p) - math.log(1.0001 - p + 1e-12), 1e-7 * v["kl(nat||adv)"]


def test_mart_bce(from_vector):
    v, loss = from_vector
    assert float(loss.parts["bce"]) + constants(v)[0] == pytest.approx(v["mart_bce"], abs=1e-9)
    assert float(loss.parts["bce"]) == pytest.approx(v["mart_bce"], abs=3e-4)


def test_mart_weighted_kl(from_vector):
    v, loss = from_vector
    assert float(loss.parts["kl"]) + constants(v)[1] == pytest.approx(v["mart_weighted_kl"], abs=1e-9)
    assert float(loss.parts["kl"]) == pytest.approx(v["mart_weighted_kl"], abs=1e-7)


def test_mart_beta5(from_vector):
    v, loss = from_vector
    bce, divergence = constants(v)
    assert float(loss.value.detach()) + bce + 5 * divergence == pytest.approx(v["mart_beta5"], abs=1e-9)
    assert float(loss.value.detach()) == pytest.approx(v["mart_beta5"], abs=3e-4)


def slow_mart(natural, adversarial, labels, beta):
    """The formula, sample by sample and class by class."""
    total = 0.0
    for z, z_adv, y in zip(natural.tolist(), adversarial.tolist(), labels.tolist(), strict=True):
        p = [math.exp(a) / sum(map(math.exp, z)) for a in z]
        q = [math.exp(a) / sum(map(math.exp, z_adv)) for a in z_adv]
        rival = max(q[c] for c in range(len(q)) if c != y)
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += -math.log(q[y]) - math.log(1 - rival) + beta * divergence * (1 - p[y])
    return total / len(labels)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("beta", [0.0, 2.5])
def test_against_a_slow_implementation(tiny, norm, beta):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    threat = ThreatModel.of(norm, {"linf": "8/255", "l2": "0.5"}[norm])
    loss, point = loss_of(MART(threat=threat, attack=PGD(steps=3, start="near"), beta=beta), net, x, y)
    with torch.no_grad():
        expected = slow_mart(net(x), net(point), y, beta)
    assert float(loss.value.detach()) == pytest.approx(expected, rel=1e-12)


def test_gradient_by_finite_differences(tiny):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    _, point = loss_of(MART(threat=LINF), net, x, y)
    for seed, (name, parameter) in enumerate(net.named_parameters()):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        def value(shift, parameter=parameter, direction=direction):
            with torch.no_grad():
                parameter += shift * direction
                found = slow_mart(net(x), net(point), y, 5.0)
                parameter -= shift * direction
            return found

        slope = (value(1e-6) - value(-1e-6)) / 2e-6
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_boost_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (6,), generator=generator)
    assert torch.autograd.gradcheck(lambda z: boost(z, y), logits.requires_grad_())


def test_boost_where_the_rival_has_all_the_probability():
    logits = torch.tensor([[0.0, 200.0, 1.0]], requires_grad=True)
    found = boost(logits, torch.tensor([0]))
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(200 - math.log(1 + math.e), rel=1e-6)
    assert logits.grad.tolist()[0] == pytest.approx([-1 / (1 + math.e), 1, -math.e / (1 + math.e)], abs=1e-5)


@pytest.mark.parametrize("adversarial", [[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0], [0.0, 0.0, 1e4]])
@pytest.mark.parametrize("natural", [[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])
def test_saturated_logits_give_a_finite_loss_and_gradient(natural, adversarial):
    loss, net = loss_of_logits(natural, adversarial, 0, torch.float32)
    assert torch.isfinite(loss.value)
    assert torch.isfinite(net.natural.grad).all()
    assert torch.isfinite(net.adversarial.grad).all()
    if adversarial[0] < max(adversarial):
        assert net.adversarial.grad[0, 0] < 0, "a surely wrong net is still pulled back"


def test_two_classes():
    loss, _ = loss_of_logits([1.0, 0.0], [0.0, 1.0], 0)
    p = 1 / (1 + math.e)
    assert float(loss.parts["bce"]) == pytest.approx(-2 * math.log(p), rel=1e-12)
