"""What train, prune, finetune and quantize share: plan, work, result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from rprune.cli.console import ProgressLines, note, print_artifact, print_costs, print_json, print_profile, stdout

if TYPE_CHECKING:
    from rprune.models.registry import Architecture
    from rprune.pipeline.artifact import Artifact
    from rprune.pipeline.bench import Bench
    from rprune.pipeline.recipe import Section


ALWAYS = ("kind", "method", "objective", "epochs", "lr", "batch_size")  # shown even where they are the defaults


def work(
    bench: Bench,
    stage: Section,
    source: Artifact | None,
    output: Path,
    reporter: ProgressLines,
    *,
    arch: Architecture | None = None,
    force: bool,
    resume: bool,
    profile: Path | None = None,
    dry_run: bool,
    show_config: bool = False,
    as_json: bool,
    next_step: str,
) -> None:
    """Run one stage and show what it changed."""
    from rprune.models.registry import is_trusted
    from rprune.pipeline.single import prepare, run_single, teacher_of

    if show_config:
        print_config(bench, stage, as_json)
        return
    prepare(bench, stage, source, output, arch=arch, force=force)
    plan = stage.model_dump(mode="json") | {
        "data": bench.data.source,
        "threat": str(bench.threat),
        "seed": bench.seed,
        "device": str(bench.device),
        "output": str(output),
    }
    if not reporter.quiet and not as_json:
        usual = {key: field.default for key, field in type(stage).model_fields.items() if key not in ALWAYS}
        said = {key: value for key, value in plan.items() if value not in (None, []) and value != usual.get(key)}
        note("Plan   " + "  ".join(f"{key} {_short(value)}" for key, value in said.items()))
    if profile is not None:
        from rprune.pipeline.profiling import profiled

        phases, _ = profiled(bench, stage, source, arch, teacher_of(bench, stage, source), profile)
        if as_json:
            print_json({"plan": plan, "phases": [vars(phase) for phase in phases]})
        else:
            print_profile(phases, profile)
        return
    if dry_run:
        from rprune.pipeline.cost import cost

        found, _ = cost(bench, stage, source, arch, teacher_of(bench, stage, source))
        if as_json:
            print_json({"plan": plan, "cost": found.to_json()})
        else:
            print_costs([str(plan["kind"])], [found])
        return
    made = run_single(bench, stage, source, output, arch=arch, resume=resume)
    if as_json:
        entry = made.metadata.lineage[-1].model_dump(mode="json")
        print_json({"output": str(output), "stage": entry, "threat": str(bench.threat), "digest": made.digest})
        return
    print_artifact(made, str(output))
    if made.metadata.lineage[-1].metrics.get("target_met") is False:
        note("The search never met the budget: its result was cut to it. More --epochs help.")
    stdout.print(Text(f"sha256 of the tensors  {made.digest}"))
    if not reporter.quiet:
        name = made.metadata.arch.name
        note(f"Next: {next_step}" + ("" if is_trusted(name) else f" --arch {name}"))


def print_config(bench: Bench, stage: Section, as_json: bool) -> None:
    """Every value of a stage, with the options of its method and its objective, as a recipe would hold it."""
    from rprune.files import toml
    from rprune.pipeline.origins import described

    data = bench.section.model_dump(mode="json")
    threat = {"norm": bench.threat.norm, "eps": bench.threat.text}
    table = described(stage)
    table = {"kind": table["kind"]} | table  # which comes first
    if as_json:
        print_json({"seed": bench.seed, "data": data, "threat": threat, "stage": [table]})
        return
    lines = [f"seed = {bench.seed}"]
    for title, values in (("[data]", data), ("[threat]", threat), ("[[stage]]", table)):
        lines += ["", title, *(f"{key} = {toml(value)}" for key, value in values.items() if value is not None)]
    sys.stdout.write("\n".join(lines) + "\n")


def _short(value: Any) -> str:
    return str(value.get("name", value)) if isinstance(value, dict) else str(value)
