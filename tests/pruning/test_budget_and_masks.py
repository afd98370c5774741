"""Budgets, shares, masks and allocators: what must hold for any numbers, and what is refused."""

import json
import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rprune.errors import InputError, UsageError
from rprune.pruning.allocation import ALLOCATORS, allocate, global_top, lamp_scores
from rprune.pruning.budget import Budget, apportion, fill
from rprune.pruning.masks import count, impose, top_mask

quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def budgets(draw):
    sizes = {f"l{i}": n for i, n in enumerate(draw(st.lists(st.integers(1, 3000), min_size=1, max_size=8)))}
    floor = draw(st.integers(1, 4))
    least = sum(min(floor, n) for n in sizes.values())
    return Budget(sizes, draw(st.integers(least, sum(sizes.values()))), floor)


@st.composite
def shared(draw):
    budget = draw(budgets())
    share = st.one_of(st.integers(0, 1000).map(float), st.floats(0, 1e6))
    return budget, {name: draw(share) for name in budget.sizes}


@quick
@given(shared())
def test_fill_meets_the_budget_between_floor_and_size(case):
    budget, shares = case
    counts = fill(shares, budget)
    assert sum(counts.values()) == pytest.approx(budget.kept, rel=1e-9, abs=1e-6)
    for name, size in budget.sizes.items():
        assert min(budget.floor, size) <= counts[name] <= size


@quick
@given(shared())
def test_apportion_is_exact_between_floor_and_size(case):
    budget, shares = case
    counts = apportion(shares, budget)
    wanted = fill(shares, budget)
    assert list(counts) == list(budget.sizes)
    assert sum(counts.values()) == budget.kept
    for name, size in budget.sizes.items():
        assert min(budget.floor, size) <= counts[name] <= size
        assert abs(counts[name] - wanted[name]) <= 1 + 1e-6


@quick
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8), st.integers(1, 500), st.floats(0, 1))
def test_apportion_gives_no_less_to_a_larger_share_of_an_equal_layer(shares, size, level):
    sizes = {f"l{i}": size for i in range(len(shares))}
    kept = len(shares) + int(level * (len(shares) * size - len(shares)))
    counts = apportion(dict(zip(sizes, map(float, shares), strict=True)), Budget(sizes, kept))
    ranked = sorted(zip(shares, counts.values(), strict=True))
    for (lower, few), (higher, many) in pairwise(ranked):
        assert lower == higher or few <= many


@quick
@given(st.integers(0, 999_999), st.lists(st.integers(1, 10**7), min_size=1, max_size=5))
def test_budget_is_exact_in_fractions(millionths, numbers):
    sizes = {f"l{i}": n for i, n in enumerate(numbers)}
    exact = math.floor((1 - Fraction(millionths, 10**6)) * sum(numbers))
    if exact < len(sizes):
        with pytest.raises(UsageError):
            Budget.of(sizes, millionths / 10**6)
    else:
        assert Budget.of(sizes, millionths / 10**6).kept == exact


@pytest.mark.parametrize(
    ("sparsity", "total", "kept"),
    [(0.9, 10, 1), (0.1, 10, 9), (0.7, 10, 3), (0.99, 100, 1), (0.57, 100, 43), (0.0, 7, 7)],
)
def test_budget_has_no_float_trap(sparsity, total, kept):
    assert Budget.of({"w": total}, sparsity).kept == kept


def test_budget_of_a_tiny_sparsity():
    assert Budget.of({"w": 10**6}, 1e-06).kept == 10**6 - 1


@st.composite
def score_tensors(draw):
    """Few distinct values, so that ties are common; contiguous, transposed, strided or channels last."""
    shape = draw(st.tuples(*[st.integers(1, 4)] * 4))
    values = draw(st.lists(st.integers(0, 6), min_size=math.prod(shape), max_size=math.prod(shape)))
    scores = torch.tensor(values, dtype=draw(st.sampled_from([torch.float32, torch.float64]))).view(shape)
    layout = draw(st.sampled_from(["plain", "channels_last", "transposed", "strided"]))
    if layout == "channels_last":
        scores = scores.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        scores = scores.permute(3, 1, 0, 2)
    elif layout == "strided":
        scores = torch.stack([scores, scores + 1], dim=-1)[..., 0]
    return scores


@quick
@given(score_tensors(), st.data())
def test_top_mask(scores, data):
    kept = data.draw(st.integers(0, scores.numel()))
    before = scores.clone()
    mask = top_mask(scores, kept)
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    assert torch.equal(scores, before)
    flat = scores.reshape(-1).tolist()
    best = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:kept]
    assert mask.reshape(-1).nonzero().flatten().tolist() == sorted(best)


