from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rprune.certification.smoothing import ABSTAIN, Smoothing, lower_confidence_bound, needed_l2, radius
from rprune.errors import UsageError

# (count, n, alpha, lower bound, radius / sigma or None) of CERTIFY as Cohen, Rosenfeld and Kolter (ICML 2019) define
# it, computed with scipy 1.17's beta and norm apart from this project.
COHEN = [
    (0, 100, 0.001, 0.0, None),
    (50, 100, 0.001, 0.34479800642531777, None),
    (60, 100, 0.001, 0.4409842652212994, None),
    (75, 100, 0.001, 0.5973931551937869, 0.24660531652922774),
    (90, 100, 0.001, 0.7753298801677749, 0.7565154051119878),
    (99, 100, 0.001, 0.9113731112960424, 1.3492590388103902),
    (100, 100, 0.001, 0.933254300796991, 1.5004750241206364),
    (510, 1000, 0.001, 0.46071303297861366, None),
    (550, 1000, 0.001, 0.5006759600925578, 0.001694381491268537),
    (600, 1000, 0.001, 0.5510754739370525, 0.1283789963055296),
    (1000, 1000, 0.001, 0.9931160484209338, 2.4632626147808114),
    (10_000, 10_000, 0.001, 0.9993094630025899, 3.1985775147383384),
    (9578, 10_000, 0.01, 0.9528887490683399, 1.6735325621176744),
    (9900, 10_000, 0.01, 0.9874324179513082, 2.2393190521469),
    (100_000, 100_000, 0.001, 0.9999309248330094, 3.8114565633899145),
]


@pytest.mark.parametrize("sigma", [0.12, 0.25, 1.0])
@pytest.mark.parametrize(("count", "n", "alpha", "lower", "ratio"), COHEN)
def test_radius_of_cohen(count: int, n: int, alpha: float, lower: float, ratio: float | None, sigma: float) -> None:
    assert lower_confidence_bound(count, n, alpha) == pytest.approx(lower, abs=1e-9)
    found = radius(count, n, alpha, sigma)
    if ratio is None:
        assert found is None
    else:
        assert found == pytest.approx(sigma * ratio, abs=1e-9)


def test_radius_of_the_reference_vectors(vectors) -> None:
    checked = 0
    for key, value in vectors["smoothing"].items():
        if key.startswith("nA="):
            settings = dict(part.split("=") for part in key.split(","))
            count, n = int(settings["nA"]), int(settings["N"])
            alpha, sigma = float(settings["alpha"]), float(settings["sigma"])
            assert lower_confidence_bound(count, n, alpha) == pytest.approx(value[0], abs=1e-9)
            found = radius(count, n, alpha, sigma)
            assert (found is None) if value[1] is None else (found == pytest.approx(value[1], abs=1e-9))
            checked += 1
    assert checked >= 5
    assert needed_l2("linf", 2 / 255, 3072) == pytest.approx(
        vectors["smoothing"]["linf 2/255 as l2 (d=3072)"], abs=1e-9
    )


# smallest count that certifies a radius at alpha 0.001: (sigma, radius, n, count)
@pytest.mark.parametrize(
    ("sigma", "wanted", "n", "count"),
    [
        (0.25, 2 / 255 * math.sqrt(3072), 10_000, 9651),
        (0.25, 110 / 255, 10_000, 9640),
        (0.25, 0.5, 10_000, 9818),
        (0.25, 0.25, 10_000, 8526),
        (0.25, 2 / 255 * math.sqrt(3072), 100_000, 96_090),
        (0.25, 110 / 255, 100_000, 95_974),
        (1.0, 0.435, 10_000, 6828),
        (1.0, 2 / 255 * math.sqrt(3072), 1000, 715),
    ],
)
def test_smallest_count_that_certifies(sigma: float, wanted: float, n: int, count: int) -> None:
    below, at = radius(count - 1, n, 0.001, sigma), radius(count, n, 0.001, sigma)
    assert at is not None
    assert at >= wanted
    assert below is None or below < wanted


def test_extreme_counts() -> None:
    assert lower_confidence_bound(0, 50, 0.01) == 0.0
    assert radius(0, 50, 0.01, 1.0) is None
    assert lower_confidence_bound(50, 50, 0.01) == pytest.approx(0.01 ** (1 / 50), abs=1e-12)
    assert math.isfinite(radius(10**7, 10**7, 0.001, 1.0) or math.nan)
    assert radius(1, 1, 0.001, 1.0) is None
    assert [radius(n, n, 0.001, 1.0) is not None for n in (9, 10)] == [False, True]  # 0.001 ** (1/10) = 0.501


