"""What every stage may wrap around its training: averages, weight perturbation, clipping, warm-up, optimizers."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from rprune.attacks.noise import Stream
from rprune.errors import UsageError
from rprune.models.prunable import prunable
from rprune.objectives.base import Loss, Objective
from rprune.objectives.benign import Benign
from rprune.objectives.distillation import Distilled
from rprune.objectives.pgd_at import PGDAT
from rprune.objectives.trades import kl
from rprune.pruning.base import METHODS, Context, Fixed, Pruner
from rprune.pruning.budget import Budget
from rprune.threat import ThreatModel
from rprune.training.averaging import Average, perturbed
from rprune.training.loop import OPTIMIZERS, Settings, fit
from rprune.training.schedules import schedule, warmed_up

SETTINGS = Settings(epochs=3, batch_size=16, lr=0.05)


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def hydra_of(model, epochs=3):
    budget = Budget.of({n: w.numel() for n, w in prunable(model).items()}, 0.9)
    return METHODS.build("hydra").bind(model, budget, Context(epochs, 3))


def run(tiny, settings, make=Pruner, objective=None, **options):
    model = tiny.net()
    pruner = make(model)
    found = fit(model, pruner, objective or Benign(), tiny.data(40), settings, **options)
    return model, pruner, found


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_average_equals_the_slow_one(kind):
    net = nn.Linear(3, 2)
    pruner = Pruner(net)
    trained = list(net.parameters())
    average = Average(kind, 0.9, pruner, trained)
    values, mean, n = [], net.weight.detach().clone(), 0
    for step in range(40):
        with torch.no_grad():
            net.weight.add_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        average.update(step / 40)
        if kind == "ema":
            n += 1
            decay = min(0.9, (1 + n) / (10 + n))
            mean = decay * mean + (1 - decay) * net.weight.detach()
        elif step / 40 >= 0.75:
            values.append(net.weight.detach().clone())
            mean = torch.stack(values).mean(0)
        else:
            mean = net.weight.detach().clone()
    live = net.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(net.weight.detach(), mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(net.weight.detach(), live)


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("make", [Pruner, hydra_of], ids=["dense", "hydra"])
def test_averaged_model_is_what_is_validated_and_selected(tiny, kind, make):
    seen = []

    def validate(net):
        seen.append({k: v.clone() for k, v in net.state_dict().items()})
        return {"score": float(len(seen))}

    settings = replace(SETTINGS, average=kind)
    model, pruner, _ = run(tiny, settings, make, validate=validate)
    assert tiny.same_bits(model.state_dict(), seen[-1])
    plain, _, _ = run(tiny, SETTINGS, make, validate=lambda net: {"score": 1.0})
    assert not tiny.same_bits(model.state_dict(), plain.state_dict())
    if pruner.masks():
        pruner.finish()
        assert sum(int(w.count_nonzero()) for w in prunable(model).values()) == sum(
            int(m.sum()) for m in pruner.masks().values()
        )


def test_average_of_a_masked_net_keeps_the_mask(tiny):
    def masked(model):
        return Fixed(model, {n: w > 0 for n, w in prunable(model).items()})

    model, pruner, _ = run(tiny, replace(SETTINGS, average="ema"), masked)
    for name, mask in pruner.masks().items():
        weight = prunable(model)[name].detach()
        assert not weight[~mask].any()
        assert not torch.signbit(weight[~mask]).any()


@pytest.mark.parametrize("change", [{"average": "ema"}, {"average": "swa"}, {"awp": 0.01}, {"optimizer": "adamw"}])
def test_resume_with_wrappers_is_uninterrupted(tiny, tmp_path, change):
    settings = replace(SETTINGS, **change)

    class Stop(Exception):
        pass

    def stop(log):
        if log.epoch == 2:
            raise Stop

    file = tmp_path / "state.pt"
    with pytest.raises(Stop):
        run(tiny, settings, hydra_of, state_file=file, on_epoch=stop)
    resumed, _, found = run(tiny, settings, hydra_of, state_file=file)
    whole, _, expected = run(tiny, settings, hydra_of)
    assert tiny.same_bits(resumed.state_dict(), whole.state_dict())
    assert found == expected


def test_perturbation_moves_each_tensor_by_the_radius_and_puts_it_back(tiny):
    model = tiny.net().train()
    pruner = Pruner(model)
    x, y = tiny.batch()
    before = nn.functional.cross_entropy(model(x), y)
    before.backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    with perturbed(pruner, list(model.parameters()), 0.01):
        for name, parameter in model.named_parameters():
            moved = parameter.detach() - state[name]
            if parameter.dim() < 2:
                assert not moved.any()
                continue
            assert float(moved.norm()) == pytest.approx(0.01 * float(state[name].norm()), rel=1e-3)
            cosine = nn.functional.cosine_similarity(moved.flatten(), gradients[name].flatten(), dim=0)
            assert float(cosine) == pytest.approx(1, abs=1e-3)
        assert float(nn.functional.cross_entropy(model(x), y).detach()) > float(
            before.detach()
        )  # train mode: running statistics rest
    after = model.state_dict()
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    assert all(torch.equal(after[name], state[name]) for name in state if name not in counters)


def test_perturbation_of_scores_reaches_the_model(tiny):
    model = tiny.net().train()
    pruner = hydra_of(model)
    x, y = tiny.batch()
    nn.functional.cross_entropy(model(x), y).backward()
    pruner.before_step()
    weights = {n: w.detach().clone() for n, w in prunable(model).items()}
    with perturbed(pruner, list(pruner.parameters()), 2.0):
        assert any(not torch.equal(w, weights[n]) for n, w in prunable(model).items())
    assert all(torch.equal(w, weights[n]) for n, w in prunable(model).items())


def test_awp_step_is_the_gradient_at_the_perturbed_weights(tiny):
    """One SGD step by hand."""
    data, settings = tiny.data(16), Settings(epochs=1, batch_size=16, lr=0.1, momentum=0.0, weight_decay=0.0, awp=0.05)
    batch = next(data.ordered(16))
    model = tiny.net()
    fit(model, Pruner(model), InEvalMode(), data, settings)
    by_hand = tiny.net().eval()
    names = dict(by_hand.named_parameters())
    first = torch.autograd.grad(nn.functional.cross_entropy(by_hand(batch.x), batch.y), list(names.values()))
    moved = {
        n: (p + 0.05 * p.norm() * g / g.norm() if p.dim() > 1 else p).detach().requires_grad_()
        for (n, p), g in zip(names.items(), first, strict=True)
    }
    logits = torch.func.functional_call(by_hand, moved, (batch.x,))
    second = torch.autograd.grad(nn.functional.cross_entropy(logits, batch.y), list(moved.values()))
    factor = schedule("cosine")(0, 0.0, 1)
    for (name, parameter), gradient in zip(names.items(), second, strict=True):
        expected = parameter.detach() - 0.1 * factor * gradient
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), expected, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True, kw_only=True)
class InEvalMode(Objective):
    def __call__(self, net, x, y, progress, noise):  # noqa: ARG002
        def loss():
            net.eval()
            logits = net(x)
            return Loss(nn.functional.cross_entropy(logits, y), logits)

        yield loss


def test_pruners_ask_for_the_perturbation_from_an_epoch_on(tiny):
    radii = []

    class Asking(Pruner):
        radius, radius_from = 0.01, 2

        def refresh(self):
            radii.append(1)

    run(tiny, SETTINGS, Asking)
    assert len(radii) == 3 * 2  # there and back, in the three steps of the last epoch


def test_gradients_are_clipped_to_the_norm(tiny, monkeypatch):
    norms = []
    original = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    run(tiny, replace(SETTINGS, clip_norm=0.05))
    assert max(norms) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(tiny, name):
    lr = 0.05 if name == "sgd" else 0.005
    _, _, found = run(tiny, replace(SETTINGS, epochs=8, optimizer=name, lr=lr))
    assert found.history[-1].values["loss"] < 0.6 * found.history[0].values["loss"]


def test_unknown_optimizer_offers_the_nearest(tiny):
    with pytest.raises(UsageError, match="unknown optimizer 'adamW'"):
        run(tiny, replace(SETTINGS, optimizer="adamW"))


def test_lr_admm(vectors):
    for key, values in vectors["lr_admm"].items():
        factor = schedule(f"thirds:{key.rpartition('admm_epoch')[2]}")
        for epoch, lr in values.items():
            assert 0.01 * factor(int(epoch), 0.5, 200) == pytest.approx(lr), (key, epoch)


def test_piecewise_falls_at_its_milestones():
    factor = schedule("piecewise:0.5,0.75")
    assert [factor(e, 0.0, 100) for e in (0, 49, 50, 74, 75, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert schedule("piecewise")(50, 0.0, 100) == pytest.approx(0.1)
    assert schedule("piecewise:0.3")(30, 0.0, 100) == pytest.approx(0.1)


def test_one_cycle_rises_and_falls():
    factor = schedule("one-cycle")
    assert [factor(e, 0.0, 10) for e in (0, 2, 4, 7)] == pytest.approx([0, 0.5, 1, 0.5])
    assert schedule("one-cycle:0.5")(5, 0.0, 10) == pytest.approx(1)


def test_warm_up_is_linear():
    factor = warmed_up(schedule("constant"), 4)
    assert [factor(e, d, 10) for e, d in ((0, 0.0), (1, 0.0), (2, 0.5), (4, 0.0), (9, 0.0))] == [0, 0.25, 0.625, 1, 1]


@pytest.mark.parametrize("name", ["piecewise:2", "piecewise:x", "cosine:1", "one-cycle:0.2,0.3", "thirds:0", "thirds:"])
def test_numbers_that_a_schedule_does_not_take(name):
    if name == "thirds:":
        assert schedule(name)(0, 0.0, 20) == 1
        return
    with pytest.raises(UsageError, match="does not take"):
        schedule(name)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_distillation_mixes_the_teachers_term(tiny, weight):
    net, teacher, (x, y) = tiny.net().eval(), tiny.net(seed=1).eval(), tiny.batch()
    inner = PGDAT(threat=ThreatModel.of("linf", "8/255"))
    taught = Distilled(inner=inner, teacher=teacher, weight=weight, temperature=4.0)
    (step,) = taught(net, x, y, 0.0, Stream(torch.Generator().manual_seed(0)))
    (plain,) = inner(net, x, y, 0.0, Stream(torch.Generator().manual_seed(0)))
    found, own = step(), plain()
    term = 16 * kl(teacher(x) / 4, own.logits / 4).mean()
    assert float(found.value.detach()) == pytest.approx(
        float(((1 - weight) * own.value + weight * term).detach()), rel=1e-5
    )
    assert taught.attack_used == inner.attack
    found.value.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_label_smoothing_is_torchs(tiny):
    net, (x, y) = tiny.net().eval(), tiny.batch()
    (step,) = Benign(label_smoothing=0.1)(net, x, y, 0.0, Stream(torch.Generator()))
    expected = nn.functional.cross_entropy(net(x), y, label_smoothing=0.1).detach()
    assert float(step().value.detach()) == pytest.approx(float(expected))
