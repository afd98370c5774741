"""Scratch: a random mask of fresh weights."""

import pytest
import torch

from rprune.models.prunable import prunable
from rprune.pruning.allocation import allocate
from rprune.pruning.base import Context
from rprune.pruning.budget import Budget
from rprune.pruning.scratch import Scratch


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def bound(model, seed=0, **options):
    budget = Budget.of({n: w.numel() for n, w in prunable(model).items()}, 0.9)
    return Scratch(**options).bind(model, budget, Context(seed=seed)), budget


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
def test_counts_are_the_allocators(tiny, allocation):
    model = tiny.net()
    pruner, budget = bound(model, allocation=allocation)
    counts = {name: int(mask.sum()) for name, mask in pruner.masks().items()}
    assert counts == allocate(allocation, prunable(model), budget)


def test_neither_mask_nor_weights_depend_on_the_model_given(tiny):
    first, second = tiny.net(0), tiny.net(1)
    a, b = bound(first)[0], bound(second)[0]
    assert tiny.same_bits(a.masks(), b.masks())
    assert tiny.same_bits(first.state_dict(), second.state_dict())
    other = bound(tiny.net(), seed=1)[0].masks()
    assert all(not torch.equal(mask, other[name]) for name, mask in a.masks().items())


def test_given_weights_can_be_kept(tiny):
    model, given = tiny.net(), tiny.net()
    pruner, _ = bound(model, reinitialize=False)
    for name, mask in pruner.masks().items():
        assert torch.equal(prunable(model)[name], prunable(given)[name].where(mask, torch.zeros(())))


def test_the_mask_is_not_the_largest_weights(tiny):
    model = tiny.net()
    pruner, _ = bound(model, reinitialize=False)
    kept = pruner.masks()["conv2.weight"]
    size = prunable(tiny.net())["conv2.weight"].abs()
    assert size[kept].mean() < 1.2 * size.mean()


def test_scale_init_divides_by_the_root_of_the_kept_share(tiny):
    plain, scaled = tiny.net(), tiny.net()
    masks = bound(plain)[0].masks()
    assert tiny.same_bits(bound(scaled, scale_init=True)[0].masks(), masks)
    for name, mask in masks.items():
        share = int(mask.sum()) / mask.numel()
        torch.testing.assert_close(prunable(scaled)[name] * share**0.5, prunable(plain)[name])
