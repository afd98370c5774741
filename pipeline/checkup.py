"""What rprune needs of a machine, looked at one by one. Torch is a finding like any other: nothing here needs it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import rprune
from rprune.data.sources import TORCHVISION, data_folder
from rprune.errors import RpruneError, first_line, unknown_name
from rprune.export.saturation import int8_is_exact
from rprune.export.session import may_saturate
from rprune.reports.text import size

State = Literal["ok", "warn", "missing"]
PYTHON = (3, 11)
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)
ROOM, LITTLE = 1 << 30, 10 << 30  # bytes of a disk: needed, and better to have
SECRET = "RPRUNE_KEY_PASSWORD"  # its value is not shown
VARIABLES = {
    "RPRUNE_SEED": "seed of train, prune and the like, where --seed does not say it",
    "RPRUNE_DEVICE": "device, where --device does not say it",
    "RPRUNE_DATA": "folder of torchvision's sets",
    "RPRUNE_CO2": "grams of CO2 a kWh",
    SECRET: "password of the private key that sign reads",
    "RPRUNE_DEBUG": "tracebacks of errors",
}
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "svhn": "train_32x32.mat",
           "mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # fmt: skip
PACKAGE = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?\s*([^;]*)(?:;.*extra\s*==\s*['\"]([^'\"]+)['\"])?")


@dataclass(frozen=True)
class Finding:
    """``needed``: nothing, or not the main thing, works without it; then "missing" means broken. ``mend``: how."""

    what: str
    state: State
    detail: str
    mend: str = ""
    needed: bool = False

    @property
    def broken(self) -> bool:
        return self.needed and self.state == "missing"


def checkup() -> list[Finding]:
    """Every finding; a check that fails in a way of its own is one, too."""
    return [finding for check in CHECKS for finding in _safely(check)]


def _safely(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # a broken installation may raise anything
        name = check.__name__.strip("_").replace("_", " ")
        yield Finding(name, "warn", f"cannot be looked at: {first_line(error)}", "please report this")


def _python() -> Iterator[Finding]:
    right = sys.version_info[:2] >= PYTHON
    mend = "" if right else f"install Python {'.'.join(map(str, PYTHON))} or newer"
    yield Finding("Python", "ok" if right else "missing", f"{platform.python_version()}, {sys.executable}", mend, True)


def requirements() -> list[tuple[str, str, str | None]]:
    """(package, versions such as ``>=0.26,<1``, the extra that asks for it): as installed, else from pyproject.toml."""
    try:
        said = importlib.metadata.requires("rprune") or []
    except importlib.metadata.PackageNotFoundError:
        path = Path(rprune.__file__).with_name("pyproject.toml")
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"] if path.is_file() else {}
        extras = project.get("optional-dependencies", {})
        said = [*project.get("dependencies", ()),
                *(f"{text}; extra == '{extra}'" for extra, texts in extras.items() for text in texts)]  # fmt: skip
    found = [match for text in said if (match := PACKAGE.match(text))]
    return [(match[1], match[2].strip(" ()"), match[3]) for match in found if match[1] != "rprune"]


def fits(version: str, wanted: str) -> bool:
    """Whether a version is in a range like ``>=0.26,<1``; only release numbers are compared."""

    def numbers(text: str) -> list[int]:
        release = re.match(r"[\d.]+", text)
        return [int(part) for part in release[0].strip(".").split(".")] if release else []

    for op, bound in re.findall(r"(>=|<=|==|!=|<|>)\s*([\w.+-]+)", wanted):
        here, there = numbers(version), numbers(bound)
        width = max(len(here), len(there))
        here, there = (side + [0] * (width - len(side)) for side in (here, there))
        holds = {">=": here >= there, "<=": here <= there, "==": here == there, "!=": here != there, "<": here < there,
                 ">": here > there}  # fmt: skip
        if not holds[op]:
            return False
    return True


def _packages() -> Iterator[Finding]:
    for name, wanted, extra in requirements():
        if extra in ("test", "dev", "bench"):  # for those who build rprune
            continue
        mend = f"pip install 'rprune[{extra}]'" if extra else f"pip install '{name}{wanted}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            what = f"not installed; for the extra '{extra}'" if extra else "not installed"
            yield Finding(name, "missing", what, mend, needed=extra is None)
            continue
        right = fits(version, wanted)
        detail = version if right else f"{version}, and {wanted} is needed"
        yield Finding(name, "ok" if right else "missing", detail, "" if right else mend, needed=extra is None)


def _torch() -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # what is missing or damaged shows in many ways
        mend = "pip install torch torchvision; without it gate, verify, report and inspect work, and nothing else"
        yield Finding("import torch", "missing", first_line(error), mend, needed=True)
        return
    threads = f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    yield Finding(
        "import torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {threads}", needed=True
    )
    driver = _driver()
    if not torch.cuda.is_available():
        state: State = "warn" if driver else "missing"
        why = f"the driver {driver} is there, and this torch does not see a GPU" if driver else "training uses the CPU"
        mend = "install a torch built for CUDA, and see CUDA_VISIBLE_DEVICES" if driver else "not needed for small nets"
        yield Finding("GPU", state, why, mend)
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if found.major >= 8 else "no bf16"
        detail = (
            f"{found.name}, {size(found.total_memory)}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}, {bf16}"
        )
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
            yield Finding(f"GPU {index}", "ok", detail)
        except RuntimeError as error:
            yield Finding(
                f"GPU {index}", "warn", f"{detail}: {first_line(error)}", "install a torch built for this GPU"
            )


def _driver() -> str:
    """The version of NVIDIA's driver; empty where there is none."""
    if tool := shutil.which("nvidia-smi"):
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else ""


