from __future__ import annotations

from typing import Annotated, Any

import typer

from rprune.cli import completion
from rprune.cli.console import print_json
from rprune.errors import unknown_name

KINDS = ("recipe", "report", "gate")


def schema(
    kind: Annotated[str, typer.Argument(help="recipe, report or gate.", autocompletion=completion.of(*KINDS))],
) -> None:
    """JSON Schema of a recipe, a report or a gate policy."""
    from rprune.pipeline.recipe import Recipe
    from rprune.reports.gate import Policy
    from rprune.reports.schema import Report

    models: dict[str, Any] = {"recipe": Recipe, "report": Report, "gate": Policy}
    if kind not in models:
        raise unknown_name("schema", kind, KINDS)
    print_json(models[kind].model_json_schema())
