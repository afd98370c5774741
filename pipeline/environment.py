"""Where and with what a run was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path
from typing import Any

import rprune
from rprune.files import file_digest

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
    """sha256 over rprune's own source files: results made by other code are not reused."""
    root = Path(rprune.__file__).parent
    sha = hashlib.sha256()
    # the root is a checkout in development: only package folders count, not tests or environments
    packages = (*root.glob("*/__init__.py"), *root.glob("export/*/__init__.py"))
    for folder in sorted({root, *(p.parent for p in packages)}):
        for path in sorted([*folder.glob("*.py"), *folder.glob("*.c")]):
            sha.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()


def referenced_files(value: Any) -> dict[str, str]:
    """sha256 of every file that a specification names (``file.py:Class``, ``file:PATH``): its content is part of it."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return {path: digest for item in value for path, digest in referenced_files(item).items()}
    if not isinstance(value, str):
        return {}
    if "," in value:  # several attacks of a suite
        return referenced_files(value.split(","))
    value = value.strip()
    place = value.removeprefix("file:") if value.startswith("file:") else value.rpartition(":")[0]
    path = Path(place)
    wanted = value.startswith("file:") or place.endswith(".py")
    return {place: file_digest(path)} if wanted and path.is_file() else {}


def named_code(value: Any) -> frozenset[str]:
    """Every ``module:name`` that a user wrote in a recipe or in options."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return frozenset(name for item in value for name in named_code(item))
    return frozenset({value} if isinstance(value, str) and ":" in value else ())


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
