"""Allocators: how a budget is shared among layers. Every strategy is keyed by tensor name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rprune.errors import InputError, unknown_name
from rprune.files import read_json
from rprune.pruning.budget import Budget, apportion

Counts = dict[str, int]


def uniform(weights: Mapping[str, Tensor], budget: Budget) -> Counts:
    """The same kept share in every layer (Sehwag et al., NeurIPS 2020)."""
    return apportion({name: weight.numel() for name, weight in weights.items()}, budget)


def erk(weights: Mapping[str, Tensor], budget: Budget) -> Counts:
    """Erdos-Renyi-Kernel: kept weights are proportional to the sum of a layer's dimensions (Evci et al., ICML 2020)."""
    return apportion({name: float(sum(weight.shape)) for name, weight in weights.items()}, budget)


def lamp(weights: Mapping[str, Tensor], budget: Budget) -> Counts:
    """The globally largest LAMP scores stay (Lee et al., ICLR 2021, eq. 3); no layer is emptied, its top score is 1."""
    return global_top({name: lamp_scores(weight) for name, weight in weights.items()}, budget)


def magnitude(weights: Mapping[str, Tensor], budget: Budget) -> Counts:
    """The globally largest magnitudes stay, after each layer has kept its floor (Han et al., NeurIPS 2015)."""
    return global_top({name: weight.detach().abs() for name, weight in weights.items()}, budget)


def igq(weights: Mapping[str, Tensor], budget: Budget) -> Counts:  # noqa: ARG001  sizes are all it needs
    """Nearly equal counts for all large layers: density 1/(f n + 1), one f for all (Flying Bird, ICLR 2022, its code).

    Never above 1 and smooth in n.
    """

    def exceeds(f: float) -> bool:
        return sum(count * budget.cost(name) for name, count in _igq_counts(f, budget).items()) > budget.kept

    low, high = 0.0, 1.0  # f; the total falls as f grows
    while exceeds(high):
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeds(middle) else (low, middle)
    return apportion(_igq_counts(high, budget), budget)


def _igq_counts(f: float, budget: Budget) -> dict[str, float]:
    return {name: max(n / (f * n + 1), float(budget.least[name])) for name, n in budget.sizes.items()}


def uniform_plus(weights: Mapping[str, Tensor], budget: Budget) -> Counts:
    """First convolution dense, at least a fifth of the last layer, the same share elsewhere (LAMP's code: uniform+).

    Where the budget cannot hold that, the shares of those two layers give way first.
    """
    first, last = next(iter(weights)), list(weights)[-1]
    spare = budget.kept - budget.spent({name: budget.least[name] for name in weights if name not in (first, last)})
    held = {first: budget.sizes[first], last: math.ceil(0.2 * budget.sizes[last])} if len(weights) > 1 else {}
    scale = min(1.0, spare / max(1, budget.spent(held)))
    even = uniform(weights, budget)
    held = {name: max(even[name], budget.least[name], math.floor(scale * n)) for name, n in held.items()}
    if budget.spent(held) > spare:  # the even share of the two is within the budget always
        return even
    inner = {name: n for name, n in budget.sizes.items() if name not in held}
    counts = dict(held)
    if inner:
        left = min(budget.kept - budget.spent(held), budget.spent(inner))
        counts |= uniform({name: weights[name] for name in inner}, budget.inside(inner, left))
    return apportion({name: float(counts[name]) for name in weights}, budget)  # what is left over, too


def lamp_scores(weight: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """w_u^2 over the sum of w_v^2 with |w_v| >= |w_u| in the same layer.

    In float64 and summed from the largest down, so that the tail is not a difference of large numbers.
    """
    squares = weight.detach().double().flatten().square()
    ordered, order = squares.sort(descending=True, stable=True)
    tail = ordered.cumsum(0)
    scores = torch.empty_like(squares)
    scores[order] = ordered / tail.clamp_min(torch.finfo(torch.float64).tiny)
    return scores.view(weight.shape)


def global_top(scores: Mapping[str, Tensor], budget: Budget) -> Counts:
    """How many of the ``kept`` largest scores lie in each layer, each layer's best ``floor`` taken first.

    Where weights cost unequally, each is taken in its turn unless it costs more than what is left.
    """
    raised = []
    for name, score in scores.items():
        flat = score.detach().double().flatten().clone()
        flat[flat.topk(budget.least[name]).indices] = torch.inf
        raised.append(flat)
    owner = torch.repeat_interleave(torch.arange(len(raised)), torch.tensor([flat.numel() for flat in raised]))
    rest = owner[torch.cat(raised).cpu().sort(descending=True, stable=True).indices]
    costs = torch.tensor([budget.cost(name) for name in scores])
    counts, left = torch.zeros(len(raised), dtype=torch.int64), budget.kept
    while len(rest := rest[costs[rest] <= left]):  # a round ends at a weight that does not fit
        taken = rest[: int(torch.searchsorted(costs[rest].cumsum(0), left, right=True))]
        counts += torch.bincount(taken, minlength=len(raised))
        left -= int(costs[taken].sum())
        rest = rest[len(taken) :]
    return dict(zip(scores, counts.tolist(), strict=True))


def from_file(path: Path, weights: Mapping[str, Tensor], budget: Budget) -> Counts:
    """A JSON table tensor name -> kept share, scaled to the budget.

    Raises InputError when its names are not exactly the model's prunable tensors or a share is outside [0, 1].
    """
    table = read_json(path, "allocation file")
    if not isinstance(table, dict):
        raise InputError(f"{path} is not a table", "write {tensor name: kept share}")
    missing, extra = set(weights) - set(table), set(table) - set(weights)
    if missing or extra:
        raise InputError(
            f"{path} does not fit the model: {len(missing)} tensors missing, {len(extra)} unknown "
            f"(first: {sorted(missing | extra)[0]})",
            "its keys must be the model's weight names",
        )
    if not all(isinstance(share, int | float) and 0 <= share <= 1 for share in table.values()):
        raise InputError(f"{path} has a share outside [0, 1]", "a share is kept weights / weights of the layer")
    return apportion({name: table[name] * weight.numel() for name, weight in weights.items()}, budget)


ALLOCATORS: dict[str, Callable[[Mapping[str, Tensor], Budget], Counts]] = {
    "uniform": uniform,
    "erk": erk,
    "lamp": lamp,
    "magnitude": magnitude,
    "igq": igq,
    "uniform+": uniform_plus,
}


def allocate(name: str, weights: Mapping[str, Tensor], budget: Budget) -> Counts:
    """Kept count of every layer, exactly ``budget.kept`` in all. ``name``: one of ALLOCATORS, or ``file:PATH``.

    Raises UsageError for an unknown name.
    """
    check_allocator(name)
    if name.startswith("file:"):
        return from_file(Path(name.removeprefix("file:")), weights, budget)
    return ALLOCATORS[name](weights, budget)


def check_allocator(name: str) -> None:
    """Raises UsageError for an unknown name."""
    if name not in ALLOCATORS and not name.startswith("file:"):
        raise unknown_name("allocator", name, [*ALLOCATORS, "file:PATH"])
