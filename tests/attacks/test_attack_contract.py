"""What every registered attack must keep to; PGD against the slow oracle."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from rprune.attacks.base import ATTACKS, Attack, cross_entropy, input_gradient, margin
from rprune.attacks.noise import Keyed, Stream
from rprune.attacks.norms import project, size, within
from rprune.attacks.pgd import PGD
from rprune.attacks.suites import SUITES, suite
from rprune.errors import UsageError
from rprune.threat import ThreatModel

VARIANTS = {
    "pgd": [
        {"steps": 4, "restarts": 3, "loss": "margin"},
        {"steps": 4, "start": "near"},
        {"steps": 4, "start": "none"},
        {"steps": 4, "overshoot": 0.5, "step": 0.7},
        {"steps": 3, "restarts": 2, "overshoot": math.inf},
    ],
    "apgd": [
        {"steps": 5, "loss": "dlr", "targets": 2},
        {"steps": 4, "loss": "margin", "restarts": 2, "kappa": 1.0},
        {"steps": 3, "loss": "margin", "targets": 9, "overshoot": 0.5},
        {"steps": 3, "eot": 2, "overshoot": math.inf},
    ],
    "fab": [{"steps": 6, "targets": 1, "restarts": 3}],
    "square": [
        {"restarts": 2},
        {"budget": 30, "overshoot": 0.5, "rescale": True},
        {"budget": 20, "overshoot": math.inf},
    ],
}
"""Options worth a run of the contract besides the defaults."""

DEFAULTS = {
    "adapter": {"function": f"{Path(__file__).parent / 'own_attacks.py'}:my_pgd"},
    "apgd": {"steps": 12},
    "fab": {"steps": 10},
    "square": {"budget": 60},
}
"""Options for all runs: budgets that are smaller than the attack's own, and what has no default."""

SPECS = [
    {"name": name, **DEFAULTS.get(name, {}), **options}
    for name in ATTACKS.all()
    for options in ({}, *VARIANTS.get(name, []))
]
every_attack = pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, s.values())))
THREATS = [ThreatModel.of("linf", "8/255"), ThreatModel.of("linf", "0.3"), ThreatModel.of("l2", "0.5")]
every_threat = pytest.mark.parametrize("threat", THREATS, ids=lambda t: f"{t.norm}-{t.eps:.2f}")
both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


@pytest.fixture(scope="module")
def oracle(load_helper):
    return load_helper("oracles/wrapper_net.py")


@pytest.fixture(scope="module")
def scene(tiny):
    """A float64 net and samples of which it gets most, not all, right with various margins."""
    net = tiny.net(seed=1, dtype=torch.float64).eval()
    x, y = tiny.batch(24, seed=2, dtype=torch.float64)
    with torch.no_grad():
        right = net(x).argmax(1)
    y = torch.where(torch.arange(24) % 4 == 0, y, right)
    return net, x, y


def keyed(n, seed=0):
    return Keyed(seed, torch.arange(n))


def trains(attack):
    """Whether it can drive a training loss; others look for misclassified points only."""
    return type(attack).perturb is not Attack.perturb


@every_attack
@every_threat
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_lie_in_ball_and_box(tiny, spec, threat, dtype):
    net = tiny.net(dtype=dtype).eval()
    attack = ATTACKS.build(spec)
    x, y = tiny.batch(8, dtype=dtype)
    corners = (x > 0.5).to(dtype)
    for images in (x, corners):
        points = [attack.evaluate(net, images, y, threat, keyed(8)).x]
        if trains(attack):
            noise = Stream(torch.Generator().manual_seed(0))
            points.append(attack.training_point(net, images, threat, cross_entropy(y), noise))
        for point in points:
            assert point.dtype == dtype
            assert point.shape == images.shape
            assert not point.requires_grad
            assert point.min() >= 0
            assert point.max() <= 1
            delta = (point - images).flatten(1)
            reach = delta.abs().amax(1) if threat.norm == "linf" else delta.square().sum(1).sqrt()
            assert (reach <= threat.eps + (1e-6 if dtype == torch.float32 else 1e-12)).all()
        if spec["name"] != "fab":  # it gives the images back where the nearest point that it finds is outside
            assert (points[0] != images).any()


