"""Atomic writes, canonical JSON, digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rprune.errors import InputError, UsageError

KEY_FILE = "key.json"


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces, no NaN, UTF-8: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def seal_of(table: Mapping[str, Any]) -> str:
    """The digest of a table that holds it as ``digest``: that of everything else."""
    return digest_of({key: value for key, value in table.items() if key != "digest"})


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it, synced to disk, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def readable_json(value: Any) -> str:
    """With the key order and number format of the canonical form."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, readable_json(value))


def read_json(path: Path, what: str) -> Any:
    """Raises InputError when the file is not there or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{what} {path} is not there", "check the path") from None
    except (ValueError, OSError) as error:
        raise InputError(f"cannot read {what} {path}: {error}", "it must be a JSON file") from None


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raises UsageError when ``path`` exists and ``force`` is not set, or is a folder that rprune did not write."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists", "choose another -o, or allow overwriting with --force")
    check_ours(path)


def check_ours(path: Path) -> None:
    """Raises UsageError when ``path`` is a folder that rprune did not write: it would be deleted later."""
    if path.is_dir() and not any((path / name).is_file() for name in (KEY_FILE, "stage.json", "report.json")):
        raise UsageError(f"{path} is a folder that rprune did not write", "choose another -o; nothing was deleted")


def remove_result(path: Path) -> None:
    """Delete a folder that rprune wrote; a file is left to be replaced. Raises UsageError for any other folder."""
    check_ours(path)
    if path.is_dir():
        shutil.rmtree(path)


def partial_of(path: Path) -> Path:
    """Where work on ``path`` lies while it is unfinished."""
    return path.with_name(f"{path.name}.partial")


def partial_folder(path: Path, key: str, resume: bool = True) -> Path:
    """The folder beside ``path`` for unfinished work; emptied unless it was left by work with the same key."""
    partial = partial_of(path)
    if not (resume and stored_key(partial) == key):
        shutil.rmtree(partial, ignore_errors=True)
        write_json(partial / KEY_FILE, {"key": key})
    return partial


def stored_key(folder: Path) -> str | None:
    """The key that a folder's content was made for, if it says."""
    try:
        key = json.loads((folder / KEY_FILE).read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return key if isinstance(key, str) else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
