"""Single-step adversarial training against the step written out, sample by sample."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from rprune.attacks.fgsm import FGSM
from rprune.attacks.noise import Stream
from rprune.attacks.norms import random_in_ball, size, within
from rprune.attacks.pgd import PGD
from rprune.objectives.fast_at import NFGSM, FastAT
from rprune.objectives.pgd_at import PGDAT
from rprune.threat import ThreatModel

THREATS = [ThreatModel.of("linf", "8/255"), ThreatModel.of("l2", "0.5")]
both_norms = pytest.mark.parametrize("threat", THREATS, ids=str)


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def stream():
    return Stream(torch.Generator().manual_seed(4))


def trained_on(objective, net, x, y):
    """The loss, and the point that it is computed at."""
    points = []
    handle = net.register_forward_pre_hook(lambda module, given: points.append(given[0].detach().clone()))
    (compute,) = objective(net, x, y, 0.0, stream())
    loss = compute()
    handle.remove()
    return loss, points[-1]


def ball_noise(x, norm):
    noise = stream()
    unit = noise.uniform(x, "")
    return random_in_ball(unit, noise.normal(x, "") if norm == "l2" else unit, norm)


def step_by_hand(net, start, y, length, norm):
    """start + length * direction of steepest ascent of the sample's cross-entropy, before any clipping."""
    moved = []
    for point, label in zip(start, y, strict=True):
        leaf = point.clone()[None].requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(net(leaf), label[None]), leaf)
        moved.append(point + length * (gradient[0].sign() if norm == "linf" else gradient[0] / gradient.norm()))
    return torch.stack(moved)


def clipped(delta, threat):
    if threat.norm == "linf":
        return delta.clamp(-threat.eps, threat.eps)
    return torch.stack([d * min(1.0, threat.eps / float(d.norm())) for d in delta])


@both_norms
def test_fast_at_by_hand(tiny, threat):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    loss, point = trained_on(FastAT(threat=threat), net, x, y)
    start = (x + threat.eps * ball_noise(x, threat.norm)).clamp(0, 1)
    moved = step_by_hand(net, start, y, 1.25 * threat.eps, threat.norm)
    expected = (x + clipped(moved - x, threat)).clamp(0, 1)
    torch.testing.assert_close(point, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss.value, cross_entropy(net(expected), y))
    assert within(point, x, threat).all()


@both_norms
def test_fast_at_is_pgd_at_of_one_step(tiny, threat):
    net, (x, y) = tiny.net().eval(), tiny.batch()
    fast, _ = trained_on(FastAT(threat=threat), net, x, y)
    slow, _ = trained_on(PGDAT(threat=threat, attack=PGD(steps=1, step=1.25)), net, x, y)
    assert torch.equal(fast.value, slow.value)


@both_norms
@pytest.mark.parametrize("k", [0.5, 2.0])
def test_n_fgsm_by_hand(tiny, threat, k):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    loss, point = trained_on(NFGSM(threat=threat, k=k), net, x, y)
    start = (x + k * threat.eps * ball_noise(x, threat.norm)).clamp(0, 1)
    expected = step_by_hand(net, start, y, threat.eps, threat.norm).clamp(0, 1)
    torch.testing.assert_close(point, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss.value, cross_entropy(net(expected), y))


@both_norms
def test_n_fgsm_is_not_clipped_to_the_ball(tiny, threat):
    net, (x, y) = tiny.net().train(), tiny.batch()
    _, point = trained_on(NFGSM(threat=threat), net, x, y)
    distance = size(point - x, threat.norm)
    assert (distance > threat.eps).all()
    assert (distance <= 3 * threat.eps + 1e-6).all()
    assert point.min() >= 0
    assert point.max() <= 1


@both_norms
def test_n_fgsm_without_noise_is_fgsm(tiny, threat):
    net, (x, y) = tiny.net().eval(), tiny.batch()
    _, point = trained_on(NFGSM(threat=threat, k=0.0), net, x, y)
    expected = FGSM().training_point(
        net, x, threat, lambda logits: cross_entropy(logits, y, reduction="none"), stream()
    )
    torch.testing.assert_close(point, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [FastAT, NFGSM])
def test_validation_is_pgd_of_ten_steps(kind):
    assert kind(threat=THREATS[0]).attack_used == PGD(steps=10)
