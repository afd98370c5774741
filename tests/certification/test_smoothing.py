from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rprune.certification.confidence import ABSTAIN, anytime_bound, needed_probability, radius
from rprune.certification.smoothing import CHUNK, Smoothed, Smoothing
from rprune.errors import UsageError


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


def fixed(**settings) -> Smoothing:
    return Smoothing(test="fixed", **settings)


def one(smoothing: Smoothing, predict, image: Tensor, classes: int, seed: int, sample: int, **aim) -> Smoothed:
    (found,) = smoothing.certify(predict, image[None], [sample], classes, seed, **aim)
    return found


IMAGE = torch.zeros(1, 4, 4)
NORMAL = torch.randn(16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("distance", [0.0, 0.02, 0.25, 0.6])
def test_radius_never_exceeds_the_true_distance(distance: float) -> None:
    smoothing = fixed(sigma=0.25, n0=50, n=500, alpha=0.05)
    runs, failures, certified = 400, 0, 0
    for seed in range(runs):
        found = one(smoothing, halfspace(distance, NORMAL), IMAGE, 2, seed, 0)
        certified += found.prediction != ABSTAIN
        failures += found.prediction == 0 or found.radius > distance
        assert found.radius >= 0
    # at distance 0 both classes are equally likely, so either of them is a failure: 0.05 each at most, given the pilot
    assert failures <= 0.05 * runs + 3 * math.sqrt(0.05 * 0.95 * runs)
    if distance >= 0.25:
        assert certified == runs


def test_failures_happen_at_about_the_promised_rate() -> None:
    # a lower bound that never failed would not be tight: with alpha 0.2 some of 300 radii must be too large
    smoothing = fixed(sigma=0.25, n0=20, n=300, alpha=0.2)
    failures = sum(one(smoothing, halfspace(0.25, NORMAL), IMAGE, 2, s, 0).radius > 0.25 for s in range(300))
    assert 0.1 * 300 < failures < 0.27 * 300


def test_certificate_is_replayed_by_seed_and_sample() -> None:
    smoothing = fixed(sigma=0.25, n0=20, n=300)

    def counts(seed: int, sample: int) -> int:
        return one(smoothing, halfspace(0.1, NORMAL), IMAGE, 2, seed, sample).count

    assert counts(3, 5) == counts(3, 5)
    assert len({counts(seed, sample) for seed in range(4) for sample in range(4)}) > 6


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 3, 3), (3, 5, 7)])
def test_certificate_does_not_depend_on_the_batch_size(shape: tuple[int, int, int]) -> None:
    image = torch.zeros(shape)
    normal = torch.randn(image.numel(), generator=torch.Generator().manual_seed(0))
    found = {
        one(fixed(sigma=0.25, n0=20, n=500, batch=batch), halfspace(0.1, normal), image, 2, 1, 2)
        for batch in (1, 7, 100, 1000)
    }
    assert len(found) == 1


def test_pilot_draws_are_not_counted_again() -> None:
    seen: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.ones(len(x), dtype=torch.int64)

    found = one(fixed(sigma=0.5, n0=40, n=60, batch=16), predict, IMAGE + 0.5, 3, 0, 0)
    draws = torch.cat(seen).flatten(1)
    assert len(draws) == 100
    assert len(draws.unique(dim=0)) == 100
    assert (found.prediction, found.count, found.n) == (1, 60, 60)
    assert found.radius == radius(60, 60, 0.001, 0.5)
    assert draws.min() < 0  # never clamped
    assert draws.max() > 1
    assert float(draws.std()) == pytest.approx(0.5, rel=0.1)


def test_evenly_split_classifier_abstains() -> None:
    found = one(fixed(sigma=0.25, n0=50, n=400), halfspace(0.0, NORMAL), IMAGE, 2, 0, 0)
    assert (found.prediction, found.radius) == (ABSTAIN, 0.0)
    assert 0 < found.count < 400


