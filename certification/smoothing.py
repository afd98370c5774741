"""Randomized smoothing (Cohen, Rosenfeld, Kolter, ICML 2019): CERTIFY, for any classifier that can be called."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rprune.errors import UsageError
from rprune.seeds import derive

Predict = Callable[[Float[Tensor, "b c h w"]], Int64[Tensor, " b"]]
ABSTAIN = -1


@dataclass(frozen=True)
class Smoothed:
    """Verdict for one image: the class (or ABSTAIN), and the counts from which the l2 radius follows."""

    prediction: int
    count: int
    n: int
    radius: float


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """Gaussian noise of ``sigma`` in pixel units, never clamped. Cohen et al. use n0 100, n 100,000, alpha 0.001;
    HYDRA n 10,000, the default here.

    Raises UsageError for sigma not in (0, inf), counts below 1 or alpha outside (0, 1).
    """

    sigma: float = 0.25
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    batch: int = 1000

    def __post_init__(self) -> None:
        if not (0 < self.sigma < math.inf and self.n0 > 0 and self.n > 0 and 0 < self.alpha < 1 and self.batch > 0):
            raise UsageError(f"smoothing settings out of range: {self}", "sigma > 0, n0 and n >= 1, alpha in (0, 1)")

    def certify(self, predict: Predict, x: Float[Tensor, "c h w"], classes: int, seed: int, sample: int) -> Smoothed:
        """CERTIFY of one image (Cohen et al., section 3.2.2). The noise is fixed by (seed, sample)."""
        pilot = self._counts(predict, x, classes, self.n0, derive(seed, "pilot", sample))
        guess = int(pilot.argmax())
        # fresh draws: reusing the pilot's would bias the count
        count = int(self._counts(predict, x, classes, self.n, derive(seed, "certify", sample))[guess])
        found = radius(count, self.n, self.alpha, self.sigma)
        return Smoothed(ABSTAIN, count, self.n, 0.0) if found is None else Smoothed(guess, count, self.n, found)

    def _counts(self, predict: Predict, x: Tensor, classes: int, draws: int, seed: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        counts = torch.zeros(classes, dtype=torch.int64)
        for start in range(0, draws, self.batch):
            count = min(self.batch, draws - start)
            # torch fills in blocks of 16: rows of whole blocks make the noise independent of the batch size
            rows = torch.randn(count, -(-x.numel() // 16) * 16, generator=generator, device=x.device)
            noise = rows[:, : x.numel()].view(count, *x.shape)
            predicted = predict(x + self.sigma * noise).cpu()
            counts += torch.bincount(predicted[predicted >= 0], minlength=classes)  # below 0: no class at all
        return counts


def lower_confidence_bound(count: int, n: int, alpha: float) -> float:
    """One-sided Clopper-Pearson lower bound of a probability at confidence 1 - alpha."""
    from scipy.stats import beta

    return 0.0 if count == 0 else float(beta.ppf(alpha, count, n - count + 1))


def radius(count: int, n: int, alpha: float, sigma: float) -> float | None:
    """Certified l2 radius sigma * Phi^-1(p), or None to abstain when the bound p on the top class is not above 1/2."""
    from scipy.stats import norm

    p = lower_confidence_bound(count, n, alpha)
    return None if p <= 0.5 else sigma * float(norm.ppf(p))


def needed_l2(norm: str, eps: float, dimensions: int) -> float:
    """l2 radius that covers a threat: eps itself, or eps * sqrt(d) for linf."""
    return eps if norm == "l2" else eps * math.sqrt(dimensions)
