"""The security curve agrees with the claim and, on linear nets, with the exact distances to the boundary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rprune.attacks.apgd import APGD
from rprune.attacks.fab import FAB
from rprune.attacks.fgsm import FGSM
from rprune.data.loaders import Batch, Resident
from rprune.evaluation.curve import FACTORS, distances, security_curve
from rprune.evaluation.robustness import robustness
from rprune.evaluation.target import Target
from rprune.threat import ThreatModel

SUITE = (APGD(steps=10), APGD(steps=10, loss="margin"))
THREAT = ThreatModel.of("linf", "0.08")


class Linear(nn.Module):
    """Two classes; ``weight @ x + bias`` is the margin of class 1."""

    def __init__(self, pixels=48):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(pixels, generator=generator)
        self.bias = -self.weight.sum() / 2

    def forward(self, x):
        margin = x.flatten(1) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(margin), margin], 1)


@pytest.fixture(scope="module")
def linear():
    """(net, data of which it gets 5 wrong, exact distances by norm): no perturbation here comes near the box."""
    net = Linear()
    images = torch.randint(110, 146, (80, 3, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    margin = net(images.float() / 255)[:, 1]
    labels = (margin > 0).long()
    labels[:5] = 1 - labels[:5]
    right = torch.arange(80) >= 5
    dual = {"linf": net.weight.abs().sum(), "l2": net.weight.norm()}
    return net, Resident(images, labels), {norm: margin.abs() / size * right for norm, size in dual.items()}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_curve_of_a_linear_net_is_exact(linear, norm):
    net, data, exact = linear
    threat = ThreatModel.of(norm, float(exact[norm].median()))
    target = Target.of(net, net)
    outcome = robustness(target, data, threat, SUITE)
    curve = security_curve(target, data.take, threat, outcome)
    largest = 0.5 if norm == "linf" else 48**0.5 / 2
    assert [eps for eps, _ in curve] == [threat.eps * factor for factor in FACTORS] + [largest]
    for eps, correct in curve[1:-1]:
        assert abs(correct - int((exact[norm] > eps).sum())) <= (exact[norm] / eps - 1).abs().lt(1e-4).sum()
    assert (curve[0][1], curve[-1][1]) == (75, 0)


@pytest.fixture(scope="module")
def oracle(oracle_net):
    """(target, data, outcome) of the linf oracle."""
    net, x, y = oracle_net
    data = Resident((x * 255).round().to(torch.uint8), y)
    target = Target.of(net, net)
    return target, data, robustness(target, data, THREAT, SUITE, limit=60)


def test_curve_agrees_with_the_claim_and_never_rises(oracle):
    target, data, outcome = oracle
    curve = security_curve(target, data.take, THREAT, outcome)
    counts = dict(curve)
    assert [eps for eps, _ in curve] == sorted({*(0.08 * factor for factor in FACTORS), 0.5})
    assert counts[0.0] == outcome.clean.correct
    assert counts[0.08] == outcome.correct
    ordered = [correct for _, correct in curve]
    assert ordered == sorted(ordered, reverse=True)
    assert counts[0.02] > counts[0.06] > outcome.correct > counts[0.12]
    assert counts[0.5] == 0
    assert security_curve(target, data.take, THREAT, outcome, batch_size=7) == curve


def test_only_what_can_still_change_is_attacked(oracle):
    target, data, outcome = oracle
    taken: list[int] = []

    def take(ids):
        taken.extend(ids.tolist())
        return data.take(ids)

    below = security_curve(target, take, THREAT, outcome, factors=(0.5,))
    wrong = set(outcome.ids[~outcome.clean.right].tolist())
    broken = set(outcome.broken_ids.tolist())
    assert broken <= set(taken)
    assert not wrong & set(taken[1:])  # the first is taken for its shape
    assert len(taken) == 1 + len(broken) + outcome.correct  # at eps/2, and at the huge eps
    assert [eps for eps, _ in below] == [0, 0.04, 0.08, 0.5]


class Nearest(nn.Module):
    """The label of the nearest of some images: what small perturbations of them never break."""

    def __init__(self, images, labels):
        super().__init__()
        self.images, self.classes = images.flatten(1), nn.functional.one_hot(labels, 10).float()

    def forward(self, x):
        return self.classes[torch.cdist(x.flatten(1), self.images).argmin(1)]


def test_point_that_reaches_less_far_counts_there_too(oracle):
    _, data, outcome = oracle
    net = Nearest(*data.take(outcome.ids)[:2])
    known = replace(outcome, size=torch.full_like(outcome.size, 0.03))
    counts = dict(security_curve(Target.of(net, net), data.take, THREAT, known, factors=(0.25, 0.5, 0.75)))
    assert counts[0.04] == counts[0.06] == outcome.correct
    assert counts[0.02] == outcome.clean.correct


def test_eps_zero_and_an_artifact_without_gradients(oracle):
    target, data, _ = oracle
    nothing = ThreatModel.of("linf", "0")
    outcome = robustness(target, data, nothing, (FGSM(),), limit=20)
    assert security_curve(target, data.take, nothing, outcome)[0] == (0.0, outcome.clean.correct)
    blind = Target.of(target.artifact.net)
    outcome = robustness(target, data, THREAT, SUITE, limit=20)
    curve = security_curve(blind, data.take, THREAT, outcome, factors=(0.5, 2))
    counts = [correct for _, correct in curve]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < outcome.correct < outcome.clean.correct
    assert dict(curve)[0.08] == outcome.correct


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_distances_of_a_linear_net_are_exact(linear, norm):
    net, data, exact = linear
    probe = data.take(torch.arange(30))
    found = distances(Target.of(net, net), probe, norm)
    assert (found[:5] == 0).all()
    torch.testing.assert_close(found[5:], exact[norm][5:30], rtol=0.01, atol=1e-5)
    assert (found[5:] >= exact[norm][5:30] * (1 - 1e-5)).all()


def test_distances_are_the_artifacts(linear):
    net, data, _ = linear
    probe = data.take(torch.arange(30))

    nearest = Nearest(probe.x, probe.y)

    class Stubborn(nn.Module):
        """Another artifact: right wherever the first ten images are moved."""

        def forward(self, x):
            mine = torch.cdist(x.flatten(1), nearest.images).argmin(1) < 15
            return torch.where(mine[:, None], nearest(x)[:, :2], net(x))

    found = distances(Target.of(Stubborn(), net), Batch(*(part[5:] for part in probe)), "linf", attack=FAB(steps=5))
    assert found[:10].isnan().all()
    assert found[10:].isfinite().all()
    assert distances(Target.of(net), probe, "l2").isnan().all()
