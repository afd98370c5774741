"""APGD against a slow implementation of its own, and on awkward nets and images."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from rprune.attacks.apgd import APGD, checkpoints
from rprune.attacks.base import ATTACKS, cross_entropy, margin, rows_of, worth_compacting
from rprune.attacks.noise import Keyed, Stream
from rprune.attacks.norms import within
from rprune.errors import UsageError
from rprune.evaluation.target import Rows
from rprune.threat import ThreatModel

LINF, L2 = ThreatModel.of("linf", "0.08"), ThreatModel.of("l2", "0.6")
SMALL = [ThreatModel.of("linf", "0.02"), ThreatModel.of("l2", "0.2")]
both_threats = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
FORMS = {
    "apgd-ce": {"loss": "ce"},
    "apgd-dlr": {"loss": "dlr"},
    "cw-apgd": {"loss": "margin"},
    "apgd-t": {"loss": "dlr", "targets": 3},
    "cw-apgd-t": {"loss": "margin", "targets": 3},
}
every_form = pytest.mark.parametrize("form", FORMS)


def small_net(classes=6, shape=(3, 8, 8), seed=0, dtype=torch.float64, rows=4):
    """A curved net, whose loss goes up and down on the way, always called with ``rows`` images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conv = nn.Conv2d(shape[0], 8, 3, padding=1)
        linear = nn.Linear(8 * shape[1] * shape[2], classes)
        with torch.no_grad():
            conv.weight.mul_(4)
            linear.weight.mul_(3)
    return Rows(nn.Sequential(conv, nn.Tanh(), nn.Flatten(), linear).to(dtype), rows).eval().requires_grad_(False)


def images(n, shape=(3, 8, 8), classes=6, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, generator=generator, dtype=dtype).mul_(1.2).sub_(0.1).clamp_(0, 1)
    return x, torch.randint(classes, (n,), generator=generator)


@pytest.fixture(scope="module")
def scene():
    """A float64 net and images of which it gets all but two right."""
    net = small_net()
    x, y = images(8)
    return net, x, torch.where(torch.arange(8) < 2, y, net(x).argmax(1))


def keyed(n, seed=0):
    return Keyed(seed, torch.arange(n))


# The slow implementation: one sample, every loss and point in a list, the reference's bookkeeping by loop counters.


def slow_loss(kind, z, y, target, kappa=None):
    order = sorted(range(len(z)), key=lambda j: -z.tolist()[j])
    other = z[next(j for j in order if j != y)]
    if kind == "ce":
        return torch.logsumexp(z, 0) - z[y]
    if kind == "dlr" and target is None:
        return -(z[y] - other) / (z[order[0]] - z[order[2]] + 1e-12)
    if kind == "dlr":
        return -(z[y] - z[target]) / (z[order[0]] - 0.5 * (z[order[2]] + z[order[3]]) + 1e-12)
    lead = other - z[y] if target is None else z[target] - z[y]
    return lead if kappa is None or lead.item() < kappa else lead * 0 + kappa


def slow_start(x, threat, noise, purpose):
    if threat.norm == "linf":
        delta = noise.uniform(x, purpose)
        return (x + threat.eps * delta / delta.abs().max()).clamp(0, 1)
    delta = noise.normal(x, purpose)
    return (x + threat.eps * delta / math.sqrt(float((delta * delta).sum()))).clamp(0, 1)


def slow_project(point, x, threat):
    if threat.norm == "linf":
        return torch.minimum(torch.maximum(point, x - threat.eps), x + threat.eps).clamp(0, 1)
    length = math.sqrt(float(((point - x) ** 2).sum()))
    return (x + (point - x) / (length + 1e-12) * min(threat.eps, length)).clamp(0, 1)


