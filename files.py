"""Atomic writes, canonical JSON, digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rprune.errors import InputError, IntegrityError, RpruneError, UsageError, WorkError

KEY_FILE = "key.json"
LOCK = ".lock"  # in a folder that one process at a time works in (rprune.locks)
REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG
)  # fmt: skip
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # half a character, or half of a pair
MOST_TEXT = 1 << 27  # bytes of a JSON or TOML file; a certificate of 50,000 samples has some 20 MB


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces, no NaN, UTF-8: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def seal_of(table: Mapping[str, Any]) -> str:
    """The digest of a table that holds it as ``digest``: that of everything else."""
    return digest_of({key: value for key, value in table.items() if key != "digest"})


def is_endless(path: Path) -> bool:
    """Whether it is a pipe, a socket or a device: reading one may wait, or go on, for ever."""
    return path.exists() and not path.is_file() and not path.is_dir()


def readable(path: Path) -> Path:
    """The path again. Raises InputError when :func:`is_endless`."""
    if is_endless(path):
        raise InputError(f"{path} is a pipe or a device, not a file", "put its content into a file")
    return path


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes. Raises InputError for what :func:`readable` refuses."""
    with readable(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it, synced to disk, when the block ends without an error.

    It is always the same one, so that what a killed process left of it is overwritten by the next. Raises
    :func:`unwritable`'s errors.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        reason = _system_error(error)
        if reason is None:
            raise
        raise unwritable(path, reason) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """What a file is called until it is whole."""
    return f".{name}.tmp"


def unwritable(path: Path, error: OSError) -> RpruneError:
    """What to tell of a place that cannot be written: a mistake of the user's, or a disk that is full or fails."""
    message = f"cannot write {path}: {error.strerror or error}"
    if error.errno in REFUSED:
        return UsageError(message, "name a place that you may write with -o")
    return WorkError(message, "what was written before is whole; free some space, and the same command continues")


def _system_error(error: BaseException | None) -> OSError | None:
    """What the system said behind an error of a library that writes files: torch wraps it, safetensors quotes it."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        if quoted := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(quoted[1]), os.strerror(int(quoted[1])))
        error = error.__cause__ or error.__context__
    return None


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def readable_json(value: Any) -> str:
    """With the key order and number format of the canonical form."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, readable_json(value))


def parsed_json(text: str) -> Any:
    """JSON that a stranger may have written. Raises ValueError and RecursionError.

    Half a character (a lone surrogate) is refused here: no later step could write, print or digest it.
    """
    value = json.loads(text)
    if HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a character stands in it, which is no text") from None
    return value


def read_json(path: Path, what: str) -> Any:
    """Raises InputError when the file is not there, not JSON, or larger than 128 MiB."""
    try:
        return parsed_json(_text(path))
    except FileNotFoundError:
        raise InputError(f"{what} {path} is not there", "check the path") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"cannot read {what} {path}: {error}", "it must be a JSON file") from None


def toml(value: Any) -> str:
    """A value as TOML has it, tables in one line; what is None is left out of them."""
    if isinstance(value, Mapping):
        bare = {key: key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml(key) for key in value}
        entries = (f"{bare[key]} = {toml(entry)}" for key, entry in value.items() if entry is not None)
        return f"{{ {', '.join(entries)} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def read_toml(path: Path, what: str, hint: str) -> dict[str, Any]:
    """Raises UsageError when the file is not there, not TOML, or larger than 128 MiB."""
    try:
        return tomllib.loads(_text(path))
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror}", "check the path") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what} {path} is not TOML: {error}", hint) from None


def _text(path: Path) -> str:
    with readable(path).open("rb") as file:
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        raise ValueError(f"it is larger than {MOST_TEXT >> 20} MiB")
    return content.decode()


def inside(folder: Path, name: str) -> Path:
    """The file that a stranger calls ``name``.

    Raises IntegrityError when it, or a link on the way, leads outside, and when it is a pipe or a device.
    """
    try:
        path = (folder / name).resolve()
        within, endless = path.is_relative_to(folder.resolve()), is_endless(path)
    except (OSError, ValueError, RuntimeError):  # names that no file can have, and links in a circle
        within = endless = False
    if not within:
        raise IntegrityError(f"{folder} names {name}, outside itself", "do not trust this folder")
    if endless:
        raise IntegrityError(f"{folder} names {name}, a pipe or a device", "do not trust this folder")
    return path


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raises UsageError when ``path`` exists and ``force`` is not set, or is a folder that rprune did not write."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists", "choose another -o, or allow overwriting with --force")
    check_ours(path)


def check_ours(path: Path) -> None:
    """Raises UsageError when ``path`` is a folder that rprune did not write: it would be deleted later.

    One that a killed process had just begun holds nothing that could be lost.
    """
    ours, begun = {KEY_FILE, "stage.json", "report.json"}, {LOCK, temporary_name(KEY_FILE)}
    there = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if not there & ours and there - begun:
        raise UsageError(f"{path} is a folder that rprune did not write", "choose another -o; nothing was deleted")


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


def sync_folder(folder: Path) -> None:
    """What was renamed in it stays so when the machine stops."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def stored_key(folder: Path) -> str | None:
    """The key that a folder's content was made for, if it says."""
    try:
        key = json.loads((folder / KEY_FILE).read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return key if isinstance(key, str) else None
