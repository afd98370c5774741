from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from rprune.cli import options as o
from rprune.cli.console import note, print_json, print_report, stdout
from rprune.errors import InputError


def report(
    source: Annotated[Path, typer.Argument(help="report.json, or the folder it lies in.")],
    output: Annotated[Path | None, typer.Option("-o", "--html", help="Write the HTML page here.")] = None,
    data: o.Data = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Show a report, or render it again as HTML."""
    from rprune.files import refuse_overwrite, write_text
    from rprune.reports.schema import read_report

    found = read_report(source)
    folder = source if source.is_dir() else source.parent
    if output is not None:
        from rprune.data.sources import load_data
        from rprune.reports.evidence import broken_samples
        from rprune.reports.html import render_html

        refuse_overwrite(output, force)
        try:
            samples = broken_samples(folder, found, load_data(data or found.data.source).test)
        except (InputError, FileNotFoundError) as error:
            note(f"without pictures of adversarial samples: {error}")
            samples = []
        write_text(output, render_html(found, samples))
        stdout.print(Text(str(output)))
    elif as_json:
        print_json(found.to_json())
    else:
        print_report(found, str(folder))
