"""Counts and what they prove, against vectors computed with scipy apart from this project, and by simulation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rprune.certification.confidence import (
    ABSTAIN,
    anytime_bound,
    high_probability_accuracy,
    log_e_value,
    lower_confidence_bound,
    needed_l2,
    needed_probability,
    predicted,
    radius,
    upper_confidence_bound,
)

V = json.loads((Path(__file__).parent.parent / "data" / "vectors-smoothing.json").read_text())
ALPHA = 1e-3


@pytest.mark.parametrize("v", V["clopper_pearson"], ids=lambda v: f"{v['nA']}/{v['N']}-{v['alpha']}")
def test_clopper_pearson_and_radii(v) -> None:
    assert lower_confidence_bound(v["nA"], v["N"], v["alpha"]) == pytest.approx(v["pABar"], abs=1e-9)
    for sigma in (0.12, 0.25, 0.5, 1.0):
        found = radius(v["nA"], v["N"], v["alpha"], sigma)
        assert (found is None) == v["abstain"]
        assert (found or 0.0) == pytest.approx(v[f"radius_sigma{sigma}"], abs=1e-9)


@pytest.mark.parametrize("v", V["min_counts"], ids=lambda v: f"{v['name']}-{v['sigma']}-{v['N']}")
def test_smallest_count_that_certifies(v) -> None:
    assert needed_probability(v["radius"], v["sigma"]) == pytest.approx(v["p_threshold"], abs=1e-9)
    most, least = radius(v["N"], v["N"], v["alpha"], v["sigma"]), v["min_nA"]
    if least is None:
        assert most is None or most < v["radius"]
        return
    assert (radius(least, v["N"], v["alpha"], v["sigma"]) or 0) >= v["radius"]
    assert (radius(least - 1, v["N"], v["alpha"], v["sigma"]) or 0) < v["radius"]


@pytest.mark.parametrize("v", V["max_radius"], ids=lambda v: str(v["N"]))
def test_largest_radius(v) -> None:
    assert radius(v["N"], v["N"], v["alpha"], 1.0) == pytest.approx(v["max_radius_over_sigma"], abs=1e-9)


def test_linf_threats_as_l2() -> None:
    v = V["linf_conversion"]
    assert needed_l2("linf", v["eps"], v["d"]) == pytest.approx(v["l2_needed"], abs=1e-9)
    assert needed_l2("l2", 0.5, 3072) == 0.5


@pytest.mark.parametrize("v", V["predict"], ids=lambda v: f"{v['c1']}-{v['c2']}")
def test_predict_abstains_where_a_lead_may_be_chance(v) -> None:
    counts = [v["c2"], 0, v["c1"]]
    assert predicted(counts, v["pvalue"] * (1 + 1e-9)) == 2
    assert predicted(counts, v["pvalue"] * (1 - 1e-6)) == ABSTAIN


@pytest.mark.parametrize("v", V["e_process"], ids=lambda v: f"{v['A']}/{v['N']}")
def test_e_values(v) -> None:
    assert float(log_e_value(v["A"], v["N"], v["p0"])) == pytest.approx(v["log_e"], abs=1e-9)


@pytest.mark.parametrize(("hits", "n", "p0"), [(7, 9, 0.4), (30, 40, 0.6), (3, 3, 0.9)])
def test_e_values_are_the_mixtures_they_are_said_to_be(hits: int, n: int, p0: float) -> None:
    """By quadrature: the mean likelihood ratio under the arcsine law cut to p > p0."""
    angle = np.linspace(math.asin(math.sqrt(p0)), math.pi / 2, 2_000_001)[:-1]  # uniform in the angle: p = sin^2
    p = np.sin(angle[:-1] + (angle[1] - angle[0]) / 2) ** 2
    ratio = (p / p0) ** hits * ((1 - p) / (1 - p0)) ** (n - hits)
    assert float(log_e_value(hits, n, p0)) == pytest.approx(math.log(ratio.mean()), abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("p0", [0.3, 0.5, 0.9])
def test_the_mean_e_value_is_one_at_the_null_and_less_below_it(n: int, p0: float) -> None:
    hits = np.arange(n + 1)
    chances = np.array([math.comb(n, k) for k in hits], np.float64)

    def mean(p: float) -> float:
        return float((chances * p**hits * (1 - p) ** (n - hits) * np.exp(log_e_value(hits, n, p0))).sum())

    assert mean(p0) == pytest.approx(1, abs=1e-9)
    assert mean(p0 - 0.1) < 1


@given(st.integers(1, 2000), st.data())
def test_the_anytime_bound_is_where_the_e_value_passes(n: int, data) -> None:
    hits = data.draw(st.integers(1, n))
    bound = anytime_bound(hits, n, ALPHA)
    assert 0 < bound < hits / n
    assert float(log_e_value(hits, n, bound)) == pytest.approx(-math.log(ALPHA), abs=1e-6)
    assert float(log_e_value(hits, n, bound * 0.999)) > -math.log(ALPHA)


def test_the_anytime_bound_pays_little_for_its_freedom() -> None:
    for hits, n in ((99, 100), (960, 1000), (9700, 10_000)):
        assert anytime_bound(hits, n, ALPHA) < lower_confidence_bound(hits, n, ALPHA)
        assert anytime_bound(hits, n, ALPHA) > lower_confidence_bound(hits, n, ALPHA / 200)
    assert anytime_bound(0, 10, ALPHA) == 0
    assert anytime_bound(10**7, 10**7, ALPHA) < 1


def test_upper_bounds_mirror_lower_ones() -> None:
    assert upper_confidence_bound(3, 10, 0.01) == pytest.approx(1 - lower_confidence_bound(7, 10, 0.01))
    assert upper_confidence_bound(10, 10, 0.01) == 1


def test_slack_is_taken_off_the_probability() -> None:
    assert radius(99, 100, ALPHA, 1.0, slack=0.01) == pytest.approx(1.289415, abs=1e-6)
    assert radius(99, 100, ALPHA, 1.0, slack=0.5) is None


def test_accuracy_with_high_probability() -> None:
    assert high_probability_accuracy(0.5, 500, 0.001, 0.001) == pytest.approx(
        0.5 - 0.001 - math.sqrt(0.001 * 0.999 * math.log(1000) / 500) - math.log(1000) / 1500
    )
