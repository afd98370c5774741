"""Re-check a bundle without trusting who made it, and without torch.

Levels, each including the ones before: ``hash`` (files are the ones the report names, and the report is the one its id
names), ``static`` (sparsity, sizes, zeros, intervals, curves and gate follow from the files and counts), ``replay``
(predictions, witnesses and counts are reproduced by ONNX Runtime on the data).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rprune.data.sources import load_data
from rprune.errors import IntegrityError
from rprune.evaluation.statistics import clopper_pearson
from rprune.export.session import OnnxClassifier, load_onnx, weight_counts
from rprune.files import digest_of, file_digest
from rprune.reports.gate import Policy, judge
from rprune.reports.schema import Claim, Report, Subject, read_report

Level = Literal["hash", "static", "replay"]
LEVELS: tuple[Level, ...] = ("hash", "static", "replay")
BALL_TOLERANCE = 1e-6  # float32 rounding of x + delta


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


@dataclass
class Verification:
    """What was checked, in order. ``integrity`` is false when bytes differ; ``passed`` needs every check."""

    level: Level
    checks: list[Check] = field(default_factory=list)
    integrity: bool = True

    @property
    def passed(self) -> bool:
        return self.integrity and all(check.passed for check in self.checks)

    def add(self, name: str, passed: bool, detail: str) -> None:
        self.checks.append(Check(name, bool(passed), detail))


def verify(
    folder: Path, level: Level = "replay", policy: Policy | None = None, data: str | None = None
) -> Verification:
    """Check a bundle up to ``level``; stops after the hashes when bytes are not the promised ones.

    Args:
        folder: the bundle, with report.json inside.
        policy: if given, the gate of the report must be this policy's outcome.
        data: where the test data is here; None: the source that the report names.

    Raises:
        InputError: no readable report, or the data is not there.
    """
    report = read_report(folder)
    result = Verification(level)
    _hashes(result, folder, report)
    if result.integrity and level != "hash":
        _static(result, folder, report, policy)
    if result.integrity and level == "replay":
        _replay(result, folder, report, data or report.data.source)
    return result


def _hashes(result: Verification, folder: Path, report: Report) -> None:
    problems = []
    for subject in report.subjects:
        path = _inside(folder, subject)
        if not path.is_file():
            problems.append(f"{subject.name} is missing")
        elif file_digest(path) != subject.sha256:
            problems.append(f"{subject.name} differs from its sha256")
    result.add("files", not problems, "; ".join(problems) or f"{len(report.subjects)} files match their hashes")
    id_holds = report.id == report.computed_id()
    result.add(
        "report id",
        id_holds,
        "report.json matches its id" if id_holds else "report.json was changed after it was sealed",
    )
    result.add("recipe", digest_of(report.recipe) == report.recipe_sha256, "the recipe matches its digest")
    result.integrity = all(check.passed for check in result.checks)


def _inside(folder: Path, subject: Subject) -> Path:
    path = (folder / subject.name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise IntegrityError(f"the report names {subject.name}, outside its folder", "do not trust this bundle")
    return path


def _static(result: Verification, folder: Path, report: Report, policy: Policy | None) -> None:
    roles = {subject.role: subject.name for subject in report.subjects}
    counted = weight_counts(folder / roles[report.sparsity.measured_on])
    layers = {entry.name: (tuple(entry.shape), entry.nonzero) for entry in report.sparsity.by_layer}
    kept = sum(nonzero for _, nonzero in counted.values())
    total = sum(int(np.prod(shape)) for shape, _ in counted.values())
    right = counted == layers and kept == report.sparsity.kept and total == report.sparsity.total
    right = right and _close(report.sparsity.overall, 1 - kept / total)
    result.add("sparsity", right, f"{kept} of {total} weights counted in {roles[report.sparsity.measured_on]}")
    if report.sparsity.budget is not None:
        result.add("budget", kept == report.sparsity.budget, f"kept {kept}, budget {report.sparsity.budget}")
    if report.sparsity.int8_zeros_equal_float_zeros is not None:
        same = _same_zeros(folder / roles["onnx"], folder / roles["onnx-int8"], list(counted))
        result.add(
            "zeros",
            same == report.sparsity.int8_zeros_equal_float_zeros,
            "int8 zeros equal float zeros, weight by weight",
        )
    for claim in report.claims:
        result.add(claim.id, *_arithmetic(claim, report))
    broken_chain = [b.stage for a, b in zip(report.lineage, report.lineage[1:], strict=False) if b.parent != a.output]
    result.add("lineage", not broken_chain, f"{len(report.lineage)} stages follow each other")
    if report.gate is not None or policy is not None:
        _gate(result, report, policy)


def _arithmetic(claim: Claim, report: Report) -> tuple[bool, str]:
    """Value, interval, curve and radii of a claim recomputed from its counts; its file is one of the bundle's."""
    lower, upper = clopper_pearson(claim.correct, claim.n, claim.interval.level)
    right = 0 <= claim.correct <= claim.n and _close(claim.value, claim.correct / claim.n)
    right = right and _close(claim.interval.lower, lower) and _close(claim.interval.upper, upper)
    right = right and any(s.role == claim.artifact and s.sha256 == claim.sha256 for s in report.subjects)
    right = right and all(_close(p.value, p.correct / claim.n) for p in claim.curve)
    if claim.metric == "smoothed_certified_accuracy":
        right = right and _radii(claim)
    return right, f"{claim.correct}/{claim.n} = {claim.value:.4f}, interval recomputed"


