"""What changed between two reports, and which changes are for the worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rprune.evaluation.statistics import fisher
from rprune.reports.metrics import Metric, Observed, observe, speed
from rprune.reports.pairs import Pairs, same_threat, under
from rprune.reports.schema import Claim, Latency, PairedTest, Report
from rprune.reports.text import flags

SLACK = 0.01  # sizes and counts of weights that differ by less, relatively, are similar
Verdict = Literal["regression", "improvement", "not significant", "similar", "new", "not comparable"]


@dataclass(frozen=True)
class Change:
    """One metric of one file, before and after. ``before`` or ``after`` None: that report does not have it.

    ``test``: an exact test of the two shares, and its ``p``; ``paired``: sample by sample, with an interval, or
    ``unpaired``: why not.
    """

    metric: str
    artifact: str
    before: float | str | None
    after: float | str | None
    verdict: Verdict
    test: str = ""
    p: float | None = None
    paired: PairedTest | None = None
    unpaired: str = ""
    note: str = ""


@dataclass(frozen=True)
class Setting:
    """A key of the recipe, or of a stage, that differs; None: it is not there."""

    key: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Comparison:
    before: Report
    after: Report
    alpha: float
    changes: list[Change]
    settings: list[Setting]

    @property
    def regressions(self) -> list[Change]:
        """What got worse, or can no longer be told."""
        return [change for change in self.changes if change.verdict in ("regression", "not comparable")]


def compare(pairs: Pairs, alpha: float) -> Comparison:
    """``alpha``: each test by itself may be wrong in this share of cases.

    Raises InputError when the evidence of a report contradicts its claims.
    """
    before, after = pairs.before.report, pairs.after.report
    names = {(claim.metric, claim.artifact): None for report in (before, after) for claim in report.claims}
    changes = [_claim(pairs, metric, artifact, alpha) for metric, artifact in names]
    roles = {s.role: None for report in (before, after) for s in report.subjects if s.role not in ("evidence", "masks")}
    changes.append(_measure("sparsity", "", observe(before, SPARSITY, "", ""), observe(after, SPARSITY, "", "")))
    changes.append(_measure("macs", "", observe(before, MACS, "", ""), observe(after, MACS, "", "")))
    for role in roles:
        metric = Metric("bytes", role)
        changes.append(_measure("bytes", role, observe(before, metric, "", ""), observe(after, metric, "", "")))
    changes += [_latency(before, after, role) for role in roles]
    changes += [_health(before, after, artifact) for metric, artifact in names if metric == "robust_accuracy"]
    known = [change for change in changes if (change.before, change.after) != (None, None)]
    return Comparison(before, after, alpha, known, list(_settings(before, after)))


SPARSITY, MACS = Metric("sparsity", "onnx-int8"), Metric("macs", "onnx-int8")


def _claim(pairs: Pairs, metric: str, artifact: str, alpha: float) -> Change:
    before, after = (source.report.claim(metric, artifact) for source in (pairs.before, pairs.after))
    shares = (metric, artifact, _share(before), _share(after))
    if before is None or after is None:
        return _one_sided(*shares)
    if not same_threat(before, after):
        return Change(*shares, "not comparable", note=f"{under(before)}, then {under(after)}")
    if not pairs.same_data:
        return Change(*shares, "not comparable", note="other test data")
    if pairs.before.report.smoke or pairs.after.report.smoke:
        return Change(*shares, "not comparable", note="smoke run")
    found = pairs.test(metric, artifact)
    paired, unpaired, note = (None, found, "") if isinstance(found, str) else (found, "", "")
    p = paired.p if paired else fisher((before.correct, before.n), (after.correct, after.n))
    difference = after.correct / after.n - before.correct / before.n
    verdict: Verdict = "not significant" if p > alpha else "regression" if difference < 0 else "improvement"
    if after.kind == "empirical-upper-bound":
        if before.method != after.method:
            note = f"attacked by {before.method}, then by {after.method}"
            verdict = "not comparable" if verdict != "regression" else verdict
        if verdict == "improvement" and flags(after):
            verdict, note = "not comparable", " ".join(flags(after))
    return Change(*shares, verdict, paired.test if paired else "fisher", p, paired, unpaired, note)


def _share(claim: Claim | None) -> float | None:
    return None if claim is None else claim.correct / claim.n


def _one_sided(metric: str, artifact: str, before: float | str | None, after: float | str | None) -> Change:
    if after is None:
        return Change(metric, artifact, before, after, "regression", note="no longer in the report")
    return Change(metric, artifact, before, after, "new")


def _measure(metric: str, artifact: str, before: Observed, after: Observed) -> Change:
    """Sizes: the smaller, the better. Of sparsity, it is what is left that has a size."""
    old, new = before.value, after.value
    if not isinstance(old, float) or not isinstance(new, float):
        change = _one_sided(metric, artifact, old, new)
        return (
            change if metric != "bytes" else Change(metric, artifact, old, new, "similar", note="in one report alone")
        )
    first, second = (1 - old, 1 - new) if metric == "sparsity" else (old, new)
    verdict: Verdict = "similar"
    if abs(second - first) > SLACK * first:
        verdict = "regression" if second > first else "improvement"
    return Change(metric, artifact, old, new, verdict)


def _latency(before: Report, after: Report, role: str) -> Change:
    """A median outside the middle of the other's times: above its 95th percentile, or the other way round."""
    old, new = speed(before, role), speed(after, role)
    verdict: Verdict = "similar"
    note = ""
    if old is None or new is None:
        note = "in one report alone"
    elif _machine(before, old) != _machine(after, new):
        note = "another machine or runtime: not judged"
    elif new.p50 > old.p95 or new.p95 < old.p50:
        verdict = "regression" if new.p50 > old.p50 else "improvement"
    return Change(
        "latency", role, None if old is None else old.p50, None if new is None else new.p50, verdict, note=note
    )


def _machine(report: Report, row: Latency) -> tuple[Any, ...]:
    return report.environment.get("cpu"), row.runtime, row.threads


def _health(before: Report, after: Report, artifact: str) -> Change:
    def status(claim: Claim | None) -> str | None:
        return None if claim is None else "not checked" if claim.health is None else claim.health.status

    old, new = (status(report.claim("robust_accuracy", artifact)) for report in (before, after))
    verdict: Verdict = "similar"
    if old != new:
        verdict = "regression" if old == "ok" else "improvement" if new == "ok" else "similar"
    return Change("attack_health", artifact, old, new, verdict)


def _settings(before: Report, after: Report) -> Iterator[Setting]:
    first, second = _flat(_said(before)), _flat(_said(after))
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            yield Setting(key, first.get(key), second.get(key))


def _said(report: Report) -> dict[str, Any]:
    """The recipe with the stages as they were run, by their kind."""
    stages: dict[str, Any] = {}
    for entry in report.lineage:
        again = sum(name.partition("#")[0] == entry.stage for name in stages)
        stages[f"{entry.stage}#{again + 1}" if again else entry.stage] = entry.config
    return {key: value for key, value in report.recipe.items() if key != "stage"} | {"stage": stages}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in table.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return rows
