"""Size, load time, memory and latency of files that classify, side by side on this machine. No torch.

ONNX Runtime runs its dense kernels whatever the weights are: zeros cost it what other numbers cost. The C form works on
the weights that are not zero alone. OpenVINO is measured beside them where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError, UsageError, WorkError
from rprune.export.c.engine import CClassifier
from rprune.export.constants import Constants
from rprune.export.session import OnnxClassifier, load_onnx
from rprune.export.unpack import unpack

BLOCK = 5  # timed calls of one runtime before the next one's turn
WHOLE = sys.maxsize  # a batch is one call, however large
PACKED = ".packed.safetensors"
Images = NDArray[np.float32]


class Classifier(Protocol):
    @property
    def input_shape(self) -> tuple[int, int, int]: ...

    def logits(self, images: Images) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Latency:
    """Milliseconds a call. ``ratio``: how many times as fast as ONNX Runtime on the float file, by medians."""

    file: str
    runtime: str
    batch: int
    threads: int
    calls: int
    p50: float
    p95: float
    ratio: float | None = None


@dataclass(frozen=True)
class Footprint:
    """Bytes on disk, as they are and zipped; what loading and one call take in a fresh process."""

    file: str
    bytes: int
    zipped: int
    load_ms: float
    memory: int


class OpenVino:
    """OpenVINO over an ONNX file, on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        self.input_shape = OnnxClassifier(path).input_shape  # which refuses what is not safe to run
        self._model = core.compile_model(str(path), "CPU", hints)

    def logits(self, images: Images) -> NDArray[np.float32]:
        return np.asarray(self._model(images)[0])


def runtimes(path: Path, threads: int) -> dict[str, Callable[[], Classifier]]:
    """What can run a file on so many threads: names, and functions that load it. Raises InputError for other kinds."""
    if path.suffix == ".c":
        return {"C": lambda: CClassifier(path)} if threads == 1 else {}
    if path.suffix != ".onnx":
        raise InputError(f"{path} cannot be run", "name .onnx files, model.c, or the folder of an export")
    found: dict[str, Callable[[], Classifier]] = {"ONNX Runtime": lambda: OnnxClassifier(path, WHOLE, threads)}
    if importlib.util.find_spec("openvino"):
        found["OpenVINO"] = lambda: OpenVino(path, threads)
    return found


def runnable(artifacts: Sequence[Path]) -> list[Path]:
    """The files that are named, and those of folders that can be measured, each once.

    Raises InputError for what is not there, of another kind, or a folder without any.
    """
    found: dict[Path, None] = {}
    for path in artifacts:
        files = [file for file in sorted(path.glob("model.*")) if _known(file)] if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path} holds no exported model", "name the folder of 'rprune export'")
        for file in files:
            if not file.is_file() or not _known(file):
                what = "is not there" if not file.exists() else "cannot be run"
                raise InputError(f"{file} {what}", "name .onnx, .c or .packed.safetensors files, or folders of exports")
            found[file] = None
    return list(found)


def _known(path: Path) -> bool:
    return path.suffix in (".onnx", ".c") or path.name.endswith(PACKED)


def sizes_of(text: str, option: str) -> tuple[int, ...]:
    """``1,64`` as numbers. Raises UsageError for anything else."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"cannot read {option} {text}", "write whole numbers of at least 1 with commas, such as 1,64")
    return found


def core_counts(text: str) -> tuple[int, ...]:
    """``1,0`` as numbers of threads, each once; 0 stands for all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [str(cores) if part.strip() == "0" else part for part in text.split(",")]
    return tuple(dict.fromkeys(sizes_of(",".join(parts), "--threads")))


