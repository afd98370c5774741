"""Learned codebooks: weights of few values, by k-means in one dimension (ATMC: Gui et al., NeurIPS 2019)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LEVELS = 255  # non-zero levels that one byte can name; the remaining code is "no weight"


def quantize(values: Float[Tensor, ...], support: Bool[Tensor, ...], levels: int = LEVELS) -> Float[Tensor, ...]:
    """``values`` on ``support`` at the nearest of at most ``levels`` learned levels, +0.0 elsewhere.

    A non-zero value gets a level of its own sign, never 0. The paper's code lets the support grow, here it is
    fixed.
    """
    chosen = values[support]
    result = torch.zeros_like(values)
    if chosen.numel():
        result[support] = nearest(chosen, learn(chosen, levels))
    return result


def learn(values: Float[Tensor, " n"], levels: int = LEVELS) -> Float[Tensor, " k"]:
    """At most ``levels`` (2 or more) ascending levels for non-zero values; the values themselves where few."""
    assert levels >= 2
    ordered = values.sort().values
    distinct: Tensor = torch.unique_consecutive(ordered)
    return distinct if len(distinct) <= levels else lloyd(ordered, seeds(distinct, levels))


def seeds(distinct: Float[Tensor, " n"], levels: int) -> Float[Tensor, " k"]:
    """Different ascending values to start from, the least and the largest among them, so that both signs have one.

    Their density goes with the cube root of the values' density, which is right for many levels (Panter and Dite,
    Proceedings of the IRE 1951): a gap counts with its power 2/3. The same values give the same levels, as nothing is
    drawn (the paper's code draws entries). Quantiles leave the tails with too few levels for 20 iterations to mend.
    """
    below, above = distinct[:-1], distinct[1:]
    gaps = (above - below).double().masked_fill_((below < 0) & (above > 0), 0.0)  # no interval spans the signs
    place = torch.cat([gaps.new_zeros(1), gaps.pow(2 / 3).cumsum(0)])
    order = torch.arange(levels, device=distinct.device)
    index = torch.searchsorted(place, torch.linspace(0, 1, levels, dtype=place.dtype, device=place.device) * place[-1])
    index = (index - order).cummax(0).values + order  # no value twice
    index = index.minimum(len(distinct) - levels + order)
    index[-1] = len(distinct) - 1
    return distinct[index]


def lloyd(ordered: Float[Tensor, " n"], centres: Float[Tensor, " k"], steps: int = 20) -> Float[Tensor, " k"]:
    """Centres after ``steps`` iterations of Lloyd's algorithm; both arguments ascend, and so does the result.

    A cluster is an interval, so one iteration is k binary searches over running sums. An empty cluster keeps its
    centre (the paper's code moves it to 0), a centre at exactly 0 rests there.
    """
    n = len(ordered)
    sums = torch.cat([ordered.new_zeros(1, dtype=torch.float64), ordered.double().cumsum(0)])
    for _ in range(steps):
        cuts = torch.searchsorted(ordered, boundaries(centres))
        first, end = torch.cat([cuts.new_zeros(1), cuts]), torch.cat([cuts, cuts.new_full((1,), n)])
        means = ((sums[end] - sums[first]) / (end - first).clamp_min(1)).to(centres.dtype)
        # differences of sums round; a mean lies among its values, so it cannot become 0 or change sign
        means = means.clamp(ordered[first.clamp_max(n - 1)], ordered[(end - 1).clamp_min(0)])
        centres = torch.where((first == end) | (centres == 0), centres, means)
    return centres


def nearest(values: Float[Tensor, ...], levels: Float[Tensor, " k"]) -> Float[Tensor, ...]:
    """Each value's nearest level of its own sign; ``levels`` ascend."""
    return levels[torch.bucketize(values, boundaries(levels), right=True)]


def boundaries(levels: Float[Tensor, " k"]) -> Float[Tensor, " k-1"]:
    """Where one level's interval ends and the next one's begins: half way, and 0 between the signs."""
    below, above = levels[:-1], levels[1:]
    return torch.where((below < 0) & (above > 0), 0.0, below + (above - below) / 2)


def size_in_bits(nonzero: int, levels: int, quantized: bool = True) -> int:
    """ATMC's size of a tensor: an index for each non-zero entry, and the levels in 32 bits.

    32 bits an entry where it is not quantized or has no more entries than the index has codes. Where the entries lie
    costs nothing in this count, which flatters strong sparsity.
    """
    index = max(0, levels - 1).bit_length()
    if not quantized or 2**index >= nonzero:
        return 32 * nonzero
    return nonzero * index + 32 * levels