def slow_apgd(net, x, loss, threat, steps, start, rho=0.75):
    """All points from the start on, their losses and logits, and the point of highest loss. ``x`` holds one image."""

    def evaluate(point):
        point = point.clone().requires_grad_()
        logits = net(point)[0]
        value = loss(logits)
        (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient, logits.detach()

    window, shrink, least = (max(int(part * steps), 1) for part in (0.22, 0.03, 0.06))
    value, gradient, logits = evaluate(start)
    points, values, all_logits = [start], [value], [logits]
    best_value, best, best_gradient = value, start, gradient
    losses = [0.0] * steps  # losses[-1] is what the first step is compared with: 0
    point = old = start
    length, counter, best_then, halved_then = 2 * threat.eps, 0, value, True
    for i in range(steps):
        drift, old = point - old, point
        if threat.norm == "linf":
            direction = gradient.sign()
        else:
            direction = gradient / (math.sqrt(float((gradient**2).sum())) + 1e-12)
        there = slow_project(point + length * direction, x, threat)
        share = 0.75 if i > 0 else 1.0
        point = slow_project(point + (there - point) * share + drift * (1 - share), x, threat)
        value, gradient, logits = evaluate(point)
        points.append(point)
        values.append(value)
        all_logits.append(logits)
        losses[i] = value
        if value > best_value:
            best_value, best, best_gradient = value, point, gradient
        counter += 1
        if counter == window:
            rises = sum(losses[i - back] > losses[i - back - 1] for back in range(window))
            halve = rises <= rho * window or (not halved_then and best_value <= best_then)
            if halve:
                length, point, gradient = length / 2, best, best_gradient
            best_then, halved_then = best_value, halve
            window, counter = max(window - shrink, least), 0
    return points, values, all_logits, best


def slow_search(net, x, y, threat, attack, seed, number):
    """Point of lowest margin, that margin and the passes, of one sample."""
    noise, y = Keyed(seed, torch.tensor([number])), int(y)
    lowest, found, passes, ranking = math.inf, None, 0, [None]
    if attack.targets:
        clean = net(x)[0]
        ranking = [j for j in sorted(range(len(clean)), key=lambda j: -float(clean[j])) if j != y][: attack.targets]
        passes = 1
    for rank, target in enumerate(ranking):
        for restart in range(attack.restarts):
            if lowest <= -attack.overshoot:
                return found, lowest, passes
            start = slow_start(x, threat, noise, f"{attack.label}/{rank}/{restart}")
            loss = lambda z, t=target: slow_loss(attack.loss, z, y, t, attack.kappa)  # noqa: E731
            points, _, logits, _ = slow_apgd(net, x, loss, threat, attack.steps, start, attack.rho)
            for point, z in zip(points, logits, strict=True):
                passes += 1
                here = float(z[y]) - max(float(z[j]) for j in range(len(z)) if j != y)
                if here < lowest:
                    lowest, found = here, point
                if here <= -attack.overshoot:
                    break
    return found, lowest, passes


@pytest.mark.parametrize("form", ["apgd-ce", "apgd-dlr", "apgd-t"])
@both_threats
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_best_points_are_those_of_the_slow_implementation(scene, form, threat, steps):
    net, x, y = scene
    attack, target = APGD(steps=steps, **FORMS[form]), (y + 2) % 6
    if form == "apgd-dlr":
        y = net(x).argmin(1)  # where y ranks third, DLR is 1 whatever the logits, and its gradient is rounding error
    found = attack.training_point(net, x, threat, attack._loss(y, target), keyed(len(x), seed=3))
    compared = 0
    for i in range(2, 8 if steps < 100 else 5):
        aim = int(target[i]) if attack.targets else None
        loss = lambda z, i=i, aim=aim: slow_loss(attack.loss, z, int(y[i]), aim)  # noqa: E731
        start = slow_start(x[i : i + 1], threat, Keyed(3, torch.tensor([i])), f"{form}/0/0")
        points, values, _, best = slow_apgd(net, x[i : i + 1], loss, threat, steps, start)
        if form != "apgd-dlr" or min(abs(value - 1) for value in values) > 1e-6:
            torch.testing.assert_close(found[i : i + 1], best, rtol=0, atol=1e-9)
            compared += 1
            assert len({tuple(point.flatten().tolist()) for point in points}) > steps / 2
    assert compared >= 2


SEARCHES = [
    {"steps": 30, "loss": "ce"},
    {"steps": 15, "loss": "dlr", "restarts": 2},
    {"steps": 10, "loss": "dlr", "targets": 4},
    {"steps": 10, "loss": "margin", "targets": 9, "overshoot": 0.3, "kappa": 0.2},
    {"steps": 15, "loss": "margin", "overshoot": math.inf, "kappa": 0.1, "rho": 0.5},
]


@pytest.mark.parametrize("options", SEARCHES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("threat", SMALL, ids=["linf", "l2"])
def test_search_is_that_of_the_slow_implementation(scene, options, threat):
    net, x, y = scene
    attack = APGD(**options)
    found = attack.evaluate(net, x, y, threat, keyed(len(x), seed=5))
    for i in range(len(x)):
        point, lowest, passes = slow_search(net, x[i : i + 1], y[i], threat, attack, 5, i)
        torch.testing.assert_close(found.x[i : i + 1], point, rtol=0, atol=1e-9)
        assert float(found.margin[i]) == pytest.approx(lowest, abs=1e-8)
        assert int(found.queries[i]) == passes
    assert found.broken.any()


def test_checkpoints():
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert checkpoints(10) == {2: 2} | dict.fromkeys(range(3, 11), 1)
    assert checkpoints(1) == {1: 1}


# Budgets.


class Unbroken(nn.Module):
    """Always sure of class 0, with a gradient everywhere; counts the images that it is shown."""

    def __init__(self, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4 * classes).view(4, classes).sin())
        self.register_buffer("bias", 100.0 * (torch.arange(classes) == 0))
        self.passes = 0

    def forward(self, x):
        self.passes += len(x)
        return x.flatten(1)[:, :4] @ self.weight + self.bias


BUDGETS = [
    ({"steps": 7}, 10, 8),
    ({"steps": 7, "restarts": 3}, 10, 24),
    ({"steps": 12, "loss": "dlr", "targets": 9}, 10, 1 + 9 * 13),
    ({"steps": 5, "loss": "dlr", "targets": 9}, 4, 1 + 3 * 6),
    ({"steps": 5, "loss": "margin", "targets": 2, "restarts": 2}, 2, 1 + 2 * 6),
    ({"steps": 4, "loss": "dlr", "eot": 3}, 2, 15),
    ({"steps": 1, "overshoot": math.inf}, 3, 2),
]


@pytest.mark.parametrize(("options", "classes", "passes"), BUDGETS)
def test_budget_is_exact(options, classes, passes):
    net, attack = Unbroken(classes), APGD(**options)
    x, _ = images(5, (1, 5, 5), dtype=torch.float32)
    found = attack.evaluate(net, x, torch.zeros(5, dtype=torch.int64), LINF, keyed(5))
    assert not found.broken.any()
    assert found.queries.tolist() == [passes] * 5
    assert net.passes == 5 * passes
    assert attack.queries(classes) == passes


def test_budgets_of_autoattack():
    assert APGD().queries() == 101
    assert APGD(loss="dlr", targets=9).queries(10) == APGD(loss="dlr", targets=9).queries(100) == 910


def test_training_climbs_once_whatever_the_restarts():
    net = Unbroken(3)
    x, y = images(5, (1, 5, 5), classes=3, dtype=torch.float32)
    attack = APGD(steps=6, loss="dlr", targets=2, restarts=4)
    attack.training_point(net, x, LINF, cross_entropy(y), Stream(torch.Generator().manual_seed(0)))
    assert net.passes == 5 * 7


def test_broken_samples_cost_nothing_more(scene):
    net, x, y = scene
    seen = []
    handle = net.net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    found = APGD(steps=20, loss="dlr", targets=5).evaluate(net, x, y, ThreatModel.of("linf", "0.02"), keyed(len(x)))
    handle.remove()
    assert found.queries[:2].tolist() == [2, 2]
    # up to three copies fill a call, and the samples of this small batch are dropped at once
    assert int(found.queries.sum()) <= sum(seen) <= int(found.queries.sum()) + 3 * len(seen)


@every_form
def test_transfer_form_takes_every_step_and_goes_deeper(scene, form):
    net, x, y = scene
    attack = APGD(steps=8, **FORMS[form])
    near, deep = (a.evaluate(net, x, y, LINF, keyed(len(x))) for a in (attack, attack.for_transfer()))
    assert (deep.queries == attack.queries(6)).all()
    assert (deep.margin <= near.margin).all()
    assert deep.margin.mean() < near.margin.mean() - 0.1
    some = ATTACKS.build({"name": "apgd", "steps": 8, "overshoot": 0.1, **FORMS[form]}).evaluate(
        net, x, y, LINF, keyed(len(x))
    )
    assert (deep.margin <= some.margin).all()
    assert ((some.margin <= -0.1) | (some.queries == attack.queries(6))).all()


# Any net, any image.


@every_form
@pytest.mark.parametrize("classes", [2, 3, 4, 10, 100])
def test_any_number_of_classes(form, classes):
    net = small_net(classes)
    x, _ = images(6)
    y = net(x).argmax(1)
    attack = APGD(steps=10, **FORMS[form])
    found = attack.evaluate(net, x, y, ThreatModel.of("linf", "0.1"), keyed(6))
    assert torch.isfinite(found.margin).all()
    assert found.broken.any()
    assert found.queries.max() <= attack.queries(classes)


@pytest.mark.parametrize(("targets", "least"), [(0, 3), (2, 4)])
def test_too_few_classes_for_dlr_fall_back_on_the_margin(targets, least):
    for classes in (2, 3, 4, 5):
        logits, _ = images(7, (classes,))
        y, target = torch.arange(7) % classes, (torch.arange(7) + 1) % classes
        ratio, plain = (APGD(loss=name, targets=targets)._loss(y, target)(logits) for name in ("dlr", "margin"))
        assert torch.equal(ratio, plain) == (classes < least)
        assert torch.equal(ratio > 0, plain > 0)


@every_form
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 7, 12)], ids=str)
@both_threats
def test_any_shape(form, shape, threat):
    net = small_net(5, shape, dtype=torch.float32)
    x, _ = images(6, shape, dtype=torch.float32)
    y = net(x).argmax(1)
    found = APGD(steps=6, **FORMS[form]).evaluate(net, x, y, threat, keyed(6))
    assert within(found.x, x, threat).all()
    assert torch.equal(found.margin, margin(net(found.x), y))