def test_lower_bound_grows_with_the_count() -> None:
    bounds = [lower_confidence_bound(k, 200, 0.001) for k in range(201)]
    assert bounds == sorted(bounds)
    assert all(bound < max(k / 200, 1e-9) for k, bound in enumerate(bounds))


def test_l2_threats_need_no_conversion() -> None:
    assert needed_l2("l2", 0.5, 3072) == 0.5
    assert needed_l2("linf", 0.1, 1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"sigma": 0.0}, {"sigma": -1.0}, {"n0": 0}, {"n": 0}, {"n": -5}, {"alpha": 0.0}, {"alpha": 1.0},
        {"alpha": -0.1}, {"alpha": 2.0}, {"batch": 0}, {"sigma": float("nan")}, {"alpha": float("nan")},
        {"sigma": float("inf")},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_usage_errors(settings: dict) -> None:
    with pytest.raises(UsageError, match="out of range"):
        Smoothing(**settings)


def halfspace(distance: float, normal: Tensor):
    """Class 1 where w.x <= b; the smoothed classifier's radius at the origin is exactly ``distance``."""
    unit = normal / normal.norm()

    def predict(x: Tensor) -> Tensor:
        return (x.flatten(1) @ unit <= distance).long()

    return predict


IMAGE = torch.zeros(1, 4, 4)
NORMAL = torch.randn(16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("distance", [0.0, 0.02, 0.25, 0.6])
def test_radius_never_exceeds_the_true_distance(distance: float) -> None:
    smoothing = Smoothing(sigma=0.25, n0=50, n=500, alpha=0.05)
    runs, failures, certified = 400, 0, 0
    for seed in range(runs):
        found = smoothing.certify(halfspace(distance, NORMAL), IMAGE, 2, seed, 0)
        certified += found.prediction != ABSTAIN
        failures += found.prediction == 0 or found.radius > distance
        assert found.radius >= 0
    # at distance 0 both classes are equally likely, so either of them is a failure: 0.05 each at most, given the pilot
    assert failures <= 0.05 * runs + 3 * math.sqrt(0.05 * 0.95 * runs)
    if distance >= 0.25:
        assert certified == runs


def test_failures_happen_at_about_the_promised_rate() -> None:
    # a lower bound that never failed would not be tight: with alpha 0.2 some of 300 radii must be too large
    smoothing = Smoothing(sigma=0.25, n0=20, n=300, alpha=0.2)
    failures = sum(smoothing.certify(halfspace(0.25, NORMAL), IMAGE, 2, s, 0).radius > 0.25 for s in range(300))
    assert 0.1 * 300 < failures < 0.27 * 300


def test_certificate_is_replayed_by_seed_and_sample() -> None:
    smoothing = Smoothing(sigma=0.25, n0=20, n=300)

    def counts(seed: int, sample: int) -> int:
        return smoothing.certify(halfspace(0.1, NORMAL), IMAGE, 2, seed, sample).count

    assert counts(3, 5) == counts(3, 5)
    assert len({counts(seed, sample) for seed in range(4) for sample in range(4)}) > 6


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 3, 3), (3, 5, 7)])
def test_certificate_does_not_depend_on_the_batch_size(shape: tuple[int, int, int]) -> None:
    image = torch.zeros(shape)
    normal = torch.randn(image.numel(), generator=torch.Generator().manual_seed(0))
    found = {
        Smoothing(sigma=0.25, n0=20, n=500, batch=batch).certify(halfspace(0.1, normal), image, 2, 1, 2)
        for batch in (1, 7, 100, 1000)
    }
    assert len(found) == 1


def test_pilot_draws_are_not_counted_again() -> None:
    seen: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.ones(len(x), dtype=torch.int64)

    found = Smoothing(sigma=0.5, n0=40, n=60, batch=16).certify(predict, IMAGE + 0.5, 3, 0, 0)
    draws = torch.cat(seen).flatten(1)
    assert len(draws) == 100
    assert len(draws.unique(dim=0)) == 100
    assert (found.prediction, found.count, found.n) == (1, 60, 60)
    assert found.radius == radius(60, 60, 0.001, 0.5)
    assert draws.min() < 0  # never clamped
    assert draws.max() > 1
    assert float(draws.std()) == pytest.approx(0.5, rel=0.1)


def test_evenly_split_classifier_abstains() -> None:
    found = Smoothing(sigma=0.25, n0=50, n=400).certify(halfspace(0.0, NORMAL), IMAGE, 2, 0, 0)
    assert (found.prediction, found.radius) == (ABSTAIN, 0.0)
    assert 0 < found.count < 400