def _radii(claim: Claim) -> bool:
    from scipy.stats import beta, norm

    settings, at = claim.settings, claim.threat.eps_float if claim.threat else 0.0
    correct = 0
    for row in settings["samples"]:
        count, n = row["count"], row["n"]
        p = float(beta.ppf(settings["alpha"], count, n - count + 1)) if count else 0.0
        found = settings["sigma"] * float(norm.ppf(p)) if p > 0.5 else 0.0
        if not _close(found, row["radius"]) or (p <= 0.5) != (row["prediction"] == -1):
            return False
        correct += row["prediction"] == row["label"] and found >= at
    return correct == claim.correct and len(settings["samples"]) == claim.n


def _gate(result: Verification, report: Report, policy: Policy | None) -> None:
    if policy is not None:
        result.add("policy", report.policy_sha256 == policy.sha256, "the report was made under this policy")
    if report.gate is None:
        return
    from rprune.reports.gate import PolicyRule

    rules = tuple(
        PolicyRule(metric=r.metric, artifact=r.artifact, op=r.op, value=r.threshold, bound=r.bound)  # type: ignore[arg-type]
        for r in report.gate.rules
    )
    again = judge(report, Policy(gate=rules))
    right = again.rules == report.gate.rules and again.result == report.gate.result
    right = right and again.policy_sha256 == report.gate.policy_sha256 == report.policy_sha256
    result.add("gate", right, f"gate {report.gate.result}, re-evaluated from counts")


def _same_zeros(first: Path, second: Path, names: list[str]) -> bool:
    from onnx import numpy_helper

    tables = []
    for path in (first, second):
        arrays = {tensor.name: tensor for tensor in load_onnx(path).graph.initializer}
        tables.append({name: numpy_helper.to_array(arrays[name]) == 0 for name in names if name in arrays})
    return all(name in t for t in tables for name in names) and all(
        np.array_equal(tables[0][name], tables[1][name]) for name in names
    )


