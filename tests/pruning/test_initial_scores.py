"""Initial scores: the statistics of each kind, and where a wrong name is refused."""

import typing

import pytest
import torch

from rprune.errors import UsageError
from rprune.models.prunable import prunable
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget
from rprune.pruning.initial_scores import RANDOM, InitialScores, initial_scores, scaled_initial_scores

WEIGHTS = {
    "conv.weight": torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(0)),
    "fc.weight": torch.randn(100, 300, generator=torch.Generator().manual_seed(1)),
}
KINDS = typing.get_args(InitialScores)
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_the_kinds_are_those_of_hydra():
    assert set(KINDS) == {"scaled", *RANDOM}


@every_kind
def test_scores_look_like_the_weights_and_depend_on_seed_and_name_alone(kind):
    scores = initial_scores(kind, WEIGHTS, 3)
    state = torch.get_rng_state()
    again = initial_scores(kind, {"fc.weight": torch.zeros(100, 300) + 1, **WEIGHTS}, 3)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in WEIGHTS.items():
        assert (scores[name].shape, scores[name].dtype) == (weight.shape, weight.dtype)
        assert scores[name].is_leaf
        assert torch.equal(scores[name], again[name])
        assert not torch.equal(scores[name], weight)
    if kind not in ("scaled", "dirac"):
        assert not torch.equal(scores["fc.weight"], initial_scores(kind, WEIGHTS, 4)["fc.weight"])


@every_kind
def test_memory_layout_and_double_precision_are_kept(kind):
    weights = {"w": WEIGHTS["conv.weight"].double().to(memory_format=torch.channels_last)}
    scores = initial_scores(kind, weights, 0)["w"]
    assert scores.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(scores, initial_scores(kind, {"w": weights["w"].contiguous()}, 0)["w"])


@pytest.mark.parametrize(
    ("kind", "conv", "fc"),
    [
        ("xavier-normal", (2 / (9 * 32 + 9 * 64)) ** 0.5, (2 / 400) ** 0.5),
        ("xavier-uniform", (2 / (9 * 32 + 9 * 64)) ** 0.5, (2 / 400) ** 0.5),
        ("kaiming-normal", (2 / 288) ** 0.5, (2 / 300) ** 0.5),
        ("kaiming-uniform", (1 / (3 * 288)) ** 0.5, (1 / 900) ** 0.5),
    ],
)
def test_standard_deviations(kind, conv, fc):
    scores = initial_scores(kind, WEIGHTS, 0)
    assert float(scores["conv.weight"].std()) == pytest.approx(conv, rel=0.03)
    assert float(scores["fc.weight"].std()) == pytest.approx(fc, rel=0.03)
    if kind.endswith("uniform"):
        assert float(scores["fc.weight"].abs().max()) <= fc * 3**0.5 + 1e-6


def test_orthogonal_rows():
    for scores in initial_scores("orthogonal", WEIGHTS, 0).values():
        rows = scores.flatten(1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)


def test_dirac_passes_every_channel_on():
    scores = initial_scores("dirac", WEIGHTS, 0)
    x = torch.rand(2, 32, 5, 5)
    y = torch.nn.functional.conv2d(x, scores["conv.weight"], padding=1)
    assert torch.equal(y[:, :32], x)
    assert not y[:, 32:].any()
    assert torch.equal(scores["fc.weight"], torch.eye(100, 300))


def test_scaled_scores_of_an_empty_tensor_are_zero():
    assert scaled_initial_scores(torch.zeros(3, 2)).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("method", ["hydra", "harp", "harp-r", "harp-s", "edge-popup"])
def test_methods_start_from_the_named_scores(load_helper, method):
    tiny = load_helper("pruning/tiny_net.py")
    for kind in KINDS:
        model = tiny.net()
        budget = Budget.of({name: w.numel() for name, w in prunable(model).items()}, 0.9)
        pruner = METHODS.build({"name": method, "initial_scores": kind}).bind(model, budget, Context(seed=7))
        assert tiny.same_bits(pruner.scores, initial_scores(kind, pruner.weights, 7)), kind


@pytest.mark.parametrize("method", ["hydra", "harp", "edge-popup"])
def test_a_misspelt_kind_is_refused_with_the_recipe(method):
    with pytest.raises(UsageError, match=r"unknown initial_scores in method .*'kaiming'") as caught:
        METHODS.build({"name": method, "initial_scores": "kaiming"})
    assert "did you mean 'kaiming-normal'?" in caught.value.hint


def test_a_misspelt_kind_is_refused_when_bound():
    with pytest.raises(UsageError, match="unknown initialisation of scores 'ortogonal'") as caught:
        initial_scores("ortogonal", WEIGHTS, 0)
    assert "did you mean 'orthogonal'?" in caught.value.hint