def test_images_share_batches_and_keep_their_noise() -> None:
    """Verdicts of a batch are those of its images alone, in any order; batches are full."""
    sizes: list[int] = []
    normal = NORMAL

    def predict(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return halfspace(0.1, normal)(x)

    images = torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.1
    smoothing = Smoothing(sigma=0.25, n0=30, n=4000, batch=500)
    together = smoothing.certify(predict, images, list(range(7)), 2, 3, 0.02)
    assert max(sizes) <= 500
    assert sizes[:2] == [150, 60]  # five pilots of 30, then two
    for index in (6, 2):
        assert together[index] == one(smoothing, predict, images[index], 2, 3, index, target=0.02)


@pytest.mark.parametrize("target", [0.1, 0.25, 0.6])
def test_sequential_radii_fail_as_rarely_as_promised(target: float) -> None:
    """The true radius is just below the target: to reach it is to fail."""
    smoothing = Smoothing(sigma=0.25, n0=50, n=2000, alpha=0.05)
    runs = 400
    found = smoothing.certify(
        halfspace(target * 0.999, NORMAL), IMAGE.expand(runs, 1, 4, 4), list(range(runs)), 2, 0, target
    )
    failures = sum(v.radius >= target for v in found)
    assert failures <= 0.05 * runs + 3 * math.sqrt(0.05 * 0.95 * runs)
    assert any(v.n < 2000 for v in found)


def test_sequential_test_stops_early_where_the_answer_is_clear() -> None:
    smoothing = Smoothing(sigma=0.25)
    clear = one(smoothing, halfspace(0.6, NORMAL), IMAGE, 2, 0, 0, target=0.25)
    hopeless = one(smoothing, halfspace(0.1, NORMAL), IMAGE, 2, 0, 0, target=0.25)
    assert clear.radius >= 0.25
    assert clear.n <= 300
    assert hopeless.radius < 0.25
    assert hopeless.n <= 2000
    for found in (clear, hopeless):
        assert found.radius == (radius(found.count, found.n, 0.001, 0.25, "sequential") or 0.0)


@pytest.mark.parametrize("p0", [0.84134, 0.95897, 0.97725])
def test_type_1_error_of_the_sequential_test(p0: float) -> None:
    """20,000 runs at the null, looks as the test takes them: at most 1.3 alpha of them may ever pass."""
    import numpy as np
    from scipy.stats import norm

    runs, alpha, target = 20_000, 0.001, float(norm.ppf(p0)) * 0.25
    smoothing = Smoothing(sigma=0.25, n=10_000, alpha=alpha)
    rng = np.random.default_rng(0)
    count, passed, before = np.zeros(runs, np.int64), np.zeros(runs, bool), 0
    for look in smoothing._looks():
        count += rng.binomial(look - before, needed_probability(target, 0.25), runs)
        passed |= smoothing._reached(count, look, target, 1)
        before = look
    assert passed.sum() <= 1.3 * alpha * runs


def test_sequential_test_needs_a_target_within_reach() -> None:
    smoothing = Smoothing(sigma=0.12, n=10_000)
    with pytest.raises(UsageError, match="needs a radius"):
        smoothing.certify(halfspace(0.1, NORMAL), IMAGE[None], [0], 2, 0)
    with pytest.raises(UsageError, match=r"reach l2 0\.37"):
        smoothing.certify(halfspace(0.1, NORMAL), IMAGE[None], [0], 2, 0, 0.4347)
    assert smoothing.reach(16) == pytest.approx(0.12 * 3.1, abs=0.02)
    assert fixed(sigma=0.12, n=10_000).reach(16) == pytest.approx(0.12 * 3.198578, abs=1e-6)
    assert anytime_bound(100, 100, 0.001) < 1


def test_predict_names_the_smoothed_class_or_abstains() -> None:
    smoothing = fixed(sigma=0.25, n=200)
    assert smoothing.predict(halfspace(0.25, NORMAL), IMAGE[None], [0], 2, 0) == [1]
    assert smoothing.predict(halfspace(-0.25, NORMAL), IMAGE[None], [0], 2, 0) == [0]
    assert smoothing.predict(halfspace(0.0, NORMAL), IMAGE[None], [0], 2, 0) == [ABSTAIN]


@pytest.mark.parametrize("sigma", [0.01, 0.25])
def test_grid_noise_is_a_rounded_gaussian_on_8_bit_pixels(sigma: float) -> None:
    from scipy.stats import norm

    seen: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros(len(x), dtype=torch.int64)

    image = (torch.arange(256.0) / 255).view(1, 16, 16)
    smoothing = fixed(sigma=sigma, n0=1, n=4000, noise="grid")
    one(smoothing, predict, image, 2, 0, 0)
    levels = torch.cat(seen[1:]) * 255
    assert torch.allclose(levels, levels.round(), atol=2e-4)
    steps = (levels - image * 255).round().flatten().long()
    low, high = int(steps.min()), int(steps.max())
    observed = torch.bincount(steps - low, minlength=high - low + 1).double() / len(steps)
    for step in range(-3, 4):
        wanted = norm.cdf((step + 0.5) / (255 * sigma)) - norm.cdf((step - 0.5) / (255 * sigma))
        assert float(observed[step - low]) == pytest.approx(wanted, abs=4 * math.sqrt(wanted / len(steps)))
    assert float(steps.double().std()) == pytest.approx(math.sqrt((255 * sigma) ** 2 + 1 / 12), rel=0.01)
    assert 0 < smoothing.slack(3072) < 1e-8


@pytest.mark.parametrize("noise", ["gauss", "grid"])
def test_noise_of_a_chunk_depends_on_seed_sample_and_chunk_alone(noise) -> None:
    seen: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.ones(len(x), dtype=torch.int64)

    draws = {}
    for n, batch in ((150, 100), (250, 1000)):
        seen.clear()
        one(fixed(sigma=0.5, n0=1, n=n, batch=batch, noise=noise), predict, IMAGE, 2, 0, 9)
        draws[n] = torch.cat(seen[1:])
    assert [len(found) for found in draws.values()] == [150, 250]
    assert torch.equal(draws[150], draws[250][:150])
    assert not torch.equal(draws[250][:CHUNK], draws[250][CHUNK : 2 * CHUNK])
