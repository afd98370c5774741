"""The numeric vectors of HYDRA, HARP, ERK and LAMP, key by key."""

import math

import pytest
import torch
from torch import nn

from rprune.models.prunable import prunable
from rprune.pruning.allocation import ALLOCATORS, allocate, erk, lamp, lamp_scores, uniform
from rprune.pruning.base import Context
from rprune.pruning.budget import Budget, apportion, fill
from rprune.pruning.harp import Harp, HarpPruner, hardware_loss
from rprune.pruning.hydra import ScorePruner
from rprune.pruning.initial_scores import scaled_initial_scores
from rprune.pruning.masks import top_mask
from rprune.pruning.rates import initial_r, rate


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def empty(shapes):
    """Weights of given shapes that take no memory."""
    return {f"layer{i}": torch.empty(shape, device="meta") for i, shape in enumerate(shapes)}


def budget_of(weights, keep_rate):
    return Budget.of({name: w.numel() for name, w in weights.items()}, round(1 - keep_rate, 6))


@pytest.fixture(scope="module")
def shapes(load_helper):
    oracle_test = load_helper("oracles/test_wrapper_net.py")
    return oracle_test.SHAPES


@pytest.mark.parametrize("key", ["hydra_conv", "hydra_linear"])
def test_scores_and_masks_of_hydra(vectors, key):
    v = vectors[key]
    weight = f64(v["weight_flat"]).view(v["weight_shape"])
    scores = scaled_initial_scores(weight)
    torch.testing.assert_close(scores.flatten(), f64(v["scores_flat"]), rtol=0, atol=1e-8)
    for expected in v["masks"].values():
        mask = top_mask(scores.abs(), weight.numel() - expected["n_pruned"])
        assert mask.flatten().int().tolist() == expected["mask"]


def test_rounding(vectors):
    for v in vectors["rounding"]:
        kept = Budget.of({"layer": v["N"]}, round(1 - v["keep_rate"], 6)).kept
        assert kept == math.floor(v["ideal"] + 1e-9), v
        assert 0 <= v["N"] - v["pruned_exact"] - kept <= 1, v


@pytest.mark.parametrize("arch", ["vgg16_bn", "resnet18_cifar"])
def test_uniform_totals(vectors, shapes, arch):
    weights = empty(shapes[arch])
    for keep_rate, v in vectors["uniform_totals"][arch].items():
        budget = budget_of(weights, float(keep_rate))
        counts = uniform(weights, budget)
        assert budget.total == v["total"]
        assert sum(counts.values()) == budget.kept == math.floor(v["budget"])
        layerwise = {name: n - math.floor((1 - float(keep_rate)) * n + 1e-6) for name, n in budget.sizes.items()}
        assert sum(layerwise.values()) == v["kept_layerwise_floor_prune"]
        assert all(abs(counts[name] - layerwise[name]) <= 1 for name in counts)


def ste_net(v):
    """The vector's layer, and one that makes room for a target density of 1 %."""
    net = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(14, 14, bias=False)).double()
    net[0].weight.data = f64([v["w"]])
    return net


def pulled(pruner, net, v):
    pruner.scores["0.weight"].data = f64([v["s"]])
    net[0].weight.grad = f64([v["upstream_dL_dweff"]])
    pruner.before_step()
    return pruner.scores["0.weight"].grad.flatten().tolist()


def test_ste_of_hydra(vectors):
    v = vectors["ste"]
    net = ste_net(v)
    pruner = ScorePruner(net, {"0.weight": 2, "1.weight": 1})
    assert pulled(pruner, net, v) == v["dL_dscore"]
    pruner.after_step()
    assert pruner.masks()["0.weight"].flatten().int().tolist() == v["mask"]
    assert net[0].weight.detach().flatten().tolist() == [1, 0, 0, -4]


def test_ste_of_harp(vectors):
    v = vectors["ste"]
    net = ste_net(v)
    budget = Budget({"0.weight": 4, "1.weight": 196}, 2)
    pruner = HarpPruner(net, budget, {"0.weight": v["a"], "1.weight": v["a"]}, 0.01)
    assert float(pruner.r.detach()[0]) == pytest.approx(v["r"], abs=1e-6)
    assert float(pruner.rates().detach()[0]) == pytest.approx(v["a"], abs=1e-7)
    assert pulled(pruner, net, v) == v["dL_dscore"]
    assert pruner.r.grad.tolist() == pytest.approx([v["dL_dr"], 0], abs=1e-6)


def test_harp_r_init(vectors):
    for v in vectors["harp_r_init"]:
        r = initial_r(v["a_init"], v["a_t"])
        assert r == pytest.approx(v["r"], abs=1e-9), v
        r = f64(r).requires_grad_()
        a = rate(r, v["a_t"])
        a.backward()
        assert float(a.detach()) == pytest.approx(v["a_roundtrip"], abs=1e-12), v
        assert float(r.grad) == pytest.approx(v["g_prime"], abs=1e-12), v


def test_harp_r_init_is_clipped_from_below():
    for a_init in (0.001, 0.0005, 0.002):
        assert initial_r(a_init, 0.01) == pytest.approx(math.log(0.01 / 0.99), abs=1e-12)