@every_attack
@both_norms
def test_eps_zero_returns_the_images(scene, spec, norm):
    if spec["name"] == "adapter":
        pytest.skip("a user's function has an eps of its own")
    net, x, y = scene
    attack, threat = ATTACKS.build(spec), ThreatModel.of(norm, "0")
    if trains(attack):
        noise = Stream(torch.Generator().manual_seed(0))
        assert torch.equal(attack.training_point(net, x, threat, cross_entropy(y), noise), x)
    found = attack.evaluate(net, x, y, threat, keyed(len(x)))
    assert torch.equal(found.x, x)
    assert torch.equal(found.broken, net(x).argmax(1) != y)


@every_attack
@every_threat
def test_result_does_not_depend_on_batches_or_order(scene, spec, threat):
    net, x, y = scene
    attack = ATTACKS.build(spec)
    whole = attack.evaluate(net, x, y, threat, keyed(len(x)))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(4))
    points, broken, queries = torch.empty_like(x), torch.empty_like(whole.broken), torch.empty_like(whole.queries)
    for part in (order[:1], order[1:6], order[6:]):
        found = attack.evaluate(net, x[part], y[part], threat, Keyed(0, part))
        points[part], broken[part], queries[part] = found.x, found.broken, found.queries
    torch.testing.assert_close(points, whole.x, rtol=0, atol=1e-9)
    assert torch.equal(broken, whole.broken)
    assert torch.equal(queries, whole.queries)


@every_attack
@every_threat
def test_broken_is_what_the_net_says(scene, spec, threat):
    net, x, y = scene
    attack = ATTACKS.build(spec)
    found = attack.evaluate(net, x, y, threat, keyed(len(x)))
    with torch.no_grad():
        assert torch.equal(found.broken, net(found.x).argmax(1) != y)
    assert found.queries.min() >= 1
    assert found.queries.max() <= attack.queries()


@every_attack
def test_attack_finds_something(scene, spec):
    net, x, y = scene
    found = ATTACKS.build(spec).evaluate(net, x, y, ThreatModel.of("linf", "0.3"), keyed(len(x)))
    with torch.no_grad():
        clean = net(x).argmax(1) != y
    assert found.broken.sum() > clean.sum()


@every_attack
@pytest.mark.parametrize("kind", ["training_point", "evaluate"])
def test_net_is_left_as_it_was(tiny, spec, kind):
    net = tiny.net().train()
    net.bn2.eval()
    net.fc.weight.requires_grad_(False)
    net.conv1.weight.grad = torch.ones_like(net.conv1.weight)
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    x, y = tiny.batch(6)
    images = x.clone()
    attack = ATTACKS.build(spec)
    noise = Stream(torch.Generator().manual_seed(0))
    if kind == "evaluate":
        attack.evaluate(net, x, y, THREATS[0], keyed(6))
    elif trains(attack):
        attack.training_point(net, x, THREATS[0], cross_entropy(y), noise)
    else:
        with pytest.raises(UsageError, match="cannot drive a training loss"):
            attack.training_point(net, x, THREATS[0], cross_entropy(y), noise)
    assert tiny.same_bits(net.state_dict(), before)
    assert [module.training for module in net.modules()] == modes
    assert [key for key, p in net.named_parameters() if not p.requires_grad] == ["fc.weight"]
    assert net.conv1.weight.grad.eq(1).all()
    assert all(p.grad is None for key, p in net.named_parameters() if key != "conv1.weight")
    assert torch.equal(x, images)
    assert not x.requires_grad
    assert x.grad is None


