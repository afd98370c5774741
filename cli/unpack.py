from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from rprune.cli import options as o
from rprune.cli.console import print_json, print_table, stdout
from rprune.errors import UsageError, one_line


def unpack(
    file: Annotated[Path, typer.Argument(help="A .packed.safetensors file, or a bundle with one in it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    formats: o.Formats = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Restore the dense forms of a packed file, bit for bit; by default the ONNX file and the dense tensors.

    Of a bundle: a copy with the files that it was passed on without, as its report names them.
    """
    from rprune.pipeline.unpacking import whole_bundle
    from rprune.reports.text import size

    absent: list[str] = []
    if file.is_dir():
        if formats is not None or force:
            raise UsageError("--format and --force are for a packed file", "a bundle's report names its files")
        written, absent = whole_bundle(file, output)
    else:
        written = _dense(file, output, formats, force)
    if as_json:
        files = [{"name": path.name, "bytes": path.stat().st_size} for path in written]
        print_json({"files": files} | ({"absent": absent} if file.is_dir() else {}))
        return
    print_table(f"{file} -> {output}", ["file", "size"], [[p.name, size(p.stat().st_size)] for p in written])
    if absent:
        stdout.print(Text(one_line(f"in no packed file, so not here: {', '.join(absent)}"), "yellow"))


def _dense(file: Path, output: Path, formats: str | None, force: bool) -> list[Path]:
    from rprune.pipeline.unpacking import unpacked

    if output.exists() and not (force and output.is_dir()):  # files in it are replaced, none is deleted
        hint = ", or replace its files with --force" if output.is_dir() else ": it becomes a folder"
        raise UsageError(f"{output} exists", f"choose another -o{hint}")
    chosen = None if formats is None else tuple(name.strip() for name in formats.split(","))
    return unpacked(file, output, chosen)
