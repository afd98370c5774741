"""ERK, IGQ and LAMP on the vectors of the second fact sheet, and the bounds that every allocator keeps."""

import math

import pytest
import torch

from rprune.errors import UsageError
from rprune.pruning.allocation import ALLOCATORS, allocate, erk, igq, lamp, lamp_scores
from rprune.pruning.budget import Budget, dense_layers
from rprune.pruning.masks import top_mask

TOY = {"a": (4, 3, 3, 3), "b": (8, 4, 3, 3), "c": (8, 8, 1, 1), "d": (10, 8)}
NETS = {"resnet18": "resnet18_cifar", "vgg16": "vgg16_bn"}


def empty(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def sizes_of(weights):
    return {name: weight.numel() for name, weight in weights.items()}


@pytest.fixture(scope="module")
def shapes(load_helper):
    return load_helper("oracles/test_wrapper_net.py").SHAPES


@pytest.mark.parametrize("key", ["erk_toy_d0.3", "erk_toy_d0.6", "igq_toy_d0.3"])
def test_toy(vectors_others, key):
    v = vectors_others[key]
    weights = empty(TOY)
    counts = (erk if key.startswith("erk") else igq)(weights, Budget(sizes_of(weights), sum(v["counts"])))
    assert list(counts.values()) == v["counts"]


@pytest.mark.parametrize("rule", ["erk", "igq"])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("density", ["0.1", "0.01", "0.001"])
def test_nets(vectors_others, shapes, rule, net, density):
    v = vectors_others[f"{rule}_{net}_{density}"]
    weights = empty(dict(enumerate(shapes[NETS[net]])))
    weights = {str(name): weight for name, weight in weights.items()}
    wanted = list(v["counts"].values() if isinstance(v["counts"], dict) else v["counts"])
    counts = list(ALLOCATORS[rule](weights, Budget(sizes_of(weights), sum(wanted))).values())
    assert sum(counts) == sum(wanted)
    assert max(abs(a - b) for a, b in zip(counts, wanted, strict=True)) <= 1


def test_lamp_toy(vectors_others):
    v = vectors_others["lamp_toy"]
    weights = {"w1": torch.tensor(v["w1"]), "w2": torch.tensor(v["w2"])}
    for name, key in (("w1", "score1"), ("w2", "score2")):
        torch.testing.assert_close(lamp_scores(weights[name]).float(), torch.tensor(v[key]), rtol=0, atol=1e-6)
    counts = lamp(weights, Budget(sizes_of(weights), v["keep_total"]))
    for name, key in (("w1", "mask1"), ("w2", "mask2")):
        assert top_mask(weights[name].abs(), counts[name]).int().tolist() == v[key]


def test_lamp_float32_pitfall(vectors_others):
    """The scores of a large layer do not suffer from cancellation: the largest weight scores exactly 1."""
    v = vectors_others["lamp_float32_pitfall"]
    weight = torch.randn(v["n"], generator=torch.Generator().manual_seed(0))
    scores = lamp_scores(weight)
    assert float(scores.max()) == v["true_top1"]
    squares = weight.double().square().sort(descending=True).values
    exact = squares[:1000] / squares.cumsum(0)[:1000]
    torch.testing.assert_close(scores.sort(descending=True).values[:1000], exact.sort(descending=True).values)


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("kept", [4, 5, 40, 162, 500, 539, 540])
@pytest.mark.parametrize("dense", [(), ("c",)])
def test_every_allocator_keeps_budget_floors_and_dense_layers(name, kept, dense):
    weights = {n: torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, (n, s) in enumerate(TOY.items())}
    sizes = sizes_of(weights)
    total = sum(sizes.values())
    if kept < 4 + (63 if dense else 0) or kept > total:
        with pytest.raises(UsageError):
            Budget(sizes, kept, dense=frozenset(dense))
        return
    budget = Budget(sizes, kept, dense=frozenset(dense))
    counts = allocate(name, weights, budget)
    assert list(counts) == list(sizes)
    assert sum(counts.values()) == kept
    assert all(budget.least[n] <= counts[n] <= sizes[n] for n in sizes)
    assert all(counts[n] == sizes[n] for n in dense)


def test_uniform_plus_keeps_the_first_layer_dense_where_the_budget_allows():
    weights = empty(TOY)
    counts = allocate("uniform+", weights, Budget(sizes_of(weights), 250))
    assert counts["a"] == 108
    assert counts["d"] == max(16, math.floor(250 / 540 * 80))


def test_floor_may_be_a_share():
    budget = Budget({"a": 1000, "b": 10}, 120, floor=0.1)
    assert budget.least == {"a": 100, "b": 1}
    with pytest.raises(UsageError, match="floor"):
        Budget({"a": 1000, "b": 10}, 100, floor=0.1)


def test_globs_name_what_stays_dense():
    names = ["conv1.weight", "layer1.conv.weight", "fc.weight"]
    assert dense_layers(names, [], []) == frozenset()
    assert dense_layers(names, [], ["conv1", "fc.weight"]) == {"conv1.weight", "fc.weight"}
    assert dense_layers(names, ["layer*"], []) == {"conv1.weight", "fc.weight"}
    assert dense_layers(names, ["*conv*"], ["conv1"]) == {"conv1.weight", "fc.weight"}
    with pytest.raises(UsageError, match="unknown layer 'fx'") as caught:
        dense_layers(names, [], ["fx"])
    assert "fc.weight" in caught.value.hint


def test_shape_totals(vectors_others, shapes):
    for key, arch in (("resnet18_cifar", "resnet18_cifar"), ("vgg16_fc256_cifar", "vgg16_bn")):
        v = vectors_others["shape_totals"][key]
        assert len(shapes[arch]) == v["layers"]
        assert sum(math.prod(shape) for shape in shapes[arch]) == v["prunable"]


def test_erk_vs_harp_vgg16(vectors_others, shapes):
    """Our ERK is as near to the vector's as that is to the list which HARP publishes for VGG16 at 10 %."""
    weights = {str(name): weight for name, weight in empty(dict(enumerate(shapes["vgg16_bn"]))).items()}
    sizes = sizes_of(weights)
    counts = erk(weights, Budget.of(sizes, 0.9))
    ours = [counts[name] / sizes[name] for name in sizes]
    theirs = list(vectors_others["erk_vgg16_0.1"]["density"].values())
    limit = vectors_others["erk_vs_harp_vgg16_maxabsdiff"] + max(1 / n for n in sizes.values())
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= limit
