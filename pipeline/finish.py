"""How unfinished work becomes a result: at once, and never by half."""

from __future__ import annotations

import shutil
from pathlib import Path

from rprune.files import check_ours, sync_folder

STATE = "resume.pt"
VERDICTS = "verdicts.jsonl"
LEDGER = ".ledger.jsonl"
OLD = ".old"
WORKING = (STATE, f"*.{STATE}", VERDICTS, f"*{LEDGER}", OLD)  # in a folder: what is of no use once its work is finished


def publish(partial: Path, path: Path) -> None:
    """Put a finished folder in its place. What rprune wrote there before gives way to it.

    Whenever this ends early, one of the two is whole, and the same work continues.
    """
    give_way(path, partial)
    path.unlink(missing_ok=True)
    partial.replace(path)
    sync_folder(path.parent)
    tidy(path)


def give_way(path: Path, partial: Path) -> None:
    """Move a folder that rprune wrote into the one of the work that replaces it. Raises UsageError for any other."""
    check_ours(path)
    if path.is_dir():
        shutil.rmtree(partial / OLD, ignore_errors=True)
        path.replace(partial / OLD)


def tidy(folder: Path) -> None:
    """Delete what was of use while a finished folder was unfinished: only now, for until now it was needed."""
    for pattern in WORKING:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
