"""What every registered training objective must keep to, and the numeric vectors of the losses."""

import copy
import dataclasses
import json
import re

import pytest
import torch
from torch import nn

from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.errors import UsageError
from rprune.objectives.base import OBJECTIVES
from rprune.objectives.pgd_at import PGDAT
from rprune.objectives.trades import TRADES, kl
from rprune.threat import ThreatModel

OPTIONS = {name: {"attack": {"steps": 3}} for name in ("pgd-at", "trades", "mart", "smoothadv")} | {
    "free-at": {"replays": 3}
}
FREE = ("free-at",)  # their perturbation's gradient comes with the training step's own backward
every_objective = pytest.mark.parametrize("name", OBJECTIVES.all())
LINF = ThreatModel.of("linf", "8/255")
both_norms = pytest.mark.parametrize("threat", [LINF, ThreatModel.of("l2", "0.5")], ids=str)


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


@pytest.fixture(scope="module")
def oracle(load_helper):
    return load_helper("oracles/wrapper_net.py")


def objective_named(name, threat=LINF):
    options = {k: v for k, v in OPTIONS.get(name, {}).items() if k in OBJECTIVES.get(name).__dataclass_fields__}
    return OBJECTIVES.build({"name": name, **options}, threat=threat)


def stream(seed=0):
    return Stream(torch.Generator().manual_seed(seed))


def losses(objective, net, x, y, seed=0, noise=None):
    """All losses of a batch, each after its backward."""
    found = []
    for compute in objective(net, x, y, 0.25, noise or stream(seed)):
        net.zero_grad()
        loss = compute()
        loss.value.backward()
        found.append(loss)
    assert found, "the objective yields nothing"
    return found


@every_objective
@both_norms
def test_loss_is_finite_and_its_gradient_reaches_all_weights(tiny, name, threat):
    net, (x, y) = tiny.net().train(), tiny.batch()
    for loss in losses(objective_named(name, threat), net, x, y):
        assert loss.value.dim() == 0
        assert torch.isfinite(loss.value)
        assert loss.logits.shape == (len(x), tiny.CLASSES)
        assert all(torch.isfinite(part) and not part.requires_grad for part in loss.parts.values())
    for key, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.any(), f"no gradient reaches {key}"


@every_objective
def test_net_is_left_as_it_was_before_the_backward(tiny, name):
    net, (x, y) = tiny.net().train(), tiny.batch()
    net.bn1.eval()
    net.conv1.weight.requires_grad_(False)
    modes = {key: module.training for key, module in net.named_modules()}
    before = x.clone()
    for _ in objective_named(name)(net, x, y, 0.0, stream()):
        assert {key: module.training for key, module in net.named_modules()} == modes
        assert [key for key, p in net.named_parameters() if not p.requires_grad] == ["conv1.weight"]
        assert all(p.grad is None for p in net.parameters())
    assert x.grad is None
    assert not x.requires_grad
    assert torch.equal(x, before)


@every_objective
def test_attack_does_not_touch_the_running_statistics(tiny, name):
    """They move by the train-mode passes of the losses alone, none of which differentiates its input."""
    net, (x, y) = tiny.net().train(), tiny.batch()
    twin = copy.deepcopy(net)
    passes = []
    handle = net.register_forward_pre_hook(lambda module, inputs: passes.append((module.training, *inputs)))
    found = losses(objective_named(name), net, x, y)
    handle.remove()
    trained = [inputs for training, inputs in passes if training]
    assert name in FREE or not any(inputs.requires_grad for inputs in trained)
    assert len(trained) <= 2 * len(found)
    with torch.no_grad():
        for inputs in trained:
            twin(inputs)
    assert tiny.same_bits(dict(net.named_buffers()), dict(twin.named_buffers()))
    assert int(net.bn1.num_batches_tracked) == len(trained)


@every_objective
def test_same_generator_same_loss(tiny, name):
    x, y = tiny.batch()
    objective = objective_named(name)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(runs))
        net, noise = tiny.net().train(), stream(seed)
        before = noise.generator.get_state()
        loss = losses(objective, net, x, y, noise=noise)[-1]
        runs.append((loss, {k: p.grad for k, p in net.named_parameters()}))
        draws = not torch.equal(before, noise.generator.get_state())
    assert torch.equal(runs[0][0].value, runs[1][0].value)
    assert torch.equal(runs[0][0].logits, runs[1][0].logits)
    assert tiny.same_bits(runs[0][1], runs[1][1])
    assert torch.equal(runs[0][0].value, runs[2][0].value) != draws


