"""Where and with what a run was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path
from typing import Any

import rprune

PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "numpy", "scipy", "safetensors")


def environment(device: str) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "device": device,
        "packages": versions,
    }


@cache
def source_digest() -> str:
    """sha256 over rprune's own Python files: results made by other code are not reused."""
    root = Path(rprune.__file__).parent
    sha = hashlib.sha256()
    # the root is a checkout in development: only package folders count, not tests or environments
    for folder in sorted({root, *(p.parent for p in root.glob("*/__init__.py"))}):
        for path in sorted(folder.glob("*.py")):
            sha.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
