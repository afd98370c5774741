from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from rprune.cli import options as o
from rprune.cli.console import print_json, stdout
from rprune.errors import unknown_name


def verify(
    bundle: Annotated[Path, typer.Argument(help="The folder that export wrote.")],
    level: Annotated[str, typer.Option("--level", help="hash, static, or replay (needs the data).")] = "replay",
    policy: Annotated[
        Path | None, typer.Option("--policy", help="Also check that the report was made under this policy.")
    ] = None,
    data: o.Data = None,
    as_json: o.Json = False,
) -> None:
    """Re-check a bundle from its files alone. Exit 5 when bytes differ, 1 for a false claim."""
    from rprune.reports.gate import read_policy
    from rprune.reports.verify import LEVELS
    from rprune.reports.verify import verify as run_verify

    if level not in LEVELS:
        raise unknown_name("level", level, LEVELS)
    found = run_verify(bundle, level, None if policy is None else read_policy(policy), data)
    if as_json:
        checks = [vars(check) for check in found.checks]
        print_json({"level": level, "passed": found.passed, "integrity": found.integrity, "checks": checks})
    else:
        for check in found.checks:
            mark = Text("✓", "green") if check.passed else Text("✗", "bold red")
            stdout.print(Text.assemble(mark, f" {check.name:<36} {check.detail}"))
        words = f"VERIFIED level={level}" if found.passed else "NOT VERIFIED"
        stdout.print(Text(words, "bold green" if found.passed else "bold red"))
    if not found.integrity:
        raise typer.Exit(5)
    if not found.passed:
        raise typer.Exit(1)
