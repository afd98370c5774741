"""Magnitude pruning: at once, in steps, and ATMC's two baselines."""

import pytest
import torch

from rprune.models.prunable import prunable
from rprune.objectives.benign import Benign
from rprune.pruning.allocation import ALLOCATORS
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget
from rprune.pruning.lwm import LWM, LWMMultistep
from rprune.pruning.masks import count
from rprune.training.loop import Settings, fit


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def budget_of(model, sparsity=0.9, **options):
    return Budget.of({n: w.numel() for n, w in prunable(model).items()}, sparsity, **options)


def train(model, pruner, tiny, epochs, **options):
    return fit(model, pruner, Benign(), tiny.data(), Settings(epochs=epochs, batch_size=24, lr=0.1), **options)


@pytest.mark.parametrize(("epochs", "steps"), [(10, 10), (10, 5), (10, 4), (10, 3), (7, 20), (1, 20), (5, 1)])
def test_the_kept_share_falls_by_the_same_factor_at_every_step(tiny, epochs, steps):
    model = tiny.net()
    budget = budget_of(model, 0.99)
    pruner = LWMMultistep(steps=steps).bind(model, budget, Context(epochs))
    taken = min(steps, epochs)
    seen = []
    for epoch in range(epochs):
        pruner.before_epoch(epoch)
        seen.append(sum(int(w.count_nonzero()) for w in prunable(model).values()))
        assert pruner.log()["kept_share"] == seen[-1] / budget.total
        assert pruner.within_budget() == (seen[-1] == budget.kept)
        assert count(pruner.masks()) == budget.kept
    levels = sorted(set(seen), reverse=True)
    assert seen == sorted(seen, reverse=True)
    assert levels == [round(budget.total * budget.density ** (i / taken)) for i in range(1, taken)] + [budget.kept]
    runs = [seen.count(level) for level in levels]
    assert max(runs) - min(runs) <= 1, "training is not spread over the steps"


@pytest.mark.parametrize("allocation", ALLOCATORS)
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_what_is_pruned_stays_pruned(tiny, allocation, sparsity):
    model = tiny.net()
    pruner = LWMMultistep(allocation=allocation).bind(model, budget_of(model, sparsity), Context(4, 2))
    dead = {name: w.detach() == 0 for name, w in prunable(model).items()}
    original = pruner.after_step

    def after_step():
        original()
        for name, weight in prunable(model).items():
            assert not weight[dead[name]].any()
            assert not torch.signbit(weight[dead[name]]).any()
            dead[name] |= weight.detach() == 0

    pruner.after_step = after_step
    train(model, pruner, tiny, 4)
    masks = pruner.finish()
    assert count(masks) == budget_of(model, sparsity).kept
    assert all(not (mask & dead[name]).any() for name, mask in masks.items())


def test_each_cut_takes_the_smallest_weights_of_the_moment(tiny):
    model = tiny.net()
    pruner = LWMMultistep().bind(model, budget_of(model), Context(2, 1))
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)))
    before = {name: w.detach().abs() for name, w in prunable(model).items()}
    pruner.before_epoch(1)
    for name, mask in pruner.masks().items():
        assert before[name][mask].min() >= before[name][~mask].max()


def test_only_epochs_after_the_last_step_are_selected(tiny):
    model = tiny.net()
    pruner = LWMMultistep(steps=2).bind(model, budget_of(model), Context(4, 2))
    scores = iter([9.0, 8.0, 2.0, 1.0])
    found = train(model, pruner, tiny, 4, validate=lambda net: {"score": next(scores)})
    assert found.selected_epoch == 3
    assert count(pruner.finish()) == budget_of(model).kept


@pytest.mark.parametrize("options", [{"floor": 30}, {"floor": 0.05}, {"exclude": ("conv1", "fc")}])
def test_floors_and_dense_layers_hold_at_every_step(tiny, options):
    model = tiny.net()
    budget = budget_of(model, 0.55, **options)
    pruner = LWMMultistep(allocation="magnitude").bind(model, budget, Context(5))
    for epoch in range(5):
        pruner.before_epoch(epoch)
        for name, weight in prunable(model).items():
            assert int(weight.count_nonzero()) >= budget.least[name]
    assert count(pruner.finish()) == budget.kept


def test_without_epochs_it_is_lwm(tiny):
    found = []
    for method in (LWM(), LWMMultistep()):
        model = tiny.net()
        pruner = method.bind(model, budget_of(model), Context(0))
        found.append(pruner.finish() | model.state_dict())
    assert tiny.same_bits(*found)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_nap_and_ap_keep_the_largest_weights_of_the_whole_net(tiny, sparsity):
    found = []
    for name in ("nap", "ap"):
        model = tiny.net()
        found.append(METHODS.build(name).bind(model, budget_of(model, sparsity), Context()).finish())
    assert tiny.same_bits(*found)
    size = {name: w.detach().abs() for name, w in prunable(tiny.net()).items()}
    kept = torch.cat([size[name][mask] for name, mask in found[0].items()])
    dropped = torch.cat([size[name][~mask] for name, mask in found[0].items()])
    assert len(kept) == budget_of(tiny.net(), sparsity).kept
    # a layer's floor of one weight may be below the threshold
    assert kept.sort().values[len(found[0])] >= dropped.max()
