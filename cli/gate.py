from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rprune.cli import options as o
from rprune.cli.console import print_gate, print_json
from rprune.errors import UsageError, unknown_name


def gate(
    report: Annotated[Path, typer.Argument(help="report.json, or the folder it lies in.")],
    policy: Annotated[Path | None, typer.Option("--policy", help="TOML file with a table for each rule.")] = None,
    at_least: Annotated[
        list[str] | None, typer.Option("--min", help="METRIC[@FILE]=VALUE that must be reached; repeatable.")
    ] = None,
    at_most: Annotated[
        list[str] | None, typer.Option("--max", help="METRIC[@FILE]=VALUE that must not be exceeded; repeatable.")
    ] = None,
    bound: Annotated[
        str,
        typer.Option(
            "--bound", help="Judge --min and --max by the 95 % 'lower' confidence bound, or the 'point' value."
        ),
    ] = "lower",
    allow_unreliable: Annotated[
        bool,
        typer.Option(
            "--allow-unreliable", help="Let --min and --max count numbers of attacks that were weak or cut short."
        ),
    ] = False,
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Exit 0 even when the gate fails.")] = False,
    as_json: o.Json = False,
) -> None:
    """Exit 0 or 1: does the report clear the bar?"""
    from rprune.reports.gate import policy_of, read_policy, rule_of
    from rprune.reports.schema import read_report

    if bound not in ("lower", "point"):
        raise unknown_name("bound", bound, ("lower", "point"))
    rules: list[dict[str, Any]] = [rule_of(text, ">=", bound) for text in at_least or []]  # type: ignore[arg-type]
    rules += [rule_of(text, "<=", bound) for text in at_most or []]  # type: ignore[arg-type]
    if allow_unreliable:
        if not rules:
            raise UsageError("--allow-unreliable is for --min and --max", "in a policy, write allow_unreliable = true")
        rules = [rule | {"allow_unreliable": True} for rule in rules]
    if policy is not None:
        rules = [rule.model_dump() for rule in read_policy(policy).gate] + rules
    if not rules:
        raise UsageError("there is nothing to judge by", "give --policy gate.toml, or --min robust_accuracy=0.45")
    found = read_report(report)
    from rprune.reports.gate import judge

    outcome = judge(found, policy_of({"gate": rules}, "options"))
    if as_json:
        print_json(outcome.model_dump(mode="json") | {"report": found.id})
    else:
        print_gate(outcome)
    if outcome.result == "failed" and not exit_zero:
        raise typer.Exit(1)