def _replay(result: Verification, folder: Path, report: Report, source: str) -> None:
    test = load_data(source).test
    same = test.digest == report.data.sha256
    result.add("data", same, f"test split of {source}" + ("" if same else " is not the data of the report"))
    if not same:
        return
    main = "onnx-int8" if report.subject("onnx-int8") else "onnx"
    predictions: dict[str, NDArray[np.int64]] = {}
    sessions: dict[str, OnnxClassifier] = {}
    labels = test.labels
    for claim in report.claims:
        if claim.metric != "clean_accuracy":
            continue
        subject = report.subject(claim.artifact)
        assert subject is not None
        sessions[claim.artifact] = session = OnnxClassifier(_inside(folder, subject))
        images = test.pixels(0, claim.n).astype(np.float32) / np.float32(255)
        predictions[claim.artifact] = session.predict(images)
        correct = int((predictions[claim.artifact] == labels[: claim.n]).sum())
        result.add(
            f"replay {claim.id}", correct == claim.correct, f"{correct}/{claim.n} right, {subject.name} in ONNX Runtime"
        )
    _replay_samples(result, folder, report, predictions[main], labels)
    _replay_witnesses(result, folder, report, main, sessions[main], predictions[main], test.pixels, labels)


def _replay_samples(
    result: Verification, folder: Path, report: Report, predicted: NDArray[np.int64], labels: NDArray[np.int64]
) -> None:
    with (folder / report.evidence.samples).open(newline="") as file:
        rows = list(csv.DictReader(file))
    equal = len(rows) == len(predicted) and all(
        int(row["label"]) == label and int(row["clean_prediction"]) == guess
        for row, label, guess in zip(rows, labels.tolist(), predicted.tolist(), strict=False)
    )
    result.add("samples", equal, f"{len(rows)} clean predictions equal the evidence")
    certified = [row for row in rows if row["certified"] == "1"]
    claim = next((c for c in report.claims if c.metric == "certified_accuracy"), None)
    if claim is not None and claim.threat is not None:
        same_threat = claim.threat.norm == report.threat.norm and claim.threat.eps_float >= report.threat.eps_float
        broken = [row["index"] for row in certified if row["attack"] or row["label"] != row["clean_prediction"]]
        right = len(certified) == claim.correct and not (same_threat and broken)
        result.add("certified", right, f"{len(certified)} certified samples, none broken by the attack")


def _replay_witnesses(
    result: Verification,
    folder: Path,
    report: Report,
    main: str,
    session: OnnxClassifier,
    predicted: NDArray[np.int64],
    pixels: Callable[[int, int], NDArray[np.uint8]],
    labels: NDArray[np.int64],
) -> None:
    from safetensors.numpy import load_file

    witnesses = load_file(folder / report.evidence.witnesses)
    index, points = witnesses["index"], witnesses["x"]
    claim = report.claim("robust_accuracy", main)
    if claim is None or claim.threat is None:
        return
    in_range = len(set(index.tolist())) == len(index) and bool(((index >= 0) & (index < claim.n)).all())
    if not in_range:
        result.add("witnesses", False, "witness indices repeat or lie outside the samples")
        return
    clean = np.stack([pixels(i, i + 1)[0] for i in index.tolist()]) if len(index) else points
    delta = (points - clean.astype(np.float32) / np.float32(255)).reshape(len(index), -1).astype(np.float64)
    size = np.abs(delta).max(1, initial=0) if claim.threat.norm == "linf" else np.sqrt((delta**2).sum(1))
    in_box = bool(((points >= 0) & (points <= 1)).all()) if points.size else True
    in_ball = bool((size <= claim.threat.eps_float + BALL_TOLERANCE).all()) and in_box
    result.add(
        "witnesses in ball", in_ball, f"{len(index)} points within {claim.threat.norm} {claim.threat.eps} and [0,1]"
    )
    wrong = session.predict(points) != labels[index] if len(index) else np.zeros(0, bool)
    result.add("witnesses fool", bool(wrong.all()), f"{int(wrong.sum())} of {len(index)} misclassified in ONNX Runtime")
    fooled = np.zeros(claim.n, bool)
    fooled[index] = True
    most = int(((predicted[: claim.n] == labels[: claim.n]) & ~fooled).sum())
    result.add("robust count", most == claim.correct, f"{most} of {claim.n} samples have no witness and are right")


def _close(a: Any, b: Any) -> bool:
    return math.isclose(float(a), float(b), rel_tol=1e-9, abs_tol=1e-12)
