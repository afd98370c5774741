"""STR: the numeric vector, gradients, and the controller that steers it to the budget."""

import math

import pytest
import torch
from torch.func import functional_call

from rprune.models.prunable import prunable
from rprune.objectives.benign import Benign
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget
from rprune.pruning.masks import count
from rprune.pruning.soft_threshold import THRESHOLDS, level, soft_threshold
from rprune.training.loop import Settings, fit


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def bound(tiny, sparsity=0.9, epochs=4, steps=2, dtype=torch.float32, dense=(), **options):
    model = tiny.net(dtype=dtype)
    sizes = {name: w.numel() for name, w in prunable(model).items()}
    budget = Budget.of(sizes, sparsity, exclude=dense)
    return model, METHODS.build({"name": "str", **options}).bind(model, budget, Context(epochs, steps))


def test_str(vectors_others):
    v = vectors_others["str"]
    w = torch.tensor(v["w"], dtype=torch.float64, requires_grad=True)
    s = torch.tensor(v["s"], dtype=torch.float64, requires_grad=True)
    threshold = THRESHOLDS["sigmoid"](s)
    effective = soft_threshold(w, threshold)
    effective.backward(torch.tensor(v["upstream"], dtype=torch.float64))
    assert float(threshold.detach()) == pytest.approx(v["threshold"], abs=1e-9)
    assert effective.tolist() == pytest.approx(v["w_eff"], abs=1e-9)
    assert float((effective == 0).double().mean()) == v["sparsity"]
    assert w.grad.tolist() == v["dL_dw"]
    assert float(s.grad) == pytest.approx(v["dL_ds"], abs=1e-9)


@pytest.mark.parametrize("kind", ["sigmoid", "exp"])
def test_level_is_the_inverse(kind):
    s = torch.linspace(-30, -0.1, 50, dtype=torch.float64)
    torch.testing.assert_close(level(kind, THRESHOLDS[kind](s)), s)
    assert level(kind, torch.tensor([0.0, 1.0, 50.0])).isfinite().all()


@pytest.mark.parametrize("kind", ["sigmoid", "exp"])
def test_gradients_are_those_of_the_reparameterised_net(tiny, kind):
    model, pruner = bound(tiny, threshold=kind, ramp=0, dtype=torch.float64)
    x, y = tiny.batch(dtype=torch.float64)
    model.eval()
    names = list(pruner.weights)
    weights = {name: w.detach().clone().requires_grad_() for name, w in pruner.weights.items()}
    s = (pruner._start + pruner._offset).detach().clone().requires_grad_()
    g = torch.sigmoid if kind == "sigmoid" else torch.exp
    effective = {n: weights[n].sign() * torch.relu(weights[n].abs() - g(s[i])) for i, n in enumerate(names)}
    torch.nn.functional.cross_entropy(functional_call(model, effective, (x,)), y).backward()

    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    pruner.before_step()
    expected = s.grad - pruner._marginal * s.grad.sum()  # c rises where s falls
    assert float(pruner.s.grad.sum()) == pytest.approx(0, abs=1e-6)  # a common s is no change at all
    for index, name in enumerate(names):
        torch.testing.assert_close(prunable(model)[name].detach(), effective[name].detach())
        torch.testing.assert_close(pruner.weights[name].grad, weights[name].grad)
        assert float(pruner.s.grad[index]) == pytest.approx(float(expected[index]), rel=1e-4)
        assert s.grad[index] != 0


def test_the_common_offset_answers_to_each_s_by_its_marginal(tiny):
    _, pruner = bound(tiny, 0.5, ramp=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, weight in enumerate(pruner.weights.values()):
            weight.normal_(std=0.01 * 2**index, generator=generator)
    pruner.refresh()
    marginal = pruner._marginal.tolist()
    assert sum(marginal) == pytest.approx(1)
    for index, expected in enumerate(marginal):
        found = []
        for step in (0.3, -0.3):
            with torch.no_grad():
                pruner.s.zero_()[index] = step
            pruner.refresh()
            found.append(float(pruner._offset))
        assert (found[1] - found[0]) / 0.6 == pytest.approx(expected, abs=0.05)


def test_kept_share_falls_by_a_cubic_to_the_budget(tiny):
    model, pruner = bound(tiny, epochs=8, ramp=0.5)
    total, kept = pruner.budget.total, pruner.budget.kept
    expected = [kept + round((1 - min(1, t / 8)) ** 3 * (total - kept)) for t in range(17)]
    seen = [count(pruner.current_masks())]
    original = pruner.after_step

    def after_step():
        original()
        seen.append(count(pruner.current_masks()))
        assert seen[-1] == sum(int(w.count_nonzero()) for w in prunable(model).values())
        assert pruner.within_budget() == (seen[-1] == kept)

    pruner.after_step = after_step
    result = fit(model, pruner, Benign(), tiny.data(), Settings(epochs=8, batch_size=24))
    assert seen == expected
    assert seen[0] == total
    assert [log.values["kept_share"] * total for log in result.history] == pytest.approx(expected[2::2])


def test_the_loss_moves_the_budget_between_layers(tiny):
    model, pruner = bound(tiny, ramp=0)
    start = {name: int(mask.sum()) for name, mask in pruner.masks().items()}
    fit(model, pruner, Benign(), tiny.data(), Settings(epochs=4, batch_size=24, lr=0.5))
    assert {name: int(mask.sum()) for name, mask in pruner.finish().items()} != start
    assert pruner.s.detach().abs().min() > 0


def test_start_is_the_allocation(tiny):
    for allocation in ("erk", "uniform", "magnitude"):
        _, pruner = bound(tiny, ramp=0, allocation=allocation)
        counts = METHODS.build({"name": "lwm", "allocation": allocation})
        model = tiny.net()
        with torch.no_grad():
            for name, weight in prunable(model).items():
                weight.copy_(pruner.weights[name])
        expected = counts.bind(model, pruner.budget, Context()).masks()
        assert all(torch.equal(mask, expected[name]) for name, mask in pruner.masks().items())


def test_a_layer_below_its_floor_keeps_its_largest_with_the_next_as_threshold(tiny):
    model, pruner = bound(tiny, ramp=0, reinitialize=False)
    with torch.no_grad():
        pruner.s[0] = 50.0  # the threshold of the first layer is all but 1
    pruner.refresh()
    masks = pruner.masks()
    assert int(masks["conv1.weight"].sum()) == 1
    assert count(masks) == pruner.budget.kept
    w = pruner.weights["conv1.weight"].detach().abs().flatten()
    first, second = w.topk(2).values
    held = prunable(model)["conv1.weight"].detach()
    assert held.abs().max() == pytest.approx(float(first - second))
    assert math.isclose(float(held.count_nonzero()), 1)


def test_a_dense_layer_has_no_threshold(tiny):
    model, pruner = bound(tiny, 0.6, dense=["fc"])
    fit(model, pruner, Benign(), tiny.data(), Settings(epochs=4, batch_size=24))
    masks = pruner.finish()
    assert masks["fc.weight"].all()
    assert torch.equal(model.fc.weight, pruner.weights["fc.weight"])
    assert count(masks) == pruner.budget.kept
    assert pruner.s.detach()[-1] == 0
    assert pruner.s.detach().isfinite().all()


def test_masks_before_the_ramp_has_ended_meet_the_budget(tiny):
    _, pruner = bound(tiny)
    assert not pruner.within_budget()
    assert count(pruner.masks()) == pruner.budget.kept
    assert count(pruner.current_masks()) == pruner.budget.total
    early = pruner.masks()
    assert all(torch.equal(mask, early[name]) for name, mask in pruner.finish().items())
