"""A comparison of two reports in words: rows of a table, Markdown, JSON."""

from __future__ import annotations

import json
from typing import Any

from rprune.reports.compare import Change, Comparison
from rprune.reports.markdown import bullets, escape, joined, table
from rprune.reports.metrics import CLAIMED
from rprune.reports.schema import Report
from rprune.reports.text import SMOKE, flags, number, percent

COLUMNS = ["", "file", "before", "after", "change", "p", "verdict"]
TESTS = {"mcnemar-exact": "McNemar, exact, sample by sample", "fisher": "Fisher, exact, unpaired"}


def rows(found: Comparison) -> list[list[str]]:
    """Every claim, and whatever else changed."""
    shown = [c for c in found.changes if c.metric in CLAIMED or c.before != c.after]
    return [_row(found, change) for change in shown]


def _row(found: Comparison, change: Change) -> list[str]:
    sides = [_value(change, value) for value in (change.before, change.after)]
    for index, report in enumerate((found.before, found.after)):
        sides[index] = " ".join([sides[index], *_flags(report, change)])
    verdict = change.verdict.upper() if change in found.regressions else change.verdict
    verdict += f": {change.note}" if change.note else ""
    p = "" if change.p is None else f"{change.p:.2g}{'*' * (change.test == 'fisher')}"
    return [change.metric, change.artifact, *sides, _difference(change), p, verdict]


def _flags(report: Report, change: Change) -> list[str]:
    claim = report.claim(change.metric, change.artifact)
    return [] if claim is None else flags(claim)


def _value(change: Change, value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if change.metric in CLAIMED:
        return percent(value)
    return (
        f"{value:.4f}"
        if change.metric == "sparsity"
        else f"{value:.4g} ms"
        if change.metric == "latency"
        else (number(value))
    )


def _difference(change: Change) -> str:
    """Points of a percent with their interval; of sizes and times the ratio."""
    before, after, paired = change.before, change.after, change.paired
    if not isinstance(before, float) or not isinstance(after, float):
        return ""
    if paired is not None:
        return f"{100 * paired.delta:+.1f} [{100 * paired.lower:+.1f}, {100 * paired.upper:+.1f}]"
    if change.metric in CLAIMED:
        return f"{100 * (after - before):+.1f}"
    if change.metric == "sparsity":
        return f"{after - before:+.4f}"
    return f"x{after / before:.3g}" if before else ""


def settings(found: Comparison) -> list[list[str]]:
    def said(value: Any) -> str:
        return "" if value is None else value if isinstance(value, str) else json.dumps(value, sort_keys=True)

    return [[setting.key, said(setting.before), said(setting.after)] for setting in found.settings]


def summary(found: Comparison) -> str:
    worse = sum(change.verdict == "regression" for change in found.changes)
    unknown = len(found.regressions) - worse
    words = f"{worse} regression{'s' * (worse != 1)}" if worse else "no regression"
    return words + (f", {unknown} not comparable" if unknown else "")


def _sides(found: Comparison) -> dict[str, Report]:
    return {"before": found.before, "after": found.after}


def footnote(found: Comparison) -> str:
    """What the numbers and columns mean, as far as they are used; a line each."""
    used = {change.test for change in found.changes if change.test}
    parts = [f"{name}: {SMOKE}" for name, report in _sides(found).items() if report.smoke]
    parts += [f"p: {TESTS['mcnemar-exact']}"] if "mcnemar-exact" in used else []
    why = {change.unpaired: None for change in found.changes if change.unpaired}
    parts += [f"p*: {TESTS['fisher']} ({'; '.join(why)})"] if "fisher" in used else []
    parts += [f"alpha {found.alpha:g} for each"] if used else []
    return "\n".join(parts)


def markdown(found: Comparison) -> str:
    differ = table(["setting", "before", "after"], settings(found)) if found.settings else ""
    ids = escape(f"before {found.before.id[:12]}, after {found.after.id[:12]}")
    claims = table(COLUMNS, rows(found))
    head = f"### rprune compare: {summary(found)}"
    return joined(head, claims, bullets(footnote(found).splitlines()), differ, ids) + "\n"


def to_json(found: Comparison) -> dict[str, Any]:
    changes = [
        vars(change) | {"paired": None if change.paired is None else change.paired.model_dump(mode="json")}
        for change in found.changes
    ]
    return {
        "before": found.before.id,
        "after": found.after.id,
        "alpha": found.alpha,
        "smoke": [name for name, report in _sides(found).items() if report.smoke],
        "same_data": found.before.data.sha256 == found.after.data.sha256,
        "regressions": sum(change.verdict == "regression" for change in found.changes),
        "not_comparable": sum(change.verdict == "not comparable" for change in found.changes),
        "changes": changes,
        "settings": [vars(setting) for setting in found.settings],
    }