@every_form
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_zero_is_the_image_itself(scene, form, norm):
    net, x, y = scene
    found = APGD(steps=4, **FORMS[form]).evaluate(net, x, y, ThreatModel.of(norm, "0"), keyed(len(x)))
    assert torch.equal(found.x, x)
    assert torch.equal(found.margin, margin(net(x), y))
    assert found.broken.tolist() == [True] * 2 + [False] * 6


@every_form
@pytest.mark.parametrize(("threat", "overshoot"), [(LINF, 0.0), (L2, 0.2)], ids=["linf", "l2"])
def test_results_are_the_same_bits_in_any_batch_and_order(form, threat, overshoot):
    net = small_net(dtype=torch.float32, rows=8)
    x, _ = images(24, dtype=torch.float32)
    y = net(x).argmax(1)
    threat = threat.scaled(0.2)
    attack = APGD(steps=8, overshoot=overshoot, **FORMS[form])
    whole = attack.evaluate(net, x, y, threat, keyed(24))
    assert 0 < whole.broken.sum() < 24
    assert torch.equal(whole.margin, margin(net(whole.x), y))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for part in torch.split(order, [1, 5, 18]):
        found = attack.evaluate(net, x[part], y[part], threat, Keyed(0, part))
        assert torch.equal(found.x, whole.x[part])
        assert torch.equal(found.margin, whole.margin[part])
        assert torch.equal(found.queries, whole.queries[part])


