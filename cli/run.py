from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rprune.cli import completion
from rprune.cli import options as o
from rprune.cli.console import (
    ProgressLines,
    duration,
    note,
    print_costs,
    print_json,
    print_profile,
    print_report,
    print_smoke,
    print_stages,
    print_table,
)
from rprune.cli.launch import launched
from rprune.errors import UsageError, unknown_name

ORIGINS = {"COMMANDLINE": "option", "ENVIRONMENT": "environment", "DEFAULT": "default"}

if TYPE_CHECKING:
    from rprune.pipeline.recipe import Recipe
    from rprune.pipeline.run import Runner


def run(
    context: typer.Context,
    recipe: Annotated[
        Path,
        typer.Argument(help="A recipe file, or the name of a shipped one: digits.", autocompletion=completion.recipes),
    ],
    output: o.Output = None,
    settings: o.Set = None,
    device: o.Device = "auto",
    gpus: o.Gpus = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Fit into 90s, 10m or 2h: stages train for fewer epochs.")
    ] = None,
    profile: o.Profile = None,
    trust_pickle: o.TrustPickle = False,
    dry_run: o.DryRun = False,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke", help="Try the whole chain on few images, into a folder of its own: a minute for small nets."
        ),
    ] = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print every value of the run with where it comes from, and stop.")
    ] = False,
    baseline: o.Baseline = None,
    gate: Annotated[bool, typer.Option("--gate/--no-gate", help="Exit 1 when the recipe's policy is not met.")] = True,
    tensorboard: o.TensorBoard = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Run a recipe end to end; what is done already is reused, what was interrupted continues."""
    if launched(gpus, device):
        return
    from rprune.pipeline.recipe import read_recipe, shipped_recipes
    from rprune.pipeline.run import Outcome, Runner

    if not recipe.exists():
        known = shipped_recipes()
        if not recipe.suffix and str(recipe) not in known:
            raise unknown_name("recipe", str(recipe), known)
        recipe = known.get(str(recipe), recipe)
    content = read_recipe(recipe, [*(settings or []), *(["smoke=true"] if smoke else [])])
    out = output or Path("runs") / content.name
    if show_config:
        _show_config(context, recipe, settings or [], smoke, out, as_json)
        return
    with ProgressLines(quiet or as_json, tensorboard) as reporter:
        limit = None if budget is None else o.seconds(budget)
        if limit == 0:
            raise UsageError("no run fits into no time", "name one: --budget 2h")
        runner = Runner(content, recipe.parent, out, reporter, device, limit, trust_pickle, baseline)
        plan = [[kind, str(folder), "done" if done else "to do"] for kind, folder, done in runner.plan()]
        if profile is not None:
            told = []
            for folder, phases in runner.profiles(profile):
                told.append({"folder": str(folder), "phases": [vars(phase) for phase in phases]})
                if not as_json:
                    print_profile(phases, folder)
            if as_json:
                print_json({"profiles": told})
            return
        if dry_run:
            _dry_run(content, runner, plan, as_json)
            return

        def announce(outcome: Outcome) -> None:
            if not (quiet or as_json):
                note(f"{'reused' if outcome.reused else 'done'}   {outcome.kind} -> {outcome.folder}")

        outcomes = runner.run(announce, (lambda text: None) if quiet or as_json else note)
    report = next((outcome.report for outcome in outcomes if outcome.report is not None), None)
    passed = report is None or report.gate is None or report.gate.result == "passed"
    if as_json:
        stages: list[dict[str, Any]] = [{"kind": x.kind, "folder": str(x.folder), "reused": x.reused} for x in outcomes]
        print_json({"stages": stages, "report": None if report is None else report.to_json(), "gate_passed": passed})
    else:
        print_stages([(outcome.artifact, str(outcome.folder)) for outcome in outcomes if outcome.artifact is not None])
        if report is None:
            print_smoke(runner.bench.smoke)
        else:
            print_report(report, str(outcomes[-1].folder))
            if not quiet:
                note(f"Next: rprune {f'run {recipe}' if content.smoke else f'verify {outcomes[-1].folder}'}")
    if gate and not passed and not content.smoke:
        raise typer.Exit(1)


def _dry_run(content: Recipe, runner: Runner, plan: list[list[str]], as_json: bool) -> None:
    """What would be done, and what it would cost."""
    costs, kinds = runner.costs(), [stage.kind for stage in content.stage]
    epochs = None if runner.anytime is None else runner.fitted(costs)
    if as_json:
        found: dict[str, Any] = {"recipe": content.model_dump(mode="json"), "plan": plan}
        found["costs"] = [{"kind": kind, "cost": cost.to_json()} for kind, cost in zip(kinds, costs, strict=True)]
        print_json(found if epochs is None else found | {"epochs": epochs})
        return
    print_table(f"{content.name}: {runner.bench.threat}, {runner.bench.device}", ["stage", "folder", ""], plan)
    print_costs(kinds, costs)
    if epochs is not None and runner.anytime is not None:
        fit = ", ".join(f"{kind} {count}" for kind, count in zip(kinds, epochs, strict=True) if count)
        note(f"Epochs within {duration(runner.anytime.seconds)}: {fit}.")


def _show_config(
    context: typer.Context, recipe: Path, overrides: list[str], smoke: bool, out: Path, as_json: bool
) -> None:
    """Every value with its origin: those of the recipe, then those of this run."""
    from rprune.data.sources import TORCHVISION
    from rprune.pipeline.origins import Setting
    from rprune.pipeline.origins import settings as resolved

    rows = resolved(recipe, overrides, smoke)
    for name in ("device", "gpus", "budget", "baseline", "output"):
        value = out if name == "output" else context.params[name]
        value = str(value) if isinstance(value, Path) else value
        rows.append(Setting(name, value, ORIGINS[_source(context, name)]))
    kind, _, place = str(next(row.value for row in rows if row.key == "data.source")).partition(":")
    if kind in TORCHVISION and not place:
        folder = os.environ.get("RPRUNE_DATA")
        rows.append(Setting("data folder", folder or "~/.cache/rprune", "environment" if folder else "default"))
    if as_json:
        print_json([vars(row) for row in rows])
        return
    cells = [[row.key, row.value if isinstance(row.value, str) else json.dumps(row.value), row.origin] for row in rows]
    print_table(str(recipe), ["key", "value", "origin"], cells, words=True)


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name
