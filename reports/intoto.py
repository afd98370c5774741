"""The report as in-toto attestations: Statement v1, unsigned. https://github.com/in-toto/attestation"""

from __future__ import annotations

from typing import Any

from rprune.reports.schema import Report, Rule
from rprune.reports.text import bar, doubts, judged

STATEMENT = "https://in-toto.io/Statement/v1"
REPORT = "https://rprune.dev/integrity-report/v1"  # names the predicate; nothing is served there
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"


def statements(report: Report) -> list[dict[str, Any]]:
    """The report itself as a predicate and, where there is a gate, the gate as a test result."""
    subjects = [_subject(report, subject.name, subject.sha256) for subject in report.subjects]
    found = [(REPORT, report.to_json())]
    if report.gate is not None:
        found.append((TEST_RESULT, _test_result(report)))
    return [
        {"_type": STATEMENT, "subject": subjects, "predicateType": kind, "predicate": predicate}
        for kind, predicate in found
    ]


def _subject(report: Report, name: str, sha256: str) -> dict[str, Any]:
    """A file, with what makes its numbers less than they seem."""
    found = [f"{claim.id}: {doubt}" for claim in report.claims if claim.sha256 == sha256 for doubt in doubts(claim)]
    return {"name": name, "digest": {"sha256": sha256}} | ({"annotations": {"doubts": found}} if found else {})


def _test_result(report: Report) -> dict[str, Any]:
    """Rules that pass by a number that is unreliable or incomplete, since they allow it, pass with a warning."""
    assert report.gate is not None
    passed = [rule for rule in report.gate.rules if rule.passed]
    warned = [rule for rule in passed if (claim := report.claim(rule.metric, rule.artifact)) and doubts(claim)]
    result = "FAILED" if report.gate.result == "failed" else "WARNED" if warned else "PASSED"
    return {
        "result": result,
        "configuration": [
            _json("policy", report.gate.policy_sha256),
            _json("recipe", report.recipe_sha256),
        ],
        "passedTests": [_name(rule) for rule in passed if rule not in warned],
        "warnedTests": [_name(rule) for rule in warned],
        "failedTests": [_name(rule) for rule in report.gate.rules if not rule.passed],
    }


def _json(name: str, sha256: str) -> dict[str, Any]:
    """A table that the digest of its canonical JSON names, whatever file it stood in."""
    return {"name": name, "digest": {"sha256": sha256}, "annotations": {"digestOf": "canonical JSON"}}


def _name(rule: Rule) -> str:
    return f"{judged(rule)}@{rule.artifact} {bar(rule.op, rule.threshold)} ({rule.bound})"
