from __future__ import annotations

import math

import pytest

from rprune.evaluation.statistics import clopper_pearson


def tail(correct: int, n: int, p: float) -> float:
    """P(X >= correct) for X ~ B(n, p)."""
    return math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(correct, n + 1))


def inverted(correct: int, n: int, level: float) -> tuple[float, float]:
    """The p where each tail has half of what the level leaves, by bisection."""

    def root(rising) -> float:
        low, high = 0.0, 1.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if rising(middle) < (1 - level) / 2 else (low, middle)
        return low

    lower = 0.0 if correct == 0 else root(lambda p: tail(correct, n, p))
    upper = 1.0 if correct == n else 1 - root(lambda q: 1 - tail(correct + 1, n, 1 - q))
    return lower, upper


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("correct", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (37, 60), (0, 1), (1, 1), (98, 100)])
def test_interval_inverts_the_binomial_tails(correct: int, n: int, level: float) -> None:
    assert clopper_pearson(correct, n, level) == pytest.approx(inverted(correct, n, level), abs=1e-9)


@pytest.mark.parametrize("p", [0.03, 0.5, 0.9])
def test_interval_covers_the_truth_at_least_as_often_as_it_says(p: float) -> None:
    n = 40
    missed = 0.0
    for k in range(n + 1):
        low, high = clopper_pearson(k, n, 0.95)
        if not low <= p <= high:
            missed += math.comb(n, k) * p**k * (1 - p) ** (n - k)
    assert missed <= 0.05


def test_interval_contains_the_observed_share() -> None:
    for k in range(31):
        low, high = clopper_pearson(k, 30)
        assert 0 <= low <= k / 30 <= high <= 1
