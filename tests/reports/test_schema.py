"""The report as JSON, and the id that covers all of it."""

from __future__ import annotations

import json
import random

import pydantic
import pytest

from rprune.errors import InputError
from rprune.files import canonical_json, write_json
from rprune.reports.schema import Interval, Report, Threat, read_report
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


@pytest.mark.parametrize("gate", ["passed", "failed", None])
def test_round_trip(load_helper, tmp_path, gate):
    report = load_helper("reports/sample_report.py").sample_report(gate)
    write_json(tmp_path / "report.json", report.to_json())
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == report
    assert read_report(tmp_path).computed_id() == report.id


def test_id_changes_with_every_value(load_helper):
    report = load_helper("reports/sample_report.py").sample_report(history=False)
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
