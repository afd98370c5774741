"""What counts of noisy predictions prove: bounds on a probability, and the l2 radius that follows. No torch.

A fixed test counts once. The sequential one may be read at any time: its e-process, a Beta(1/2, 1/2) mixture over
p > p0 against p0, passes 1/alpha at no time with probability 1 - alpha when p <= p0 (Ville's inequality).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Test = Literal["fixed", "sequential"]
ABSTAIN = -1
PRIOR = 0.5  # both parameters of the Beta mixture
STEPS = 60  # of bisection: below float64's resolution


def lower_confidence_bound(count: int, n: int, alpha: float) -> float:
    """One-sided Clopper-Pearson lower bound of a probability at confidence 1 - alpha."""
    from scipy.stats import beta

    return 0.0 if count == 0 else float(beta.ppf(alpha, count, n - count + 1))


def upper_confidence_bound(count: int, n: int, alpha: float) -> float:
    """One-sided Clopper-Pearson upper bound of a probability at confidence 1 - alpha."""
    return 1.0 - lower_confidence_bound(n - count, n, alpha)


def log_e_value(count: ArrayLike, n: ArrayLike, p0: ArrayLike) -> NDArray[np.float64]:
    """Logarithm of the e-value of ``count`` of ``n`` draws against "the probability is at most p0"; p0 in (0, 1)."""
    from scipy.special import betaln
    from scipy.stats import beta

    hits, p = np.asarray(count, np.float64), np.asarray(p0, np.float64)
    misses = np.asarray(n, np.float64) - hits
    a, b = PRIOR + hits, PRIOR + misses
    mixture = betaln(a, b) + beta.logsf(p, a, b) - betaln(PRIOR, PRIOR) - beta.logsf(p, PRIOR, PRIOR)
    return np.asarray(mixture - hits * np.log(p) - misses * np.log1p(-p))


def anytime_bound(count: int, n: int, alpha: float) -> float:
    """Lower bound of a probability that holds at confidence 1 - alpha whenever one has stopped: the least p0 that the
    e-process has not refuted."""
    if count == 0:
        return 0.0
    low, high = 0.0, count / n  # refuted, not refuted: at the observed share the e-value is below 1
    for _ in range(STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        refuted = log_e_value(count, n, middle) >= -math.log(alpha)
        low, high = (middle, high) if refuted else (low, middle)
    return low


def probability(count: int, n: int, alpha: float, test: Test) -> float:
    """The bound that a test gives on the probability of the counted class."""
    return (lower_confidence_bound if test == "fixed" else anytime_bound)(count, n, alpha)


def radius(count: int, n: int, alpha: float, sigma: float, test: Test = "fixed", slack: float = 0.0) -> float | None:
    """Certified l2 radius sigma * Phi^-1(p), or None to abstain when the bound p on the top class is not above 1/2.

    ``slack`` is taken off p first.
    """
    from scipy.stats import norm

    p = probability(count, n, alpha, test) - slack
    return None if p <= 0.5 else sigma * float(norm.ppf(p))


def recounted(
    row: Mapping[str, Any], *, n: int, alpha: float, sigma: float, test: Test, slack: float
) -> tuple[float | None, bool]:
    """The radius that a sample's row of counts proves, and whether the row says just that; ``n``: draws, at most.

    Raises ValueError for counts that no draws have.
    """
    if not all(isinstance(row[name], int) for name in ("count", "n")) or not 0 <= row["count"] <= row["n"] > 0:
        raise ValueError(f"{row['count']!r:.40} of {row['n']!r:.40} draws")
    proved = radius(row["count"], row["n"], alpha, sigma, test, slack)
    drawn = row["n"] == n or (test == "sequential" and 0 < row["n"] < n)
    same = math.isclose(proved or 0.0, row["radius"], rel_tol=1e-9)
    return proved, drawn and same and (proved is None) == (row["prediction"] == ABSTAIN)


def needed_probability(target: float, sigma: float) -> float:
    """Phi(target / sigma): the probability from which the radius is ``target``."""
    from scipy.stats import norm

    return float(norm.cdf(target / sigma))


def needed_l2(norm: str, eps: float, dimensions: int) -> float:
    """l2 radius that covers a threat: eps itself, or eps * sqrt(d) for linf."""
    return eps if norm == "l2" else eps * math.sqrt(dimensions)


def predicted(counts: Sequence[int], alpha: float) -> int:
    """PREDICT (Cohen et al., section 3.2.1): the most frequent class, or ABSTAIN where its lead may be chance."""
    from scipy.stats import binomtest

    order = np.argsort(-np.asarray(counts), kind="stable")
    first, second = int(counts[order[0]]), int(counts[order[1]])
    found: Any = binomtest(first, first + second, 0.5)
    return int(order[0]) if found.pvalue <= alpha else ABSTAIN


def high_probability_accuracy(accuracy: float, n: int, alpha: float, rho: float) -> float:
    """Certified accuracy of which at most alpha of the samples' certificates fail, with probability 1 - rho.

    Cohen et al., appendix C; only for noise that is independent between samples.
    """
    doubt = -math.log(rho)
    return accuracy - alpha - math.sqrt(alpha * (1 - alpha) * doubt / n) - doubt / (3 * n)