@pytest.mark.parametrize("form", ["apgd-ce", "apgd-t"])
@pytest.mark.parametrize("when", [lambda going, step: False, lambda going, step: step % 3 == 2], ids=["never", "late"])
def test_results_do_not_depend_on_when_samples_are_dropped(monkeypatch, form, when):
    net = small_net(rows=8)
    x, _ = images(16)
    y = net(x).argmax(1)
    attack = APGD(steps=8, restarts=2, overshoot=1.0, **FORMS[form])
    soon = attack.evaluate(net, x, y, L2, keyed(16))
    monkeypatch.setattr("rprune.attacks.apgd.worth_compacting", when)
    late = attack.evaluate(net, x, y, L2, keyed(16))
    assert torch.equal(soon.x, late.x)
    assert torch.equal(soon.margin, late.margin)
    assert torch.equal(soon.queries, late.queries)
    assert len(soon.queries.unique()) > 2


@dataclass
class State:
    number: torch.Tensor
    noise: Keyed
    nothing: None = None


def test_rows_of_cuts_every_tensor_inside():
    state = State(torch.arange(3.0), Keyed(7, torch.arange(3) + 10))
    for rows in (torch.tensor([True, False, True]), torch.tensor([0, 2])):
        part = rows_of(state, rows)
        assert part.number.tolist() == [0, 2]
        assert part.noise.ids.tolist() == [10, 12]
        assert (part.noise.seed, part.nothing) == (7, None)
    assert rows_of(state, torch.zeros(3, dtype=torch.bool)).number.shape == (0,)


