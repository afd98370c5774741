from __future__ import annotations

from typing import Annotated, Any

import typer

from rprune.cli import options as o
from rprune.cli.console import print_json, print_table
from rprune.errors import unknown_name

KINDS = ("methods", "objectives", "attacks", "suites", "allocators", "architectures", "data", "schedules", "recipes")


def list_(
    kind: Annotated[str, typer.Argument(help=f"One of: {', '.join(KINDS)}.")] = "methods", as_json: o.Json = False
) -> None:
    """Methods, objectives, attacks, architectures and data sources that this installation knows."""
    if kind not in KINDS:
        raise unknown_name("list", kind, KINDS)
    rows = known(kind)
    if as_json:
        print_json(rows)
    else:
        print_table(kind, ["name", "what"], [[row["name"], row["what"]] for row in rows])


def known(kind: str) -> list[dict[str, Any]]:
    """Name, one line, and the options with their defaults of everything of a kind."""
    import dataclasses

    if kind == "architectures":
        from rprune.models.registry import names

        return [{"name": name, "what": "built in"} for name in names()] + [
            {"name": "torchvision:NAME", "what": "torchvision"}
        ]
    if kind == "recipes":
        from rprune.pipeline.recipe import shipped_recipes

        return [
            {"name": name, "what": path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")}
            for name, path in shipped_recipes().items()
        ]
    if kind == "data":
        from rprune.data.sources import ABOUT
        from rprune.data.sources import KINDS as SOURCES

        where = "torchvision's, in NAME:DIR, $RPRUNE_DATA or ~/.cache/rprune; --download fetches it"
        return [{"name": name, "what": ABOUT.get(name, where)} for name in SOURCES]
    if kind in ("suites", "allocators", "schedules"):
        from rprune.attacks.suites import SUITES
        from rprune.pruning.allocation import ALLOCATORS
        from rprune.training.schedules import SCHEDULES

        tables: dict[str, Any] = {"suites": SUITES, "allocators": ALLOCATORS, "schedules": SCHEDULES}
        what = {
            name: ", ".join(map(repr, v)) if isinstance(v, tuple) else _first_line(v)
            for name, v in tables[kind].items()
        }
        return [{"name": name, "what": text} for name, text in what.items()]
    from rprune.attacks.base import ATTACKS
    from rprune.objectives.base import OBJECTIVES
    from rprune.pruning.base import METHODS

    registry: Any = {"methods": METHODS, "objectives": OBJECTIVES, "attacks": ATTACKS}[kind]
    rows = []
    for name, cls in registry.all().items():
        fields = [f for f in dataclasses.fields(cls) if f.name != "threat"]
        options = {f.name: None if f.default is dataclasses.MISSING else _plain(f.default) for f in fields}
        rows.append(
            {"name": name, "what": _first_line(cls), "options": options, "class": f"{cls.__module__}.{cls.__name__}"}
        )
    return rows


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]
