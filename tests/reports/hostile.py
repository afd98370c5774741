"""A report whose every free text tries to become something else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pydantic

from rprune.reports.schema import Report

EVIL = (
    "\"'><script>alert(1)</script><img src=x onerror=alert(1)> [a](https://evil.example) ![i](//evil.example/i.png)"
    " | b | \\| `c` ``` *e* _u_ ~~s~~ $m$ {{ 7*7 }} {% x %} www.evil.example who@evil.example @who &lt; #1"
)
BROKEN = "# h\n---\nlicense: mit\n\n- item\n> quote\n\t| x | y |\n|---|---|\n</td></table>```\n\u2028\u0085\x7f\u202e"


def hostile(report: Report, evil: str = EVIL) -> Report:
    """Every string that the schema leaves free is ``evil``, and tables of free keys hold it as one."""
    table = report.to_json()
    for place in sorted({place for place, value in _leaves(table) if isinstance(value, str)}):
        changed = copy.deepcopy(table)
        _replace(changed, place, evil)
        try:
            Report.model_validate(changed)
        except pydantic.ValidationError:
            continue
        table = changed
    for free in (table["recipe"], table["environment"], table["model"], table["claims"][1]["settings"]):
        free[evil] = {evil: [evil]}
    table["tool"][evil] = evil
    return Report.model_validate(table).sealed()


def _leaves(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Values with their path, in which all items of a list are one."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*place, key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, (*place, "*"))
    else:
        yield place, value


def _replace(owner: Any, place: tuple[str, ...], evil: str) -> None:
    first, *rest = place
    keys = range(len(owner)) if first == "*" else [first] if first in owner else []
    for key in keys:
        if rest:
            _replace(owner[key], tuple(rest), evil)
        elif isinstance(owner[key], str):
            owner[key] = evil
