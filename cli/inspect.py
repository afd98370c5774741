from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rprune.cli import options as o
from rprune.cli.console import print_json, print_table


def inspect(file: Annotated[Path, typer.Argument(help="Any model file.")], as_json: o.Json = False) -> None:
    """What is in this file? Nothing in it is ever executed."""
    found = contents(file)
    if as_json:
        print_json(found)
        return
    tensors = found.pop("tensors", [])
    print_table(
        str(file),
        ["", ""],
        [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in found.items()],
    )
    if tensors:
        print_table(
            f"{len(tensors)} tensors",
            ["name", "shape", "type"],
            [[t["name"], str(t["shape"]), t["type"]] for t in tensors],
        )


def contents(file: Path) -> dict[str, Any]:
    """Kind, tensors, and rprune's metadata of a file, as JSON-able values."""
    from rprune.export.session import load_onnx, weight_counts
    from rprune.pipeline.intake import classify, pickled_names, safetensors_header

    kind = classify(file)
    found: dict[str, Any] = {"kind": kind, "bytes": file.stat().st_size}
    if kind == "checkpoint":
        unsafe, strings = pickled_names(file)
        found["unsafe_globals"] = unsafe
        text = next((s for s in strings if s.startswith('{"format":"rprune.artifact/')), None)
        if text is not None:
            found |= summary(json.loads(text))
    elif kind == "safetensors":
        header = safetensors_header(file)
        text = header.pop("__metadata__", {}).get("rprune")
        if text is not None:
            found |= summary(json.loads(text))
        found["tensors"] = [{"name": n, "shape": t["shape"], "type": t["dtype"]} for n, t in sorted(header.items())]
    elif kind == "onnx":
        model = load_onnx(file)
        found["opset"] = model.opset_import[0].version
        found["metadata"] = {entry.key: entry.value for entry in model.metadata_props}
        counts = weight_counts(file)
        kept, total = sum(c for _, c in counts.values()), sum(_size(shape) for shape, _ in counts.values())
        found["weights"] = {"kept": kept, "total": total, "sparsity": round(1 - kept / max(total, 1), 6)}
    return found


def summary(metadata: dict[str, Any]) -> dict[str, Any]:
    """The part of an artifact's metadata that a person asks for."""
    keys = ("stage", "architecture", "norm", "eps", "objective", "seed", "sparsity", "budget")
    return {key: metadata[key] for key in keys} | {
        "data": metadata["data"]["source"],
        "lineage": [entry["stage"] for entry in metadata["lineage"]],
    }


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
