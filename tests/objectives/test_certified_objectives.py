"""IBP, CROWN-IBP and MixTrain: schedules, the loss by hand, and that training certifies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rprune.attacks.base import cross_entropy
from rprune.attacks.noise import Stream
from rprune.certification import ibp
from rprune.certification.compat import hydra_box, hydra_threat
from rprune.certification.live import Bounds
from rprune.models.graph import trace
from rprune.objectives.base import OBJECTIVES
from rprune.objectives.benign import Benign
from rprune.objectives.crown_ibp import CROWNIBP
from rprune.objectives.ibp import IBP, certified, ramped
from rprune.objectives.mixtrain import MixTrain
from rprune.objectives.mtl_ibp import MTLIBP
from rprune.threat import ThreatModel

LINF = ThreatModel.of("linf", "8/255")


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def loss_of(objective, net, x, y, progress, seed=0):
    (compute,) = objective(net, x, y, progress, Stream(torch.Generator().manual_seed(seed)))
    return compute()


def cross_entropies(net, x, y, threat):
    """(natural, by intervals, by CROWN) of a net that does not depend on its mode, the margins in float64."""
    finished = trace(net, tuple(x.shape[1:])).double()
    region = (x - threat.eps).clamp_min(0).double(), (x + threat.eps).clamp_max(1).double()
    intervals = ibp.margins(finished, *region, y).scatter(1, y[:, None], 0)
    crown = Bounds(net, x, threat).linear_margins(y)
    found = (nn.functional.cross_entropy(z, y) for z in (net(x), -intervals, -crown))
    return [float(value.detach()) for value in found]


def test_ramp_is_linear_then_constant():
    assert [ramped(p, 0.5) for p in (0, 0.125, 0.25, 0.5, 0.75, 0.999)] == [0, 0.25, 0.5, 1, 1, 1]
    assert ramped(0, 0) == ramped(0.5, 0) == 1
    assert ramped(0.75, 1) == 0.75


def test_certified_share_counts_all_other_classes():
    lower = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, 2.0, torch.nan]])
    assert float(certified(lower)) == 0.25


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_loss_of_ibp(tiny, progress):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    reached = min(progress / 0.5, 1)
    kappa = 1 - 0.5 * reached
    natural, robust, _ = cross_entropies(net, x, y, LINF.scaled(reached))
    loss = loss_of(IBP(threat=LINF), net, x, y, progress)
    assert float(loss.value.detach()) == pytest.approx(kappa * natural + (1 - kappa) * robust, rel=1e-9)
    assert float(loss.parts["ce"]) == pytest.approx(natural, rel=1e-9)
    assert float(loss.parts["ce_bound"]) == pytest.approx(robust, rel=1e-9)


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.6, 1.0])
def test_loss_of_mtl_ibp(tiny, progress, alpha):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    reached = min(progress / 0.5, 1)
    objective = MTLIBP(threat=LINF, alpha=alpha)
    loss = loss_of(objective, net, x, y, progress)
    noise = Stream(torch.Generator().manual_seed(0))
    point = objective.attack.training_point(net, x, LINF.scaled(2 * reached), cross_entropy(y), noise)
    assert float((point - x).abs().max()) <= 2 * LINF.eps * reached + 1e-12
    adversarial = float(nn.functional.cross_entropy(net(point), y).detach())
    _, robust, _ = cross_entropies(net, x, y, LINF.scaled(reached))
    assert float(loss.value.detach()) == pytest.approx((1 - alpha) * adversarial + alpha * robust, rel=1e-9)
    assert float(loss.parts["ce"]) == pytest.approx(adversarial, rel=1e-9)


@pytest.mark.parametrize("progress", [0.0, 0.15, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("final_beta", [0.0, 0.3, 1.0])
def test_loss_of_crown_ibp(tiny, progress, final_beta):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    reached = min(progress / 0.6, 1)
    beta = 1 - reached * (1 - final_beta)
    threat = LINF.scaled(reached)
    bounds = Bounds(net, x, threat)
    mixed = beta * bounds.linear_margins(y) + (1 - beta) * bounds.interval_margins(y)
    wanted = float(nn.functional.cross_entropy(-mixed, y).detach())
    _, by_intervals, by_crown = cross_entropies(net, x, y, threat)
    assert beta < 1 or wanted == pytest.approx(by_crown)
    assert beta > 0 or wanted == pytest.approx(by_intervals)
    loss = loss_of(CROWNIBP(threat=LINF, final_beta=final_beta), net, x, y, progress)
    assert float(loss.value.detach()) == pytest.approx(wanted, rel=1e-9)


def test_crown_ibp_has_no_natural_term_unless_asked(tiny):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    plain = loss_of(CROWNIBP(threat=LINF), net, x, y, 0.3)
    assert torch.equal(plain.value.detach(), plain.parts["ce_bound"])
    mixed = loss_of(CROWNIBP(threat=LINF, kappa=0.5), net, x, y, 0.3)
    wanted = 0.75 * float(mixed.parts["ce"]) + 0.25 * float(plain.value.detach())
    assert float(mixed.value.detach()) == pytest.approx(wanted, rel=1e-12)


def test_crown_ibp_without_ramp_is_interval_training(tiny):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    gradients = []
    for objective in (CROWNIBP(threat=LINF, ramp=0), IBP(threat=LINF, ramp=0, kappa=0)):
        net.zero_grad()
        loss_of(objective, net, x, y, 0.0).value.backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    for crown, intervals in zip(*gradients, strict=True):
        torch.testing.assert_close(crown, intervals, rtol=1e-12, atol=1e-15)


def test_weight_of_mixtrain_is_hydras_by_epochs():
    objective = MixTrain(threat=LINF)
    for epoch in range(60):
        assert objective.weight(epoch / 60) == pytest.approx(min(0.1 * 2.5 ** (max(epoch - 10, 0) // 5), 50))
    assert objective.weight(0.999) == 50
    assert MixTrain(threat=LINF, period=1e-6).weight(0.9) == 50


def test_loss_of_mixtrain(tiny):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(16, dtype=torch.float64)
    natural = nn.functional.cross_entropy(net(x), y)
    margins = Bounds(net, x, LINF, "parallel", tighten=True).linear_margins(y)
    each = nn.functional.cross_entropy(-margins, y, reduction="none").detach()
    objective = MixTrain(threat=LINF, samples=1)
    weight, found = objective.weight(0.4), set()
    for seed in range(40):
        value = loss_of(objective, net, x, y, 0.4, seed).value
        extra = float((value - natural).detach()) / weight
        nearest = int((each - extra).abs().argmin())
        if extra == 0:
            found.add(None)
        else:
            assert extra == pytest.approx(float(each[nearest]), rel=1e-6)
            found.add(nearest)
    assert None in found
    assert len(found) > 8, "any image may be drawn"


def test_mixtrain_bounds_distinct_images_and_no_more_than_there_are(tiny):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(4, dtype=torch.float64)
    wanted = nn.functional.cross_entropy(-Bounds(net, x, LINF, "parallel", tighten=True).linear_margins(y), y)
    for samples in (4, 100):
        loss = loss_of(MixTrain(threat=LINF, samples=samples, alpha=1), net, x, y, 0.1667)
        assert float(loss.parts["bound"]) == pytest.approx(0.1 * float(wanted.detach()), rel=1e-4)


def test_share_of_mixed_batches_is_alpha(tiny):
    net, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(192, tiny.CLASSES)), tiny.batch(2)
    noise = Stream(torch.Generator().manual_seed(0))
    objective = MixTrain(threat=LINF, samples=1)
    mixed = sum("bound" in compute().parts for _ in range(150) for compute in objective(net, x, y, 0.5, noise))
    assert 105 <= mixed <= 135


def test_as_hydra_has_its_eps_and_boxes():
    """eps 0.007 for 2/255 alone; ends at the range of the batch, or of each image."""
    assert hydra_threat(ThreatModel.of("linf", "2/255")) == ThreatModel.of("linf", "0.007")
    assert hydra_threat(LINF) is LINF
    x = 0.25 + 0.5 * torch.rand(3, 3, 8, 8)
    x[0] *= 0.5
    for each in (False, True):
        lo, hi = hydra_box(x, LINF, each)
        for image, low, high in zip(x, lo, hi, strict=True):
            seen = image if each else x
            assert torch.equal(low, (image - LINF.eps).clamp(float(seen.min()), None))
            assert torch.equal(high, (image + LINF.eps).clamp(None, float(seen.max())))


@pytest.mark.parametrize("make", [CROWNIBP, MixTrain])
def test_hydras_box_is_smaller(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    x, y = 0.4 + 0.2 * torch.rand(4, 3, 8, 8), torch.arange(4)
    options = {"alpha": 1.0, "samples": 4} if make is MixTrain else {}
    threat = ThreatModel.of("linf", "2/255")
    ours, theirs = (loss_of(make(threat=threat, compat=c, **options), net, x, y, 0.9).value for c in (None, "hydra"))
    assert float(theirs.detach()) < float(ours.detach())


def test_max_pooling_is_bounded_by_every_objective():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    for objective in (MixTrain(threat=LINF, alpha=1.0), IBP(threat=LINF), CROWNIBP(threat=LINF), MTLIBP(threat=LINF)):
        assert torch.isfinite(loss_of(objective, net, x, y, 0.1).value)


# -- training ---------------------------------------------------------------------------------------------------------
STRIPES = ThreatModel.of("linf", "0.15")


def stripes(n):
    """Images of one bright row in noise; the class is the row."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (n,), generator=generator)
    x = 0.4 * torch.rand(n, 1, 4, 4, generator=generator)
    x[torch.arange(n), 0, y] += 0.5
    return x, y


