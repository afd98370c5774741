"""Re-check a bundle without trusting who made it, and without torch.

Levels, each including the ones before: ``hash`` (files are the ones the report names, and the report is the one its id
names), ``static`` (sparsity, sizes, zeros, intervals, curves, what each attack added, and gate follow from the files
and counts), ``replay`` (predictions, witnesses and counts are reproduced by ONNX Runtime on the data). That an attack's
health follows from its checks is part of reading a report; their values stand as its maker measured them. What a fourth
level, ``reattack``, adds needs torch: :mod:`rprune.pipeline.reattack`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rprune.certification.confidence import recounted
from rprune.data.sources import load_data
from rprune.data.splits import DataSet
from rprune.errors import InputError, IntegrityError, UsageError
from rprune.evaluation.statistics import clopper_pearson
from rprune.export.session import stored_weights
from rprune.files import digest_of, file_digest, inside
from rprune.reports import forms
from rprune.reports.evidence import read_samples
from rprune.reports.gate import NO_SMOKE, Policy, judge, policy_rule
from rprune.reports.partial import is_needed, packed_forms, remedy, unchecked
from rprune.reports.replay import Replay
from rprune.reports.schema import Claim, Report, Subject, read_report
from rprune.reports.signing import check_signature
from rprune.reports.text import flags

Level = Literal["hash", "static", "replay"]
LEVELS: tuple[Level, ...] = ("hash", "static", "replay")
UNREAD = ("weights", "masks", "program")  # what they are of is not computed without torch
# what a user of the folder might take for one of its models
MODELS = (".onnx", ".c", ".h", ".safetensors", ".pt", ".pt2", ".pth")


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


@dataclass
class Verification:
    """What was checked, in order. ``integrity`` is false when bytes differ; ``passed`` needs every check.

    ``unread``: files of which the hash alone was checked. ``absent``: files that are not here, where they may be
    missing, and ``unchecked``: what could not be checked without them.
    """

    level: Level
    smoke: bool = False  # the report is one of a smoke run
    checks: list[Check] = field(default_factory=list)
    integrity: bool = True
    unread: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.integrity and all(check.passed for check in self.checks)

    def check(self, name: str, run: Callable[[], tuple[bool, str]]) -> bool:
        """Add the outcome of a check. Content that makes no sense fails it; it never passes and never crashes."""
        try:
            passed, detail = run()
        except (IntegrityError, UsageError, ModuleNotFoundError):  # a package that is not here says nothing of the file
            raise
        except Exception as error:  # whatever a stranger's file can cause
            passed, detail = False, f"cannot be checked: {str(error).splitlines()[0] if str(error) else error!r}"
        self.checks.append(Check(name, bool(passed), detail))
        return bool(passed)


def verify(
    folder: Path,
    level: Level = "replay",
    policy: Policy | None = None,
    data: str | None = None,
    key: Path | None = None,
    partial: bool = False,
) -> Verification:
    """Check a bundle up to ``level``; stops after the hashes when bytes are not the promised ones.

    Args:
        folder: the bundle, with report.json inside.
        policy: if given, the report must have been made and judged under this policy.
        data: where the test data is here; None: the source that the report names.
        key: public key whose owner must have signed the bundle.
        partial: files may be missing, all but the evidence and the model that the report's main claims are of (for
            the hashes, that one too, where a packed file restores it). What stays unchecked for it is named.

    Raises:
        InputError: no readable report, or the data is not there.
        IntegrityError: the report names files outside its folder.
    """
    report = read_report(folder)
    result = Verification(level, report.smoke)
    paths = {subject.name: inside(folder, subject.name) for subject in report.subjects}
    if partial:
        needed = {s.name for s in report.subjects if is_needed(report, s.role)}
        if level == "hash":
            needed -= {s.name for s in report.subjects if s.role in packed_forms(report)}
        result.absent = [name for name, path in paths.items() if name not in needed and not path.exists()]
        result.unchecked = [] if level == "hash" else unchecked(report, result.absent)
    gone = {s.role for s in report.subjects if s.name in result.absent}
    paths = {name: path for name, path in paths.items() if name not in result.absent}
    result.check("files", lambda: _files(folder, paths, report))
    result.check("report id", lambda: (report.id == report.computed_id(), "report.json against its own id"))
    result.check("recipe", lambda: (digest_of(report.recipe) == report.recipe_sha256, "the recipe against its digest"))
    if key is not None:
        result.check("signature", lambda: check_signature(folder, key))
    result.integrity = all(check.passed for check in result.checks)
    here = [subject for subject in report.subjects if subject.name in paths]
    result.unread = [s.name for s in here if level == "hash" or not _is_read(report, s, {s.role for s in here})]
    if not result.integrity or level == "hash":
        return result
    roles = {subject.role: paths[subject.name] for subject in here}
    _static(result, report, paths, roles, gone, policy)
    if level == "replay":
        try:
            found = load_data(data or report.data.source, limit=report.data.limit)
        except (InputError, UsageError) as error:
            hint = f"the bundle was made with {report.data.source}; say where it is here: --data, or use --level static"
            raise InputError(error.message, hint) from None
        if result.check("data", lambda: _data(report, found)):
            replay = Replay(report, paths, roles, found.test, gone)
            for name, run in replay.checks():
                result.check(name, run)
    return result


def _files(folder: Path, paths: dict[str, Path], report: Report) -> tuple[bool, str]:
    for subject in report.subjects:
        if subject.name not in paths:
            continue
        path = paths[subject.name]
        if not path.is_file():
            return False, f"{subject.name} is missing{remedy(report, subject.role)}"
        if file_digest(path) != subject.sha256:
            return False, f"{subject.name} differs from its sha256"
    models = {paths[s.name] for s in report.subjects if s.name in paths and s.role not in ("evidence", "program")}
    strange = sorted({file.resolve() for file in folder.iterdir() if file.suffix.lower() in MODELS} - models)
    if strange:
        return False, f"the report names no model {strange[0].name}, which lies beside it"
    whole = "" if len(paths) == len(report.subjects) else f" of {len(report.subjects)}"
    return True, f"{len(paths)}{whole} files match their hashes"


def _is_read(report: Report, subject: Subject, roles: Collection[str]) -> bool:
    """Whether a static check or the replay looks into a file."""
    if subject.role in ("c", "c-header"):
        return "c" in roles and forms.can_write_c()
    if subject.role == "evidence":
        return subject.name in (report.evidence.samples, report.evidence.witnesses)
    return subject.role not in UNREAD


def _data(report: Report, found: DataSet) -> tuple[bool, str]:
    """A copy elsewhere may not know the names of the classes."""
    said, test = report.data, found.test
    right = test.digest == said.sha256 and len(test) == said.samples
    right = right and (found.source != said.source or list(found.classes) == said.classes)
    return right, f"test split of {found.source}"


def _static(
    result: Verification,
    report: Report,
    paths: dict[str, Path],
    roles: dict[Any, Path],
    gone: Collection[str],
    policy: Policy | None,
) -> None:
    result.check("sizes", lambda: _sizes(report, paths))
    if result.check("evidence", lambda: _evidence(report)):
        result.check("sample rows", lambda: _sample_rows(paths[report.evidence.samples]))
    result.check("sparsity", lambda: _sparsity(report, roles, "onnx" not in gone))
    if report.sparsity.int8_zeros_equal_float_zeros is not None and "onnx" not in gone:
        result.check("zeros", lambda: _zeros(report, roles))
    if "onnx-int8" in roles:
        result.check("8 bit", lambda: _int8(roles["onnx-int8"]))
    for name, run in forms.checks(report, roles):
        result.check(name, run)
    for claim in report.claims:
        result.check(claim.id, lambda claim=claim: _arithmetic(claim, report))  # type: ignore[misc]
        if claim.curve and claim.metric == "robust_accuracy":
            result.check(f"curve of {claim.id}", lambda claim=claim: _curve(claim, report))  # type: ignore[misc]
        if claim.attacks:
            result.check(f"attacks of {claim.id}", lambda claim=claim: _attacks(claim, report))  # type: ignore[misc]
    result.check("lineage", lambda: _lineage(report))
    if report.gate is not None or policy is not None:
        result.check("gate", lambda: _gate(report, policy))
    if policy is not None:
        result.check("policy", lambda: (report.policy_sha256 == policy.sha256, "the report was made under this policy"))


def _sizes(report: Report, paths: dict[str, Path]) -> tuple[bool, str]:
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    said = {subject.name: subject.bytes for subject in report.subjects}
    right = all(said[name] == size for name, size in sizes.items())
    right = right and all(said[name] == size for name, size in report.size.items() if name != "dense_float32_weights")
    right = right and report.size["dense_float32_weights"] == 4 * report.model["parameters"]
    return right, f"bytes of {'every file' if len(sizes) == len(said) else 'the files that are here'} recomputed"


def _evidence(report: Report) -> tuple[bool, str]:
    hashed = {subject.name for subject in report.subjects if subject.role == "evidence"}
    return {report.evidence.samples, report.evidence.witnesses} <= hashed, "evidence files are among the hashed files"


def _sample_rows(path: Path) -> tuple[bool, str]:
    """Every cell reads as what it is; what only some files have is there for all rows or for none."""
    rows = read_samples(path)
    for row in rows:
        witness = row.get("witness", "")
        right = row["certified"] in ("", "0", "1") and witness in ("", "uint8", "float")
        right = right and int(row.get("queries", 0)) >= 0 and not math.isnan(float(row.get("margin") or 0))
        right = right and 0 <= float(row.get("distance") or 0) < math.inf
        if "witness" in row:
            right = right and bool(row["attack"]) == bool(witness) == bool(row["distance"])
        if not right:
            return False, f"sample {row['index']} makes no sense"
    return True, f"{len(rows)} rows of {path.name} read"


def _sparsity(report: Report, roles: dict[Any, Path], floats_too: bool) -> tuple[bool, str]:
    stated, path = report.sparsity, roles[report.sparsity.measured_on]
    weights = stored_weights(path)
    layers = {layer.name: (tuple(layer.shape), layer.nonzero) for layer in stated.by_layer}
    right = {name: (array.shape, int(np.count_nonzero(array))) for name, array in weights.items()} == layers
    kept = sum(int(np.count_nonzero(array)) for array in weights.values())
    total = sum(array.size for array in weights.values())
    whole = total if stated.dense_total is None else stated.dense_total
    right = right and (stated.kept, stated.total) == (kept, total) and total <= whole
    right = right and _close(stated.overall, 1 - kept / whole)
    right = right and all(_close(e.sparsity, 1 - e.nonzero / math.prod(e.shape)) for e in stated.by_layer)
    if floats_too:
        floats = sum(int(np.count_nonzero(array)) for array in stored_weights(roles["onnx"]).values())
        right = right and stated.float_nonzero == floats
    right = right and _within(stated.budget, kept, report)
    right = right and (stated.target is None or stated.overall >= stated.target - 1e-12)
    before = "" if whole == total else f" ({whole} before shrinking, says the report)"
    return right, f"{kept} of {total} weights counted in {path.name}{before}, budget {stated.budget}"


def _within(budget: int | None, kept: int, report: Report) -> bool:
    """Exactly the budget; integers of fewer than 8 bits may have lost some of its weights."""
    narrow = report.integers is not None and report.integers.bits < 8
    return budget is None or kept == budget or (narrow and kept < budget)


def _zeros(report: Report, roles: dict[Any, Path]) -> tuple[bool, str]:
    floats, integers = stored_weights(roles["onnx"]), stored_weights(roles["onnx-int8"])
    same = set(floats) == set(integers) and all(np.array_equal(floats[n] == 0, integers[n] == 0) for n in floats)
    return same is report.sparsity.int8_zeros_equal_float_zeros, "int8 zeros equal float zeros, weight by weight"


def _int8(path: Path) -> tuple[bool, str]:
    types = {array.dtype.name for array in stored_weights(path).values()}
    return types == {"int8"}, f"conv and linear weights of {path.name} are {', '.join(sorted(types)) or 'missing'}"


def _arithmetic(claim: Claim, report: Report) -> tuple[bool, str]:
    """Value, interval, curve and radii of a claim recomputed from its counts; its file is one of the bundle's."""
    lower, upper = clopper_pearson(claim.correct, claim.n, claim.interval.level)
    right = _close(claim.value, claim.correct / claim.n)
    right = right and _close(claim.interval.lower, lower) and _close(claim.interval.upper, upper)
    right = right and any(s.role == claim.artifact and s.sha256 == claim.sha256 for s in report.subjects)
    right = right and all(_close(p.value, p.correct / claim.n) for p in claim.curve)
    right = right and len(claim.distances) <= claim.n
    if claim.metric == "smoothed_certified_accuracy":
        right = right and _radii(claim)
    said = ", ".join([f"{claim.correct}/{claim.n} = {claim.value:.4f}", *flags(claim), "interval recomputed"])
    return right, said


