"""Masks: choosing exactly k entries, and holding the rest at zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rprune.seeds import derive

Masks: TypeAlias = dict[str, Tensor]
"""Tensor name -> bool tensor of the weight's shape; True = kept."""


def top_mask(scores: Float[Tensor, ...], kept: int) -> Bool[Tensor, ...]:
    """True at exactly ``kept`` largest entries; among equal entries the first in memory order win, on every device.

    A k-th value and a comparison instead of a sort: numpy's partition on the CPU, topk on the GPU, which counts ties
    rather than wait for the host to know whether there are too many.
    """
    flat = scores.detach().reshape(-1)
    if kept >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if flat.device.type == "cpu":
        threshold = torch.from_numpy(np.partition(flat.numpy(), -kept)[-kept : flat.numel() - kept + 1])
        mask = flat >= threshold
        if (excess := int(mask.count_nonzero()) - kept) > 0:
            mask[(flat == threshold).nonzero().flatten()[-excess:]] = False
    else:
        threshold = flat.topk(kept, sorted=False).values.min()
        above, ties = flat > threshold, flat == threshold
        mask = above | (ties & (ties.cumsum(0) <= kept - above.sum()))
    return mask.view(scores.shape)


def impose(weights: Mapping[str, Tensor], masks: Masks) -> None:
    """Set masked-out weights to +0.0 in place (a product would leave negative zeros)."""
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].masked_fill_(~mask, 0.0)


def random_masks(weights: Mapping[str, Tensor], counts: Mapping[str, int], seed: int) -> Masks:
    """Exactly ``counts`` random entries of every tensor."""
    generator = torch.Generator().manual_seed(derive(seed, "random mask"))
    masks = {}
    for name, weight in weights.items():
        masks[name] = top_mask(torch.rand(weight.shape, generator=generator), counts[name]).to(weight.device)
    return masks


def enliven(weights: Mapping[str, Tensor], masks: Masks) -> None:
    """Give kept weights that are exactly 0 the least magnitude that counts, 1e-7 of the layer's largest, in place.

    A weight that grew in the last step, or whose gradient was 0 ever since, is 0; it would be missing from the budget.
    """
    with torch.no_grad():
        for name, mask in masks.items():
            weight = weights[name]
            least = weight.abs().max().clamp_min(1e-7) * 1e-7
            weight.copy_(torch.where(mask & (weight == 0), least, weight))


def count(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())
