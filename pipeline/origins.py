"""Where each value of a run comes from: a default, the recipe's file, its preset, ``--set``, ``--smoke``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rprune.objectives.base import OBJECTIVES
from rprune.pipeline.presets import apply_preset, method_of
from rprune.pipeline.recipe import PruneStage, Recipe, Section, override, read_recipe, read_table
from rprune.pipeline.stages import epochs_of
from rprune.pruning.base import METHODS
from rprune.threat import ThreatModel

REGISTRIES: dict[str, Any] = {"method": METHODS, "objective": OBJECTIVES}


@dataclass(frozen=True)
class Setting:
    """A value by the key that ``--set`` knows it by."""

    key: str
    value: Any
    origin: str


def settings(path: Path, overrides: Sequence[str] = (), smoke: bool = False) -> list[Setting]:
    """Every value of a recipe as it will run, in its order, with the options of methods and objectives filled in.

    Raises UsageError as :func:`read_recipe` does.
    """
    recipe = read_recipe(path, overrides)
    found = flat(_filled(recipe))
    table = read_table(path)
    origins = dict.fromkeys(flat(table), "file")
    for text in overrides:
        override(table, text)
        origins[text.partition("=")[0].strip()] = "--set"
    said = set(flat(table))
    if table.get("preset") is not None:
        filled = copy.deepcopy(table)
        apply_preset(filled)
        origins = {key: f"preset {table['preset']}" for key in flat(filled) if key not in said} | origins
    rows = [Setting(key, value, _origin(key, origins)) for key, value in found.items()]
    if not smoke:
        return rows
    whole = {row.key: row for row in settings(path, overrides)}
    cut = flat(_filled(read_recipe(path, [*overrides, "smoke=true"])))
    return [
        whole[key] if key in whole and whole[key].value == value else Setting(key, value, "--smoke")
        for key, value in cut.items()
    ]


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """That of the key itself, of a table that holds it, or of the name that stood for its table."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        whole = ".".join(parts[:length])
        named = parts[length:] in ([], ["name"])
        if whole in origins and (named or origins[whole] == "--set"):
            return origins[whole] if named or parts[length - 1] not in REGISTRIES else "default"
    return "default"


def _filled(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a table, with what the classes that it names say themselves."""
    return recipe.model_dump(mode="json") | {"stage": [described(stage) for stage in recipe.stage]}


def described(stage: Section) -> dict[str, Any]:
    """A stage as a table, with what the classes that it names say themselves."""
    table = stage.model_dump(mode="json")
    for name, registry in REGISTRIES.items():
        if table.get(name) is not None:
            given = {"threat": ThreatModel("linf", "0")} if name == "objective" else {}
            table[name] = registry.describe(registry.build(table[name], **given))
    if isinstance(stage, PruneStage):
        table["epochs"] = epochs_of(stage)
        table["lr"] = METHODS.get(str(method_of(table["method"]))).lr if stage.lr is None else stage.lr
    return table


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; a stage is addressed by its kind, and does not say it again."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if prefix == "" and key == "stage" and isinstance(value, list):
            for stage in value:
                found |= flat({k: v for k, v in stage.items() if k != "kind"}, f"stage.{stage.get('kind')}.")
        elif isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
