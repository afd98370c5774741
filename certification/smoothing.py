"""Randomized smoothing (Cohen, Rosenfeld, Kolter, ICML 2019) of any classifier that can be called.

Noise is added to pixels in [0,1], before any normalisation, and never clamped. Draws come in chunks that depend on
(seed, sample, chunk) alone: a certificate can be drawn again in any order, and images share batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from rprune.certification.confidence import (
    ABSTAIN,
    Test,
    log_e_value,
    needed_probability,
    predicted,
    radius,
    upper_confidence_bound,
)
from rprune.errors import UsageError
from rprune.seeds import derive

Predict = Callable[[Float[Tensor, "b c h w"]], Int64[Tensor, " b"]]
Progress = Callable[[int], None]
CHUNK = 100  # draws that share a seed
LOOKS = 10  # of one chunk each; each later one comes a tenth later than the one before
FUTILE = 1e-4  # a look gives up where the target lies above the Clopper-Pearson bound at this level
DRAWS: dict[Test, int] = {"sequential": 100_000, "fixed": 10_000}  # by default; HYDRA's where all are made
LEVELS = 255
DEVIATIONS = 12  # of noise on the grid; beyond it lies a probability of 4e-33
CELL_ERROR = 2.0**-52  # of a cell's probability: one of the two ends of a cell in float64


@dataclass(frozen=True)
class Smoothed:
    """Verdict for one image: the class (or ABSTAIN), and the counts from which the l2 radius follows."""

    prediction: int
    count: int
    n: int
    radius: float


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """Gaussian noise of ``sigma`` in pixel units; certificates that fail with probability ``alpha`` at most.

    ``test``: "sequential" draws until the target is reached, out of reach, or ``n`` draws are made; "fixed" draws
    ``n`` (CERTIFY). ``noise``: "gauss", in floating point as all published work; or "grid", rounded to the grid of
    8-bit pixels and drawn by integers: what is smoothed is then exactly the classifier of rounded images, so that the
    radius holds against any 8-bit image (Voracek, Hein, ICLR 2023, on what floats can hide).

    Cohen et al. use n0 100, n 100,000, alpha 0.001; HYDRA n 10,000.

    Raises UsageError for sigma not in (0, inf), counts below 1 or alpha outside (0, 1).
    """

    sigma: float = 0.25
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    test: Test = "sequential"
    noise: Literal["gauss", "grid"] = "gauss"
    batch: int = 1000

    def __post_init__(self) -> None:
        if not (0 < self.sigma < math.inf and self.n0 > 0 and self.n > 0 and 0 < self.alpha < 1 and self.batch > 0):
            raise UsageError(f"smoothing settings out of range: {self}", "sigma > 0, n0 and n >= 1, alpha in (0, 1)")

    def reach(self, dimensions: int) -> float:
        """The largest radius that ``n`` draws can certify: all of them of one class."""
        return radius(self.n, self.n, self.alpha, self.sigma, self.test, self.slack(dimensions)) or 0.0

    def slack(self, dimensions: int) -> float:
        """By how much the noise's distribution may differ from a rounded Gaussian, in total variation."""
        return 0.0 if self.noise == "gauss" else dimensions * len(self._grid) * CELL_ERROR

    def certify(
        self,
        predict: Predict,
        x: Float[Tensor, "b c h w"],
        samples: Sequence[int],
        classes: int,
        seed: int,
        target: float | None = None,
        on_done: Progress = lambda done: None,
    ) -> list[Smoothed]:
        """Verdicts for a batch of images; ``samples`` key their noise. ``target``: the l2 radius to reach, for the
        sequential test, which needs one.

        Raises UsageError when the target cannot be reached by any count.
        """
        self._check(target, x[0].numel())
        every = np.arange(len(x))
        pilot = self._counts(predict, x, samples, classes, derive(seed, "pilot"), every, 0, self.n0)
        guess = pilot.argmax(1)
        count, n, active = np.zeros(len(x), np.int64), np.zeros(len(x), np.int64), every
        done = 0
        for look in self._looks():
            # fresh draws: reusing the pilot's would bias the count
            found = self._counts(predict, x, samples, classes, derive(seed, "certify"), active, done, look)
            count[active] += found[np.arange(len(active)), guess[active]]
            n[active] = done = look
            if target is not None and self.test == "sequential":
                active = active[~self._settled(count[active], look, target, x[0].numel())]
            on_done(len(x) - len(active))
            if not len(active):
                break
        on_done(len(x))
        return [
            self.verdict(*row, x[0].numel()) for row in zip(guess.tolist(), count.tolist(), n.tolist(), strict=True)
        ]

    def predict(
        self, predict: Predict, x: Float[Tensor, "b c h w"], samples: Sequence[int], classes: int, seed: int
    ) -> list[int]:
        """PREDICT with ``n`` draws: the smoothed classifier's class for each image, or ABSTAIN."""
        return [predicted(row, self.alpha) for row in self.drawn(predict, x, samples, classes, seed, self.n).tolist()]

    def drawn(
        self, predict: Predict, x: Float[Tensor, "b c h w"], samples: Sequence[int], classes: int, seed: int, draws: int
    ) -> NDArray[np.int64]:
        """How many of so many draws each class has, ``(b, classes)``; other draws than those of a certificate."""
        return self._counts(predict, x, samples, classes, derive(seed, "predict"), np.arange(len(x)), 0, draws)

    def verdict(self, guess: int, count: int, n: int, dimensions: int) -> Smoothed:
        found = radius(count, n, self.alpha, self.sigma, self.test, self.slack(dimensions))
        return Smoothed(ABSTAIN, count, n, 0.0) if found is None else Smoothed(guess, count, n, found)

    def _check(self, target: float | None, dimensions: int) -> None:
        if target is None and self.test == "sequential":
            raise UsageError("the sequential test needs a radius to aim at", "name one, or use the fixed test")
        if target is not None and target >= self.reach(dimensions):
            raise UsageError(
                f"{self.n} draws at sigma {self.sigma:g} reach l2 {self.reach(dimensions):.4f}, not {target:.4f}",
                "raise sigma or n, or lower eps",
            )

    def _looks(self) -> Iterator[int]:
        look = 0
        while look < self.n:
            ahead = CHUNK if look < LOOKS * CHUNK else CHUNK * math.ceil(look / 10 / CHUNK)
            look = self.n if self.test == "fixed" else min(self.n, look + ahead)
            yield look

    def _reached(self, count: NDArray[np.int64], n: int, target: float, dimensions: int) -> NDArray[np.bool_]:
        needed = needed_probability(target, self.sigma) + self.slack(dimensions)
        return np.asarray(log_e_value(count, n, needed) >= -math.log(self.alpha))

    def _settled(self, count: NDArray[np.int64], n: int, target: float, dimensions: int) -> NDArray[np.bool_]:
        """Reached, or out of reach."""
        best = np.array([upper_confidence_bound(int(hits), n, FUTILE) for hits in count])
        return self._reached(count, n, target, dimensions) | (best < needed_probability(target, self.sigma))

    def _counts(
        self,
        predict: Predict,
        x: Tensor,
        samples: Sequence[int],
        classes: int,
        seed: int,
        images: NDArray[np.int64],
        start: int,
        stop: int,
    ) -> NDArray[np.int64]:
        """Predictions (len(images), classes) of the draws start..stop of each image."""
        chunks = range(start // CHUNK, -(-stop // CHUNK))
        tasks = [(place, chunk) for place in range(len(images)) for chunk in chunks]
        counts = torch.zeros(len(images) * classes, dtype=torch.int64)
        together = max(1, self.batch // CHUNK)
        for first in range(0, len(tasks), together):
            points, owners = [], []
            for place, chunk in tasks[first : first + together]:
                begin, end = max(start, chunk * CHUNK), min(stop, (chunk + 1) * CHUNK)
                image = int(images[place])
                generator = torch.Generator(x.device).manual_seed(derive(seed, samples[image], chunk))
                noisy = self._noisy(x[image], generator)
                points.append(noisy[begin - chunk * CHUNK : end - chunk * CHUNK])
                owners += [place] * (end - begin)
            found = predict(torch.cat(points)).cpu()
            known = found >= 0  # below 0: no class at all
            counts += torch.bincount((torch.tensor(owners) * classes + found)[known], minlength=len(counts))
        return counts.view(len(images), classes).numpy()

    def _noisy(self, x: Float[Tensor, "c h w"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        """One chunk of noisy copies."""
        if self.noise == "gauss":
            # torch fills in blocks of 16: whole blocks give the same numbers however many rows are drawn
            return x + self.sigma * torch.randn(CHUNK, *x.shape, generator=generator, device=x.device)
        draws = torch.randint(1 << 62, (CHUNK, *x.shape), generator=generator, device=x.device)
        steps = torch.searchsorted(self._grid.to(x.device), draws, right=True) - len(self._grid) // 2
        return ((x * LEVELS).round() + steps) / LEVELS

    @cached_property
    def _grid(self) -> Int64[Tensor, " k"]:
        """Of 2^62 equal chances, how many fall below each half step: the distribution of the rounded Gaussian."""
        from scipy.stats import norm

        most = math.ceil(DEVIATIONS * self.sigma * LEVELS)
        below = norm.cdf((np.arange(-most, most) + 0.5) / (self.sigma * LEVELS))
        return torch.from_numpy((below * 2.0**62).astype(np.int64))