@every_attack
def test_net_is_left_as_it_was_after_an_error(tiny, spec):
    net = tiny.net().train()
    x, y = tiny.batch(6)

    def fail(*_):
        raise ZeroDivisionError

    net.fc.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        ATTACKS.build(spec).evaluate(net, x, y, THREATS[0], keyed(6))
    assert all(module.training for module in net.modules())
    assert all(p.requires_grad for p in net.parameters())


@every_attack
def test_description_gives_the_attack_back(spec):
    attack = ATTACKS.build(spec)
    assert ATTACKS.build(ATTACKS.describe(attack)) == attack
    classes = {cls.__name__: cls for cls in ATTACKS.all().values()}
    assert eval(repr(attack), {**classes, "inf": math.inf}) == attack
    if attack == ATTACKS.build({"name": spec["name"], **DEFAULTS.get(spec["name"], {})}):
        assert ATTACKS.build(json.loads(json.dumps(ATTACKS.describe(attack)))) == attack


def test_broken_samples_leave_early(scene):
    net, x, y = scene
    attack = PGD(steps=5, restarts=2)
    with torch.no_grad():
        wrong = net(x).argmax(1) != y
    found = attack.evaluate(net, x, y, ThreatModel.of("linf", "1e-9"), keyed(len(x)))
    assert wrong.any()
    assert torch.equal(found.broken, wrong)
    assert (found.queries[wrong] == 1).all()
    assert (found.queries[~wrong] == attack.queries()).all()


def test_transfer_form_never_stops_and_goes_deeper(scene):
    net, x, y = scene
    attack = PGD(steps=6)
    near = attack.evaluate(net, x, y, THREATS[1], keyed(len(x)))
    deep = attack.for_transfer().evaluate(net, x, y, THREATS[1], keyed(len(x)))
    assert (deep.queries == attack.queries()).all()
    with torch.no_grad():
        assert (margin(net(deep.x), y) <= margin(net(near.x), y) + 1e-9).all()
        assert margin(net(deep.x), y).mean() < margin(net(near.x), y).mean() - 1e-3
    assert torch.equal(deep.broken, near.broken) or deep.broken.sum() >= near.broken.sum()


def test_more_restarts_never_break_fewer(scene):
    net, x, y = scene
    threat = ThreatModel.of("linf", "0.02")
    one, three = (PGD(steps=3, restarts=n).evaluate(net, x, y, threat, keyed(len(x))) for n in (1, 3))
    assert (three.broken >= one.broken).all()
    with torch.no_grad():
        assert (margin(net(three.x), y) <= margin(net(one.x), y) + 1e-9).all()


class GivenStart:
    """A noise that makes the attack start where the test wants it."""

    def __init__(self, unit):
        self.unit = unit

    def uniform(self, *_):
        return self.unit

    normal = uniform


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("eps", ["8/255", "0.3"])
def test_pgd_is_the_oracles_step_by_step(scene, oracle, steps, eps):
    net, x, y = scene
    threat = ThreatModel.of("linf", eps)
    unit = torch.rand(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype) * 2 - 1
    start = (x + threat.eps * unit).clamp(0, 1)
    attack = PGD(steps=steps, step=0.25)
    point = attack.training_point(net, x, threat, cross_entropy(y), GivenStart(unit))
    expected = oracle.pgd_linf(net, x, y, threat.eps, 0.25 * threat.eps, steps, start)
    torch.testing.assert_close(point, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("steps", "share"), [(10, 0.25), (20, 0.125), (50, 0.05)])
def test_pgd_step_is_madrys_rule(scene, steps, share):
    net, x, y = scene
    by_rule, given = (
        attack.training_point(net, x, THREATS[0], cross_entropy(y), Stream(torch.Generator().manual_seed(0)))
        for attack in (PGD(steps=steps), PGD(steps=steps, step=share))
    )
    torch.testing.assert_close(by_rule, given, rtol=0, atol=1e-12)


