"""What a step of GitHub Actions reads: commands on stdout, and files that variables name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rprune.errors import RpruneError, UsageError

if TYPE_CHECKING:
    from rprune.reports.gate_forms import Place
    from rprune.reports.schema import Gate, Report


def tell_gate(outcome: Gate, report: Report, places: Sequence[Place]) -> None:
    """Annotations, the summary of the job, and the outputs of the step."""
    from rprune.reports.gate_forms import github, markdown, outputs

    sys.stdout.write(github(outcome, places))
    _append("GITHUB_STEP_SUMMARY", markdown(outcome, report))
    _append("GITHUB_OUTPUT", outputs(outcome))


@contextmanager
def annotated(wanted: bool) -> Iterator[None]:
    """An error becomes an annotation, too: stderr is but a line of the log there."""
    from rprune.reports.gate_forms import TITLE, command

    try:
        yield
    except RpruneError as error:
        if wanted:
            sys.stdout.write(command("error", f"{error.message}; {error.hint}", title=TITLE) + "\n")
            _append("GITHUB_OUTPUT", "result=error\n")
        raise


def _append(variable: str, text: str) -> None:
    """Add to the file that a variable names, if it is set."""
    name = os.environ.get(variable)
    if name:
        try:
            with Path(name).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UsageError(f"cannot write {variable} {name}: {error.strerror}", "it must name a file") from None