def _cpu() -> Iterator[Finding]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        yield Finding("CPU", "ok", f"{platform.machine()}, {os.cpu_count()} cores; features unknown")
        return
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (named.get("flags") or named.get("Features") or "").split()
    has = " ".join(name for name in FEATURES if name in flags) or "no vector features that rprune knows"
    yield Finding("CPU", "ok", f"{named.get('model name', platform.machine())}, {os.cpu_count()} cores; {has}")


def _onnx_runtime() -> Iterator[Finding]:
    try:
        runtime = importlib.import_module("onnxruntime")
    except Exception as error:
        yield Finding("import onnxruntime", "missing", first_line(error), "pip install onnxruntime", needed=True)
        return
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in runtime.get_available_providers())
    yield Finding("ONNX Runtime", "ok", f"{runtime.__version__}, providers {providers}; rprune uses CPU", needed=True)
    plain, exact = int8_is_exact(False), int8_is_exact(True)
    needs = may_saturate()
    if plain and not needs:
        yield Finding("int8 kernels", "ok", "sums of int8 products are exact with default settings")
    elif exact:
        detail = "sums saturate by default here, and are exact with session.x64quantprecision=1, which rprune sets"
        if plain:
            detail = "this CPU has no VNNI: rprune sets session.x64quantprecision=1, so that no sum saturates"
        mend = "set it where you deploy, or make models with 'rprune quantize --portable'"
        yield Finding("int8 kernels", "warn", detail, mend)
    else:
        mend = "update onnxruntime; int8 files give other labels here than elsewhere, except those of --portable"
        yield Finding("int8 kernels", "missing", "sums of int8 products saturate under any setting", mend, needed=True)


def _c_compiler() -> Iterator[Finding]:
    from rprune.export.c.engine import FLAGS, compiler

    mend = "install gcc or clang, set CC, or: pip install 'rprune[zig]'; only the C form needs it"
    try:
        command = compiler()
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "probe.c").write_text("int probe(int x) { return x + 1; }\n")
            command += [*FLAGS, "probe.c", "-o", "probe.so"]
            done = subprocess.run(command, cwd=work, capture_output=True, timeout=120, text=True, check=False)
    except (RpruneError, OSError, subprocess.TimeoutExpired) as error:
        yield Finding("C compiler", "missing", first_line(error), mend)
        return
    name = " ".join(compiler())
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it failed"])[0]
        yield Finding("C compiler", "warn", f"{name} does not compile a line: {reason[:120]}", mend)
    else:
        yield Finding("C compiler", "ok", f"{name}, compiles with {FLAGS[1]}")


def _disk() -> Iterator[Finding]:
    from rprune.export.c.engine import cache_folder

    yield _folder("current folder", Path.cwd(), "go where you may write", needed=True)
    yield _folder("cache", cache_folder(), "set XDG_CACHE_HOME to a folder of yours; only the C form needs it")


def _folder(what: str, path: Path, mend: str, needed: bool = False) -> Finding:
    """Room, and whether a file can be written, in a folder or the nearest one above it that is there."""
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding(what, "missing", f"cannot write in {there}: {error.strerror}", mend, needed)
    free = shutil.disk_usage(there).free
    if free < LITTLE:
        state: State = "missing" if free < ROOM else "warn"
        return Finding(
            what, state, f"{path}, {size(free)} free", "make room: checkpoints of large nets need it", needed
        )
    return Finding(what, "ok", f"{path}, {size(free)} free", needed=needed)


def _data() -> Iterator[Finding]:
    root = data_folder()
    if not root.is_dir():
        state: State = "warn" if os.environ.get("RPRUNE_DATA") else "missing"
        yield Finding("data folder", state, f"{root} is not there", "set RPRUNE_DATA, or fetch a set with --download")
        return
    found = [name for name in TORCHVISION if (root / FOLDERS[name]).exists()]
    yield Finding("data folder", "ok", f"{root}: {', '.join(found) or 'none of torchvision'}")


def _environment() -> Iterator[Finding]:
    for name, value in sorted(os.environ.items()):
        if name.startswith("RPRUNE_"):
            if name not in VARIABLES:
                yield Finding(name, "warn", "nothing reads it", unknown_name("variable", name, VARIABLES).hint)
            elif name == "RPRUNE_SEED" and not value.isdigit():
                yield Finding(name, "warn", f"{value} is no number", "set it to 0 or more, or unset it")
            else:
                yield Finding(name, "ok", f"{'set' if name == SECRET else value}: {VARIABLES[name]}")


CHECKS = (_python, _packages, _torch, _cpu, _onnx_runtime, _c_compiler, _disk, _data, _environment)
