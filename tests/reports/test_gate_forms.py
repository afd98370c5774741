"""What CI systems read: GitHub's commands, Markdown, JUnit XML. Nothing that a report says may break out of them."""

from __future__ import annotations

from urllib.parse import unquote
from xml.dom import minidom
from xml.etree import ElementTree

import junitparser
import pytest

from rprune.reports import gate_forms
from rprune.reports.gate import judge, policy_of
from rprune.reports.gate_forms import Place
from rprune.reports.schema import HealthCheck

RULES = [
    {"metric": "sparsity", "value": 0.99},
    {"metric": "robust_accuracy", "value": 0.45},
    {"metric": "certified_accuracy", "eps": "2/255", "value": 0.1},
    {"metric": "bytes", "artifact": "onnx", "op": "<=", "value": 50e6},
    {"metric": "attack_health", "op": "==", "value": "ok"},
    {"metric": "latency", "op": "<=", "value": 3},
]
PLACES = [Place("gate.toml", 1 + 4 * i) for i in range(5)] + [Place("out/report.json")]
EVIL = 'x|y,z: 100%\r\n::error::forged ##[add-path]/tmp <img src=x> [a](b) `c` "d" ]]> \x00\x1b\ud800'


@pytest.fixture(scope="module")
def judged(load_helper):
    report = load_helper("reports/sample_report.py").sample_report(None)
    return judge(report, policy_of({"gate": RULES}, "x")), report


@pytest.fixture(scope="module")
def evil(load_helper):
    """A report whose attack failed a check with a name of a stranger's making, and a rule that says so."""
    report = load_helper("reports/sample_report.py").sample_report(None, weak=True)
    claims = []
    for claim in report.claims:
        if claim.health is not None:
            checks = [HealthCheck.of("R4", EVIL, 1.0, 0.0), *claim.health.checks[4:]]
            claim = claim.model_copy(update={"health": type(claim.health).of(checks)})
        claims.append(claim)
    report = report.model_copy(update={"claims": claims})
    rules = [{"metric": "robust_accuracy", "value": 0.1}]
    rules.append(rules[0] | {"allow_unreliable": True})  # one fails, one passes: both say the name
    gate = judge(report, policy_of({"gate": rules}, "x"))
    assert [rule.passed for rule in gate.rules] == [False, True]
    assert all(EVIL in rule.message for rule in gate.rules)
    return gate, report


def test_annotations_name_file_line_and_reason(judged):
    gate, _ = judged
    lines = gate_forms.github(gate, PLACES).splitlines()
    assert [line.startswith("::error ") for line in lines] == [not rule.passed for rule in gate.rules] + [False]
    assert lines[1].startswith("::error file=gate.toml,line=5,title=rprune gate%3A robust_accuracy (onnx-int8)::0.4390")
    assert "95 %25 bound" in lines[1]
    assert lines[5].startswith("::error file=out/report.json,title=rprune gate%3A latency")
    assert lines[-1] == "GATE FAILED  2 of 6 rules"


def test_escapes_of_a_command():
    said = gate_forms.command("error", "a%b\r\nc:d,e", title="f%g\r\nh:i,j", line=None)
    assert said == "::error title=f%25g%0D%0Ah%3Ai%2Cj::a%25b%0D%0Ac:d,e"
    properties, _, message = said.removeprefix("::error ").partition("::")
    assert (unquote(message), unquote(properties)) == ("a%b\r\nc:d,e", "title=f%g\r\nh:i,j")


def test_no_text_of_a_report_becomes_a_command(evil):
    gate, _ = evil
    text = gate_forms.github(gate, [Place("a,b:c\n.toml"), Place("x")])
    lines = text.splitlines()
    assert len(lines) == 3
    assert [line for line in lines if line.startswith("::")] == lines[:1]
    assert "##[" not in text
    assert lines[0].startswith("::error file=a%2Cb%3Ac%0A.toml,title=")


