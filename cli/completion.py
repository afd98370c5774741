"""Names that the shell completes. A key press must not wait for torch, so registered names are read off the source."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import rprune

Complete = Callable[[str], list[str]]


def registered(folder: str, registry: str, group: str) -> list[str]:
    """Names that a folder's files register, and those of installed entry points."""
    pattern = re.compile(rf'^@{registry}\.register\("([^"]+)"\)', re.MULTILINE)
    files = sorted((Path(rprune.__file__).parent / folder).glob("*.py"))
    found = {name for path in files for name in pattern.findall(path.read_text(encoding="utf-8"))}
    return sorted(found | {entry.name for entry in importlib.metadata.entry_points(group=group)})


def methods(incomplete: str) -> list[str]:
    return _fitting(registered("pruning", "METHODS", "rprune.methods"), incomplete)


def objectives(incomplete: str) -> list[str]:
    return _fitting(registered("objectives", "OBJECTIVES", "rprune.objectives"), incomplete)


def architectures(incomplete: str) -> list[str]:
    from rprune.models.registry import names

    if incomplete.startswith("torchvision:"):
        import torchvision

        models = torchvision.models.list_models(module=torchvision.models)
        return _fitting([f"torchvision:{name}" for name in models], incomplete)
    return _fitting([*names(), "torchvision:"], incomplete)


def suites(incomplete: str) -> list[str]:
    from rprune.attacks.names import ABOUT, TABLES

    return _last([*ABOUT, *TABLES, *registered("attacks", "ATTACKS", "rprune.attacks")], incomplete)


def data(incomplete: str) -> list[str]:
    from rprune.data.sources import KINDS

    return _fitting([kind.partition("[")[0].removesuffix("FILE").removesuffix("DIR") for kind in KINDS], incomplete)


def recipes(incomplete: str) -> list[str]:
    """Shipped ones, and files."""
    names = [path.stem for path in (Path(rprune.__file__).parent / "recipes").glob("*.toml") if path.stem != "gate"]
    folder = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    files = [str(path) + "/" * path.is_dir() for path in folder.glob("*") if path.is_dir() or path.suffix == ".toml"]
    return _fitting([*names, *files], incomplete)


def formats(incomplete: str) -> list[str]:
    return _last(["safetensors", "onnx", "onnx-int8", "onnx-compact", "packed", "c"], incomplete)


def of(*names: str) -> Complete:
    """Completion from a fixed list."""
    return lambda incomplete: _fitting(names, incomplete)


def _fitting(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


def _last(names: Iterable[str], incomplete: str) -> list[str]:
    """Of several with commas the last one is completed."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _fitting(names, last)]
