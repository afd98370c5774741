"""Two small bundles of the same test samples, as the gate reads them: a report and its samples.csv."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rprune.files import file_digest, write_json
from rprune.reports.evidence import COLUMNS
from rprune.reports.schema import Interval, Report

N = 200


def write_bundle(
    folder: Path,
    sample_report: Any,
    clean: Sequence[bool],
    robust: Sequence[bool],
    certified: Sequence[bool] = (),
    *,
    changes: dict[str, dict[str, Any]] | None = None,
    **report: Any,
) -> Report:
    """``clean``, ``robust`` and ``certified``: whether each sample counts; the last may be of fewer samples.

    ``changes``: fields of the int8 file's claims by metric; ``report``: arguments of the sample report.
    """
    (folder / "evidence").mkdir(parents=True)
    file = folder / "evidence" / "samples.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(COLUMNS)
        for i, (right, held) in enumerate(zip(clean, robust, strict=True)):
            label, attacked = i % 10, right and not held
            proved = int(certified[i]) if i < len(certified) else ""
            guess = label if right else (label + 1) % 10
            rows.writerow([i, label, guess, (label + 2) % 10 if attacked else "", "apgd" * attacked, proved])
    found = sample_report(None, history=False, profile=False, **report)
    counts = {"clean_accuracy": clean, "robust_accuracy": robust, "certified_accuracy": certified}
    claims = []
    for claim in found.claims:
        if claim.artifact == "onnx-int8" and counts.get(claim.metric):
            correct, n = sum(counts[claim.metric]), len(counts[claim.metric])
            counted = {"correct": correct, "n": n, "value": correct / n, "interval": Interval.of(correct, n)}
            more = (changes or {}).get(claim.metric, {})
            claims.append(claim.model_copy(update=counted | {"curve": [], "attacks": []} | more))
        elif claim.artifact != "onnx-int8":
            claims.append(claim)
    subjects = [
        s.model_copy(update={"sha256": file_digest(file), "bytes": file.stat().st_size})
        if s.name == "evidence/samples.csv"
        else s
        for s in found.subjects
    ]
    sealed = found.model_copy(update={"claims": claims, "subjects": subjects}).sealed()
    write_json(folder / "report.json", sealed.to_json())
    return sealed


def counts(lost: int, gained: int, right: int) -> tuple[list[bool], list[bool]]:
    """Before and after, of N samples of which ``right`` are right in both, ``lost`` before alone, ``gained`` after."""
    before = [True] * (right + lost) + [False] * (N - right - lost)
    after = [True] * right + [False] * lost + [True] * gained + [False] * (N - right - lost - gained)
    return before, after


def write_pair(folder: Path, sample_report: Any) -> None:
    """Bundles ``main`` and ``branch``: clean accuracy loses 4 of 200 and gains 1, robust accuracy loses 20."""
    clean, robust = counts(4, 1, 150), counts(20, 0, 80)
    for i, name in enumerate(("main", "branch")):
        write_bundle(folder / name, sample_report, clean[i], robust[i])