def test_outputs_are_one_line_each(judged, evil):
    gate, report = judged
    table = dict(line.split("=", 1) for line in gate_forms.outputs(gate).splitlines())
    assert table["result"] == "failed"
    assert table["attack_health"] == "ok"
    assert float(table["sparsity"]) == report.sparsity.overall
    assert float(table["robust_accuracy"]) == gate.rules[1].observed
    assert float(table["bytes_onnx"]) == report.subject("onnx").bytes
    assert "latency" not in table  # it was not measured, and has no value
    assert all(name.replace("_", "a").isalnum() and not name[0].isdigit() for name in table)
    assert len(gate_forms.outputs(evil[0]).splitlines()) == 2


def test_markdown_is_one_row_a_rule(judged, evil):
    for gate, report in (judged, evil):
        lines = gate_forms.markdown(gate, report).splitlines()
        rows = [line for line in lines if line.startswith("| ✓") or line.startswith("| ✗")]
        assert len(rows) == len(gate.rules)
        assert {row.count("|") for row in rows} == {6}
        assert not any(sign in "".join(rows).replace("<!-- -->", "") for sign in ("<img", " [a]", " `c`"))
    assert lines[0] == "### rprune gate: failed"
    assert report.id[:12] in lines[-1]


def test_smoke_run_has_a_place_of_its_own(load_helper):
    report = load_helper("reports/sample_report.py").sample_report(None, smoke=True)
    gate = judge(report, policy_of({"gate": RULES[:1]}, "x"))
    text = gate_forms.github(gate, [Place("out"), *PLACES[:1]])
    assert text.startswith("::error file=out,title=rprune gate%3A smoke (report)::SMOKE RUN")
    assert len(ElementTree.fromstring(gate_forms.junit(gate, report)).findall(".//failure")) == 1


@pytest.mark.parametrize("parse", ["etree", "minidom"])
def test_junit_has_a_case_a_rule_with_digests(judged, parse):
    gate, report = judged
    text = gate_forms.junit(gate, report)
    if parse == "minidom":
        (suite,) = minidom.parseString(text.encode()).getElementsByTagName("testsuite")
        assert len(suite.getElementsByTagName("failure")) == 2
        return
    (suite,) = ElementTree.fromstring(text.encode())
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("6", "2", "0")
    found = {p.get("name"): p.get("value") for p in suite.find("properties")}
    assert found == {
        "report": report.id, "policy_sha256": gate.policy_sha256, "data_sha256": report.data.sha256,
    }  # fmt: skip
    cases = suite.findall("testcase")
    assert [case.find("failure") is None for case in cases] == [rule.passed for rule in gate.rules]
    assert cases[1].find("failure").get("message") == gate.rules[1].message
    assert cases[1].get("name") == "robust_accuracy >= 0.45 (onnx-int8)"
    digests = {p.get("name"): p.get("value") for p in cases[3].find("properties")}
    assert digests == {"file": "model.onnx", "sha256": report.subject("onnx").sha256}


def test_junit_of_a_strangers_words_is_still_xml(evil):
    gate, report = evil
    text = gate_forms.junit(gate, report)
    failure = ElementTree.fromstring(text.encode()).find(".//failure")
    assert "::error::forged" in failure.text
    assert "\ufffd" in failure.text  # what XML cannot hold


def test_junit_by_the_library_of_ci_tools(judged, tmp_path):
    gate, report = judged
    (tmp_path / "junit.xml").write_text(gate_forms.junit(gate, report))
    found = junitparser.JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    assert (found.tests, found.failures, found.errors) == (6, 2, 0)
    cases = [case for suite in found for case in suite]
    assert [case.is_passed for case in cases] == [rule.passed for rule in gate.rules]


def test_lines_of_a_policy():
    text = '# [[gate]]\n[[gate]]\nmetric = "sparsity"\n\n  [[ gate ]]  # more\nvalue = 1\n'
    assert gate_forms.policy_lines(text) == [2, 5]
