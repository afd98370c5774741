"""HARP-r and HARP-S."""

import pytest
import torch

from rprune.models.prunable import prunable
from rprune.objectives.benign import Benign
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget
from rprune.pruning.initial_scores import initial_scores
from rprune.training.loop import Settings, fit


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def bound(name, model, sparsity, **options):
    budget = Budget.of({n: w.numel() for n, w in prunable(model).items()}, sparsity)
    return METHODS.build({"name": name, **options}).bind(model, budget, Context(3, 2)), budget


def train(model, pruner, tiny):
    return fit(model, pruner, Benign(), tiny.data(), Settings(epochs=3, batch_size=24, lr=0.5))


def test_harp_r_learns_rates_and_leaves_scores(tiny):
    model = tiny.net()
    pruner, budget = bound("harp-r", model, 0.9, gamma_step=0.5)
    assert all(not any(t is s for s in pruner.scores.values()) for t in pruner.parameters())
    before, r = initial_scores("scaled", pruner.weights, 0), pruner.r.detach().clone()
    train(model, pruner, tiny)
    assert tiny.same_bits(pruner.scores, before)
    assert not torch.equal(pruner.r, r)
    masks = pruner.finish()
    assert sum(int(m.sum()) for m in masks.values()) == budget.kept
    for name, mask in masks.items():  # a layer keeps its largest weights
        size = pruner.weights[name].abs()
        assert size[mask].min() >= size[~mask].max()


def test_rates_of_harp_r_get_harps_gradient(tiny):
    models = [tiny.net(), tiny.net()]
    pruners = [bound(name, model, 0.9)[0] for name, model in zip(("harp", "harp-r"), models, strict=True)]
    x, y = tiny.batch()
    for model, pruner in zip(models, pruners, strict=True):
        torch.nn.functional.cross_entropy(model.eval()(x), y).backward()
        pruner.before_step()
    assert torch.equal(pruners[0].r.grad, pruners[1].r.grad)
    assert pruners[0].scores["fc.weight"].grad is not None
    assert pruners[1].scores["fc.weight"].grad is None


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_harp_s_keeps_the_targets_share_in_every_layer(tiny, sparsity):
    """The released score_prune mode keeps 73 % whatever is asked for."""
    model = tiny.net()
    pruner, budget = bound("harp-s", model, sparsity)
    train(model, pruner, tiny)
    masks = pruner.finish()
    assert sum(int(m.sum()) for m in masks.values()) == budget.kept
    for name, mask in masks.items():
        assert abs(int(mask.sum()) - budget.density * budget.sizes[name]) <= 1


def test_harp_s_is_hydra(tiny):
    found = []
    for name in ("harp-s", "hydra"):
        model = tiny.net()
        pruner, _ = bound(name, model, 0.9)
        train(model, pruner, tiny)
        found.append(pruner.finish() | model.state_dict())
    assert tiny.same_bits(*found)