@every_objective
@both_norms
def test_loss_computed_again_is_the_same(tiny, name, threat):
    """A perturbation of the weights (AWP) asks for it twice, at the same points."""
    net, (x, y) = tiny.net().train(), tiny.batch()
    for compute in objective_named(name, threat)(net, x, y, 0.25, stream()):
        runs = []
        for _ in range(2):
            net.zero_grad()
            loss = compute()
            loss.value.backward()
            runs.append({key: p.grad.clone() for key, p in net.named_parameters()} | {"": loss.value.detach()})
            net.bn1.momentum = net.bn2.momentum = 0.0  # as the loop holds running statistics for the second time
        assert tiny.same_bits(*runs)


@every_objective
def test_label_smoothing_acts(tiny, name):
    x, y = tiny.batch()
    sharp = objective_named(name)
    values = [
        losses(dataclasses.replace(sharp, label_smoothing=share), tiny.net().train(), x, y)[0].value.detach()
        for share in (0.0, 0.2)
    ]
    assert not torch.equal(*values)


@every_objective
def test_validation_attacks_for_real(name):
    """An adversarial objective is validated by an attack of several steps."""
    objective = OBJECTIVES.build(name, threat=LINF)
    if objective.attack_used is not None:
        assert objective.attack_used.queries() > 10


@every_objective
def test_docstring_is_a_card_that_names_its_paper(name):
    cls = OBJECTIVES.get(name)
    assert cls.cost
    if name != "benign":
        assert re.fullmatch(r"[\w ]+( et al\.)?, \w+ (19|20)\d\d", cls.paper)
        assert cls.paper in " ".join(cls.__doc__.split())


@every_objective
def test_description_gives_the_objective_back(name):
    objective = objective_named(name)
    table = json.loads(json.dumps(OBJECTIVES.describe(objective)))
    assert OBJECTIVES.build(table, threat=LINF) == objective
    assert OBJECTIVES.build(name, threat=LINF) == OBJECTIVES.build(
        OBJECTIVES.describe(OBJECTIVES.build(name, threat=LINF)), threat=LINF
    )


class Stub(nn.Module):
    """Logits of the vector: the natural ones at x = 0.5, the adversarial ones at a distance of eps from it."""

    def __init__(self, v, eps):
        super().__init__()
        self.natural = nn.Parameter(torch.tensor(v["nat_logits"], dtype=torch.float64))
        self.adversarial = nn.Parameter(torch.tensor(v["adv_logits"], dtype=torch.float64))
        self.eps = eps

    def forward(self, x):
        share = ((x - 0.5).abs() / self.eps).flatten(1)
        return self.natural + share * (self.adversarial - self.natural)


@pytest.fixture
def stubbed(vectors):
    v = vectors["losses"]
    y = torch.tensor([v["y"]])
    return v, Stub(v, 0.125), torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), y, ThreatModel.of("linf", "0.125")


def test_loss_of_pgd_at(stubbed):
    v, net, x, y, threat = stubbed
    (loss,) = losses(PGDAT(threat=threat), net, x, y)
    assert float(loss.value.detach()) == pytest.approx(v["pgd_at(CE adv)"], abs=1e-9)
    assert loss.logits.detach().flatten().tolist() == pytest.approx(v["adv_logits"], abs=1e-9)


def test_loss_of_kl(vectors):
    v = vectors["losses"]
    natural, adversarial = (torch.tensor([v[key]], dtype=torch.float64) for key in ("nat_logits", "adv_logits"))
    assert kl(natural, adversarial).tolist() == pytest.approx([v["kl(nat||adv)"]], abs=1e-9)
    assert kl(natural, natural).tolist() == [0]


def test_loss_of_trades_beta6(stubbed):
    v, net, x, y, threat = stubbed
    (loss,) = losses(TRADES(threat=threat), net, x, y)
    assert float(loss.value.detach()) == pytest.approx(v["trades_beta6"], abs=1e-9)
    assert float(loss.parts["kl"]) == pytest.approx(v["kl(nat||adv)"], abs=1e-9)
    assert loss.logits.detach().flatten().tolist() == pytest.approx(v["nat_logits"], abs=1e-9)


def plain(tiny):
    """A float64 net whose outputs do not depend on the mode it is in."""
    return tiny.net(dtype=torch.float64).eval()


def recorded(objective, net, x, y):
    """Loss, gradients, and the point of the last pass."""
    inputs = []
    handle = net.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach().clone()))
    (loss,) = losses(objective, net, x, y, seed=2)
    handle.remove()
    return loss, {key: p.grad.clone() for key, p in net.named_parameters()}, inputs[-1]


