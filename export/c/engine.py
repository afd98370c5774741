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
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError, WorkError

FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")
COMPILERS = ("cc", "gcc", "clang")
BATCH = """
void predict_batch(const float *images, float *logits, int count) {
    for (; count > 0; count--, images += MODEL_CHANNELS * MODEL_HEIGHT * MODEL_WIDTH, logits += MODEL_CLASSES)
        predict_float(images, logits);
}
"""
HEADER = re.compile(r"^#define MODEL_(FORMAT|CHANNELS|HEIGHT|WIDTH|CLASSES) (\d{1,7})$", re.MULTILINE)


class CClassifier:
    """``model.c`` with its ``model.h``: images ``(n, c, h, w)`` float32 in [0,1] to logits ``(n, k)``, on one thread.

    The compiler is ``$CC``, the system's, or that of the package ``ziglang``. What it makes is kept in
    ``$XDG_CACHE_HOME/rprune`` under the hash of source, compiler and processor. The source is code, which then runs in
    this process: it is for files whose origin is known, as any program is.

    Raises:
        InputError: the files are not there, are none of rprune's, or do not compile.
        WorkError: there is no compiler.
    """

    batch_size = 1

    def __init__(self, path: Path, flags: tuple[str, ...] = FLAGS) -> None:
        self.path = path
        header = _read(path.with_suffix(".h"))
        sizes = {name: int(value) for name, value in HEADER.findall(header)}
        if len(sizes) != 5 or sizes["FORMAT"] != 1:
            raise InputError(f"{path.with_suffix('.h')} is no header of rprune's", "export the model again: --format c")
        self.input_shape = sizes["CHANNELS"], sizes["HEIGHT"], sizes["WIDTH"]
        self.classes = sizes["CLASSES"]
        library = ctypes.CDLL(str(compiled(path, header, flags)))
        self._batch = library.predict_batch
        self._batch.restype = None
        self._lock = threading.Lock()  # its memory is static

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        if images.shape[1:] != self.input_shape:
            raise InputError(f"{self.path} takes images of {self.input_shape}, not {images.shape[1:]}", "check --data")
        given = np.ascontiguousarray(images, np.float32)
        found = np.empty((len(given), self.classes), np.float32)
        with self._lock:
            self._batch(given.ctypes.data_as(ctypes.c_void_p), found.ctypes.data_as(ctypes.c_void_p), len(given))
        return found

    def predict(self, images: NDArray[np.float32]) -> NDArray[np.int64]:
        """Class of the largest logit, the first of equals; -1, wrong for every label, where logits are not numbers."""
        logits = self.logits(images)
        return np.where(np.isnan(logits).any(1), -1, logits.argmax(1))


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


def compiled(path: Path, header: str, flags: tuple[str, ...]) -> Path:
    """The shared library of a source, from the cache where it is there."""
    source = _read(path)
    command = compiler()
    key = hashlib.sha256("\0".join([source, header, BATCH, *command, *flags, _processor()]).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rprune"
    target = folder / f"{key}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        (Path(work) / path.with_suffix(".h").name).write_text(header)
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


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"cannot read {path}: {reason}", "give model.c, with model.h beside it") from None
