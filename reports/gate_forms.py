"""The outcome of a gate as CI systems read it: GitHub's commands and files, Markdown, JUnit XML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from rprune.reports.markdown import escape, joined, table
from rprune.reports.schema import Gate, Report, Rule
from rprune.reports.text import bar, judged

NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
TITLE = "rprune gate"


@dataclass(frozen=True)
class Place:
    """Where a rule is written: a policy and its line, or the report when it came from an option."""

    file: str
    line: int | None = None


def verdict(gate: Gate) -> str:
    failed = sum(not rule.passed for rule in gate.rules)
    return f"GATE FAILED  {failed} of {len(gate.rules)} rules" if failed else "GATE PASSED"


def policy_lines(text: str) -> list[int]:
    """The line of each ``[[gate]]`` table of a policy, from 1."""
    return [n for n, line in enumerate(text.splitlines(), 1) if re.match(r"\s*\[\[\s*gate\s*\]\]", line)]


def data(text: str) -> str:
    """The message of a workflow command of GitHub Actions; its toolkit's ``command.ts`` has these rules."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def command(kind: str, message: str, **properties: object) -> str:
    """A workflow command: ``::error file=a.toml,line=3,title=b::message``."""
    said = ",".join(
        f"{name}={data(str(value)).replace(':', '%3A').replace(',', '%2C')}"
        for name, value in properties.items()
        if value is not None
    )
    return f"::{kind} {said}::{data(message)}"


def github(gate: Gate, places: Sequence[Place]) -> str:
    """One line a rule, an error annotation where it failed. No text of the report can become a command."""
    lines = []
    for rule, place in zip(gate.rules, places, strict=True):
        if rule.passed:
            lines.append(data(f"✓ {judged(rule)}: {rule.message} ({rule.artifact})"))
        else:
            title = f"{TITLE}: {judged(rule)} ({rule.artifact})"
            lines.append(command("error", rule.message, file=place.file, line=place.line, title=title))
    return "\n".join([*lines, verdict(gate)]).replace("##[", "# #[") + "\n"  # as commands were once written


def output_name(rule: Rule) -> str:
    """What a rule judged as GitHub takes it: clean_accuracy_drop, bytes_onnx, certified_accuracy_2_255."""
    role = "" if rule.artifact == "onnx-int8" else f" {rule.artifact}"
    return re.sub(r"\W+", "_", judged(rule) + role)


def outputs(gate: Gate) -> str:
    """Lines of GITHUB_OUTPUT: the value by which each rule was judged, where there is one, and the result."""
    values = {output_name(rule): rule.observed for rule in gate.rules if rule.observed is not None}
    plain = {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in values.items()}
    return "".join(f"{name}={value}\n" for name, value in (plain | {"result": gate.result}).items())


def markdown(gate: Gate, report: Report) -> str:
    """A heading and a table with a row for each rule."""
    rows = [
        ["✓" if rule.passed else "✗", judged(rule), rule.artifact, bar(rule.op, rule.threshold), rule.message]
        for rule in gate.rules
    ]
    digests = {"report": report.id, "policy": gate.policy_sha256}
    digests |= {"baseline": gate.baseline.report} if gate.baseline else {}
    said = ", ".join(f"{name} {digest[:12]}" for name, digest in digests.items())
    found = table(["", "rule", "file", "bar", "what was found"], rows)
    return joined(f"### {TITLE}: {gate.result}", found, escape(said)) + "\n"


def junit(gate: Gate, report: Report) -> str:
    """A test suite with a case for each rule; digests as properties."""

    def clean(text: str) -> str:
        return NOT_XML.sub("\ufffd", text)

    def properties(parent: ElementTree.Element, table: dict[str, str]) -> None:
        holder = ElementTree.SubElement(parent, "properties")
        for name, value in table.items():
            ElementTree.SubElement(holder, "property", name=name, value=clean(value))

    failed = str(sum(not rule.passed for rule in gate.rules))
    head = {"name": TITLE, "tests": str(len(gate.rules)), "failures": failed, "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", head)
    suite = ElementTree.SubElement(root, "testsuite", head)
    digests = {"report": report.id, "policy_sha256": gate.policy_sha256, "data_sha256": report.data.sha256}
    properties(suite, digests | ({"baseline": gate.baseline.report} if gate.baseline else {}))
    for rule in gate.rules:
        name = f"{judged(rule)} {bar(rule.op, rule.threshold)} ({rule.artifact})"
        case = ElementTree.SubElement(suite, "testcase", classname=TITLE, name=clean(name), time="0")
        subject = report.subject(rule.artifact)
        if subject is not None:
            properties(case, {"file": subject.name, "sha256": subject.sha256})
        if not rule.passed:
            failure = ElementTree.SubElement(case, "failure", message=clean(rule.message), type="gate")
            failure.text = clean(rule.message)
        else:
            ElementTree.SubElement(case, "system-out").text = clean(rule.message)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'
