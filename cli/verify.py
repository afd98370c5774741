from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from rprune.cli import completion
from rprune.cli import options as o
from rprune.cli.console import ProgressLines, print_json, print_smoke, stdout
from rprune.errors import one_line, unknown_name

REATTACK = "reattack"


def verify(
    bundle: Annotated[Path, typer.Argument(help="The folder that export wrote.")],
    level: Annotated[
        str,
        typer.Option(
            "--level",
            help="hash, static, replay (needs the data), or reattack.",
            autocompletion=completion.of("hash", "static", "replay", REATTACK),
        ),
    ] = "replay",
    policy: Annotated[
        Path | None, typer.Option("--policy", help="Also check that the report was made under this policy.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", help="Public key, PEM: its owner must have signed the bundle.")
    ] = None,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial", help="Weights, masks and other forms may be missing: check the rest, and say what was not."
        ),
    ] = False,
    data: o.Data = None,
    limit: Annotated[
        int | None, typer.Option("-n", "--limit", help="reattack: so many samples of each kind.", min=1)
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="reattack: default: drawn, and told.", min=0)] = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Re-check a bundle from its files alone. Exit 5 when bytes or signature differ, 1 for a false claim.

    reattack also attacks, proves and draws anew, under a seed that nobody knew before.
    """
    from rprune.reports.gate import read_policy
    from rprune.reports.verify import LEVELS
    from rprune.reports.verify import verify as run_verify

    known = [*LEVELS, REATTACK]
    if level not in known:
        raise unknown_name("level", level, known)
    first = next((each for each in LEVELS if each == level), LEVELS[-1])
    rules = None if policy is None else read_policy(policy, baseline=True)
    found = run_verify(bundle, first, rules, data, key, partial)
    if level == REATTACK and found.passed:
        from rprune.pipeline.reattack import Reattack

        with ProgressLines(quiet or as_json) as reporter:
            again = Reattack(bundle, data, limit, seed, reporter)
            for name, run in again.checks():
                found.check(name, run)
        found.unchecked += again.unchecked
    if as_json:
        checks = [vars(check) for check in found.checks]
        print_json(
            {
                "level": level,
                "smoke": found.smoke,
                "passed": found.passed,
                "integrity": found.integrity,
                "checks": checks,
                "unread": found.unread,
                "absent": found.absent,
                "unchecked": found.unchecked,
            }
        )
    else:
        for check in found.checks:
            mark = Text("✓", "green") if check.passed else Text("✗", "bold red")
            stdout.print(Text.assemble(mark, one_line(f" {check.name:<36} {check.detail}")))
        words = f"VERIFIED level={level}" if found.passed else "NOT VERIFIED"
        stdout.print(Text(words, "bold green" if found.passed else "bold red"))
        if found.passed and found.unread:
            stdout.print(Text(one_line(f"by their hash alone: {', '.join(found.unread)}")))
        if found.passed and found.absent:
            stdout.print(Text(one_line(f"not here: {', '.join(found.absent)}"), "yellow"))
            if found.unchecked:
                stdout.print(Text(one_line(f"unchecked without: {', '.join(found.unchecked)}"), "yellow"))
        print_smoke(found.smoke)
    if not found.integrity:
        raise typer.Exit(5)
    if not found.passed:
        raise typer.Exit(1)
