from __future__ import annotations

import json

import pytest

from rprune.reports.gate import Policy, judge
from rprune.reports.intoto import REPORT, STATEMENT, TEST_RESULT, statements
from rprune.reports.renderings import RENDERINGS
from rprune.reports.schema import Report


def test_report_is_the_predicate_and_the_files_are_its_subjects(sample):
    report = sample(None)
    [statement] = statements(report)
    assert (statement["_type"], statement["predicateType"]) == (STATEMENT, REPORT)
    assert Report.model_validate(statement["predicate"]).intact()
    assert {s["name"]: s["digest"]["sha256"] for s in statement["subject"]} == {
        s.name: s.sha256 for s in report.subjects
    }


@pytest.mark.parametrize(("gate", "result", "failed"), [("passed", "PASSED", 0), ("failed", "FAILED", 1)])
def test_gate_is_a_test_result(sample, gate, result, failed):
    report = sample(gate)
    predicate = statements(report)[1]["predicate"]
    assert statements(report)[1]["predicateType"] == TEST_RESULT
    assert predicate["result"] == result
    assert (len(predicate["passedTests"]), len(predicate["failedTests"])) == (4 - failed, failed)
    assert predicate["warnedTests"] == []
    assert predicate["configuration"][0]["digest"]["sha256"] == report.gate.policy_sha256


def test_rule_that_passes_by_an_unreliable_number_is_a_warning(sample):
    report = sample(None, weak=True)
    rules = [
        {"metric": "robust_accuracy", "value": 0.4, "allow_unreliable": True},
        {"metric": "sparsity", "value": 0.9},
    ]
    report = report.model_copy(update={"gate": judge(report, Policy.model_validate({"gate": rules}))})
    predicate = statements(report)[1]["predicate"]
    assert predicate["result"] == "WARNED"
    assert predicate["warnedTests"] == ["robust_accuracy@onnx-int8 >= 0.4 (lower)"]
    assert predicate["passedTests"] == ["sparsity@onnx-int8 >= 0.9 (lower)"]


def test_subject_of_a_weak_attack_says_so(sample):
    [statement] = statements(sample(None, weak=True, complete=False))
    noted = {s["name"]: s["annotations"]["doubts"] for s in statement["subject"] if "annotations" in s}
    assert list(noted) == ["model.int8.onnx"]
    assert [doubt.split(": ")[1] for doubt in noted["model.int8.onnx"]] == ["UNRELIABLE", "INCOMPLETE"]


def test_each_statement_is_one_line(sample):
    text = RENDERINGS["intoto"](sample())
    assert text.endswith("\n")
    assert [json.loads(line) for line in text.splitlines()] == statements(sample())
