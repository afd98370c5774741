"""Errors that a user can act on, and the exit codes of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RpruneError(Exception):
    """A mistake or failure with a reason and a way out: one line what and why, one line how to fix it."""

    exit_code = 70

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(RpruneError):
    """The request itself is wrong; nothing was run."""

    exit_code = 2


class InputError(RpruneError):
    """A model, data set or file cannot be used."""

    exit_code = 3


class WorkError(RpruneError):
    """The work was started and failed: diverged, target missed, export disagrees with its source."""

    exit_code = 4


class IntegrityError(RpruneError):
    """Bytes are not the ones that were promised."""

    exit_code = 5


class Interrupted(RpruneError):
    """Ctrl-C; what was done is kept."""

    exit_code = 130


EXIT_CODES = {
    0: "done; gate passed; verified",
    1: "valid negative result: gate failed, verify found a false claim, or compare a regression",
    2: "usage or recipe error, nothing was run",
    3: "input cannot be used: model or data unreadable, unsafe pickle refused, unsupported layer",
    4: "work failed: diverged, out of memory, disk full, target not reached, export disagrees with its source",
    5: "integrity: hash mismatch",
    70: "internal error (a bug)",
    130: "interrupted, resumable",
}


def printable(text: str, most: int = 120) -> str:
    """A name that a file says, for people: control characters and what is no character escaped, and cut."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: most + 1])
    return shown if len(text) <= most else shown[:most] + "..."


def one_line(text: str) -> str:
    """Nothing but signs: what a stranger's file says can neither move the cursor nor begin a line."""
    return "".join(sign if sign.isprintable() or sign == "\u00a0" else " " for sign in text)


def first_line(error: BaseException, most: int = 160) -> str:
    """What a library's error says in its first line, cut; the name of its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def unknown_name(kind: str, name: str, known: Iterable[str], error: type[RpruneError] = UsageError) -> RpruneError:
    """The error for a name that is not in a registry, with the nearest known name offered."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return error(f"unknown {kind} '{name}'", f"{hint}known: {', '.join(names)}" if names else "none is known")
