"""A model's C source as a classifier: compiled for this machine once, kept, and called. No torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError, WorkError
from rprune.files import readable

FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")
COMPILERS = ("cc", "gcc", "clang")
BATCH = """
void predict_batch(const float *images, float *logits, int count) {
    for (; count > 0; count--, images += MODEL_CHANNELS * MODEL_HEIGHT * MODEL_WIDTH, logits += MODEL_CLASSES)
        predict_float(images, logits);
}
"""
LOCKS: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)  # a library's memory is static and there once
INCLUDE = re.compile(r'^#include "([\w.-]{1,100})"$', re.MULTILINE)
NEEDED = ("FORMAT", "CHANNELS", "HEIGHT", "WIDTH", "CLASSES", "RAM_VECTOR", "RAM_SCALAR", "TABLES_SCALAR")
HEADER = re.compile(rf"^#define MODEL_({'|'.join(NEEDED)}) (\d{{1,10}})$", re.MULTILINE)


class CClassifier:
    """``model.c`` with its ``model.h``: images ``(n, c, h, w)`` float32 in [0,1] to logits ``(n, k)``, on one thread.

    The compiler is ``$CC``, the system's, or that of the package ``ziglang``. What it makes is kept in
    ``$XDG_CACHE_HOME/rprune`` under the hash of source, compiler and processor. The source is code, which then runs in
    this process: whoever calls this knows its origin (:mod:`rprune.export.c.origin`).

    Raises:
        InputError: the files are not there, are none of rprune's, or do not compile.
        WorkError: there is no compiler.
    """

    def __init__(self, path: Path, flags: tuple[str, ...] = FLAGS) -> None:
        self.path = path
        header = read_source(path.with_suffix(".h"))
        sizes = stated(path)
        self.input_shape = sizes["CHANNELS"], sizes["HEIGHT"], sizes["WIDTH"]
        self.classes = sizes["CLASSES"]
        library = compiled(path, header, flags)
        try:
            self._batch = ctypes.CDLL(str(library)).predict_batch
        except OSError as error:
            raise WorkError(f"cannot load {library}: {error}", "set XDG_CACHE_HOME to where code may run") from None
        self._batch.restype = None
        self._lock = LOCKS[library]

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        if images.shape[1:] != self.input_shape:
            raise InputError(f"{self.path} takes images of {self.input_shape}, not {images.shape[1:]}", "check --data")
        given = np.ascontiguousarray(images, np.float32)
        found = np.empty((len(given), self.classes), np.float32)
        with self._lock:
            self._batch(given.ctypes.data_as(ctypes.c_void_p), found.ctypes.data_as(ctypes.c_void_p), len(given))
        return found


def stated(path: Path) -> dict[str, int]:
    """What ``model.h`` beside a source says: sizes of images, classes, bytes of memory and tables.

    Raises InputError when it is not there, or no header of rprune's.
    """
    header = path.with_suffix(".h")
    found = {name: int(value) for name, value in HEADER.findall(read_source(header))}
    if len(found) != len(NEEDED) or found["FORMAT"] != 1:
        raise InputError(f"{header} is no header of rprune's", "export the model again: --format c")
    return found


def compiler() -> list[str]:
    """The command of a C compiler. Raises WorkError when there is none."""
    if given := os.environ.get("CC"):
        return shlex.split(given)
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise WorkError("there is no C compiler", "install gcc or clang, set CC, or: pip install 'rprune[zig]'")


def cache_folder() -> Path:
    """Of compiled C."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rprune"


def compiled(path: Path, header: str, flags: tuple[str, ...]) -> Path:
    """The shared library of a source, from the cache where it is there."""
    source = read_source(path)
    command = compiler()
    key = hashlib.sha256("\0".join([source, header, BATCH, *command, *flags, _processor()]).encode()).hexdigest()
    folder = cache_folder()
    target = folder / f"{key}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise WorkError(
            f"cannot write in {folder}: {error.strerror}", "set XDG_CACHE_HOME to a folder of yours"
        ) from None
    with made as work:
        # under the name that the source includes: both may have been renamed
        name = INCLUDE.search(source)
        (Path(work) / (name[1] if name else "model.h")).write_text(header)
        (Path(work) / "source.c").write_text(source + BATCH)
        built = Path(work) / "model.so"
        try:
            done = subprocess.run(
                [*command, *flags, "source.c", "-o", built.name], cwd=work, capture_output=True, text=True
            )
        except OSError as error:
            raise WorkError(
                f"cannot run the C compiler {command[0]}: {error.strerror}", "set CC to one that works"
            ) from None
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "the compiler failed")
            raise InputError(f"{path} does not compile: {first[:200]}", "export the model again: --format c")
        built.replace(target)
    return target


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"


def read_source(path: Path) -> str:
    """The text of model.c or model.h. Raises InputError when there is none."""
    try:
        return readable(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"cannot read {path}: {reason}", "give model.c, with model.h beside it") from None
