from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rprune.cli import completion
from rprune.cli import options as o
from rprune.cli.console import print_gate, print_json
from rprune.cli.github import annotated, tell_gate
from rprune.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from rprune.reports.gate import Policy
    from rprune.reports.gate_forms import Place

BOUNDS = ("lower", "point")
RULE = "METRIC=VALUE or METRIC:EPS@FILE=VALUE"


def gate(
    report: Annotated[Path, typer.Argument(help="report.json, or the folder it lies in.")],
    policy: Annotated[Path | None, typer.Option("--policy", help="TOML file with a table for each rule.")] = None,
    at_least: Annotated[
        list[str] | None, typer.Option("--min", help=f"{RULE} that must be reached; repeatable.")
    ] = None,
    at_most: Annotated[
        list[str] | None, typer.Option("--max", help=f"{RULE} that must not be exceeded; repeatable.")
    ] = None,
    equal: Annotated[
        list[str] | None,
        typer.Option(
            "--equal", help="METRIC=VALUE or METRIC@FILE=VALUE that must be met, as attack_health=ok; repeatable."
        ),
    ] = None,
    max_drop: Annotated[
        list[str] | None,
        typer.Option(
            "--max-drop", help="METRIC=VALUE or METRIC@FILE=VALUE that it may lie below --baseline; repeatable."
        ),
    ] = None,
    baseline: o.Baseline = None,
    bound: Annotated[
        str,
        typer.Option(
            "--bound",
            help="Judge shares by the worse end of their 95 % interval ('lower'), or the 'point' value.",
            autocompletion=completion.of(*BOUNDS),
        ),
    ] = "lower",
    allow_unreliable: Annotated[
        bool,
        typer.Option(
            "--allow-unreliable", help="Let these options count numbers of attacks that were weak or cut short."
        ),
    ] = False,
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Exit 0 even when the gate fails.")] = False,
    form: Annotated[
        Literal["human", "json", "github", "markdown"],
        typer.Option("--format", help="github: annotations, and the step's summary and outputs."),
    ] = "human",
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write JUnit XML here.")] = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Exit 0 or 1: does the report clear the bar?"""
    from rprune.files import refuse_overwrite, write_text
    from rprune.reports import gate_forms
    from rprune.reports.gate import judge
    from rprune.reports.gate_forms import Place
    from rprune.reports.pairs import Pairs, read_source
    from rprune.reports.schema import read_report

    if as_json and form not in ("human", "json"):
        raise UsageError(f"--json and --format {form} are two forms", "leave out one of them")
    with annotated(form == "github"):
        typed = {">=": at_least, "<=": at_most, "==": equal, None: max_drop}
        bar, places = _rules(report, policy, typed, bound, allow_unreliable)
        if bar.needs_baseline != (baseline is not None):
            raise _half(bar)
        if junit is not None:
            refuse_overwrite(junit, force)
        pairs = None if baseline is None else Pairs(before=read_source(baseline), after=read_source(report))
        found = read_report(report) if pairs is None else pairs.after.report
        outcome = judge(found, bar, pairs)
        places = [*[Place(str(report))] * found.smoke, *places]  # its rule comes first
        if junit is not None:
            write_text(junit, gate_forms.junit(outcome, found))
        if form == "github":
            tell_gate(outcome, found, places)
        elif form == "markdown":
            sys.stdout.write(gate_forms.markdown(outcome, found))
        elif as_json or form == "json":
            print_json(outcome.model_dump(mode="json") | {"report": found.id})
        else:
            print_gate(outcome)
    if outcome.result == "failed" and not exit_zero:
        raise typer.Exit(1)


def _rules(
    report: Path, policy: Path | None, typed: dict[Any, list[str] | None], bound: Any, allow_unreliable: bool
) -> tuple[Policy, list[Place]]:
    """Those of the policy, then those of options by their operator, and where each is written."""
    from rprune.reports.gate import policy_of, read_policy, rule_of
    from rprune.reports.gate_forms import Place, policy_lines

    if bound not in BOUNDS:
        raise unknown_name("bound", bound, BOUNDS)
    rules = [rule_of(text, op, bound) for op, texts in typed.items() for text in texts or []]
    if allow_unreliable:
        if not rules:
            raise UsageError("--allow-unreliable is for rules of options", "in a policy, write allow_unreliable = true")
        rules = [rule | {"allow_unreliable": True} for rule in rules]
    places = [Place(str(report / "report.json" if report.is_dir() else report))] * len(rules)
    if policy is not None:
        written = [rule.model_dump() for rule in read_policy(policy, baseline=True).gate]
        lines: list[Any] = policy_lines(policy.read_text(encoding="utf-8"))
        lines = lines if len(lines) == len(written) else [None] * len(written)
        rules, places = written + rules, [Place(str(policy), line) for line in lines] + places
    if not rules:
        raise UsageError("there is nothing to judge by", "give --policy gate.toml, or --min robust_accuracy=0.45")
    return policy_of({"gate": rules}, "options"), places


def _half(bar: Policy) -> UsageError:
    if bar.needs_baseline:
        return UsageError("a rule judges a drop, and there is no baseline", "say against which report: --baseline")
    return UsageError("no rule compares with --baseline", "give --max-drop clean_accuracy=0.02")
