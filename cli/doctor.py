from __future__ import annotations

from dataclasses import asdict

import typer
from rich.text import Text

from rprune.cli import options as o
from rprune.cli.console import print_json, stdout

STYLES = {"ok": "green", "warn": "yellow", "missing": "bold red"}


def doctor(as_json: o.Json = False) -> None:
    """Check Python, packages, GPU, CPU, ONNX Runtime, compiler and disk. Exit 4 when something needed is broken."""
    from rprune.pipeline.checkup import checkup

    findings = checkup()
    broken = [finding for finding in findings if finding.broken]
    if as_json:
        print_json({"healthy": not broken, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            style = STYLES[finding.state] if finding.needed or finding.state != "missing" else "yellow"
            stdout.print(Text.assemble((f"{finding.state:<8}", style), f"{finding.what:<20} {finding.detail}"))
            if finding.mend and finding.state != "ok":
                stdout.print(Text(f"{'':<28} {finding.mend}", "dim"))
        said = f"{len(broken)} of what rprune needs is missing or broken" if broken else "all that rprune needs is here"
        stdout.print(Text(said, "bold red" if broken else "bold green"))
    if broken:
        raise typer.Exit(4)
