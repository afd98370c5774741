"""A-l0: the projection against its vector and against a sort, and what holds after every step."""

import pytest
import torch
from torch import nn

from rprune.models.prunable import prunable
from rprune.objectives.benign import Benign
from rprune.pruning.a_l0 import largest
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget
from rprune.pruning.masks import count, impose
from rprune.training.loop import Settings, fit


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def budget_of(model, sparsity, **options):
    return Budget.of({name: w.numel() for name, w in prunable(model).items()}, sparsity, **options)


def bound(model, budget, **options):
    return METHODS.build({"name": "a-l0", **options}).bind(model, budget, Context(3, 2))


def checked(pruner):
    """Look at the model after every step; the list has the kept counts by layer."""
    seen = []
    original = pruner.after_step

    def after_step():
        original()
        held = prunable(pruner.model)
        assert all(torch.equal(held[name], value) for name, value in pruner.learned.items())
        seen.append({name: int(weight.count_nonzero()) for name, weight in held.items()})

    pruner.after_step = after_step
    return seen


def test_l0proj(vectors_others):
    v = vectors_others["l0proj"]
    tensors = {name: torch.tensor(v[name], dtype=torch.float64) for name in "ABC"}
    impose(tensors, largest({name: t.abs() for name, t in tensors.items()}, v["k"], {}))
    assert {name: t.tolist() for name, t in tensors.items()} == {name: v[f"{name}_out"] for name in "ABC"}


@pytest.mark.parametrize("seed", range(20))
def test_projection_is_a_sort_with_floors(seed):
    generator = torch.Generator().manual_seed(seed)
    # of few values, so that many are equal
    scores = {n: torch.randint(0, 5, (i + 2, 3), generator=generator).double() for i, n in enumerate("abc")}
    least = {"a": 1, "c": 4}
    kept = int(torch.randint(5, 24, (1,), generator=generator))
    flat = [(name, i, s) for name, score in scores.items() for i, s in enumerate(score.flatten().tolist())]
    order = sorted(flat, key=lambda entry: -entry[2])
    first = [e for name, n in least.items() for e in [e for e in order if e[0] == name][:n]]
    chosen = (first + [e for e in order if e not in first])[:kept]
    masks = largest(scores, kept, least)
    found = {(name, int(i)) for name, mask in masks.items() for i in mask.flatten().nonzero()}
    assert found == {(name, i) for name, i, _ in chosen}


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99, 0.999])
def test_every_step_ends_within_the_budget(tiny, sparsity):
    model = tiny.net()
    before = {name: w.detach().clone() for name, w in prunable(model).items()}
    budget = budget_of(model, sparsity)
    pruner = bound(model, budget)
    assert tiny.same_bits(prunable(model), before), "binding leaves the net as it was"
    seen = checked(pruner)
    fit(model, pruner, Benign(), tiny.data(), Settings(epochs=3, batch_size=24, lr=0.5))
    assert len(seen) == 6
    assert all(sum(counts.values()) == budget.kept and min(counts.values()) >= 1 for counts in seen)
    masks = pruner.finish()
    assert count(masks) == budget.kept
    assert {name: int(w.count_nonzero()) for name, w in prunable(model).items()} == seen[-1]
    assert pruner.log() == {"kept_share": budget.kept / budget.total}


def test_what_was_cut_can_come_back():
    net = nn.Linear(3, 1, bias=False)
    net.weight.data = torch.tensor([[3.0, 2.0, 1.0]])
    pruner = bound(net, Budget({"weight": 3}, 2))
    optimizer = torch.optim.SGD(pruner.parameters(), lr=1)
    for gradient, expected in [([0.0, 0.0, 0.0], [3.0, 2.0, 0.0]), ([0.0, 1.5, -1.0], [3.0, 0.0, 1.0])]:
        optimizer.zero_grad()
        net.weight.grad = torch.tensor([gradient])
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
        assert net.weight.tolist() == [expected]


def test_dense_layers_stay_dense(tiny):
    model = tiny.net()
    budget = budget_of(model, 0.7, exclude=["conv1"], floor=0.05)
    seen = checked(pruner := bound(model, budget))
    fit(model, pruner, Benign(), tiny.data(), Settings(epochs=1, batch_size=24, lr=0.5))
    for counts in seen:
        assert counts["conv1.weight"] == budget.sizes["conv1.weight"]
        assert sum(counts.values()) == budget.kept
        assert all(n >= budget.least[name] for name, n in counts.items())


@pytest.mark.parametrize("options", [{"average": "ema"}, {"awp": 0.01}, {"average": "swa", "awp": 0.01}])
@pytest.mark.parametrize("name", ["a-l0", "atmc"])
def test_averages_and_perturbations_stay_on_the_ball(tiny, name, options):
    """An average of sparse nets is not sparse: the model that is validated and kept is its projection."""
    model = tiny.net()
    budget = budget_of(model, 0.9)
    pruner = METHODS.build(name).bind(model, budget, Context(3, 2))
    seen = []

    def validate(net):
        seen.append(sum(int(value.count_nonzero()) for value in pruner.projected().values()))
        assert all(torch.equal(prunable(net)[n], w) for n, w in pruner.made_of(pruner.projected()).items())
        return {"score": 0.0}

    settings = Settings(epochs=3, batch_size=24, lr=0.5, **options)
    fit(model, pruner, Benign(), tiny.data(), settings, validate=validate)
    assert seen == [budget.kept] * 3
    assert count(pruner.finish()) == budget.kept
    assert sum(int(w.count_nonzero()) for w in prunable(model).values()) == budget.kept
