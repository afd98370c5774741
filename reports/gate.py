"""Does a report clear the bar? From the report's counts alone, from what its maker found of the attack's health, and
where a rule says so, from its samples beside those of a baseline.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import BaseModel, ConfigDict

from rprune.errors import InputError, UsageError, unknown_name
from rprune.files import digest_of, read_toml
from rprune.registry import first_problem, misspelt
from rprune.reports.metrics import CLAIMED, COUNTED, METRICS, Metric, observe
from rprune.reports.pairs import RIGHT, Pairs
from rprune.reports.schema import Baseline, Gate, PairedTest, Part, Report, Role, Rule
from rprune.reports.text import SMOKE, doubts
from rprune.threat import parse_fraction

Op = Literal[">=", "<=", "=="]
Bound = Literal["lower", "point"]
OPS: dict[str, Callable[[Any, Any], bool]] = {">=": operator.ge, "<=": operator.le, "==": operator.eq}
KEYS = "metric, artifact, op, value, bound, norm, eps, max_drop, allow_unreliable"
NO_SMOKE = Rule(
    metric="smoke", artifact="report", op="<=", threshold=0, bound="point", observed=1, passed=False, message=SMOKE
)


class PolicyRule(Part):
    """One line of a policy: the metric of a file must be at least, at most, or exactly a value.

    ``bound``: shares are judged by that end of their 95 % interval which is worse for the rule, or by their ``point``
    value. ``norm`` and ``eps``: under this threat, where a claim has a curve. ``max_drop`` instead of a value: the
    metric may lie this much below a baseline's, as a share. ``allow_unreliable``: also by an attack that failed a check
    of its health, or that was ended early; for a drop, also by other attacks than the baseline's.
    """

    YOUNGER = frozenset({"value", "norm", "eps", "max_drop", "allow_unreliable"})

    metric: str
    artifact: str = "onnx-int8"
    op: Op = ">="
    value: pydantic.FiniteFloat | Literal["ok"] | None = None
    bound: Bound = "lower"
    norm: Literal["linf", "l2"] | None = None
    eps: Annotated[str, pydantic.Field(coerce_numbers_to_str=True)] | None = None
    max_drop: Annotated[float, pydantic.Field(ge=-1, le=1, allow_inf_nan=False)] | None = None
    allow_unreliable: bool = False

    @pydantic.model_validator(mode="after")
    def _one_bar(self) -> PolicyRule:
        if (self.value is None) == (self.max_drop is None):
            raise ValueError("give either value or max_drop")
        if self.max_drop is not None and self.op != ">=":
            raise ValueError("a drop has no op")
        return self

    @property
    def what(self) -> Metric:
        return Metric(self.metric, self.artifact, self.norm, self.eps)


class Policy(BaseModel):
    """``[[gate]]`` tables of a TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gate: tuple[PolicyRule, ...]

    @property
    def sha256(self) -> str:
        return digest_of(self.model_dump(mode="json"))

    @property
    def needs_baseline(self) -> bool:
        return any(rule.max_drop is not None for rule in self.gate)


def read_policy(path: Path, baseline: bool = False) -> Policy:
    """``baseline``: may there be rules that need one?

    Raises UsageError when the file is not there, not TOML, or has unknown keys, metrics, or rules that make no sense.
    """
    policy = policy_of(read_toml(path, "policy", "write [[gate]] tables"), str(path))
    if policy.needs_baseline and not baseline:
        raise UsageError(
            f"policy {path} has max_drop, which needs a baseline",
            "say against which report: 'rprune run' and 'rprune gate' take --baseline REPORT",
        )
    return policy


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
        raise UsageError(f"policy {origin}: {first_problem(error)}", f"keys: {KEYS}") from None
    for rule in policy.gate:
        if rule.metric not in METRICS:
            raise unknown_name("metric", rule.metric, METRICS)
        if rule.artifact not in get_args(Role):
            raise unknown_name("file role", rule.artifact, get_args(Role))
        _check(rule)
    if not policy.gate:
        raise UsageError(f"policy {origin} has no rule", "write at least one [[gate]] table")
    return policy


def _check(rule: PolicyRule) -> None:
    """Raises UsageError for a rule that nothing could be judged by."""
    health, drop = rule.metric == "attack_health", rule.max_drop is not None
    if drop and rule.metric not in RIGHT:
        raise UsageError(f"a drop of {rule.metric} cannot be judged", f"max_drop is for {', '.join(RIGHT)}")
    if drop and (rule.eps or rule.norm):
        raise UsageError("a drop is judged under the threat of the claims themselves", "leave out norm and eps")
    if health and (rule.op != "==" or rule.value != "ok"):
        wanted = 'write op = "==" and value = "ok"; on the command line --equal attack_health=ok'
        raise UsageError(f"attack_health cannot be {rule.op} {rule.value}", wanted)
    if not health and rule.value == "ok":
        raise UsageError(f"{rule.metric} cannot be 'ok'", "give a number")
    if rule.op == "==" and not health and rule.metric not in COUNTED:
        raise UsageError(f"{rule.metric} cannot be ==", f"that is for {', '.join(COUNTED)} and attack_health")
    if rule.eps is not None:
        parse_fraction(rule.eps)
    if (rule.eps or rule.norm) and rule.metric not in CLAIMED[1:]:
        raise UsageError(f"{rule.metric} is under no threat", f"norm and eps are for {', '.join(CLAIMED[1:])}")