def test_harp_bind_starts_every_layer_at_its_r(vectors):
    v = next(v for v in vectors["harp_r_init"] if (v["a_init"], v["a_t"]) == (0.1, 0.01))
    net = nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 100))
    budget = Budget.of({name: w.numel() for name, w in prunable(net).items()}, 0.99)
    pruner = Harp().bind(net, budget, Context(20, 391))
    assert pruner.r.tolist() == pytest.approx([v["r"], v["r"]], abs=1e-6)
    assert pruner.gamma == pytest.approx(0.01)


def test_harp_lhw(vectors):
    for v in vectors["harp_lhw"]:
        a = f64(v["a"]).requires_grad_()
        sizes = f64(v["N"])
        assert float((sizes * a).detach().sum() / sizes.sum()) == pytest.approx(v["rate"])
        loss = hardware_loss(a, sizes, v["a_t"])
        loss.backward()
        assert float(loss.detach()) == pytest.approx(v["L_hw"], abs=1e-12)
        if isinstance(v["dL_da"], list):
            assert a.grad.tolist() == pytest.approx(v["dL_da"], abs=1e-9)


def test_harp_gamma(vectors):
    v = vectors["harp_gamma"]
    net = nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 100))
    budget = Budget.of({name: w.numel() for name, w in prunable(net).items()}, 0.99)
    pruner = HarpPruner(net, budget, dict.fromkeys(budget.sizes, 0.1), v["step"])
    seen = []
    for epoch in range(15):
        pruner.before_epoch(epoch)
        seen.append(pruner.gamma)
        pruner.r.data.fill_(-20.0 if epoch == 10 else 0.0)  # the target is met after epoch 10 alone
        assert pruner.within_budget() == (epoch == 10)
        pruner.after_epoch(epoch)
    assert seen[:11] == pytest.approx(v["first_epochs"][:11])
    assert seen[11:] == pytest.approx([0.11] * 4)


def test_harp_gamma_never_rests_while_the_target_is_missed(vectors):
    v = vectors["harp_gamma"]
    net = nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 100))
    budget = Budget.of({name: w.numel() for name, w in prunable(net).items()}, 0.99)
    pruner = HarpPruner(net, budget, dict.fromkeys(budget.sizes, 0.1), v["step"])
    for epoch, gamma in enumerate(v["first_epochs"]):
        pruner.before_epoch(epoch)
        assert pruner.gamma == pytest.approx(gamma)
        assert float(pruner.penalty().detach()) == pytest.approx(gamma * float(pruner.hardware_loss().detach()))
        pruner.after_epoch(epoch)


def erk_cases(vectors, shapes):
    for key, v in vectors["erk"].items():
        arch, keep_rate = key.split("@")
        yield key, empty(v["shapes"] if arch == "tiny" else shapes[arch]), float(keep_rate), v


def test_erk_densities(vectors, shapes):
    for key, weights, keep_rate, v in erk_cases(vectors, shapes):
        # densities do not depend on the unit of the counts; in thousandths the budget is whole
        sizes = {name: 1000 * w.numel() for name, w in weights.items()}
        budget = Budget(sizes, round(keep_rate * sum(sizes.values())))
        counts = fill({name: float(sum(w.shape)) for name, w in weights.items()}, budget)
        found = [counts[name] / sizes[name] for name in sizes]
        assert found == pytest.approx(v["densities"], abs=1e-6), key


def test_erk_kept(vectors, shapes):
    for key, weights, keep_rate, v in erk_cases(vectors, shapes):
        budget = budget_of(weights, keep_rate)
        counts = erk(weights, budget)
        assert sum(counts.values()) == budget.kept
        expected = [min(math.ceil(n), w.numel()) for n, w in zip(v["kept"], weights.values(), strict=True)]
        assert all(abs(n - m) <= 1 for n, m in zip(counts.values(), expected, strict=True)), (key, counts)


def test_lamp_scores(vectors):
    v = vectors["lamp"]
    for layer in "AB":
        assert lamp_scores(f64(v[layer])).tolist() == pytest.approx(v[f"score_{layer}"], abs=1e-12)


@pytest.mark.parametrize("kept", [2, 3, 4, 5])
def test_lamp_keep(vectors, kept):
    v = vectors["lamp"]
    weights = {"A": f64(v["A"]), "B": f64(v["B"])}
    counts = lamp(weights, Budget({"A": 3, "B": 4}, kept))
    expected = v[f"keep{kept}"]
    assert counts == {"A": round(3 * expected["A"]), "B": round(4 * expected["B"])}


@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator_meets_the_budget_of_a_layer_that_is_full(name):
    weights = {"small": torch.full((2, 2), 9.0), "large": torch.arange(1.0, 401.0).view(20, 20)}
    counts = allocate(name, weights, Budget({"small": 4, "large": 400}, 380))
    assert sum(counts.values()) == 380
    assert counts["small"] <= 4


def test_apportion_gives_the_odd_weight_to_the_largest_remainder():
    budget = Budget({"a": 10, "b": 10, "c": 10}, 7)
    assert apportion({"a": 2.2, "b": 2.5, "c": 2.3}, budget) == {"a": 2, "b": 3, "c": 2}
