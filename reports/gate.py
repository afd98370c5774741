"""Does a report clear the bar? From the report's counts alone, and from what its maker found of the attack's health."""

from __future__ import annotations

import operator
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
from pydantic import BaseModel, ConfigDict

from rprune.errors import UsageError, unknown_name
from rprune.evaluation.statistics import clopper_pearson
from rprune.files import digest_of
from rprune.registry import first_problem, misspelt
from rprune.reports.schema import Gate, Part, Report, Role, Rule
from rprune.reports.text import SMOKE, doubts

LEVEL = 0.95
OPS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}
CLAIMED = ("clean_accuracy", "robust_accuracy", "certified_accuracy", "smoothed_certified_accuracy")
MEASURED = ("sparsity", "kept", "bytes")
NO_SMOKE = Rule(
    metric="smoke", artifact="report", op="<=", threshold=0, bound="point", observed=1, passed=False, message=SMOKE
)


class PolicyRule(Part):
    """One line of a policy: the metric of a file must be at least, or at most, a value.

    ``allow_unreliable``: also by an attack that failed a check of its health, or that was ended early.
    """

    YOUNGER = frozenset({"allow_unreliable"})

    metric: str
    artifact: str = "onnx-int8"
    op: Literal[">=", "<="] = ">="
    value: pydantic.FiniteFloat
    bound: Literal["lower", "point"] = "lower"
    allow_unreliable: bool = False


class Policy(BaseModel):
    """``[[gate]]`` tables of a TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gate: tuple[PolicyRule, ...]

    @property
    def sha256(self) -> str:
        return digest_of(self.model_dump(mode="json"))


def read_policy(path: Path) -> Policy:
    """Raises UsageError when the file is not there, not TOML, or has unknown keys or metrics."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read policy {path}: {error.strerror}", "check the path") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"policy {path} is not TOML: {error}", "write [[gate]] tables") from None
    return policy_of(table, str(path))


def policy_of(table: dict[str, Any], origin: str) -> Policy:
    try:
        policy = Policy.model_validate(table)
    except pydantic.ValidationError as error:
        problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        if problem["type"] == "extra_forbidden":
            place = problem["loc"]
            known = PolicyRule.model_fields if len(place) > 1 else Policy.model_fields
            raise unknown_name(f"key in policy {origin}", str(place[-1]), known) from None
        if (found := misspelt(problem, f"policy {origin}")) is not None:
            raise found from None
        raise UsageError(
            f"policy {origin}: {first_problem(error)}", "keys: metric, artifact, op, value, bound, allow_unreliable"
        ) from None
    for rule in policy.gate:
        if rule.metric not in CLAIMED + MEASURED:
            raise unknown_name("metric", rule.metric, CLAIMED + MEASURED)
        if rule.artifact not in get_args(Role):
            raise unknown_name("file role", rule.artifact, get_args(Role))
    if not policy.gate:
        raise UsageError(f"policy {origin} has no rule", "write at least one [[gate]] table")
    return policy


def rule_of(text: str, op: Literal[">=", "<="], bound: Literal["lower", "point"]) -> dict[str, Any]:
    """``metric=0.45`` or ``metric@onnx=0.45`` of the command line as a policy table."""
    name, separator, value = text.partition("=")
    metric, _, artifact = name.strip().partition("@")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not separator or number != number:
        raise UsageError(f"cannot read '{text}'", "write metric=value, for example robust_accuracy=0.45")
    return {"metric": metric, "artifact": artifact or "onnx-int8", "op": op, "value": number, "bound": bound}


def judge(report: Report, policy: Policy) -> Gate:
    """The outcome of every rule. A metric that the report does not claim fails its rule, and so does one whose attack
    was weak or cut short, unless the rule allows that. A smoke run fails a rule that every policy has."""
    rules = [NO_SMOKE] if report.smoke else []
    rules += [_judge(report, rule) for rule in policy.gate]
    result: Literal["passed", "failed"] = "passed" if all(rule.passed for rule in rules) else "failed"
    return Gate(policy_sha256=policy.sha256, result=result, rules=rules)


def _judge(report: Report, rule: PolicyRule) -> Rule:
    observed, words = _observe(report, rule)
    passed = observed is not None and OPS[rule.op](observed, rule.value)
    message = f"{words} {rule.op if passed else 'is not ' + rule.op} {rule.value:g}" if observed is not None else words
    claim = report.claim(rule.metric, rule.artifact)
    if claim is not None and (doubt := "; ".join(doubts(claim))):
        passed = passed and rule.allow_unreliable
        message = f"{doubt}; {'allowed: ' if rule.allow_unreliable else ''}{message}"
    return Rule(
        metric=rule.metric,
        artifact=rule.artifact,
        op=rule.op,
        threshold=rule.value,
        bound=rule.bound,
        observed=observed,
        passed=passed,
        message=message,
        allow_unreliable=rule.allow_unreliable,
    )


def _observe(report: Report, rule: PolicyRule) -> tuple[float | None, str]:
    if rule.metric in ("sparsity", "kept"):
        value = report.sparsity.overall if rule.metric == "sparsity" else report.sparsity.kept
        return float(value), f"{value:g}"
    if rule.metric == "bytes":
        subject = report.subject(rule.artifact)
        if subject is None:
            return None, f"the report has no file of role {rule.artifact}"
        return float(subject.bytes), f"{subject.bytes}"
    claim = report.claim(rule.metric, rule.artifact)
    if claim is None:
        return None, f"the report makes no claim of {rule.metric} for {rule.artifact}"
    share = claim.correct / claim.n
    if rule.bound == "point":
        return share, f"{share:.4f} (n={claim.n})"
    lower, upper = clopper_pearson(claim.correct, claim.n, LEVEL)
    bound = lower if rule.op == ">=" else upper
    return bound, f"{share:.4f}, 95 % bound {bound:.4f} (n={claim.n})"
