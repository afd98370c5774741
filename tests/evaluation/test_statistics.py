from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta

from rprune.evaluation.statistics import clopper_pearson, drop_interval, fisher, mcnemar


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


def sign_test(lost: int, gained: int) -> Fraction:
    """The share of all ways to toss a coin for each pair that are no likelier than the one seen."""
    m = lost + gained
    ways = [math.comb(m, k) for k in range(m + 1)]
    return Fraction(sum(w for w in ways if w <= ways[lost]), 2**m)


def test_mcnemar_counts_the_coin_tosses() -> None:
    for lost in range(14):
        for gained in range(14):
            assert mcnemar(lost, gained) == pytest.approx(float(sign_test(lost, gained)), rel=1e-9)
    assert mcnemar(31, 25) == pytest.approx(0.5044, abs=1e-4)


def tables(first: tuple[int, int], second: tuple[int, int]) -> float:
    """The share of all ways to draw the right ones out of both that are no likelier than the one seen."""
    (a, n), (b, m) = first, second
    ways = {k: math.comb(n, k) * math.comb(m, a + b - k) for k in range(max(0, a + b - m), min(n, a + b) + 1)}
    return sum(w for w in ways.values() if w <= ways[a]) / math.comb(n + m, a + b)


@pytest.mark.parametrize(
    ("first", "second"),
    [((8, 10), (3, 12)), ((0, 5), (5, 5)), ((0, 4), (0, 9)), ((30, 40), (20, 40)), ((7, 9), (7, 9))],
)
def test_fisher_counts_the_tables(first: tuple[int, int], second: tuple[int, int]) -> None:
    assert fisher(first, second) == pytest.approx(tables(first, second), rel=1e-9)


def melded(lost: int, gained: int, n: int, drop: float) -> float:
    """P(share that differs x balance <= drop) of Fay and Lumbard's upper bound, by quadrature over the balance."""
    m = lost + gained
    share = {True: (m + 1, n - m), False: (m, n - m + 1)}

    def inside(theta: float) -> float:
        balance = 2 * theta - 1
        a, b = share[balance > 0]
        if balance == 0:
            return float(drop >= 0)
        below = beta.cdf(min(max(drop / balance, 0), 1), a, b)
        return float(below if balance > 0 else 1 - below) * float(beta.pdf(theta, lost + 1, gained))

    return sum(quad(inside, *ends, limit=400, epsabs=1e-10)[0] for ends in ((0, 0.5), (0.5, 1)))


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(31, 25, 1000), (5, 9, 40), (1, 1, 2 + 5), (30, 2, 359), (0, 6, 100)]
)
def test_bounds_of_a_drop_against_quadrature(lost: int, gained: int, n: int) -> None:
    lower, upper = drop_interval(lost, gained, n)
    assert melded(lost, gained, n, upper) == pytest.approx(0.975, abs=2e-4)
    if lost:
        assert melded(gained, lost, n, -lower) == pytest.approx(0.975, abs=2e-4)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_drop_without_gains_is_clopper_and_pearsons_share(level: float) -> None:
    for lost in (1, 4, 20, 29):
        assert drop_interval(lost, 0, 30, level)[1] == pytest.approx(clopper_pearson(lost, 30, level)[1], abs=1e-9)
    low, high = drop_interval(0, 0, 30, level)
    assert (-low, high) == pytest.approx((clopper_pearson(0, 30, level)[1],) * 2)


def test_interval_of_a_drop_leaves_out_none_exactly_where_mcnemar_rejects() -> None:
    n = 12
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            low, high = drop_interval(lost, gained, n)
            assert -1 <= low <= (lost - gained) / n <= high <= 1
            assert (low > 0 or high < 0) == (mcnemar(lost, gained) <= 0.05), (lost, gained)
            assert drop_interval(gained, lost, n) == (-high, -low)


def worst_coverage(n: int, level: float, steps: int) -> tuple[float, float]:
    """Over a grid of all shares of losses and gains, how rarely the upper bound and the interval hold the true drop."""
    cells = [(lost, gained) for lost in range(n + 1) for gained in range(n + 1 - lost)]
    bounds = np.array([drop_interval(lost, gained, n, level) for lost, gained in cells])
    ways = [math.factorial(n) // math.prod(map(math.factorial, (i, j, n - i - j))) for i, j in cells]
    upper, both = 1.0, 1.0
    for p in range(steps + 1):
        for q in range(steps + 1 - p):
            lost, gained = p / steps, q / steps
            same = 1 - lost - gained
            chance = np.array(
                [w * lost**i * gained**j * max(same, 0) ** (n - i - j) for w, (i, j) in zip(ways, cells, strict=True)]
            )
            below, above = bounds[:, 0] <= lost - gained + 1e-9, bounds[:, 1] >= lost - gained - 1e-9
            upper, both = min(upper, float(chance[above].sum())), min(both, float(chance[above & below].sum()))
    return upper, both


@pytest.mark.parametrize(
    ("n", "level", "steps"),
    [(4, 0.95, 40), (8, 0.95, 24), (8, 0.8, 24), pytest.param(20, 0.95, 30, marks=pytest.mark.slow)],
)
def test_interval_of_a_drop_covers_the_truth_at_least_as_often_as_it_says(n: int, level: float, steps: int) -> None:
    """Every outcome is enumerated, so this is exact on the grid."""
    upper, both = worst_coverage(n, level, steps)
    assert upper >= (1 + level) / 2 - 1e-9
    assert both >= level