def latencies(
    files: Sequence[Path],
    *,
    batches: Sequence[int] = (1, 64),
    threads: Sequence[int] = (1,),
    rounds: int = 20,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Latency]:
    """Every runtime on every file: blocks of calls in alternation, so that noise of the machine meets all alike.

    Raises InputError for files that cannot be run or differ in their images.
    """
    found: list[Latency] = []
    threads = [count for count in threads if any(runtimes(path, count) for path in files)]
    done, total = 0, len(threads) * len(batches) * rounds
    for count in threads:
        loaded = {(path, name): load() for path in files for name, load in runtimes(path, count).items()}
        shapes = {tuple(classifier.input_shape) for classifier in loaded.values()}
        if len(shapes) > 1:
            raise InputError(
                f"the files take images of different sizes: {sorted(shapes)}", "compare forms of one model"
            )
        for batch in batches:
            images = np.random.RandomState(seed).random_sample((batch, *next(iter(shapes)))).astype(np.float32)
            times: dict[tuple[Path, str], list[float]] = {key: [] for key in loaded}
            for _ in range(rounds):
                for key, classifier in loaded.items():
                    classifier.logits(images)  # what it needs is in the caches again
                    for _ in range(BLOCK):
                        started = clock()
                        classifier.logits(images)
                        times[key].append(1000 * (clock() - started))
                done += 1
                on_progress(done, total)
            found += _rows(times, batch, count)
    return found


def _rows(times: Mapping[tuple[Path, str], list[float]], batch: int, threads: int) -> list[Latency]:
    dense = next((spent for (path, name), spent in times.items() if name == "ONNX Runtime" and is_dense(path)), None)
    return [
        Latency(
            path.name, name, batch, threads, len(spent), round(float(np.median(spent)), 4),
            round(float(np.percentile(spent, 95)), 4),
            None if dense is None else round(float(np.median(dense) / np.median(spent)), 3),
        )
        for (path, name), spent in times.items()
    ]  # fmt: skip


def is_dense(path: Path) -> bool:
    """A float ONNX file that holds its weights as they are, not to be expanded."""
    if path.suffix != ".onnx":
        return False
    constants = Constants(load_onnx(path).graph)
    weights = constants.weights().items()
    return all(stored == value and constants.array(value).dtype.kind == "f" for stored, value in weights)


def measured(path: Path) -> Footprint:
    """The footprint of a file. Loading is measured in a fresh process, of a packed file too: there it is unpacking.

    Raises InputError for a file that cannot be used, WorkError where the process fails.
    """
    _load(path)  # says what is wrong with it; C is compiled, which is not loading
    content = path.read_bytes()
    call = [sys.executable, "-P", "-m", "rprune.export.speed", str(path)]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise WorkError(f"cannot measure {path}: {reason[:200]}", "does 'rprune evaluate' run it?")
    return Footprint(path.name, len(content), len(zlib.compress(content, 9)), **json.loads(done.stdout))


def _load(path: Path) -> Classifier | None:
    """What runs a file; nothing of a packed one, which is unpacked."""
    if not path.name.endswith(PACKED):
        return next(iter(runtimes(path, 1).values()))()
    try:
        unpack(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error.message}", error.hint) from None
    return None


def _probe(path: Path) -> dict[str, Any]:
    """Load and call once in this process, which has done nothing else."""
    if path.suffix == ".onnx":
        import onnxruntime  # noqa: F401  importing is not loading
    before = _memory("VmRSS")
    started = time.perf_counter()
    classifier = _load(path)
    spent = time.perf_counter() - started
    if classifier is not None:
        classifier.logits(np.zeros((1, *classifier.input_shape), np.float32))
    return {"load_ms": round(1000 * spent, 3), "memory": max(0, _memory("VmHWM") - before)}


def _memory(name: str) -> int:
    """Bytes, as Linux counts this process; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def to_json(footprints: Sequence[Footprint], rows: Sequence[Latency]) -> dict[str, Any]:
    return {"files": [asdict(found) for found in footprints], "latency": [asdict(row) for row in rows]}


if __name__ == "__main__":
    print(json.dumps(_probe(Path(sys.argv[1]))))