def test_impose_leaves_no_negative_zero():
    weight = torch.tensor([[-1.0, 2.0], [-3.0, -0.0]])
    impose({"w": weight}, {"w": torch.tensor([[False, True], [False, False]])})
    assert weight.tolist() == [[0, 2], [0, 0]]
    assert not torch.signbit(weight).any()


def test_count():
    assert count({"a": torch.tensor([True, False]), "b": torch.ones(3, dtype=torch.bool)}) == 4


@quick
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40, unique_by=abs))
def test_lamp_scores_are_those_of_the_definition(load_helper, values):
    weight = torch.tensor(values)
    if (weight.double().square() < 1e-30).any():
        return
    torch.testing.assert_close(lamp_scores(weight), load_helper("oracles/wrapper_net.py").lamp_scores(weight))


def test_lamp_scores_of_zero_weights_are_finite():
    assert lamp_scores(torch.zeros(3, 2)).tolist() == [[0, 0]] * 3


def test_lamp_scores_keep_the_small_ones_apart():
    """The sum runs over the larger weights alone: a small weight after large ones still has its own score."""
    weight = torch.tensor([1e4, 1e-4, 2e-4])
    assert lamp_scores(weight)[1:].tolist() == pytest.approx([1e-16, 4e-16], rel=1e-6)


@quick
@given(budgets(), st.integers(0, 2**31))
def test_global_top_is_exact_and_keeps_the_floors(budget, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randint(0, 50, (n,), generator=generator).float() for name, n in budget.sizes.items()}
    counts = global_top(scores, budget)
    assert sum(counts.values()) == budget.kept
    assert all(min(budget.floor, n) <= counts[name] <= n for name, n in budget.sizes.items())
    kept = [s.sort(descending=True).values[budget.floor : counts[name]] for name, s in scores.items()]
    dropped = [s.sort(descending=True).values[counts[name] :] for name, s in scores.items()]
    if torch.cat(kept).numel() and torch.cat(dropped).numel():
        assert torch.cat(kept).min() >= torch.cat(dropped).max()


@pytest.mark.parametrize("sparsity", [1.5, -0.1, 1.0, float("nan"), float("inf")])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(UsageError, match="sparsity"):
        Budget.of({"w": 100}, sparsity)


def test_sparsity_that_empties_a_layer_names_the_largest_possible():
    sizes = {"a": 10, "b": 90}
    with pytest.raises(UsageError, match="leaves a layer empty") as caught:
        Budget.of(sizes, 0.99)
    assert "0.98" in caught.value.hint
    assert Budget.of(sizes, 0.98).kept == 2


def test_model_without_weights():
    with pytest.raises(UsageError, match="no conv or linear"):
        Budget.of({}, 0.5)


WEIGHTS = {"conv.weight": torch.arange(1.0, 25.0).view(4, 6), "fc.weight": torch.arange(1.0, 9.0).view(2, 4)}
HALF = Budget({"conv.weight": 24, "fc.weight": 8}, 16)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_allocators_meet_the_budget(name):
    counts = allocate(name, WEIGHTS, HALF)
    assert sum(counts.values()) == 16
    assert min(counts.values()) >= 1


def test_unknown_allocator_offers_the_nearest():
    with pytest.raises(UsageError, match="'unifrom'") as caught:
        allocate("unifrom", WEIGHTS, HALF)
    assert "'uniform'" in caught.value.hint


def table(tmp_path, content):
    path = tmp_path / "shares.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"file:{path}"


def test_allocation_file(tmp_path):
    assert allocate(table(tmp_path, {"conv.weight": 0.5, "fc.weight": 0.5}), WEIGHTS, HALF) == {
        "conv.weight": 12,
        "fc.weight": 4,
    }
    counts = allocate(table(tmp_path, {"fc.weight": 1, "conv.weight": 0.1}), WEIGHTS, HALF)
    assert counts == {"conv.weight": 8, "fc.weight": 8}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"conv.weight": 0.5}, "fc.weight"),
        ({"conv.weight": 0.5, "fc.weight": 0.5, "bias": 0.5}, "bias"),
        ({"conv.weight": 1.5, "fc.weight": 0.5}, "outside"),
        ({"conv.weight": -0.5, "fc.weight": 0.5}, "outside"),
        ({"conv.weight": "much", "fc.weight": 0.5}, "outside"),
        ([0.5, 0.5], "table"),
        ("{", "cannot read"),
    ],
)
def test_allocation_file_that_does_not_fit(tmp_path, content, reason):
    with pytest.raises(InputError, match=reason):
        allocate(table(tmp_path, content), WEIGHTS, HALF)


def test_allocation_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="not there"):
        allocate(f"file:{tmp_path / 'none.json'}", WEIGHTS, HALF)
