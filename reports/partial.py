"""Bundles that were passed on without some of their files: which may be missing, and what then stays unchecked."""

from __future__ import annotations

from collections.abc import Collection

from rprune.reports.schema import Report
from rprune.reports.text import main_role

CHECKED = {"onnx": "zeros", "onnx-compact": "compact", "packed": "packed", "c": "c"}  # the check of a role's files


def packed_forms(report: Report) -> tuple[str, ...]:
    """Roles of the files that its packed file, if there is one, restores to the byte."""
    return (main_role(report), "onnx-compact", "c", "c-header") if report.subject("packed") else ()


def is_needed(report: Report, role: str) -> bool:
    """Whether the main claims cannot be checked without such a file."""
    return role in ("evidence", main_role(report))


def unchecked(report: Report, absent: Collection[str]) -> list[str]:
    """What the report says of files, named in ``absent``, that nobody can check without them."""
    names = {subject.name: subject.role for subject in report.subjects if subject.name in absent}
    roles = set(names.values())
    left = [f"size of {name}" for name in names]
    left += [check for role, check in CHECKED.items() if role in roles]
    left += [claim.id for claim in report.claims if claim.artifact in roles]
    rules = [] if report.gate is None else report.gate.rules
    return left + [f"rule {rule.metric}@{rule.artifact}" for rule in rules if rule.artifact in roles]


def remedy(report: Report, role: str) -> str:
    """What helps where a file of this role is missing, as the end of a sentence."""
    if role in packed_forms(report):
        return "; 'rprune unpack' restores it from the packed file"
    return "" if is_needed(report, role) else "; --partial does without it"
