from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from rprune.cli import options as o
from rprune.cli.console import note, print_json, print_report, stdout
from rprune.errors import InputError


def report(
    source: Annotated[Path, typer.Argument(help="report.json, or the folder it lies in.")],
    output: Annotated[Path | None, typer.Option("-o", "--html", help="Write the HTML page here.")] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Write every plot as a file into this folder.")] = None,
    form: Annotated[Literal["svg", "png", "pdf"], typer.Option("--plot-format", help="Kind of these files.")] = "svg",
    tensorboard: o.TensorBoard = None,
    data: o.Data = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Show a report, or write its HTML page, its plots, its training as TensorBoard reads it."""
    from rprune.data.sources import load_data
    from rprune.files import atomic, refuse_overwrite
    from rprune.reports.energy import intensity
    from rprune.reports.events import event_files
    from rprune.reports.evidence import broken_samples
    from rprune.reports.html import render_html
    from rprune.reports.plots import plot_files
    from rprune.reports.schema import read_report

    found = read_report(source)
    folder = source if source.is_dir() else source.parent
    files: dict[Path, bytes] = {}
    if plots is not None:
        files |= {plots / name: content for name, content in plot_files(found, form).items()}
    if tensorboard is not None:
        files |= {tensorboard / name: content for name, content in event_files(found).items()}
    for path in [*files, *([output] if output else [])]:
        refuse_overwrite(path, force)
    if output is not None:
        try:
            samples = broken_samples(folder, found, load_data(data or found.data.source, limit=found.data.limit).test)
        except (InputError, FileNotFoundError) as error:
            note(f"without pictures of adversarial samples: {error}")
            samples = []
        files[output] = render_html(found, samples, intensity()).encode()
    for path, content in files.items():
        with atomic(path) as temporary:
            temporary.write_bytes(content)
    if as_json:
        print_json({"files": [str(path) for path in files]} if files else found.to_json())
    elif files:
        stdout.print(Text("\n".join(map(str, files))))
    else:
        print_report(found, str(folder))