def _clean(claim: Claim, report: Report) -> int:
    """Right samples of those that were attacked."""
    found = report.claim("clean_accuracy", claim.artifact)
    if found is None or found.n != claim.n:
        raise ValueError(f"no clean accuracy of {claim.artifact} for the same {claim.n} samples")
    return found.correct


def _curve(claim: Claim, report: Report) -> tuple[bool, str]:
    """The security curve starts at the clean accuracy, passes through the claim, and never rises."""
    points = sorted((point.at, point.correct) for point in claim.curve)
    counts, at = [count for _, count in points], dict(points)
    right = len(at) == len(points) and points[0] == (0, _clean(claim, report)) and counts[-1] >= 0
    right = right and counts == sorted(counts, reverse=True)
    right = right and claim.threat is not None and at.get(claim.threat.eps_float) == claim.correct
    return right, f"{len(points)} points from clean accuracy down to {counts[-1]} of {claim.n} at eps {points[-1][0]:g}"


def _attacks(claim: Claim, report: Report) -> tuple[bool, str]:
    """Each attack tried what the ones before it left, and together they broke what is not robust."""
    clean, proved = _clean(claim, report), report.claim("certified_accuracy", claim.artifact)
    broken = sum(row.broken for row in claim.attacks)
    right = broken + claim.correct == clean and len({row.name for row in claim.attacks}) == len(claim.attacks)
    right = right and all(row.broken + row.misses <= row.tried for row in claim.attacks)
    covered = proved and proved.threat and claim.threat and proved.threat.covers(claim.threat)
    left, skipped = clean, proved.correct if proved and covered else 0
    for row in claim.attacks:
        if row.tried:  # else it did not run
            least = left - skipped if claim.complete else 0
            right = right and least <= row.tried <= left
            left, skipped = row.tried - row.broken, 0
    ran = any(row.tried for row in claim.attacks) or left <= skipped
    right = right and (ran or not claim.complete)
    return right, f"of {clean} right samples {broken} broken, {claim.correct} left"


