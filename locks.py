"""One process at a time works on an output."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rprune.errors import UsageError
from rprune.files import LOCK, unwritable

TAKEN = (errno.EACCES, errno.EAGAIN)


@contextmanager
def working_in(folder: Path, first: bool = True) -> Iterator[None]:
    """Hold a folder, which is made if it is not there, while the block writes into it. See :func:`_held`.

    ``first``: whether this process does; of several that work together, one.
    """
    with _held(folder / LOCK, folder) if first else nullcontext():
        yield


@contextmanager
def working_on(output: Path, first: bool = True) -> Iterator[None]:
    """Hold a file, or a folder that is made beside its place, while the block makes it; as :func:`working_in`."""
    with _held(output.with_name(f".{output.name}.lock"), output) if first else nullcontext():
        yield


@contextmanager
def _held(path: Path, what: Path) -> Iterator[None]:
    """Hold ``path`` by a lock of the kernel's, which ends with the process, however that ends.

    A file that a killed process left is therefore free. On file systems without locks nothing is held.

    Raises:
        UsageError: another process holds it, or the folder cannot be written: found before any work.
        WorkError: the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquired(path, what)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquired(path: Path, what: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                other = os.read(handle, 200).decode(errors="replace") or "another process"
                os.close(handle)
                raise UsageError(f"{what} is in use by {other}", "wait for it, or choose another -o") from None
        try:
            if os.path.samestat(os.fstat(handle), path.stat()):
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        except FileNotFoundError:
            pass  # whoever held it has just ended and deleted it
        except OSError:
            os.close(handle)
            raise
        os.close(handle)
