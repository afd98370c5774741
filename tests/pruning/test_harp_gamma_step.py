"""HARP's default step of gamma: the paper's, scaled to the steps that there are, but no further than rates can go."""

import pytest
from torch import nn

from rprune.models.prunable import prunable
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget


def bound(sparsity, context, exclude=(), **options):
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 128, 3), nn.Conv2d(128, 16, 3), nn.Flatten(), nn.Linear(16, 64)
    )
    budget = Budget.of({n: w.numel() for n, w in prunable(net).items()}, sparsity, exclude=exclude)
    return METHODS.build({"name": "harp", **options}).bind(net, budget, context)


def first_step(pruner, lr):
    """Largest move of an r by the penalty's gradient, by autograd."""
    pruner.penalty().backward()
    return lr * float(pruner.r.grad.abs().max())


@pytest.mark.parametrize("lr", [0.1, 0.02])
@pytest.mark.parametrize("options", [{}, {"initial_density": 0.5}, {"allocation": "erk"}])
def test_the_first_step_is_bounded_where_steps_are_few(lr, options):
    pruner = bound(0.9985, Context(2, 10, lr=lr), **options)
    assert pruner.gamma < 0.01 * 391
    assert first_step(pruner, lr) == pytest.approx(0.3, rel=1e-5)


def test_layers_that_stay_dense_have_no_say():
    pruner = bound(0.45, Context(1, 1, lr=10.0), exclude=("1.weight",), initial_density=0.9)
    assert first_step(pruner, 10.0) == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("sparsity", [0.9, 0.99, 0.9985])
def test_the_papers_run_has_the_papers_gamma(sparsity):
    pruner = bound(sparsity, Context(20, 391))
    assert pruner.gamma == pytest.approx(0.01)
    assert first_step(pruner, 0.1) < 0.3


def test_few_steps_scale_it_where_that_is_gentle_enough():
    assert bound(0.9, Context(5, 71)).gamma == pytest.approx(0.01 * 391 * 20 / (5 * 71))


def test_a_start_from_dense_rates_is_no_division_by_zero():
    pruner = bound(0.9985, Context(2, 10), initial_density=1.0)
    assert 0 < pruner.gamma < 1e6
    assert first_step(pruner, 0.1) <= 0.3 * (1 + 1e-5)


def test_what_is_asked_for_is_taken():
    assert bound(0.9985, Context(2, 10), gamma_step=7.0).gamma == 7.0