def test_trades_gradient_flows_through_both_terms(tiny, oracle):
    net, (x, y) = plain(tiny), tiny.batch(dtype=torch.float64)
    loss, gradients, point = recorded(TRADES(threat=LINF, attack=PGD(steps=3, start="near")), net, x, y)
    net.zero_grad()
    expected = oracle.trades_loss(net(x), net(point), y, 6.0)
    expected.backward()
    torch.testing.assert_close(loss.value.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-10, atol=1e-12)
    net.zero_grad()
    (nn.functional.cross_entropy(net(x), y) + 6 * oracle.kl_per_sample(net(x).detach(), net(point)).mean()).backward()
    assert not torch.allclose(gradients["fc.weight"], net.fc.weight.grad), "a detached p(x) would not be noticed"


def test_trades_gradient_by_finite_differences(tiny):
    net, (x, y) = plain(tiny), tiny.batch(dtype=torch.float64)
    _, gradients, point = recorded(TRADES(threat=LINF, attack=PGD(steps=3, start="near")), net, x, y)

    def value(shift):
        with torch.no_grad():
            net.fc.bias[1] += shift
            natural, adversarial = net(x), net(point)
            net.fc.bias[1] -= shift
            return float(nn.functional.cross_entropy(natural, y) + 6 * kl(natural, adversarial).mean())

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    assert float(gradients["fc.bias"][1]) == pytest.approx(slope, rel=1e-5, abs=1e-7)


class FixedNoise(Stream):
    """A stream that shows what it has drawn."""

    def __init__(self, seed=0):
        super().__init__(torch.Generator().manual_seed(seed))
        object.__setattr__(self, "drawn", None)

    def normal(self, like, _):
        object.__setattr__(self, "drawn", torch.randn(like.shape, generator=self.generator, dtype=like.dtype))
        return self.drawn

    def uniform(self, like, _):
        drawn = torch.rand(like.shape, generator=self.generator, dtype=like.dtype) * 2 - 1
        object.__setattr__(self, "drawn", drawn)
        return self.drawn


def test_attack_of_trades_is_the_oracles(tiny, oracle):
    net, (x, y) = plain(tiny), tiny.batch(dtype=torch.float64)
    noise, points = FixedNoise(), []
    handle = net.register_forward_pre_hook(lambda module, given: points.append(given[0].detach().clone()))
    [step() for step in TRADES(threat=LINF)(net, x, y, 0.0, noise)]
    handle.remove()
    start = (x + 0.001 * noise.drawn).clamp(0, 1)
    expected = oracle.trades_attack(net, x, LINF.eps, LINF.eps / 4, 10, start)
    torch.testing.assert_close(points[-1], expected, rtol=0, atol=1e-12)


def test_attack_of_pgd_at_is_the_oracles(tiny, oracle):
    net, (x, y) = plain(tiny), tiny.batch(dtype=torch.float64)
    noise, points = FixedNoise(), []
    handle = net.register_forward_pre_hook(lambda module, given: points.append(given[0].detach().clone()))
    [step() for step in PGDAT(threat=LINF)(net, x, y, 0.0, noise)]
    handle.remove()
    start = (x + LINF.eps * noise.drawn).clamp(0, 1)
    expected = oracle.pgd_linf(net, x, y, LINF.eps, LINF.eps / 4, 10, start)
    torch.testing.assert_close(points[-1], expected, rtol=0, atol=1e-12)


def test_beta_weighs_the_second_term(tiny):
    net, (x, y) = plain(tiny), tiny.batch(dtype=torch.float64)
    found = [losses(TRADES(threat=LINF, beta=beta), net, x, y)[0] for beta in (0.0, 6.0)]
    assert float(found[0].value.detach()) == pytest.approx(float(found[0].parts["ce"]), abs=1e-12)
    difference = float((found[1].value - found[0].value).detach())
    assert difference == pytest.approx(6 * float(found[1].parts["kl"]), rel=1e-9)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "pgd-at", "attack": {"stepz": 3}},
        {"name": "pgd-at", "atack": {"steps": 3}},
        {"name": "trades", "beta": -1},
        {"name": "trades", "beta": "much"},
        {"name": "pgd-at", "attack": {"steps": 0}},
        {"name": "benign", "beta": 1},
        {"beta": 1},
    ],
)
def test_specification_that_does_not_fit_is_refused(spec):
    with pytest.raises(UsageError):
        OBJECTIVES.build(spec, threat=LINF)


def test_nested_unknown_key_is_named():
    with pytest.raises(UsageError, match="stepz"):
        OBJECTIVES.build({"name": "pgd-at", "attack": {"stepz": 3}}, threat=LINF)


def test_unknown_objective_offers_the_nearest():
    with pytest.raises(UsageError, match="unknown objective 'trade'") as caught:
        OBJECTIVES.build("trade", threat=LINF)
    assert "did you mean 'trades'" in caught.value.hint
