"""The evidence files of a bundle: points that break samples, and pictures of them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rprune.data.splits import Split
from rprune.errors import InputError
from rprune.files import inside
from rprune.reports.html import Sample
from rprune.reports.schema import Report

SHOWN = 8
COLUMNS = ("index", "label", "clean_prediction", "adversarial_prediction", "attack", "certified")
YOUNGER = ("queries", "margin", "distance", "witness")  # columns that the first reports did not have
KINDS = {"index": ("x", "uint8"), "float_index": ("float_x", "float32")}


@dataclass(frozen=True, eq=False)
class Witnesses:
    """Points that break samples, by sample."""

    index: NDArray[np.int64]  # (m,), ascending
    points: NDArray[np.float32]  # (m, c, h, w) in [0, 1]
    exact: NDArray[np.bool_]  # (m,): stored in uint8, on the grid of 8-bit pixels


def unit(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 to [0, 1] as every loader does it."""
    return pixels.astype(np.float32) / np.float32(255)


def read_witnesses(path: Path) -> Witnesses:
    """Both kinds of witnesses of a file. Raises ValueError when it holds anything else, or a sample twice."""
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # errors of safetensors share no base with those of its types
        raise ValueError(f"cannot read {path.name}: {error}") from None
    kinds = KINDS if set(tensors) != {"index", "x"} else {"index": ("x", "float32")}  # as the first reports had it
    if set(tensors) != {*kinds, *(name for name, _ in kinds.values())}:
        raise ValueError(f"{path.name} holds {', '.join(sorted(tensors))}")
    for key, (name, dtype) in kinds.items():
        if (tensors[key].dtype.name, tensors[name].dtype.name) != ("int64", dtype):
            raise ValueError(f"{key} is {tensors[key].dtype} and {name} is {tensors[name].dtype}")
        if tensors[name].ndim != 4 or tensors[key].shape != tensors[name].shape[:1]:
            raise ValueError(f"{key} has shape {tensors[key].shape} and {name} {tensors[name].shape}")
    stored = [tensors[name] for name, _ in kinds.values()]
    index = np.concatenate([tensors[key] for key in kinds])
    points = np.concatenate([unit(x) if x.dtype == np.uint8 else x for x in stored])
    exact = np.concatenate([np.full(len(x), x.dtype == np.uint8) for x in stored])
    if len(np.unique(index)) != len(index):
        raise ValueError("a sample has two witnesses")
    order = index.argsort()
    return Witnesses(index[order], points[order], exact[order])


def read_samples(path: Path) -> list[dict[str, str]]:
    """The rows of samples.csv. Raises ValueError when its columns are not those of this version or of the first."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            columns, rows = tuple(table.fieldnames or ()), list(table)
    except csv.Error as error:
        raise ValueError(f"{path.name}: {error}") from None
    if columns not in (COLUMNS, COLUMNS + YOUNGER):
        raise ValueError(f"{path.name} has columns {', '.join(columns)}")
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path.name} has a row of another length")
    return rows


def distances(delta: NDArray[np.floating], norm: str) -> NDArray[np.float64]:
    """Norm (``linf`` or ``l2``) of each perturbation ``(m, c, h, w)``."""
    size = np.abs(delta.astype(np.float64))
    return np.asarray(size.max((1, 2, 3), initial=0) if norm == "linf" else np.sqrt((size**2).sum((1, 2, 3))))


def broken_samples(folder: Path, report: Report, test: Split) -> list[Sample]:
    """The first broken samples that were right before, clean beside adversarial, from the evidence files.

    Raises InputError when these are not what they should be.
    """
    try:
        found = read_witnesses(inside(folder, report.evidence.witnesses))
        rows = {int(row["index"]): row for row in read_samples(inside(folder, report.evidence.samples))}
    except ValueError as error:
        raise InputError(f"cannot read the evidence: {error}", "check the folder with 'rprune verify'") from None
    shown = list(zip(found.index.tolist(), found.points, strict=True))[:SHOWN]
    try:
        return [_sample(report, rows[index], unit(test.pixels(index, index + 1)[0]), point) for index, point in shown]
    except (LookupError, ValueError) as error:
        raise InputError(f"the evidence makes no sense: {error}", "check the folder with 'rprune verify'") from None


def _sample(report: Report, row: dict[str, str], clean: NDArray[np.float32], point: NDArray[np.float32]) -> Sample:
    label, prediction, adversarial = (
        report.data.classes[int(row[name])] for name in ("label", "clean_prediction", "adversarial_prediction")
    )
    return Sample(
        index=int(row["index"]),
        label=label,
        clean_prediction=prediction,
        adversarial_prediction=adversarial,
        clean=clean,
        adversarial=point,
        attack=row["attack"],
        distance=float(distances((point - clean)[None], report.threat.norm)[0]),
    )
