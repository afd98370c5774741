"""How many weights may stay, or how many multiply-accumulates: exact integers, in all and for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property

from rprune.errors import InputError, UsageError, unknown_name


@dataclass(frozen=True)
class Budget:
    """Exactly ``kept`` of the conv and linear weights stay, at least ``floor`` of them in every tensor.

    ``sizes`` is tensor name -> number of weights, in the model's order. Tensors named in ``dense`` keep all their
    weights and count like any other. A ``floor`` below 1 is a share of the tensor's weights, rounded up.

    ``costs`` is tensor name -> what one of its weights costs, 1 or more (multiply-accumulates, ``models.cost``). Where
    it is given, ``kept``, ``total`` and ``density`` are in that unit: what stays costs at most ``kept``, and no weight
    more would fit.
    """

    sizes: Mapping[str, int]
    kept: int
    floor: int | float = 1
    dense: frozenset[str] = field(default_factory=frozenset)
    costs: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if idle := [name for name in self.costs if self.costs[name] < 1]:
            raise InputError(f"{idle[0]} does nothing in a forward pass", "use a budget of weights: a sparsity")
        least = self.spent(self.least)
        if not least <= self.kept <= self.total:
            raise UsageError(
                f"a budget of {self.kept} of {self.total} {'MACs' if self.costs else 'weights'} leaves a layer empty "
                f"or below its floor: {len(self.sizes)} layers need at least {least}",
                f"use macs of at least {math.ceil(1e6 * least / self.total) / 1e6:.6f}"
                if self.costs
                else f"use a sparsity of at most {1 - least / self.total:.6f}",
            )

    @cached_property
    def total(self) -> int:
        return self.spent(self.sizes)

    def cost(self, name: str) -> int:
        """What one weight of a tensor costs."""
        return self.costs.get(name, 1)

    def spent(self, counts: Mapping[str, int]) -> int:
        """What so many weights of each tensor cost."""
        return sum(count * self.cost(name) for name, count in counts.items())

    def met(self, counts: Mapping[str, int]) -> bool:
        """So many weights fit, and one more of any tensor does not: exactly ``kept`` where all cost 1."""
        room = self.kept - self.spent(counts)
        return room >= 0 and all(room < self.cost(n) for n, size in self.sizes.items() if counts[n] < size)

    @cached_property
    def least(self) -> dict[str, int]:
        """The weights that each tensor keeps whatever happens."""
        floors = {n: self.floor if self.floor >= 1 else math.ceil(self.floor * size) for n, size in self.sizes.items()}
        return {n: size if n in self.dense else max(1, min(int(floors[n]), size)) for n, size in self.sizes.items()}

    @property
    def density(self) -> float:
        """Kept share of all prunable weights, or of what they cost (a_t in HARP)."""
        return self.kept / self.total

    def inside(self, sizes: Mapping[str, int], kept: int) -> Budget:
        """A budget of other numbers, for some or all of the tensors, by the same rules."""
        return replace(self, sizes=sizes, kept=kept, dense=self.dense & frozenset(sizes))

    @classmethod
    def of(
        cls,
        sizes: Mapping[str, int],
        sparsity: float | Fraction,
        floor: int | float = 1,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        costs: Mapping[str, int] | None = None,
    ) -> Budget:
        """The largest budget whose sparsity is not below the wanted one, in exact rational arithmetic.

        With ``costs`` the sparsity is the share of these that is saved.

        ``include`` and ``exclude`` are globs over tensor names: what is excluded, or not included, stays dense. The
        sparsity is that of all tensors together all the same.

        Raises UsageError unless 0 <= sparsity < 1 and every layer can keep ``floor`` weights, and for a glob that
        matches nothing.
        """
        if not 0 <= sparsity < 1:
            raise UsageError(f"sparsity {sparsity} is not in [0, 1)", "0.99 removes 99 % of the weights")
        if not sizes:
            raise UsageError("the model has no conv or linear weight to prune", "check --arch")
        costs = dict(costs or {})
        total = sum(size * costs.get(name, 1) for name, size in sizes.items())
        kept = math.floor((1 - Fraction(str(sparsity))) * total)
        return cls(dict(sizes), kept, floor, dense_layers(list(sizes), include, exclude), costs)


def dense_layers(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> frozenset[str]:
    """Names that the globs leave dense. A glob may leave out the ``.weight`` that every name ends in."""
    for glob in [*include, *exclude]:
        if not any(_matches(name, glob) for name in names):
            raise unknown_name("layer", glob, names)
    chosen = [name for name in names if not include or any(_matches(name, glob) for glob in include)]
    return frozenset(names) - {name for name in chosen if not any(_matches(name, glob) for glob in exclude)}


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name.removesuffix(".weight"), glob)


def fill(shares: Mapping[str, float], budget: Budget) -> dict[str, float]:
    """Real-valued counts proportional to ``shares``, held between floor and size, that add up to the budget.

    Water filling: counts are clip(t * share, floor, size) for the one t at which they cost ``kept``. With shares as
    ERK defines them this is ERK's rule "cap a layer at dense and solve again".
    """
    assert set(shares) == set(budget.sizes)
    bounds = {name: (budget.least[name], size) for name, size in budget.sizes.items()}
    shares = {name: max(float(share), 1e-12) for name, share in shares.items()}

    def counts(t: float) -> dict[str, float]:
        return {name: min(max(t * share, bounds[name][0]), bounds[name][1]) for name, share in shares.items()}

    low, high = 0.0, max(size / shares[name] for name, size in budget.sizes.items())
    for _ in range(200):
        middle = (low + high) / 2
        spent = sum(count * budget.cost(name) for name, count in counts(middle).items())
        low, high = (middle, high) if spent < budget.kept else (low, middle)
    return counts(high)


def apportion(shares: Mapping[str, float], budget: Budget) -> dict[str, int]:
    """Integer counts by largest remainder from :func:`fill`, which the budget is met with (``Budget.met``)."""
    wanted = fill(shares, budget)
    counts = {name: min(math.floor(value + 1e-9), budget.sizes[name]) for name, value in wanted.items()}
    missing = budget.kept - budget.spent(counts)
    order = sorted(wanted, key=lambda name: counts[name] - wanted[name])  # largest remainder first; stable
    while missing < 0:
        for name in reversed(order):
            if missing < 0 and counts[name] > budget.least[name]:
                counts[name] -= 1
                missing += budget.cost(name)
    while not budget.met(counts):
        for name in order:
            if budget.cost(name) <= missing and counts[name] < budget.sizes[name]:
                counts[name] += 1
                missing -= budget.cost(name)
    return counts
