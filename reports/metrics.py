"""What a report says of a metric that a gate can judge."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rprune.evaluation.statistics import clopper_pearson
from rprune.reports.schema import Claim, Latency, Report
from rprune.reports.text import length
from rprune.threat import parse_fraction

LEVEL = 0.95
CLAIMED = ("clean_accuracy", "robust_accuracy", "certified_accuracy", "smoothed_certified_accuracy")
COUNTED = ("kept", "bytes", "macs")  # whole numbers
METRICS = (*CLAIMED, "sparsity", *COUNTED, "latency", "attack_health")


@dataclass(frozen=True)
class Metric:
    """A metric of one file; ``eps`` (as it was written) and ``norm`` of a threat that a claim has to hold under."""

    name: str
    artifact: str
    norm: str | None = None
    eps: str | None = None

    def __str__(self) -> str:
        at = " ".join(part for part in (self.norm, self.eps) if part)
        return f"{self.name} {at}" if at else self.name


@dataclass(frozen=True)
class Observed:
    """A value, None where the report has none, and how to say it."""

    value: float | str | None
    words: str


def observe(report: Report, metric: Metric, op: str, bound: str) -> Observed:
    """A metric as a rule with ``op`` judges it: shares by that end of their 95 % interval which is worse for the rule.

    Milliseconds for latency, ok or failed for the attack's health.
    """
    if metric.name in CLAIMED:
        return _share(report, metric, op, bound)
    if metric.name == "attack_health":
        return _health(report, metric.artifact)
    if metric.name == "latency":
        return _latency(report, metric.artifact)
    if metric.name == "bytes":
        subject = report.subject(metric.artifact)
        if subject is None:
            return Observed(None, f"the report has no file of role {metric.artifact}")
        return Observed(float(subject.bytes), str(subject.bytes))
    if metric.name == "macs":
        if report.footprint is None:
            return Observed(None, "the report has no footprint: it was made before there was one")
        return Observed(float(report.footprint.sparse_macs), str(report.footprint.sparse_macs))
    value = report.sparsity.overall if metric.name == "sparsity" else report.sparsity.kept
    return Observed(float(value), f"{value:g}")


def _share(report: Report, metric: Metric, op: str, bound: str) -> Observed:
    claim = report.claim(metric.name, metric.artifact)
    if claim is None:
        return Observed(None, f"the report makes no claim of {metric.name} for {metric.artifact}")
    correct = correct_at(claim, metric)
    if correct is None:
        return Observed(None, f"{metric} is not claimed; {known(claim)}")
    share = correct / claim.n
    if bound == "point":
        return Observed(share, f"{share:.4f} (n={claim.n})")
    lower, upper = clopper_pearson(correct, claim.n, LEVEL)
    end = lower if op == ">=" else upper
    return Observed(end, f"{share:.4f}, 95 % bound {end:.4f} (n={claim.n})")


def correct_at(claim: Claim, metric: Metric) -> int | None:
    """The count under the threat that the metric names, from the claim or a point of its curve; None: not measured."""
    if metric.eps is None and metric.norm is None:
        return claim.correct
    if claim.threat is None or metric.norm not in (None, claim.threat.norm):
        return None
    if metric.eps is None:
        return claim.correct
    eps = parse_fraction(metric.eps)
    points = [(claim.threat.eps_float, claim.correct), *((point.at, point.correct) for point in claim.curve)]
    return next((correct for at, correct in points if math.isclose(at, eps, rel_tol=1e-6)), None)


def known(claim: Claim) -> str:
    """Where a claim was measured, for a message."""
    if claim.threat is None:
        return "the claim is under no threat"
    points = sorted({claim.threat.eps_float, *(point.at for point in claim.curve)} - {0.0})
    return f"the claim is for {claim.threat.norm} {', '.join(length(at, claim.threat) for at in points)}"


def _health(report: Report, artifact: str) -> Observed:
    claim = report.claim("robust_accuracy", artifact)
    if claim is None:
        return Observed(None, f"the report makes no claim of robust_accuracy for {artifact}")
    if claim.health is None:
        return Observed(None, "the health of the attack was not checked")
    failed = ", ".join(f"{check.id} {check.name}" for check in claim.health.failed)
    return Observed(claim.health.status, f"{claim.health.status} ({failed or f'{len(claim.health.checks)} checks'})")


def _latency(report: Report, artifact: str) -> Observed:
    row = speed(report, artifact)
    if row is None:
        return Observed(None, f"the report has no latency of {artifact}: 'rprune export --bench' measures it")
    return Observed(row.p50, f"{row.p50:.4g} ms (median; {row.runtime}, batch {row.batch}, threads {row.threads})")


def speed(report: Report, artifact: str) -> Latency | None:
    """One image on the fewest threads: the first runtime, which is ONNX Runtime or the C form itself."""
    subject = report.subject(artifact)
    rows = [row for row in report.speed if subject is not None and row.file == subject.name and row.batch == 1]
    return min(rows, key=lambda row: row.threads, default=None)