def test_pgd_in_l2_steps_along_the_normalised_gradient(scene):
    net, x, y = scene
    threat = ThreatModel.of("l2", "0.5")
    gradient, *_ = input_gradient(net, x, cross_entropy(y))
    unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    attack = PGD(steps=1, step=0.6, start="none")
    point = attack.training_point(net, x, threat, cross_entropy(y), GivenStart(None))
    torch.testing.assert_close(point, (x + 0.3 * unit).clamp(0, 1), rtol=0, atol=1e-12)
    far = PGD(steps=1, step=3.0, start="none").training_point(net, x, threat, cross_entropy(y), GivenStart(None))
    torch.testing.assert_close(far, (x + 0.5 * unit).clamp(0, 1), rtol=0, atol=1e-12)


def test_fgsm_is_one_step_of_eps(scene):
    net, x, y = scene
    gradient, *_ = input_gradient(net, x, cross_entropy(y))
    point = ATTACKS.build("fgsm").evaluate(net, x, y, THREATS[0], keyed(len(x))).x
    torch.testing.assert_close(point, (x + THREATS[0].eps * gradient.sign()).clamp(0, 1), rtol=0, atol=1e-12)


def test_zero_gradient_is_no_nan(tiny):
    net = tiny.net().eval()
    with torch.no_grad():
        net.fc.weight.zero_()
    x, y = tiny.batch(4)
    for norm in ("linf", "l2"):
        point = PGD(steps=3).evaluate(net, x, y, ThreatModel.of(norm, "0.1"), keyed(4)).x
        assert torch.isfinite(point).all()


@every_attack
def test_logits_that_are_no_numbers_are_no_success(tiny, spec):
    net = tiny.net().eval()
    with torch.no_grad():
        net.fc.bias[0] = torch.nan
    x, _ = tiny.batch(4)
    for label in (0, 1):
        found = ATTACKS.build(spec).evaluate(net, x, torch.full((4,), label), THREATS[0], keyed(4))
        assert not found.broken.any()
        assert torch.isfinite(found.x).all()


@both_norms
def test_projection_is_idempotent_and_inside(norm):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20, 3, 4, 4, generator=generator, dtype=torch.float64)
    threat = ThreatModel.of(norm, "0.2")
    point = project(x + torch.randn(x.shape, generator=generator, dtype=x.dtype), x, threat)
    assert within(point, x, threat, 1e-12).all()
    torch.testing.assert_close(project(point, x, threat), point, rtol=0, atol=1e-15)
    assert (size(point - x, norm) > 0.01).all()


def test_margin():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [5.0, 5.0, 0.0]])
    assert margin(logits, torch.tensor([1, 0, 0])).tolist() == [1, -2, 0]


@pytest.mark.parametrize("name", SUITES)
def test_suites_are_registered_attacks(name):
    assert all(ATTACKS.get(ATTACKS.name_of(attack)) is type(attack) for attack in suite(name))


@pytest.mark.parametrize(
    ("wrong", "right"), [("pdg", "pgd"), ({"name": "fgms"}, "fgsm"), ({"name": "pgd", "stpes": 3}, "steps")]
)
def test_unknown_names_offer_the_nearest(wrong, right):
    with pytest.raises(UsageError, match="unknown") as caught:
        ATTACKS.build(wrong)
    assert f"did you mean '{right}'" in caught.value.hint


def test_unknown_suite_offers_the_nearest():
    with pytest.raises(UsageError) as caught:
        suite("pgd2")
    assert "did you mean 'pgd" in caught.value.hint


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"steps": 2.5}, {"step": 0}, {"restarts": 0}, {"start": "far"}, {"overshoot": -1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        ATTACKS.build({"name": "pgd", **options})


def test_every_restart_starts_elsewhere(scene):
    net, x, y = scene
    points = []
    handle = net.register_forward_pre_hook(lambda _, inputs: points.append(inputs[0].detach().clone()))
    PGD(steps=1, restarts=3, overshoot=math.inf).evaluate(net, x, y, THREATS[0], keyed(len(x)))
    handle.remove()
    starts = points[::2]
    assert len(starts) == 3
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (starts[a] == starts[b]).double().mean() < 0.2  # equal where the box cuts both
