from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from rprune.cli import options as o
from rprune.cli.console import note, print_json, print_table, stdout
from rprune.errors import InputError, UsageError


def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="The earlier report.json, or the folder it lies in.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The later one.")],
    alpha: Annotated[float, typer.Option("--alpha", help="Level of each test, between 0 and 1.")] = 0.05,
    form: Annotated[Literal["human", "json", "markdown"], typer.Option("--format", help="How to write it.")] = "human",
    fail_on: Annotated[
        Literal["regression"] | None,
        typer.Option("--fail-on", help="Exit 1 when something got worse or cannot be compared any more."),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """What changed between two reports, with exact tests of their claims, sample by sample where both have evidence."""
    from rprune.reports import compare_forms
    from rprune.reports.compare import compare as run_compare
    from rprune.reports.pairs import Pairs, read_source

    if not 0 < alpha < 1:
        raise UsageError(f"--alpha {alpha:g} is not between 0 and 1", "use for example 0.05")
    if as_json and form == "markdown":
        raise UsageError("--json and --format markdown are two forms", "leave out one of them")
    pairs = Pairs(before=read_source(before), after=read_source(after))
    if not pairs.same_data:
        if fail_on:
            hint = "regressions are told on the same samples: make both reports with the same --data"
            raise InputError(f"{before} and {after} are of different test data", hint)
        note("warning: the reports are of different test data; their accuracies stand side by side, no more")
    found = run_compare(pairs, alpha)
    if as_json or form == "json":
        print_json(compare_forms.to_json(found))
    elif form == "markdown":
        sys.stdout.write(compare_forms.markdown(found))
    else:
        print_table(f"{before} -> {after}", compare_forms.COLUMNS, compare_forms.rows(found))
        if words := compare_forms.footnote(found):
            stdout.print(Text(words))
        if found.settings:
            columns = ["setting", "before", "after"]
            print_table("what was set differently", columns, compare_forms.settings(found), words=True)
        style = "bold red" if found.regressions else "bold green"
        stdout.print(Text(compare_forms.summary(found).upper(), style))
    if fail_on and found.regressions:
        raise typer.Exit(1)
