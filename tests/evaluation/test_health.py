"""Every planted fault raises the checks that the fact sheet's table names; honest models raise none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from rprune.attacks.apgd import APGD
from rprune.attacks.base import cross_entropy, frozen
from rprune.attacks.fgsm import FGSM
from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.attacks.transfer import Transfer
from rprune.data.loaders import Resident
from rprune.evaluation.health import RULES, Check, examine, share
from rprune.evaluation.outcome import Tally
from rprune.evaluation.probe import Probe, Run, huge
from rprune.evaluation.robustness import robustness
from rprune.evaluation.target import Target
from rprune.models.graph import trace
from rprune.quantization.ptq import quantize, simulated
from rprune.threat import ThreatModel

THREAT = ThreatModel.of("linf", "0.08")
QUICK = (APGD(steps=5), APGD(steps=5, loss="margin"))
STRONG = (APGD(steps=20), APGD(steps=20, loss="margin", targets=9))
TRANSFER = (Transfer(attack=APGD(steps=20, loss="margin")),)
BY_ID = {rule.id: rule for rule in RULES}


class Around(nn.Module):
    """A net with something done to its input or its output."""

    def __init__(self, net, change):
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x):
        return self.change(self.net, x)


@pytest.fixture(scope="module")
def oracle(oracle_net):
    """(net, data) of the linf oracle."""
    net, x, y = oracle_net
    return net, Resident((x * 255).round().to(torch.uint8), y)


@pytest.fixture(scope="module")
def honest(oracle):
    """(target, outcome of a strong suite, probe) of the oracle."""
    net, data = oracle
    target = Target.of(net, net)
    return target, *attacked(target, data, attacks=STRONG)


def attacked(target, data, threat=THREAT, attacks=QUICK, limit=56, most=48):
    """(outcome of a suite, probe)"""
    outcome = robustness(target, data, threat, attacks, limit=limit)
    return outcome, data.take(outcome.ids[outcome.clean.right][:most])


def flags(target, probe, threat, outcome):
    """Failed checks by id, of all."""
    checks = examine(target, probe, threat, outcome)
    assert [check.id for check in checks] == [f"R{i}" for i in range(1, 16)]
    assert all(check.value is None or math.isfinite(check.value) for check in checks)
    assert all(check.detail for check in checks)
    return {check.id: check for check in checks if not check.passed}


def failed(ids, target, probe, outcome, threat=THREAT, **known):
    """Which of these checks fail; only the attacks run that they need, and not those whose results are ``known``."""
    case = Probe(target, probe, threat, outcome, seed=0)
    case.__dict__.update(known)  # cached properties
    with frozen(target.artifact), frozen(target.search):
        values = {name: BY_ID[name].look(case)[0] for name in ids}
    return {name for name, value in values.items() if value is not None and value > BY_ID[name].limit}


FAULTS = {
    "logits x 1e4": (lambda net, x: net(x) * 1e4, {"R3", "R9"}, 32),
    "softmax output": (lambda net, x: net(x).softmax(1), {"R2"}, 16),
    "input rounded to 16 levels": (lambda net, x: net((x * 15).round() / 15), {"R3", "R4", "R5", "R6"}, 128),
    "detached input": (lambda net, x: net(x.detach()), {"R3", "R4", "R5", "R6"}, 64),
    "noisy input": (lambda net, x: net(x + 0.02 * torch.randn_like(x)), {"R1"}, 16),
    "logits / 1e6": (lambda net, x: net(x) / 1e6, {"R15"}, 16),
    # beyond the table
    "logits x 100": (lambda net, x: net(x) * 100, {"R3", "R15"}, 16),
    "gradient of bright pixels alone": (lambda net, x: net(torch.where(x > 0.5, x, x.detach())), {"R4"}, 64),
    "NaN off the grid of 8 bits": (lambda net, x: net(x).where(on_grid(x), torch.nan), {"R2", "R6"}, 32),
    "mean of the batch": (lambda net, x: net(x - 0.1 * (x.mean(0) - 0.5)), {"R12"}, 16),
    "no gradient far from an image": (lambda net, x: net(blocked(x)), {"R7"}, 32),
}
"""The table of the fact sheet, section 4, and some more: fault, checks that must fail, size of the probe."""


def on_grid(x):
    return ((x * 255).round() / 255 - x).abs().flatten(1).amax(1, keepdim=True) < 1e-6


def blocked(x):
    """Images lie on the grid of 16 levels here; points more than 0.06 from it are moved back onto it."""
    images = (x * 5).round() / 5
    near = (x - images).abs().flatten(1).amax(1) < 0.06
    return torch.where(near.view(-1, 1, 1, 1), x, images)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_flagged(oracle, fault):
    net, data = oracle
    change, expected, most = FAULTS[fault]
    if "R7" in expected:
        data = Resident(((data.images / 51).round() * 51).to(torch.uint8), data.labels)
    torch.manual_seed(0)
    broken = Around(net, change)
    target = Target.of(broken, broken)
    outcome, probe = attacked(target, data, attacks=[FGSM()], limit=most * 5 // 4, most=most)
    assert failed(expected, target, probe, outcome) == expected


def test_honest_oracle_raises_no_flag(honest):
    target, outcome, probe = honest
    assert 0 < outcome.correct < outcome.clean.correct
    assert flags(target, probe, THREAT, outcome) == {}


def test_a_suite_too_weak_for_its_claim_is_flagged(honest, oracle):
    target, _, _ = honest
    outcome, probe = attacked(target, oracle[1], attacks=[FGSM()])
    assert failed({"R8"}, target, probe, outcome) == {"R8"}


def test_an_attack_that_does_not_climb_is_flagged(oracle):
    stuck = Around(oracle[0], lambda net, x: net(x.detach()))
    target = Target.of(stuck, stuck)
    outcome, probe = attacked(target, oracle[1], attacks=[FGSM()], limit=24, most=16)
    value, detail = BY_ID["R8"].look(Probe(target, probe, THREAT, outcome, seed=0))
    assert value == 1
    assert "after 100 iterations" in detail


def test_order_of_the_probe_does_not_matter_and_nets_are_left_as_they_were(honest, oracle):
    target, outcome, probe = honest
    net = oracle[0]
    small = probe._replace(x=probe.x[:6], y=probe.y[:6], ids=probe.ids[:6])
    flags_before = [p.requires_grad for p in net.parameters()], [m.training for m in net.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    checks = examine(target, small, THREAT, outcome)
    turned = examine(target, type(small)(*(part.flip(0) for part in small)), THREAT, outcome)
    assert [(check.id, check.value) for check in checks] == [(check.id, check.value) for check in turned]
    assert torch.equal(torch.get_rng_state(), state)
    assert flags_before == ([p.requires_grad for p in net.parameters()], [m.training for m in net.modules()])
    assert all(p.grad is None for p in net.parameters())


# --- nets trained here --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """Nets trained for a second each, plainly and adversarially in l2, and images that they did not see."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    x, y = images[:1400].float() / 255, labels[:1400]

    def train(threat):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 1, 1)]
        net = nn.Sequential(*layers, nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
        optimizer, generator = torch.optim.Adam(net.parameters(), 0.01), torch.Generator().manual_seed(0)
        for _ in range(100):
            rows = torch.randint(len(y), (64,), generator=generator)
            loss, points = cross_entropy(y[rows]), x[rows]
            if threat is not None:
                points = PGD(steps=3).training_point(net, points, threat, loss, Stream(generator))
            optimizer.zero_grad()
            loss(net.train()(points)).mean().backward()
            optimizer.step()
        return net.eval()

    return {"plain": train(None), "l2": train(ThreatModel.of("l2", "0.6"))}, Resident(images[1400:], labels[1400:])


@pytest.mark.parametrize(
    ("name", "norm", "eps", "limit"),
    [
        ("plain", "linf", "8/255", 40),
        ("l2", "l2", "0.6", 40),
        ("plain", "linf", "0", 12),
        pytest.param("plain", "l2", "0.3", 130, marks=pytest.mark.slow),
        pytest.param("l2", "linf", "0.1", 130, marks=pytest.mark.slow),
        pytest.param("plain", "linf", "1/255", 130, marks=pytest.mark.slow),
    ],
)
def test_honest_trained_nets_raise_no_flag(trained, name, norm, eps, limit):
    nets, data = trained
    threat, target = ThreatModel.of(norm, eps), Target.of(nets[name], nets[name])
    outcome, probe = attacked(target, data, threat, STRONG, limit, limit)
    assert flags(target, probe, threat, outcome) == {}


@pytest.fixture(scope="module")
def twin(trained):
    """An 8-bit net whose rounding passes gradients straight through, and its float parent."""
    nets, data = trained
    network = trace(nets["l2"], (1, 8, 8))
    return simulated(network, quantize(network, [data.take(torch.arange(64)).x])), nets["l2"]


@pytest.mark.parametrize("transfer", [(), pytest.param(TRANSFER, marks=pytest.mark.slow)], ids=["", "transfer"])
def test_honest_straight_through_twin_raises_no_flag(trained, twin, transfer):
    net, parent = twin
    target, threat = Target.of(net, net, (parent,)), ThreatModel.of("linf", "25/255")
    outcome, probe = attacked(target, trained[1], threat, (*STRONG, *transfer), 32, 32)
    assert flags(target, probe, threat, outcome) == {}


@pytest.mark.parametrize("transfer", [(), TRANSFER], ids=["", "transfer"])
def test_attack_through_real_rounding_is_flagged_whether_transfer_counts_or_not(trained, twin, transfer):
    net, parent = Around(twin[0], lambda net, x: net(x).detach()), twin[1]
    target, threat = Target.of(net, net, (parent,)), ThreatModel.of("linf", "25/255")
    outcome, probe = attacked(target, trained[1], threat, (*QUICK, *transfer), 40, 32)
    assert failed({"R3", "R4", "R10"}, target, probe, outcome, threat) == {"R3", "R4", "R10"}


# --- what follows from the suite's outcome ------------------------------------------------------------------------


def small(case):
    """The same with a few samples in the probe: for checks that look at the outcome alone."""
    target, outcome, probe = case
    return target, outcome, type(probe)(*(part[:8] for part in probe))


def test_black_box_gain_in_the_suite_is_flagged(honest):
    target, outcome, probe = small(honest)
    square = Tally("square", "black-box", outcome.correct, 2, 0, 0, 100)

    def gain(*tallies):
        here = replace(outcome, tallies=tallies)
        return failed({"R4"}, target, probe, here, blind=nothing(probe)) == {"R4"}

    assert gain(*outcome.tallies, square)
    assert not gain(*outcome.tallies, replace(square, broken=1))  # one sample is a sign of nothing
    assert not gain(square, *outcome.tallies)  # it ran first: white-box never saw those samples


def nothing(probe):
    """The run of an attack that broke no sample."""
    inf = torch.full((len(probe.y),), torch.inf)
    return Run(torch.zeros_like(probe.y, dtype=torch.bool), inf, inf)


def test_broken_certified_sample_is_flagged(honest):
    target, outcome, probe = small(honest)
    mine = torch.zeros(len(probe.y), dtype=torch.bool)

    def hard_failure(outcome, certified, here):
        runs = {"white_box": here, "blind": nothing(probe), "noise": nothing(probe)}
        return failed({"R11"}, target, probe, replace(outcome, certified=certified), **runs) == {"R11"}

    proved = outcome.robust
    assert proved.any()
    assert not hard_failure(outcome, proved, mine)
    assert hard_failure(outcome, proved | (outcome.ids == outcome.broken_ids[0]), mine)
    # the suite skipped the sample, and an attack of the check's own breaks it
    mine[0] = True
    assert hard_failure(without(outcome, 0), outcome.ids == probe.ids[0], mine)


def without(outcome, first):
    """The outcome without the first broken samples."""
    keep = slice(first, None)
    rows = {name: getattr(outcome, name)[keep] for name in ("broken_ids", "points", "adversarial", "exact", "size")}
    return replace(outcome, **rows, broken_by=outcome.broken_by[keep])


def test_point_outside_the_threat_is_flagged(honest):
    target, outcome, probe = small(honest)
    too_far, out_of_box = outcome.size.clone(), outcome.points.clone()
    too_far[0] = THREAT.eps * 1.001
    out_of_box[0, 0, 0, 0] = 1.0001
    for bad in (replace(outcome, size=too_far), replace(outcome, points=out_of_box)):
        assert failed({"R13"}, target, probe, bad) == {"R13"}


def test_search_net_that_is_not_the_artifact_is_flagged(oracle):
    net, data = oracle
    target = Target.of(net, Around(net, lambda net, x: net(x.flip(3))))
    outcome, probe = attacked(target, data, attacks=[APGD(steps=5)], limit=48, most=32)
    assert failed({"R13"}, target, probe, outcome) == {"R13"}


def test_points_that_vanish_in_8_bits_are_flagged(honest):
    target, outcome, probe = small(honest)
    lost = replace(outcome, exact=torch.zeros_like(outcome.exact))
    assert failed({"R14"}, target, probe, lost) == {"R14"}
    # with an eps below one step of a pixel there is nothing that could be lost
    assert failed({"R14"}, target, probe, lost, ThreatModel.of("linf", "0.003")) == set()


def test_invalid_logits_in_the_suite_are_flagged(honest):
    target, outcome, probe = small(honest)
    tallies = (replace(outcome.tallies[0], invalid=1), *outcome.tallies[1:])
    assert failed({"R2"}, target, probe, replace(outcome, tallies=tallies)) == {"R2"}


def test_module_in_training_mode_is_flagged(oracle, honest):
    _, outcome, probe = small(honest)
    net = nn.Sequential(oracle[0], nn.Dropout(0.0))
    net.eval()
    net[1].train()
    checks = {check.id: check for check in examine(Target(net, net), probe, THREAT, outcome)}
    assert not checks["R12"].passed
    assert net[1].training
    assert not net[0].training


# --- where checks do not apply ------------------------------------------------------------------------------------


def test_checks_that_need_gradients_do_not_apply_without_a_search_net(honest, oracle):
    _, outcome, probe = honest
    checks = examine(Target.of(oracle[0]), probe, THREAT, outcome)
    for check in checks:
        assert check.passed
        assert (check.value is None) == (BY_ID[check.id].needs == "gradients" or check.id == "R11")


def test_nothing_to_examine(honest):
    target, outcome, probe = honest
    nobody = type(probe)(*(part[:0] for part in probe))
    nothing = replace(without(outcome, len(outcome.broken_ids)), tallies=())
    nothing = replace(nothing, points=torch.zeros(0, 0, 0, 0))
    checks = examine(target, nobody, THREAT, nothing)
    assert all(check.passed for check in checks)
    assert {check.id for check in checks if check.value is not None} == {"R13", "R14"}


def test_limits():
    assert Check("R", "", 0.2, 0.2, "").passed
    assert not Check("R", "", 0.21, 0.2, "").passed
    assert Check("R", "", None, 0.0, "").passed
    assert not Check("R", "", math.nan, 0.2, "").passed
    assert [share(count, 50) for count in (-3, 0, 1, 2)] == [0, 0, 0, 0.04]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_huge_ball_holds_the_grey_image(norm):
    x = torch.cat([torch.zeros(1, 3, 5, 7), torch.ones(1, 3, 5, 7)])
    threat = huge(ThreatModel.of(norm, "0.01"), x[0].numel())
    delta = (x - 0.5).flatten(1)
    reached = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (reached <= threat.eps + 1e-6).all()
    assert huge(ThreatModel.of("l2", "1"), 4).eps == 16
