"""Intervals and tests for counts. Of pairs, ``lost`` are right in the first count alone, ``gained`` in the second."""

from __future__ import annotations

import numpy as np

STRATA = 4000  # equal parts of the distribution that is integrated over


def clopper_pearson(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval of a binomial proportion (Clopper and Pearson, 1934)."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence_level=level, method="exact")
    return float(interval.low), float(interval.high)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value that both counts of a pair have the same expectation (McNemar, 1947): a sign test."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def fisher(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Exact two-sided p-value that two shares, each a count and its n, of different samples are one (Fisher, 1935)."""
    from scipy.stats import fisher_exact

    return float(fisher_exact([[correct, n - correct] for correct, n in (first, second)]).pvalue)


def drop_interval(lost: int, gained: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of the drop of a share between two measurements of the same ``n`` samples.

    The drop is (lost - gained) / n in expectation: the share of pairs that differ, times twice the share of losses
    among them less 1. The Clopper-Pearson intervals of these two shares are melded (Fay and Lumbard, Statistics in
    Medicine 40, 2021, "Confidence intervals for difference in proportions for matched pairs compatible with exact
    McNemar's or sign tests"): 0 lies outside exactly when :func:`mcnemar` is at most 1 - level. That each bound holds
    at its level is their conjecture, of extensive numerical evidence; the tests here enumerate it as well. Computed to
    about 1e-4 of the level.
    """
    tail = (1 - level) / 2
    return -_largest_drop(gained, lost, n, tail), _largest_drop(lost, gained, n, tail)


def _largest_drop(lost: int, gained: int, n: int, tail: float) -> float:
    """The upper bound, which the drop exceeds with probability ``tail``."""
    from scipy.optimize import brentq
    from scipy.special import betainc, betaincinv

    differ = lost + gained

    def below(x: np.ndarray, a: int, b: int) -> np.ndarray:
        """P(X <= x) for X ~ Beta(a, b), which is 0 for a = 0, and 1 for b = 0."""
        x = np.clip(x, 0, 1)
        return np.asarray(betainc(a, b, x) if a and b else x >= (1 if a else 0), np.float64)

    middles = (np.arange(STRATA) + 0.5) / STRATA
    balance = 2 * (betaincinv(lost + 1, gained, middles) if gained else np.ones(STRATA)) - 1  # in [-1, 1]
    down, up = balance[balance < 0], balance[balance > 0]

    def excess(drop: float) -> float:
        """P(share that differs x balance <= drop) less the level, the share as large as is bad for the sign."""
        if drop < 0:
            found = 1 - below(drop / down, differ, n - differ + 1)
            return float(found.sum() / STRATA - (1 - tail))
        found = below(drop / up, differ + 1, n - differ)
        return float((found.sum() + STRATA - len(up)) / STRATA - (1 - tail))

    return float(brentq(excess, -1, 1, xtol=1e-12))
