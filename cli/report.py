from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from rprune.cli import options as o
from rprune.cli.console import note, print_json, print_report, stdout
from rprune.errors import InputError, UsageError


def report(
    source: Annotated[Path, typer.Argument(help="report.json, or the folder it lies in.")],
    output: Annotated[Path | None, typer.Option("-o", "--html", help="Write the HTML page here.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the report as Markdown.")] = None,
    card: Annotated[Path | None, typer.Option("--card", help="Write a model card for the Hugging Face hub.")] = None,
    bom: Annotated[Path | None, typer.Option("--bom", help="Write a CycloneDX 1.6 bill of materials.")] = None,
    intoto: Annotated[
        Path | None, typer.Option("--intoto", help="Write in-toto attestations, one a line, unsigned.")
    ] = None,
    robustbench: Annotated[
        Path | None, typer.Option("--robustbench", help="Write a model_info file of RobustBench.")
    ] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Write every plot as a file into this folder.")] = None,
    form: Annotated[Literal["svg", "png", "pdf"], typer.Option("--plot-format", help="Kind of these files.")] = "svg",
    tensorboard: o.TensorBoard = None,
    data: o.Data = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Show a report, or write its page, other documents, its plots, its training as TensorBoard reads it."""
    from rprune.data.sources import load_data
    from rprune.files import atomic, refuse_overwrite
    from rprune.reports.energy import intensity
    from rprune.reports.events import event_files
    from rprune.reports.evidence import broken_samples
    from rprune.reports.html import render_html
    from rprune.reports.plots import plot_files
    from rprune.reports.renderings import rendered
    from rprune.reports.schema import read_report

    found = read_report(source)
    folder = source if source.is_dir() else source.parent
    named = {"markdown": markdown, "card": card, "bom": bom, "intoto": intoto, "robustbench": robustbench}
    wanted = {name: path for name, path in named.items() if path is not None}
    files: dict[Path, bytes] = {}
    if plots is not None:
        files |= {plots / name: content for name, content in plot_files(found, form).items()}
    if tensorboard is not None:
        files |= {tensorboard / name: content for name, content in event_files(found).items()}
    targets = [*files, *wanted.values(), *([output] if output else [])]
    for path in targets:
        if path.is_dir():
            raise UsageError(f"{path} is a folder", "name a file in it")
        refuse_overwrite(path, force)
    if len({path.resolve() for path in targets}) < len(targets):
        raise UsageError("two documents would be written into one file", "give each a file of its own")
    files |= {path: rendered(found, name).encode() for name, path in wanted.items()}
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
