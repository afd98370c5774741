"""Footprints: known entropies, a second slow count, and what a coder that exists can reach."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rprune.export.footprint import bound, footprint


def test_a_mask_of_half_is_a_bit_a_weight():
    found = bound({"a": np.array([[0, 3], [3, 0]], np.int8), "b": np.array([0, 3, 0, 3], np.int8)})
    assert found.mask == 8 / 8
    assert found.values == 0  # one value only says nothing


def test_each_layer_has_a_mask_of_its_own():
    """A dense layer and an empty one need no mask; pooled they would need a bit a weight."""
    found = bound({"a": np.arange(1, 5, dtype=np.int8), "b": np.zeros((2, 2), np.int8)})
    assert found.mask == 0
    assert found.values == 4 * 2 / 8  # four equally likely values


def test_values_are_pooled_over_the_network():
    found = bound({"a": np.full(4, 7, np.int8), "b": np.full(4, -7, np.int8)})
    assert found.values == 8 * 1 / 8


def test_one_of_a_hundred():
    weight = np.zeros(100, np.float32)
    weight[17] = 0.5
    assert bound({"w": weight}).mask == pytest.approx(8.079313589591118 / 8)  # 100 H(0.01) bits


def test_negative_zeros_are_zeros():
    assert bound({"w": np.array([-0.0, 0.0, 1.0, -0.0], np.float32)}) == bound(
        {"w": np.array([0.0, 0.0, 1.0, 0.0], np.float32)}
    )


def slow_bound(weights: dict[str, np.ndarray]) -> tuple[float, float]:
    mask, values = 0.0, Counter()
    for array in weights.values():
        flat = array.reshape(-1).tolist()
        values.update(value for value in flat if value)
        for symbol in (True, False):
            n = sum(bool(value) == symbol for value in flat)
            mask += n * math.log2(len(flat) / n) if n else 0.0
    total = sum(values.values())
    return mask / 8, sum(n * math.log2(total / n) for n in values.values()) / 8


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=60), min_size=1, max_size=4))
def test_bound_is_that_of_a_slow_count(rows):
    weights = {f"l{i}": np.array(row, np.int8) for i, row in enumerate(rows)}
    mask, values = slow_bound(weights)
    found = bound(weights)
    assert found.mask == pytest.approx(mask, abs=1e-9)
    assert found.values == pytest.approx(values, abs=1e-9)


def test_deflate_does_not_go_below_the_bound():
    generator = np.random.default_rng(0)
    weight = np.where(generator.random(200_000) < 0.01, generator.integers(-60, 61, 200_000), 0).astype(np.int8)
    found = bound({"w": weight})
    reached = len(zlib.compress(weight.tobytes(), 9))
    assert found.mask + found.values < reached < 3 * (found.mask + found.values)


def test_footprint_counts_what_is_stored_and_what_runs():
    conv, fc = np.zeros((4, 2, 3, 3), np.int8), np.zeros((5, 16), np.int8)
    conv.reshape(-1)[:10] = 3
    fc[0, :6] = -2
    found = footprint(
        {"conv.weight": conv, "fc.weight": fc},
        {"conv.weight": 64, "fc.weight": 1},
        side={"biases": 9, "scales": 11},
        dense_weights=200,
        dense_parameters=240,
        dense_macs=10_000,
        files={"model.onnx": 96, "model.rpz": 480},
    )
    assert (found.kept, found.total, found.dense_weights) == (16, 72 + 80, 200)
    assert found.density == (16 + 9 + 11) / 240
    assert (found.sparse_macs, found.dense_macs) == (10 * 64 + 6, 10_000)
    assert found.dense_bytes == 960
    assert found.ratios == {"model.onnx": 10, "model.rpz": 2}
    table = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert table["side"] == {"biases": 9, "scales": 11}
    assert table["bound"] == asdict(bound({"conv.weight": conv, "fc.weight": fc}))