@pytest.mark.parametrize(("done", "drop"), [(0, False), (5, False), (6, True), (100, True)])
def test_samples_that_are_done_are_dropped_when_they_are_more_than_one_in_twenty(done, drop):
    assert worth_compacting(torch.arange(100) >= done, 0) == drop


class Flickering(nn.Module):
    """Adds to the logits and takes away, by turns: two passes together are the net itself."""

    def __init__(self, net, turn):
        super().__init__()
        self.net, self.turn, self.sign = net, turn, 1

    def forward(self, x):
        self.sign = -self.sign
        return self.net(x) + self.sign * self.turn(x)


def test_eot_averages_gradient_loss_and_logits(scene):
    net, x, y = scene
    other = small_net(seed=9)
    flickering = Flickering(net, lambda x: 0.02 * other(x))
    options = {"steps": 10, "loss": "margin", "overshoot": math.inf, "targets": 2}
    calm = APGD(**options).evaluate(net, x, y, LINF, keyed(len(x)))
    once, twice = (APGD(**options, eot=n).evaluate(flickering, x, y, LINF, keyed(len(x))) for n in (1, 2))
    torch.testing.assert_close(twice.x, calm.x, rtol=0, atol=1e-9)
    torch.testing.assert_close(twice.margin, calm.margin, rtol=0, atol=1e-9)
    assert (once.x - calm.x).abs().max() > 1e-3


def test_loss_that_is_no_number_does_not_stop_the_ascent(scene):
    net, x, y = scene

    def loss(logits):
        values = cross_entropy(y)(logits)
        return torch.where(values < values.detach().median(), values * math.nan, values)

    point = APGD(steps=10).training_point(net, x, LINF, loss, keyed(len(x)))
    assert torch.isfinite(point).all()
    assert cross_entropy(y)(net(point)).sum() > cross_entropy(y)(net(x)).sum()


@every_form
def test_labels_and_transfer_form(form):
    attack = APGD(**FORMS[form])
    assert attack.label == form == attack.for_transfer().label
    assert attack.for_transfer().overshoot == math.inf


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"restarts": 0},
        {"targets": -1},
        {"targets": 3},
        {"rho": 1.5},
        {"eot": 0},
        {"loss": "kl"},
        {"overshoot": -1},
        {"kappa": -1},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        ATTACKS.build({"name": "apgd", **options})
