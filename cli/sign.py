from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from rprune.cli.console import note, stdout
from rprune.errors import UsageError


def sign(
    bundle: Annotated[Path, typer.Argument(help="The folder that export wrote.")],
    key: Annotated[Path, typer.Option("--key", help="Private elliptic-curve key, PEM.")],
    password: Annotated[
        str | None, typer.Option("--password", help="Of the key.", envvar="RPRUNE_KEY_PASSWORD")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a signature.")] = False,
) -> None:
    """Sign every file of a bundle with your key, by OpenSSF model-signing (extra: sign)."""
    from rprune.reports.schema import read_report
    from rprune.reports.signing import SIGNATURE
    from rprune.reports.signing import sign as run_sign

    report = read_report(bundle)
    if (bundle / SIGNATURE).exists() and not force:
        raise UsageError(f"{bundle} is signed already", "--force replaces the signature")
    path = run_sign(bundle, key, password)
    stdout.print(Text(f"signed  {path}   report {report.id}"))
    note(f"Next: others check it by 'rprune verify {bundle} --key PUBLIC.pem'")
