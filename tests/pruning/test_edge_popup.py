"""edge-popup against its vectors."""

import math

import pytest
import torch
from torch import nn

from rprune.models.prunable import prunable
from rprune.models.registry import Architecture, build
from rprune.objectives.benign import Benign
from rprune.pruning.allocation import uniform
from rprune.pruning.base import Context
from rprune.pruning.budget import Budget
from rprune.pruning.edge_popup import EdgePopup
from rprune.pruning.hydra import ScorePruner
from rprune.pruning.masks import top_mask
from rprune.training.loop import Settings, fit


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def bound(model, sparsity=0.9, seed=0, **options):
    budget = Budget.of({n: w.numel() for n, w in prunable(model).items()}, sparsity)
    return EdgePopup(**options).bind(model, budget, Context(seed=seed))


def test_edge_popup_keep_count(vectors_others):
    """Exact where the reference's int((1 - k) n) is off, and never above the budget as its rounding may be."""
    for v in vectors_others["edge_popup_keep_count"]:
        kept = Budget.of({"layer": v["n"]}, round(1 - v["k"], 6)).kept
        assert kept == math.floor(v["k"] * v["n"] + 1e-9), v
        assert v["round_keep"] - 1 <= kept <= v["round_keep"] <= v["reference_keep"], v


@pytest.mark.parametrize("key", ["resnet18_0.01", "resnet18_0.001", "vgg16_0.01", "vgg16_0.001"])
def test_edge_popup_uniform_total(vectors_others, load_helper, key):
    v = vectors_others[f"edge_popup_uniform_total_{key}"]
    arch, density = key.split("_")
    shapes = load_helper("oracles/test_wrapper_net.py").SHAPES
    weights = {
        str(i): torch.empty(shape, device="meta")
        for i, shape in enumerate(shapes[{"resnet18": "resnet18_cifar", "vgg16": "vgg16_bn"}[arch]])
    }
    budget = Budget.of({name: w.numel() for name, w in weights.items()}, round(1 - float(density), 6))
    counts = uniform(weights, budget)
    assert sum(counts.values()) == budget.kept
    assert v["target_round"] - 1 <= budget.kept <= v["target_round"] < v["kept"]
    assert v["first_layer_kept"] - 1 <= counts["0"] <= v["first_layer_kept"]


def test_edge_popup_mask(vectors_others):
    """Backwards: the vector's two equal scores leave the choice to the sort, which took the last; here the first."""
    v = vectors_others["edge_popup_mask"]
    scores = torch.tensor(v["scores"][::-1], dtype=torch.float64)
    mask = top_mask(scores.abs(), round(v["k"] * len(scores)))
    assert mask.int().tolist()[::-1] == v["mask"]
    net = nn.Linear(5, 1, bias=False).double()
    net.weight.data = torch.tensor([v["weights"]], dtype=torch.float64)
    pruner = ScorePruner(net, {"weight": 2})
    pruner.scores["weight"].data = torch.tensor([v["scores"]], dtype=torch.float64)
    net.weight.grad = torch.tensor([v["upstream_dL_dWeff"]], dtype=torch.float64)
    pruner.before_step()
    assert pruner.scores["weight"].grad.flatten().tolist() == pytest.approx(v["dL_dscores"], abs=1e-12)


@pytest.mark.parametrize("kind", ["signed-constant", "kaiming-normal"])
def test_weights_are_random_with_kaimings_deviation(tiny, kind):
    pruner = bound(tiny.net(), weights=kind)
    for name, weight in pruner.weights.items():
        std = (2 / weight[0].numel()) ** 0.5
        assert float(weight.mean()) == pytest.approx(0, abs=0.2 * std)
        if kind == "signed-constant":
            torch.testing.assert_close(weight.abs(), torch.full_like(weight, std))
            assert (weight < 0).any(), name
        else:
            assert float(weight.std()) == pytest.approx(std, rel=0.1)


def test_scale_init_keeps_the_variance_of_what_is_kept(tiny):
    plain, scaled = bound(tiny.net()), bound(tiny.net(), scale_init=True)
    for name, weight in scaled.weights.items():
        share = scaled.counts()[name] / weight.numel()
        torch.testing.assert_close(weight * share**0.5, plain.weights[name])


def test_the_model_lends_its_shape_alone(tiny):
    first, second = tiny.net(0), tiny.net(1)
    a, b = bound(first), bound(second)
    assert tiny.same_bits(first.state_dict(), second.state_dict())
    assert tiny.same_bits(a.scores, b.scores)
    assert not torch.equal(bound(tiny.net(), seed=1).weights["fc.weight"], a.weights["fc.weight"])
    assert not first.fc.bias.any()
    assert torch.equal(first.bn1.weight, torch.ones(16))


def test_nothing_but_scores_is_learned(tiny):
    model = tiny.net()
    pruner = bound(model)
    before = {name: w.clone() for name, w in pruner.weights.items()}
    start = {name: mask.clone() for name, mask in pruner.masks().items()}
    fit(model, pruner, Benign(), tiny.data(), Settings(epochs=2, batch_size=24, lr=0.5))
    masks = pruner.finish()
    assert any(not torch.equal(mask, start[name]) for name, mask in masks.items())
    for name, weight in prunable(model).items():
        assert torch.equal(weight, before[name].where(masks[name], torch.zeros(())))
    assert torch.equal(model.bn1.weight, torch.ones(16))
    assert not model.bn1.bias.any()
    assert not model.fc.bias.any()
    assert model.bn1.running_mean.any()


def test_a_net_without_batch_norm_passes_a_signal_when_scaled():
    spread = []
    for scale_init in (False, True):
        model = build(Architecture("cnn-small", 10, (3, 16, 16)))
        bound(model, 0.95, scale_init=scale_init)
        x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        spread.append(float(model(x).detach().std()))
    assert spread[0] < 0.05 < spread[1]