def rule_of(text: str, op: Op | None, bound: Bound) -> dict[str, Any]:
    """``metric[:[norm:]eps][@file]=value`` of the command line as a policy table; op None: the value is a largest drop.

    Raises UsageError.
    """
    name, separator, value = text.partition("=")
    left, _, artifact = name.strip().partition("@")
    metric, *threat = left.split(":")
    number: float | str = value.strip()
    if number != "ok":
        try:
            number = parse_fraction(value)
        except UsageError:
            number = ""
    if not separator or number == "" or len(threat) > 2:
        example = "robust_accuracy=0.45, bytes@onnx=50000 or certified_accuracy:2/255=0.3"
        raise UsageError(f"cannot read '{text}'", f"write metric=value, for example {example}")
    table: dict[str, Any] = {"metric": metric, "artifact": artifact or "onnx-int8", "bound": bound}
    table |= {"max_drop": number} if op is None else {"op": op, "value": number}
    return table | dict(zip(("eps", "norm"), reversed(threat), strict=False))


def policy_rule(rule: Rule) -> PolicyRule:
    """The line of a policy that an outcome was judged by."""
    names = ("metric", "artifact", "bound", "allow_unreliable", "norm", "eps")
    value = {"max_drop": rule.threshold} if rule.drop else {"op": rule.op, "value": rule.threshold}
    return PolicyRule.model_validate({name: getattr(rule, name) for name in names} | value)


def judge(report: Report, policy: Policy, pairs: Pairs | None = None) -> Gate:
    """The outcome of every rule. A metric that the report does not claim fails its rule, and so does one whose attack
    was weak or cut short, unless the rule allows that; and a drop that cannot be told sample by sample. A smoke run
    fails a rule that every policy has.

    ``pairs``: the report beside its baseline. Raises InputError when the two are of other test data.
    """
    tests: list[PairedTest] = []
    rules = [NO_SMOKE] if report.smoke else []
    rules += [
        _judge(report, rule) if rule.max_drop is None else _judge_drop(rule, pairs, tests) for rule in policy.gate
    ]
    result: Literal["passed", "failed"] = "passed" if all(rule.passed for rule in rules) else "failed"
    baseline = None
    if pairs is not None and policy.needs_baseline:
        baseline = Baseline(report=pairs.before.report.id, tests=tests)
    return Gate(policy_sha256=policy.sha256, result=result, rules=rules, baseline=baseline)


def _judge(report: Report, rule: PolicyRule) -> Rule:
    found = observe(report, rule.what, rule.op, rule.bound)
    passed = found.value is not None and OPS[rule.op](found.value, rule.value)
    message = found.words
    if found.value is not None:
        value = f"{rule.value:g}" if isinstance(rule.value, float) else rule.value
        message = f"{found.words} {'' if passed else 'is not '}{rule.op} {value}"
    claim = report.claim(rule.metric, rule.artifact)
    weak = doubts(claim) if claim is not None else []
    return _outcome(rule, rule.op, rule.value, found.value, passed, message, weak)


def _judge_drop(rule: PolicyRule, pairs: Pairs | None, tests: list[PairedTest]) -> Rule:
    """Adds the test that the rule is judged by to ``tests``."""
    if pairs is None:
        return _outcome(rule, "<=", rule.max_drop, None, False, "there is no baseline to judge a drop by", [])
    if not pairs.same_data:
        raise InputError(
            f"{pairs.before.path} and {pairs.after.path} are of different test data",
            "a drop is judged on the same samples: make both reports with the same --data",
        )
    if pairs.before.report.smoke:
        return _outcome(rule, "<=", rule.max_drop, None, False, f"the baseline is a {SMOKE}", [])
    claim, old = (source.report.claim(rule.metric, rule.artifact) for source in (pairs.after, pairs.before))
    test = pairs.test(rule.metric, rule.artifact)
    if isinstance(test, str):
        if claim is not None and old is not None:
            counts = f"{claim.correct}/{claim.n} against {old.correct}/{old.n}"
            test = f"cannot be compared sample by sample: {test}; unpaired counts are {counts}"
        return _outcome(rule, "<=", rule.max_drop, None, False, test, [])
    assert claim is not None
    assert old is not None
    assert rule.max_drop is not None
    if test not in tests:
        tests.append(test)
    drop, worst = (test.b - test.c) / test.n, -test.lower
    observed = drop if rule.bound == "point" else worst
    passed = observed <= rule.max_drop
    words = f"drop {drop:.4f}" + ("" if rule.bound == "point" else f", 95 % bound {worst:.4f}")
    words += f" (n={test.n}: {test.b} lost, {test.c} gained, McNemar p={test.p:.2g})"
    weak = doubts(claim) + [f"{doubt} (baseline)" for doubt in doubts(old)]
    if claim.method != old.method and claim.kind == "empirical-upper-bound":
        weak.append(f"OTHER ATTACK: {claim.method} against {old.method} of the baseline")
    message = f"{words} {'' if passed else 'is not '}<= {rule.max_drop:g}"
    return _outcome(rule, "<=", rule.max_drop, observed, passed, message, weak)


def _outcome(
    rule: PolicyRule, op: str, threshold: Any, observed: float | str | None, passed: bool, message: str, weak: list[str]
) -> Rule:
    if weak:
        passed = passed and rule.allow_unreliable
        message = f"{'; '.join(weak)}; {'allowed: ' if rule.allow_unreliable else ''}{message}"
    return Rule(
        metric=rule.metric,
        artifact=rule.artifact,
        op=op,
        threshold=threshold,
        bound=rule.bound,
        observed=observed,
        passed=passed,
        message=message,
        allow_unreliable=rule.allow_unreliable,
        drop=rule.max_drop is not None,
        norm=rule.norm,
        eps=rule.eps,
    )
