from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rprune.cli import options as o
from rprune.cli.console import print_json, print_table

FEW = 6  # names of globals in the table


def inspect(
    file: Annotated[Path, typer.Argument(help="Any model file, or a stage folder.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="Count the weights of every layer that are not zero.")
    ] = False,
    unsafe_globals: Annotated[
        bool, typer.Option("--unsafe-globals", help="Only the names of code in a pickle, one a line, all of them.")
    ] = False,
    as_json: o.Json = False,
) -> None:
    """What is in this file, and what would it run? Nothing in it is ever executed."""
    from rprune.errors import printable
    from rprune.pipeline.inspection import contents

    found = contents(file, layers)
    if unsafe_globals:
        names = found.get("unsafe_globals", [])
        if as_json:
            print_json(names)
        else:
            for name in names:
                typer.echo(printable(name))
        return
    if as_json:
        print_json(found)
        return
    tensors = found.pop("tensors", [])
    names = found.pop("unsafe_globals", None)
    if names is not None:
        more = f" and {len(names) - FEW} more (--unsafe-globals)" if len(names) > FEW else ""
        found["unsafe globals"] = ", ".join(names[:FEW]) + more if names else "none"
    print_table(printable(str(file), 400), ["", ""], [[key, _text(value)] for key, value in found.items()], words=True)
    if tensors:
        columns = ["name", "shape", "type"] + (["not zero", "sparsity"] if layers else [])
        print_table(f"{len(tensors)} tensors", columns, [_row(tensor, layers) for tensor in tensors])


def _text(value: Any) -> str:
    from rprune.errors import printable

    return printable(value, 400) if isinstance(value, str) else printable(json.dumps(value), 1000)


def _row(tensor: dict[str, Any], layers: bool) -> list[str]:
    cells = [tensor["name"], str(tensor["shape"]), tensor["type"]]
    if not layers:
        return cells
    if "nonzero" not in tensor:
        return [*cells, "", ""]
    size = 1
    for side in tensor["shape"]:
        size *= side
    return [*cells, f"{tensor['nonzero']:,}", f"{1 - tensor['nonzero'] / max(size, 1):.4f}"]
