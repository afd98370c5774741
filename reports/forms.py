"""Checks of the other forms of a bundle's network: they hold the same weights, and what the report says of them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rprune.export.footprint import bound
from rprune.export.session import load_onnx, stored_weights
from rprune.export.unpack import unpack
from rprune.reports.schema import Report

Outcome = tuple[bool, str]
EXACT = 1 << 24


def checks(report: Report, roles: Mapping[Any, Path]) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Static checks by name, each of what is there."""
    yield "labels", lambda: _labels(report, roles)
    main = roles.get("onnx-int8", roles.get("onnx"))
    if main is None:
        return
    if "onnx-compact" in roles:
        yield "compact", lambda: _compact(main, roles["onnx-compact"])
    if "packed" in roles:
        yield "packed", lambda: _packed(main, roles["packed"])
    if "c" in roles and can_write_c():
        yield "c", lambda: _c(main, roles["c"])
    if report.integers is not None:
        yield "integers", lambda: _integers(report, roles["onnx-int8"])
    if report.footprint is not None:
        yield "footprint", lambda: _footprint(report, main)


def can_write_c() -> bool:
    """Whether torch is here, without which no C source can be compared."""
    return importlib.util.find_spec("torch") is not None


def _labels(report: Report, roles: Mapping[Any, Path]) -> Outcome:
    """Every place that names classes or tensors names the same."""
    names = "\n".join(report.data.classes)
    wanted = {"rprune.labels": names, "rprune.tensors_sha256": report.model["tensors_sha256"]}
    right = "\n".join(report.model.get("labels", report.data.classes)) == names
    for role in ("onnx", "onnx-int8", "onnx-compact"):
        stamps = {p.key: p.value for p in load_onnx(roles[role]).metadata_props} if role in roles else {}
        right = right and all(stamps.get(key, value) == value for key, value in wanted.items())
    return right, f"{len(report.data.classes)} classes, as the files name them"


def _compact(main: Path, compact: Path) -> Outcome:
    return _same(stored_weights(main), stored_weights(compact)), f"weights of {compact.name} are those of {main.name}"


def _packed(main: Path, packed: Path) -> Outcome:
    weights = {f"{name}.weight": array for name, array in unpack(packed.read_bytes()).weights.items()}
    return _same(stored_weights(main), weights), f"unpacked, {packed.name} has the weights of {main.name}"


def _c(main: Path, source: Path) -> Outcome:
    """Written again, and never compiled."""
    from rprune.export.c.origin import is_written_of

    return is_written_of(source, main), f"{source.name} against what this version of rprune writes of {main.name}"


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


def _integers(report: Report, path: Path) -> Outcome:
    """The largest sums follow from the file's weights and biases, and no weight has more bits."""
    from onnx import numpy_helper

    stated = report.integers
    assert stated is not None
    weights = stored_weights(path)
    biases = {t.name: numpy_helper.to_array(t) for t in load_onnx(path).graph.initializer if t.name.endswith(".bias")}
    largest = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        sums = 255 * np.abs(weight.reshape(len(weight), -1).astype(np.int64)).sum(1)
        largest[layer] = int((sums + np.abs(biases[f"{layer}.bias"].astype(np.int64))).max())
    most = max(int(np.abs(weight.astype(np.int64)).max(initial=0)) for weight in weights.values())
    right = 2 <= stated.bits <= 8 and most < 1 << (stated.bits - 1)
    right = right and stated.largest == largest and stated.exact == (max(largest.values()) < EXACT)
    said = "exact in float32" if stated.exact else "beyond float32"
    return right, f"{stated.bits} bits, sums of at most {max(largest.values()):,}, {said}, recomputed from {path.name}"


def _footprint(report: Report, main: Path) -> Outcome:
    stated = report.footprint
    assert stated is not None
    weights = stored_weights(main)
    kept, total = (sum(count(array) for array in weights.values()) for count in (np.count_nonzero, np.size))
    least = bound(weights)
    sizes = {subject.name: subject.bytes for subject in report.subjects}
    right = (stated.kept, stated.total) == (int(kept), int(total)) and stated.dense_bytes == 4 * stated.dense_parameters
    right = right and _close(stated.density, (stated.kept + sum(stated.side.values())) / stated.dense_parameters)
    right = right and _close(stated.bound.mask, least.mask) and _close(stated.bound.values, least.values)
    right = right and all(_close(ratio, stated.dense_bytes / sizes[name]) for name, ratio in stated.ratios.items())
    right = right and stated.sparse_macs <= stated.dense_macs
    return right, f"bound of {least.mask + least.values:,.0f} bytes, density {stated.density:.4f}, ratios recomputed"


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
