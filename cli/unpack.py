from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rprune.cli import options as o
from rprune.cli.console import print_json, print_table


def unpack(
    file: Annotated[Path, typer.Argument(help="A .packed.safetensors file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    formats: o.Formats = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Restore the dense forms of a packed file, bit for bit; by default the ONNX file and the dense tensors."""
    from rprune.errors import UsageError
    from rprune.pipeline.unpacking import unpacked
    from rprune.reports.text import size

    if output.exists() and not (force and output.is_dir()):  # files in it are replaced, none is deleted
        hint = ", or replace its files with --force" if output.is_dir() else ": it becomes a folder"
        raise UsageError(f"{output} exists", f"choose another -o{hint}")
    chosen = None if formats is None else tuple(name.strip() for name in formats.split(","))
    written = unpacked(file, output, chosen)
    if as_json:
        print_json({"files": [{"name": path.name, "bytes": path.stat().st_size} for path in written]})
        return
    rows = [[path.name, size(path.stat().st_size)] for path in written]
    print_table(f"{file} -> {output}", ["file", "size"], rows)