def _radii(claim: Claim) -> bool:
    """Every radius follows from its count by the test that is named."""
    if claim.threat is None:
        return False
    said, found = claim.settings, []
    settings = {name: said[name] for name in ("n", "alpha", "sigma")}
    # reports of earlier versions have neither
    settings |= {"test": said.get("test", "fixed"), "slack": said.get("slack", 0.0)}
    for row in said["samples"]:
        proved, right = recounted(row, **settings)
        if not right:
            return False
        found.append(proved if proved is not None and row["prediction"] == row["label"] else -1.0)
    points = [(claim.threat.eps_float, claim.correct), *((p.at, p.correct) for p in claim.curve)]
    abstained = sum(row["prediction"] == -1 for row in said["samples"])
    right = all(sum(proved >= at for proved in found) == correct for at, correct in points)
    return right and len(found) == claim.n and abstained == said["abstained"]


def _lineage(report: Report) -> tuple[bool, str]:
    pairs = zip(report.lineage, report.lineage[1:], strict=False)
    whole = bool(report.lineage) and all(later.parent == earlier.output for earlier, later in pairs)
    whole = whole and report.lineage[-1].output == report.model["tensors_sha256"]
    return whole, f"{len(report.lineage)} stages follow each other"


def _gate(report: Report, policy: Policy | None) -> tuple[bool, str]:
    told = report.gate
    if told is None:
        return False, "the report was not judged"
    rules = tuple(policy_rule(rule) for rule in told.rules if rule != NO_SMOKE)
    again = judge(report, policy or Policy(gate=rules))
    detail = f"gate {told.result}, judged again"
    if told.baseline is not None:  # no bundle holds its baseline
        detail += f", drops taken as told: hold them against report {told.baseline.report[:12]} by 'rprune gate'"
        pairs = zip(told.rules, again.rules, strict=False)
        kept = [old if old.drop and policy_rule(old) == policy_rule(new) else new for old, new in pairs]
        result = "passed" if all(rule.passed for rule in kept) else "failed"
        again = again.model_copy(update={"rules": kept, "result": result, "baseline": told.baseline})
    return again == told and again.policy_sha256 == report.policy_sha256, detail


def _close(a: Any, b: Any) -> bool:
    return math.isclose(float(a), float(b), rel_tol=1e-9, abs_tol=1e-12)
