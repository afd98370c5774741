from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from rprune.cli import completion
from rprune.cli import options as o
from rprune.cli.console import print_json, print_table
from rprune.errors import unknown_name

KINDS = (
    "methods",
    "objectives",
    "attacks",
    "suites",
    "allocators",
    "architectures",
    "data",
    "schedules",
    "recipes",
    "zoo",
)

FACTS = ("paper", "structures", "learns", "cost", "epochs", "lr", "paper_settings")
"""Class variables of methods and objectives that are listed too, where there are any."""
COLUMNS = {
    "methods": ("name", "what", "paper", "structures", "learns", "cost"),
    "objectives": ("name", "what", "paper", "cost"),
    "allocators": ("name", "what", "paper"),
    "suites": ("name", "what", "attacks"),
    "zoo": ("name", "what", "threat", "sparsity", "bytes", "clean", "robust"),
}


def list_(
    kind: Annotated[
        str, typer.Argument(help=f"One of: {', '.join(KINDS)}.", autocompletion=completion.of(*KINDS))
    ] = "methods",
    as_json: o.Json = False,
) -> None:
    """Methods, objectives, attacks, architectures and data that this installation knows; nets with checked claims."""
    if kind not in KINDS:
        raise unknown_name("list", kind, KINDS)
    rows = known(kind)
    if as_json:
        print_json(rows)
    else:
        columns = COLUMNS.get(kind, ("name", "what"))
        print_table(kind, columns, [[_cell(row[column]) for column in columns] for row in rows], words=True)


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
    if kind == "zoo":
        return zoo()
    if kind == "data":
        from rprune.data.sources import ABOUT
        from rprune.data.sources import KINDS as SOURCES

        where = "torchvision's, in NAME:DIR, $RPRUNE_DATA or ~/.cache/rprune; --download fetches it"
        return [{"name": name, "what": ABOUT.get(name, where)} for name in SOURCES]
    if kind == "suites":
        from rprune.attacks.names import ABOUT, TABLES
        from rprune.attacks.suites import SUITES

        suites = [
            {"name": name, "what": ABOUT[name], "attacks": [_brief(attack) for attack in attacks]}
            for name, attacks in SUITES.items()
        ]
        return suites + [
            {"name": name, "what": "a paper's table, for 'rprune attack'", "attacks": list(columns.values())}
            for name, columns in TABLES.items()
        ]
    if kind in ("allocators", "schedules"):
        from rprune.pruning.allocation import ALLOCATORS
        from rprune.training.schedules import SCHEDULES

        tables: dict[str, Any] = {"allocators": ALLOCATORS, "schedules": SCHEDULES}
        what = {name: _first_line(v) for name, v in tables[kind].items()}
        if kind == "allocators":
            return [
                {"name": name} | dict(zip(("what", "paper"), _source(text), strict=True)) for name, text in what.items()
            ]
        return [{"name": name, "what": text} for name, text in what.items()]
    from rprune.attacks.base import ATTACKS
    from rprune.objectives.base import OBJECTIVES
    from rprune.pruning.base import METHODS

    registry: Any = {"methods": METHODS, "objectives": OBJECTIVES, "attacks": ATTACKS}[kind]
    rows = []
    for name, cls in registry.all().items():
        fields = [f for f in dataclasses.fields(cls) if f.name != "threat"]
        options = {f.name: None if f.default is dataclasses.MISSING else _plain(f.default) for f in fields}
        row = {"name": name, "what": _source(_first_line(cls))[0], "options": options}
        row["class"] = f"{cls.__module__}.{cls.__name__}"
        rows.append(row | {key: _plain(getattr(cls, key)) for key in FACTS if hasattr(cls, key)})
    return rows


def zoo() -> list[dict[str, Any]]:
    """Nets of the repository with what their reports claim; ``folder`` is a place in it."""
    import tomllib
    from importlib.resources import files

    table = tomllib.loads((files("rprune") / "model_zoo.toml").read_text(encoding="utf-8"))
    rows = []
    for name, entry in table.items():
        shares = {m.partition("_")[0]: f"{100 * right / n:.1f} %" for m, (right, n) in entry["claims"].items()}
        rows.append({"name": name} | entry | shares)
    return rows


def card(kind: str, name: str) -> str:
    """The whole docstring of a method or an objective."""
    import inspect

    from rprune.objectives.base import OBJECTIVES
    from rprune.pruning.base import METHODS

    registry: Any = {"methods": METHODS, "objectives": OBJECTIVES}[kind]
    return inspect.getdoc(registry.get(name)) or ""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _source(line: str) -> tuple[str, str]:
    """A line without the source in its last parentheses, and that source."""
    found = re.fullmatch(r"(.*) \(([^()]*)\)(.*)", line)
    return (found[1] + found[3], found[2]) if found else (line, "")


def _brief(attack: Any) -> str:
    """The constructor call, without what is as by default."""
    import dataclasses

    said = [
        f"{f.name}={_brief(value) if dataclasses.is_dataclass(value) else repr(value)}"
        for f in dataclasses.fields(attack)
        if (value := getattr(attack, f.name)) != f.default
    ]
    return f"{type(attack).__name__}({', '.join(said)})"


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]
