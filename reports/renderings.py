"""The documents that a report can be written as, by name: the same report gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable

from rprune.errors import IntegrityError
from rprune.files import canonical_json, readable_json
from rprune.reports.bom import bom
from rprune.reports.card import render_card
from rprune.reports.intoto import statements
from rprune.reports.markdown import render_markdown
from rprune.reports.robustbench import robustbench
from rprune.reports.schema import Report

RENDERINGS: dict[str, Callable[[Report], str]] = {
    "markdown": render_markdown,
    "card": render_card,
    "bom": lambda report: readable_json(bom(report)),
    "intoto": lambda report: "".join(f"{canonical_json(statement)}\n" for statement in statements(report)),
    "robustbench": lambda report: readable_json(robustbench(report)),
}


def rendered(report: Report, name: str) -> str:
    """One of ``RENDERINGS``. They are read without the report, so a report that was changed has none.

    Raises:
        IntegrityError: the id is not that of the content.
    """
    if not report.intact():
        raise IntegrityError("the report is not the one that its id names", "take the file that 'rprune export' wrote")
    return RENDERINGS[name](report)
