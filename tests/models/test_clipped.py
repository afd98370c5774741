"""Clipping as ReLUs: what torch.clamp gives, for ends that exist and ends that do not."""

from __future__ import annotations

import math

import pytest
import torch

from rprune.errors import InputError
from rprune.models.graph import LARGEST, clipped

X = torch.linspace(-12, 12, 1001, dtype=torch.float64)


@pytest.mark.parametrize(
    ("low", "high"),
    [(-0.3, 0.9), (0, 6), (2, 3), (-3, -2), (1, 1), (0, math.inf), (-math.inf, 0), (-2, math.inf), (-math.inf, 1.5),
     (-LARGEST, LARGEST), (0, LARGEST), (-1000, 1000)],
)  # fmt: skip
def test_it_clamps(low: float, high: float) -> None:
    assert torch.allclose(clipped(low, high)(X), X.clamp(low, high), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1001), (-1e6, 0), (1, 0), (math.inf, math.inf), (-math.inf, -math.inf), (0, math.nan)]
)
def test_ends_far_out_are_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="it clips to"):
        clipped(low, high)