def trained(objective, threat=STRIPES, steps=100):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16),
        nn.ReLU(), nn.Linear(16, 4),
    ).train()  # fmt: skip
    x, y = stripes(256)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    noise = Stream(torch.Generator().manual_seed(0))
    for step in range(steps):
        start = step % 4 * 64
        for compute in objective(net, x[start : start + 64], y[start : start + 64], step / steps, noise):
            optimizer.zero_grad()
            compute().value.backward()
            optimizer.step()
    found = ibp.certified(trace(net, (1, 4, 4)), x, y, threat).float().mean()
    symbolic = certified(Bounds(net, x[:64], threat, "parallel", tighten=True).linear_margins(y[:64]))
    return float(found), float(symbolic)


def test_training_certifies_what_plain_training_does_not():
    assert trained(Benign())[0] < 0.1
    for spec in ("ibp", "crown-ibp", {"name": "mtl-ibp", "alpha": 0.6, "reach": 1.0}):
        assert trained(OBJECTIVES.build(spec, threat=STRIPES))[0] > 0.8, spec


def test_mixtrain_raises_the_symbolically_certified_share():
    threat = ThreatModel.of("linf", "0.17")
    assert trained(MixTrain(threat=threat), threat)[1] > trained(Benign(), threat)[1] + 0.3


def test_l2_threat_is_trained_for_by_the_dual_norm():
    threat = ThreatModel.of("l2", "0.4")
    before, after = (
        trained(objective, threat)[1] for objective in (Benign(), CROWNIBP(threat=threat, ramp=0.5, final_beta=1))
    )
    assert before < 0.5
    assert after > 0.8
