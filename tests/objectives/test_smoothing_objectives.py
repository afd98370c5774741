"""The three objectives for randomized smoothing: Gaussian augmentation, stability training, SmoothAdv."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rprune.attacks.noise import Stream
from rprune.attacks.norms import random_in_ball, within
from rprune.attacks.pgd import PGD
from rprune.objectives.gaussian import Gaussian
from rprune.objectives.smoothadv import SmoothAdv, log_mean_softmax
from rprune.objectives.stability import Stability
from rprune.threat import ThreatModel

THREATS = [ThreatModel.of("l2", "0.5"), ThreatModel.of("linf", "8/255")]
both_norms = pytest.mark.parametrize("threat", THREATS, ids=str)


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


@pytest.fixture(scope="module")
def oracle(load_helper):
    return load_helper("oracles/wrapper_net.py")


def run(objective, net, x, y, seed=0):
    """The loss and the inputs of every pass through the net."""
    passes = []
    handle = net.register_forward_pre_hook(lambda module, given: passes.append(given[0].detach().clone()))
    (compute,) = objective(net, x, y, 0.0, Stream(torch.Generator().manual_seed(seed)))
    loss = compute()
    handle.remove()
    return loss, passes


@pytest.mark.parametrize("sigma", [0.25, 1.0])
@pytest.mark.parametrize("kind", [Gaussian, Stability, SmoothAdv])
def test_scale_of_the_noise(kind, sigma):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    x, y = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(16, dtype=torch.int64)
    options = {"threat": ThreatModel.of("l2", "0"), "samples": 1} if kind is SmoothAdv else {}
    _, passes = run(kind(sigma=sigma, **options), net, x, y)
    noise = passes[-1] - x
    assert float(noise.mean()) == pytest.approx(0, abs=0.02 * sigma)
    assert float(noise.std()) == pytest.approx(sigma, rel=0.01)
    assert float(noise.pow(4).mean()) == pytest.approx(3 * sigma**4, rel=0.05), "not Gaussian, or clamped"
    assert passes[-1].min() < 0
    assert passes[-1].max() > 1


def test_gaussian_is_cross_entropy_at_the_noisy_image(tiny):
    net, (x, y) = tiny.net().eval(), tiny.batch()
    loss, (noisy,) = run(Gaussian(), net, x, y)
    assert torch.equal(loss.value, cross_entropy(net(noisy), y))
    assert Gaussian().attack_used is None


def test_stability_gradient_flows_through_both_terms(tiny, oracle):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    loss, (clean, noisy) = run(Stability(), net, x, y)
    assert torch.equal(clean, x)
    gradients = torch.autograd.grad(loss.value, list(net.parameters()))
    expected = oracle.trades_loss(net(x), net(noisy), y, 6.0)
    torch.testing.assert_close(loss.value, expected, rtol=1e-12, atol=1e-12)
    for found, right in zip(gradients, torch.autograd.grad(expected, list(net.parameters())), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
    assert Stability().attack_used is None


def test_stability_without_beta_is_benign(tiny):
    net, (x, y) = tiny.net().eval(), tiny.batch()
    loss, _ = run(Stability(beta=0.0), net, x, y)
    torch.testing.assert_close(loss.value, cross_entropy(net(x), y))


def test_log_mean_softmax():
    logits = 5 * torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(log_mean_softmax(logits), logits.softmax(2).mean(0).log())
    far = torch.tensor([[[0.0, 1e4]], [[0.0, 2e4]]])
    assert torch.isfinite(log_mean_softmax(far)).all()


def smoothed_loss(net, x, y, noises):
    """-log of the mean probability of y over the noises (m, b, c, h, w), of each sample, one noise at a time."""
    with torch.no_grad():
        mean = sum(net(x + noise).softmax(1) for noise in noises) / len(noises)
    return -mean[torch.arange(len(y)), y].log()


@both_norms
@pytest.mark.parametrize("samples", [1, 3])
def test_smoothadv(tiny, threat, samples):
    """The noises stay the same in every pass; the point is in the ball and beats random ones; the loss is the mean."""
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    loss, passes = run(SmoothAdv(threat=threat, samples=samples), net, x, y)
    assert len(passes) == 11
    noises = passes[0].view(samples, *x.shape) - x  # the attack starts at x
    points = [given.view(samples, *x.shape) - noises for given in passes]
    for point in points:
        torch.testing.assert_close(point, point[:1].expand_as(point), rtol=0, atol=1e-12)
    point = points[-1][0].clamp(0, 1)
    assert within(point, x, threat).all()

    reached = smoothed_loss(net, point, y, noises)
    assert (reached > smoothed_loss(net, x, y, noises)).all()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        unit, normal = (torch.empty_like(x).uniform_(-1, 1, generator=generator) for _ in range(2))
        corner = random_in_ball(unit, normal, threat.norm)
        corner = corner.sign() if threat.norm == "linf" else corner / corner.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert (reached > smoothed_loss(net, (x + threat.eps * corner).clamp(0, 1), y, noises)).all()

    expected = sum(cross_entropy(net(point + noise), y) for noise in noises) / samples
    torch.testing.assert_close(loss.value, expected, rtol=1e-10, atol=1e-12)
    probabilities = sum(net(point + noise).softmax(1) for noise in noises) / samples
    torch.testing.assert_close(loss.logits.softmax(1), probabilities)


def test_smoothadv_attack_by_hand(tiny):
    """Gradient of the smoothed loss, normalised, in steps of 2 eps / T; the whole trajectory."""
    threat = THREATS[0]
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    _, passes = run(SmoothAdv(threat=threat), net, x, y)
    noises = passes[0].view(2, *x.shape) - x
    point = x
    for given in passes[1:]:
        leaf = point.clone().requires_grad_()
        mean = (net(leaf + noises[0]).softmax(1) + net(leaf + noises[1]).softmax(1)) / 2
        (gradient,) = torch.autograd.grad(-mean[torch.arange(len(y)), y].log().sum(), leaf)
        moved = []
        for start, origin, g in zip(point, x, gradient, strict=True):
            delta = start + 0.2 * threat.eps * g / g.norm() - origin
            moved.append((origin + delta * min(1.0, threat.eps / float(delta.norm()))).clamp(0, 1))
        point = torch.stack(moved)
        torch.testing.assert_close(given.view(2, *x.shape)[1], point + noises[1], rtol=0, atol=1e-10)


def test_smoothadv_validates_with_its_attack():
    assert SmoothAdv(threat=THREATS[0]).attack_used == PGD(steps=10, step=0.2, start="none")
