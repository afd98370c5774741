"""Codebooks: the vectors, the best possible partition of tiny inputs, and that no weight is ever lost."""

import itertools

import pytest
import torch

from rprune.pruning.codebook import LEVELS, boundaries, learn, lloyd, nearest, quantize, seeds, size_in_bits


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def drawn(n, seed, power=1, dtype=torch.float64):
    """Non-zero random values; a higher power has heavier tails."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(power).to(dtype)


def squared_error(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)


def best_error(values, levels):
    """The least squared error over all partitions into intervals of one sign, tried one by one."""
    values = sorted(values)
    errors = []
    for cuts in range(levels):
        for inner in itertools.combinations(range(1, len(values)), cuts):
            ends = [0, *inner, len(values)]
            parts = [values[a:b] for a, b in itertools.pairwise(ends)]
            if not any(part[0] < 0 < part[-1] for part in parts):
                errors.append(sum(map(squared_error, parts)))
    return min(errors)


def test_kmeans_zero_center(vectors_others):
    """The paper's quantizer: 0 is a centre like the others, but rests, and small values fall to it."""
    v = vectors_others["kmeans_zero_center"]
    centres = lloyd(f64(v["x"]).sort().values, f64(v["init"]).sort().values)
    torch.testing.assert_close(centres, f64(v["centers"]).sort().values, rtol=0, atol=1e-9)
    torch.testing.assert_close(nearest(f64(v["x"]), centres), f64(v["quantized_ref"]), rtol=0, atol=1e-9)


def test_kmeans_fixed_support(vectors_others):
    v = vectors_others["kmeans_fixed_support"]
    values = f64(v["x"])
    codebook = lloyd(values[values != 0].sort().values, f64(v["init"]))
    torch.testing.assert_close(codebook, f64(v["codebook"]), rtol=0, atol=1e-9)
    found = torch.where(values != 0, nearest(values, codebook), 0.0)
    torch.testing.assert_close(found, f64(v["quantized"]), rtol=0, atol=1e-9)


def test_atmc_bits(vectors_others):
    v = vectors_others["atmc_bits"]
    assert sum(size_in_bits(*layer) for layer in v["layers(nnz,levels,quantised)"]) == v["bits"]


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("power", [1, 3])
def test_tiny_inputs_against_the_best_partition(levels, power):
    ratios = []
    for seed in range(60):
        values = drawn(8, seed, power)
        error = float((quantize(values, values != 0, levels) - values).square().sum())
        ratios.append(error / best_error(values.tolist(), levels))
    assert min(ratios) > 1 - 1e-9
    assert sorted(ratios)[len(ratios) // 2] < 1 + 1e-9, "most are the best there is"
    assert sum(ratios) / len(ratios) < {2: 1.01, 3: 1.1, 4: 1.3 if power == 1 else 4}[levels]


def test_two_levels_are_the_means_of_the_signs():
    values = drawn(50, 0)
    found = learn(values, 2)
    torch.testing.assert_close(found, torch.stack([values[values < 0].mean(), values[values > 0].mean()]))


@pytest.mark.parametrize("power", [1, 3])
def test_seeds_serve_the_tails(power):
    """Lloyd's algorithm from quantiles, as often proposed, ends far above."""
    values = drawn(20_000, 1, power).sort().values
    quantiles = values[torch.linspace(0, len(values) - 1, LEVELS, dtype=torch.float64).long()]

    def error(centres):
        return float((nearest(values, centres) - values).square().sum())

    assert error(learn(values)) < error(lloyd(values, quantiles)) / 4
    assert error(learn(values)) < 1.2 * error(lloyd(values, learn(values), steps=500))


@pytest.mark.parametrize("seed", range(5))
def test_lloyd_is_the_textbooks(seed):
    values = drawn(40, seed).sort().values
    centres = values[[3, 11, 20, 31, 38]]
    expected = centres.tolist()
    for _ in range(7):
        clusters = [[] for _ in expected]
        for value in values.tolist():
            same = [i for i, c in enumerate(expected) if (c > 0) == (value > 0)]
            clusters[min(same, key=lambda i: abs(expected[i] - value))].append(value)
        expected = [sum(c) / len(c) if c else old for c, old in zip(clusters, expected, strict=True)]
    torch.testing.assert_close(lloyd(values, centres, steps=7), f64(expected))


def test_an_empty_cluster_keeps_its_centre():
    assert lloyd(f64([1.0, 2.0, 9.0]), f64([1.5, 5.0, 5.1, 9.0])).tolist() == [1.5, 5.0, 5.1, 9.0]


@pytest.mark.parametrize("levels", [2, 3, 7, 255])
@pytest.mark.parametrize("power", [1, 9])
def test_no_weight_is_lost(levels, power):
    weight = drawn(4 * 600, levels, power, torch.float32).view(40, 60)
    support = weight.abs() > weight.abs().median()
    found = quantize(weight, support, levels)
    assert torch.equal(found != 0, support)
    assert not torch.signbit(found[~support]).any()
    assert torch.equal(found.sign(), weight.masked_fill(~support, 0.0).sign())
    assert len(found[support].unique()) <= levels
    assert torch.equal(found, quantize(weight, support, levels))


@pytest.mark.parametrize(
    "values",
    [
        [-1e-30, 1e-30, 2e-30, 1e20, -1e20, 3e20],
        [-1.0, -1e-40, 1e-40, 1.0],
        [-3.0, -2.0, -1.0, -0.5, 5.0],
        [-5.0, 0.5, 1.0, 2.0, 3.0],
        [1.0] * 50 + [1.0000001] * 50 + [7.0],
        [1e-8] * 1000 + [1e8, 2e8, 3e8],
    ],
)
def test_hard_values_keep_their_sign(values):
    values = torch.tensor(values)
    found = quantize(values, values != 0, 2)
    assert torch.equal(found.sign(), values.sign())
    assert (found.abs() <= values.abs().max()).all()


def test_few_values_stay_as_they_are():
    weight = drawn(LEVELS, 3, 3, torch.float32)
    assert torch.equal(quantize(weight, weight != 0), weight)
    repeated = weight.repeat(20)
    assert torch.equal(quantize(repeated, repeated != 0), repeated)
    once = quantize(drawn(3000, 4), torch.ones(3000, dtype=torch.bool))
    assert torch.equal(quantize(once, once != 0), once)
    assert not quantize(weight, torch.zeros(LEVELS, dtype=torch.bool)).any()


def test_seeds_are_different_values_of_both_signs():
    for n, levels in [(5, 4), (12, 11), (300, 255), (1000, 3)]:
        for values in (drawn(n, n, 5), drawn(n, n).abs(), torch.cat([-drawn(n, n).abs(), f64([0.001])])):
            distinct = values.unique()
            found = seeds(distinct, levels)
            assert (found.diff() > 0).all()
            assert (found[0], found[-1]) == (distinct[0], distinct[-1])


def test_boundaries_never_mix_signs():
    assert boundaries(f64([-4.0, -1.0, 3.0, 5.0])).tolist() == [-2.5, 0.0, 4.0]
