"""The report as JSON, and the id that covers all of it."""

from __future__ import annotations

import json
import random

import pydantic
import pytest

from rprune.errors import InputError
from rprune.files import canonical_json, write_json
from rprune.reports.schema import AttackRow, Claim, Health, HealthCheck, Interval, Report, Rule, Threat, read_report
from rprune.threat import ThreatModel


@pytest.fixture(scope="module")
def report(load_helper):
    return load_helper("reports/sample_report.py").sample_report()


def places(value, path=()):
    """The path of every value that is no table or list."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))
    else:
        yield path


def change(table, path):
    """A copy with one value changed to another of its type."""
    copy = json.loads(json.dumps(table))
    owner = copy
    for part in path[:-1]:
        owner = owner[part]
    old = owner[path[-1]]
    if isinstance(old, bool):
        owner[path[-1]] = not old
    elif isinstance(old, str):
        owner[path[-1]] = old + "x"
    else:
        owner[path[-1]] = (old or 0) + 1
    return copy


def shuffled(value):
    if isinstance(value, dict):
        keys = list(value)
        random.Random(0).shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("gate", "more"),
    [("passed", {}), ("failed", {}), (None, {"weak": True, "complete": False}), ("passed", {"attacked": False})],
)
def test_round_trip(load_helper, tmp_path, gate, more):
    report = load_helper("reports/sample_report.py").sample_report(gate, **more)
    write_json(tmp_path / "report.json", report.to_json())
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == report
    assert read_report(tmp_path).computed_id() == report.id


def test_id_changes_with_every_value(load_helper):
    report = load_helper("reports/sample_report.py").sample_report(history=False, profile=False)
    table = report.to_json()
    seen = {report.id}
    paths = [path for path in places(table) if path != ("id",)]
    assert len(paths) > 200
    for path in paths:
        changed = change(table, path)
        try:
            other = Report.model_validate(changed)
        except pydantic.ValidationError:
            continue  # a name out of a fixed list: no longer a report at all
        assert other.computed_id() not in seen, path
        seen.add(other.computed_id())
    assert len(seen) > 0.8 * len(paths)


def test_id_does_not_depend_on_the_order_of_keys_or_on_itself(report):
    table = shuffled(report.to_json())
    assert list(table) != list(report.to_json())
    assert Report.model_validate(table).computed_id() == report.id
    assert Report.model_validate(table | {"id": "else"}).computed_id() == report.id


def test_absent_optional_fields_are_not_written(load_helper):
    table = load_helper("reports/sample_report.py").sample_report(None).to_json()
    assert "gate" not in table
    assert None not in [table[key] for key in table]


def test_unknown_fields_are_refused(report, tmp_path):
    write_json(tmp_path / "report.json", report.to_json() | {"verified": True})
    with pytest.raises(InputError, match="verified"):
        read_report(tmp_path)


@pytest.mark.parametrize("schema", ["rprune.report/2", "", None, 1])
def test_unknown_schema_is_refused(report, tmp_path, schema):
    write_json(tmp_path / "report.json", report.to_json() | {"schema": schema})
    with pytest.raises(InputError, match="schema"):
        read_report(tmp_path)


def test_missing_file_and_missing_field(report, tmp_path):
    with pytest.raises(InputError, match="not there"):
        read_report(tmp_path)
    table = report.to_json()
    del table["claims"]
    write_json(tmp_path / "report.json", table)
    with pytest.raises(InputError, match="claims"):
        read_report(tmp_path)


def test_canonical_json_takes_no_nan(report):
    assert json.loads(canonical_json(report.to_json())) == report.to_json()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_lookups(report):
    assert report.claim("robust_accuracy").artifact == "onnx-int8"
    assert report.claim("robust_accuracy", "onnx").artifact == "onnx"
    assert report.claim("nothing") is None
    assert report.subject("onnx").name.endswith(".onnx")
    assert report.subject("policy") is None


def test_what_the_first_reports_did_not_have_is_not_written_at_its_default(load_helper):
    """Their ids hold: the digest covers no field that they could not know."""
    report = load_helper("reports/sample_report.py").sample_report(attacked=False)
    claim, rule = report.claim("robust_accuracy"), report.gate.rules[0]
    first = {"id", "artifact", "sha256", "kind", "metric", "correct", "n", "value", "interval", "threat", "method",
             "settings", "sound_for", "curve"}  # fmt: skip
    assert set(claim.model_dump()) == set(claim.model_dump(mode="json", exclude_none=True)) == first
    assert set(rule.model_dump()) == set(Rule.model_fields) - {"allow_unreliable", "drop", "norm", "eps"}
    assert set(report.gate.model_dump()) == {"policy_sha256", "result", "rules"}
    later = {"health": Health.of([]), "attacks": [row("square")], "distances": [None], "complete": False}
    for name, value in later.items():
        assert set(claim.model_copy(update={name: value}).model_dump()) == first | {name}
    assert "allow_unreliable" in rule.model_copy(update={"allow_unreliable": True}).model_dump()


def row(name, **more):
    return AttackRow(name=name, kind="white-box", tried=3, broken=1, misses=0, queries=30, **more)


@pytest.mark.parametrize(("value", "passed"), [(None, True), (0.0, True), (0.01, True), (0.0100001, False)])
def test_check_of_health_follows_from_value_and_limit(value, passed):
    check = HealthCheck.of("R6", "right at a huge eps", value, 0.01, "why")
    assert check.passed == passed
    assert (Health.of([check]).status == "ok") == passed
    table = check.model_dump(mode="json", exclude_none=True)
    assert HealthCheck.model_validate(table) == check
    with pytest.raises(pydantic.ValidationError, match="R6"):
        HealthCheck.model_validate(table | {"passed": not passed})


@pytest.mark.parametrize(
    "change",
    [{"id": "R0"}, {"id": "R16"}, {"id": "6"}, {"value": float("nan")}, {"value": float("inf")},
     {"limit": float("inf")}, {"weight": 1}],
)  # fmt: skip
def test_check_of_health_that_is_none(change):
    table = HealthCheck.of("R6", "x", 0.0, 0.01).model_dump()
    with pytest.raises(pydantic.ValidationError):
        HealthCheck.model_validate(table | change)


def test_status_of_health_follows_from_its_checks():
    good, bad = HealthCheck.of("R1", "x", 0.0, 1.0), HealthCheck.of("R2", "y", 2.0, 1.0)
    health = Health.of([good, bad])
    assert (health.status, health.failed) == ("failed", [bad])
    with pytest.raises(pydantic.ValidationError, match="1 checks failed"):
        Health(status="ok", checks=[good, bad])
    with pytest.raises(pydantic.ValidationError, match="0 checks failed"):
        Health(status="failed", checks=[good])
    with pytest.raises(pydantic.ValidationError, match="twice"):
        Health(status="ok", checks=[good, good])


def test_claim_is_reliable_when_every_check_passed(load_helper):
    make = load_helper("reports/sample_report.py").sample_report
    assert [make(weak=weak).claim("robust_accuracy").reliable for weak in (False, True)] == [True, False]
    assert not make(attacked=False).claim("robust_accuracy").reliable
    assert make(attacked=False).claim("clean_accuracy").reliable
    assert make(complete=False).claim("robust_accuracy").reliable  # another matter


@pytest.mark.parametrize(
    "change",
    [{"distances": [-0.1]}, {"distances": [float("inf")]}, {"distances": [float("nan")]}, {"attacks": [{"name": "x"}]}],
)
def test_claim_with_an_impossible_attack(report, change):
    table = report.claim("robust_accuracy").model_dump()
    with pytest.raises(pydantic.ValidationError):
        Claim.model_validate(table | change)
    with pytest.raises(pydantic.ValidationError):
        row("x", invalid=-1)
    with pytest.raises(pydantic.ValidationError):
        AttackRow.model_validate(row("x").model_dump() | {"broken": -1})


def test_distances_keep_their_holes(report):
    """A sample for which no perturbation was found counts: it is null, not left out."""
    found = report.claim("robust_accuracy").distances
    assert None in found
    assert Claim.model_validate(json.loads(canonical_json(report.claim("robust_accuracy").model_dump()))).distances == (
        found
    )


@pytest.mark.parametrize(
    ("norm", "eps", "covers"),
    [("linf", "8/255", True), ("linf", "9/255", True), ("linf", "7/255", False), ("l2", "1", False)],
)
def test_proof_covers_what_is_no_larger(norm, eps, covers):
    assert Threat.of(ThreatModel(norm, eps)).covers(Threat.of(ThreatModel("linf", "8/255"))) == covers


def test_threat_keeps_the_fraction():
    threat = Threat.of(ThreatModel("linf", "8/255"))
    assert (threat.eps, threat.eps_float) == ("8/255", 8 / 255)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (441, 1000)])
def test_interval_is_clopper_and_pearsons(correct, n):
    from scipy.stats import beta

    interval = Interval.of(correct, n)
    low = beta.ppf(0.025, correct, n - correct + 1) if correct else 0
    high = beta.ppf(0.975, correct + 1, n - correct) if correct < n else 1
    assert interval.lower == pytest.approx(low, abs=1e-12)
    assert interval.upper == pytest.approx(high, abs=1e-12)


def test_json_schema_names_the_fields():
    schema = Report.model_json_schema()
    assert {"schema", "id", "subjects", "claims", "gate"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
