from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from rprune.cli import completion
from rprune.cli import options as o
from rprune.cli.console import note, print_json, stdout
from rprune.errors import UsageError, unknown_name

POLICY = "gate.toml"


def init(
    data: o.Data = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch", help="Architecture; default: one that fits the data.", autocompletion=completion.architectures
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="A trained model file to start from; then nothing is trained anew.")
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option(
            "--from", help="Copy a shipped recipe: a name of 'rprune list recipes'.", autocompletion=completion.recipes
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The recipe to write.")] = Path("recipe.toml"),
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a commented recipe that fits your data and model, and a gate policy beside it."""
    from rprune.files import refuse_overwrite, write_text

    policy = output.with_name(POLICY)
    if origin is not None:
        if (data, arch, model) != (None, None, None):
            raise UsageError(
                "--from copies a recipe as it is", "leave out --data, --arch and --model, and edit the copy"
            )
        recipe, gate = _shipped(origin)
    else:
        from rprune.pipeline.starter import starter

        found = starter(data, arch, model, output.parent, POLICY)
        recipe, gate = found.recipe, found.policy
    files = {output: recipe} | ({} if gate is None else {policy: gate})
    for path in files:
        refuse_overwrite(path, force)
    if origin is None and not quiet and not as_json:
        note(f"{found.facts.source}: {found.facts.text}; {found.arch}, {found.facts.threat}")
        if not found.facts.seen:
            note(f"{found.facts.source} is not here yet: its sizes are assumed, and marked in the recipe")
    for path, text in files.items():
        write_text(path, text)
    if as_json:
        print_json({"recipe": str(output), "policy": None if gate is None else str(policy)})
        return
    stdout.print(Text("\n".join(map(str, files))))
    if not quiet:
        note(f"Next: rprune run {output} --smoke")


def _shipped(name: str) -> tuple[str, str | None]:
    """Text of a shipped recipe, and of its policy where it has one."""
    import tomllib

    from rprune.pipeline.recipe import RECIPES, shipped_recipes

    known = shipped_recipes()
    if name not in known:
        raise unknown_name("recipe", name, known)
    text = known[name].read_text(encoding="utf-8")
    policy = tomllib.loads(text).get("policy")
    return text, None if policy is None else (RECIPES / policy).read_text(encoding="utf-8")
