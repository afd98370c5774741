"""Whole settings by name: ``paper``, what a method's authors ran, and ``rprune``, this tool's own defaults."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rprune.errors import UsageError, unknown_name
from rprune.pruning.base import METHODS

if TYPE_CHECKING:
    from rprune.pipeline.artifact import Metadata

PRESETS = ("paper", "rprune")


def preset(text: str, method: str | None) -> dict[str, Any]:
    """Tables by stage kind, and ``threat``, for ``NAME`` or ``METHOD:NAME``.

    ``rprune`` is empty: the defaults of stages and methods are it.

    Raises UsageError for an unknown name, a method without that preset, and where no method is known.
    """
    said, _, name = text.rpartition(":")
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    chosen = said or method
    if chosen is None:
        raise UsageError(f"preset {name} of which method?", f"write METHOD:{name}, for example harp:{name}")
    found = METHODS.get(chosen).paper_settings
    if name == "paper" and not found:
        raise UsageError(f"{chosen} has no preset 'paper'", "its card says why; 'rprune list methods --json' shows all")
    return copy.deepcopy(dict(found)) if name == "paper" else {}


def method_of(spec: Any) -> str | None:
    """The name in the specification of a method."""
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    return name if isinstance(name, str) else None


def pruned_by(metadata: Metadata) -> str | None:
    """The method that a lineage names."""
    specs = [entry.config.get("method") for entry in metadata.lineage if entry.stage == "prune"]
    return method_of(specs[-1]) if specs else None


def stage_table(table: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's own keys over those of a preset; options of the method are filled up one by one."""
    merged = dict(defaults) | dict(table)
    options = defaults.get("method")
    if options is not None:
        own = table.get("method", {})
        own = {"name": own} if isinstance(own, str) else dict(own)
        merged["method"] = dict(options) | own
    return merged


def apply_preset(table: dict[str, Any]) -> None:
    """Fill the stages and the threat of a recipe's table with what its ``preset`` says."""
    stages = [stage for stage in table.get("stage", []) if isinstance(stage, dict)]
    methods = [method_of(stage.get("method", "harp")) for stage in stages if stage.get("kind") == "prune"]
    found = preset(str(table["preset"]), methods[0] if methods else None)
    for stage in stages:
        stage.update(stage_table(stage, found.get(str(stage.get("kind")), {})))
    if "threat" in found:
        table.setdefault("threat", found["threat"])
