"""How many weights may stay: exact integers, in all and for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from rprune.errors import UsageError


@dataclass(frozen=True)
class Budget:
    """Exactly ``kept`` of the conv and linear weights stay, at least ``floor`` of them in every tensor.

    ``sizes`` is tensor name -> number of weights, in the model's order.
    """

    sizes: Mapping[str, int]
    kept: int
    floor: int = 1

    def __post_init__(self) -> None:
        least = sum(min(self.floor, size) for size in self.sizes.values())
        if not least <= self.kept <= self.total:
            raise UsageError(
                f"a budget of {self.kept} of {self.total} weights leaves a layer empty: "
                f"{len(self.sizes)} layers need at least {least}",
                f"use a sparsity of at most {1 - least / self.total:.6f}",
            )

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    @property
    def density(self) -> float:
        """Kept share of all prunable weights (a_t in HARP)."""
        return self.kept / self.total

    @classmethod
    def of(cls, sizes: Mapping[str, int], sparsity: float, floor: int = 1) -> Budget:
        """The largest budget whose sparsity is not below the wanted one, in exact rational arithmetic.

        Raises UsageError unless 0 <= sparsity < 1 and every layer can keep ``floor`` weights.
        """
        if not 0 <= sparsity < 1:
            raise UsageError(f"sparsity {sparsity} is not in [0, 1)", "0.99 removes 99 % of the weights")
        if not sizes:
            raise UsageError("the model has no conv or linear weight to prune", "check --arch")
        total = sum(sizes.values())
        return cls(dict(sizes), math.floor((1 - Fraction(str(sparsity))) * total), floor)


def fill(shares: Mapping[str, float], budget: Budget) -> dict[str, float]:
    """Real-valued counts proportional to ``shares``, held between floor and size, that add up to the budget.

    Water filling: counts are clip(t * share, floor, size) for the one t at which they sum to ``kept``. With shares as
    ERK defines them this is ERK's rule "cap a layer at dense and solve again".
    """
    assert set(shares) == set(budget.sizes)
    bounds = {name: (min(budget.floor, size), size) for name, size in budget.sizes.items()}
    shares = {name: max(float(share), 1e-12) for name, share in shares.items()}

    def counts(t: float) -> dict[str, float]:
        return {name: min(max(t * share, bounds[name][0]), bounds[name][1]) for name, share in shares.items()}

    low, high = 0.0, max(size / shares[name] for name, size in budget.sizes.items())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle).values()) < budget.kept else (low, middle)
    return counts(high)


def apportion(shares: Mapping[str, float], budget: Budget) -> dict[str, int]:
    """Integer counts by largest remainder from :func:`fill`; they sum to exactly ``budget.kept``."""
    wanted = fill(shares, budget)
    counts = {name: min(math.floor(value + 1e-9), budget.sizes[name]) for name, value in wanted.items()}
    missing = budget.kept - sum(counts.values())
    order = sorted(wanted, key=lambda name: counts[name] - wanted[name])  # largest remainder first; stable
    while missing > 0:
        for name in order:
            if missing and counts[name] < budget.sizes[name]:
                counts[name] += 1
                missing -= 1
    while missing < 0:
        for name in reversed(order):
            if missing and counts[name] > min(budget.floor, budget.sizes[name]):
                counts[name] -= 1
                missing += 1
    return counts
