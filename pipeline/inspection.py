"""What is in a model file, told without running anything in it.

Needs torch for one thing alone: to say which architecture somebody's weights are of. onnx for ONNX files.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError, printable
from rprune.pipeline.intake import PICKLED, Kind, classify, opened, read_checkpoint, safetensors_header
from rprune.pipeline.pickles import StoredTensor, leaves
from rprune.pipeline.pt2 import read_package
from rprune.pipeline.states import find_state, without_wrappers
from rprune.pipeline.tensor_entries import TYPES, nonzero, numbers, of_archive

OURS = '{"format":"rprune.artifact/'
SAFETENSORS = {
    "F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
Reader = Callable[[StoredTensor], NDArray[Any]]


def contents(path: Path, layers: bool = False) -> dict[str, Any]:
    """Kind, tensors, metadata and code of a file, or of a stage folder, as JSON-able values.

    ``layers``: count the entries that are not zero of every tensor with two dimensions or more, where the file stores
    them as they are.

    Raises InputError when the file is missing, damaged, or an archive that is not to be unpacked.
    """
    if path.is_dir() and (path / "stage.json").is_file():
        return _folder(path)
    kind = classify(path)
    found: dict[str, Any] = {"kind": kind, "bytes": path.stat().st_size}
    if kind in PICKLED or kind == "torchscript":
        found |= _pickled(path, kind, layers)
    elif kind == "safetensors":
        found |= _safetensors(path, layers)
    elif kind == "exported program":
        package = read_package(path)
        found |= {"torch": printable(package.version), "operators": len(package.graph["graph"].get("nodes", []))}
        tensors = {name: package.tensors[name] for name in package.weights}
        found |= _told(tensors) | {"tensors": _rows(tensors, layers, lambda: _of_archive(path, ""))}
    elif kind == "onnx":
        found |= _onnx(path, layers)
    return found


def _pickled(path: Path, kind: Kind, layers: bool) -> dict[str, Any]:
    held = read_checkpoint(path, kind)
    root, place = held.pickle.root, held.place
    # what a TorchScript program names are its own classes
    found: dict[str, Any] = {"unsafe_globals": held.pickle.unsafe} if kind in PICKLED else {}
    text = root.get("rprune") if isinstance(root, dict) else None
    state = find_state(root, StoredTensor)
    if isinstance(text, str) and text.startswith(OURS):
        found |= _summary(text, path)
    elif state is not None:
        found |= {key: value for key, value in {"part": state.part, "prefix": state.prefix}.items() if value}
        found |= {"other_parts": list(state.others)} if state.others else {}
        found |= _told(state.state)
    tensors = dict(leaves(root)) if state is None else state.state
    if state is None and tensors:
        found |= _told(without_wrappers(tensors)[0])
    readable = place is not None and layers
    return found | {"tensors": _rows(tensors, readable, lambda: _of_archive(path, place or ""))}


def _safetensors(path: Path, layers: bool) -> dict[str, Any]:
    header = safetensors_header(path)
    texts = header.pop("__metadata__", {})
    text = texts.get("rprune")
    found: dict[str, Any] = {}
    if isinstance(text, str) and text.startswith(OURS):
        found |= _summary(text, path)
    elif texts:
        found["metadata"] = texts
    tensors = {name: _placed(entry) for name, entry in sorted(header.items())}
    if text is None and not any(name.startswith("rprune") for name in texts):
        found |= _told(without_wrappers(tensors)[0])
    return found | {"tensors": _rows(tensors, layers, lambda: _of_safetensors(path))}


def _placed(entry: dict[str, Any]) -> StoredTensor:
    """``key`` holds where its bytes are."""
    shape = tuple(entry["shape"])
    strides: list[int] = []
    step = 1
    for side in reversed(shape):
        strides.append(step)
        step *= side
    begin, end = entry["data_offsets"]
    kind = SAFETENSORS.get(entry["dtype"], entry["dtype"])
    return StoredTensor(kind, shape, tuple(reversed(strides)), 0, f"{begin}:{end}", end - begin)


@contextmanager
def _of_archive(path: Path, place: str) -> Iterator[Reader]:
    with opened(path) as archive:
        yield lambda tensor: of_archive(archive, place, tensor)


@contextmanager
def _of_safetensors(path: Path) -> Iterator[Reader]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 8 + int.from_bytes(data[:8], "little")

        def read(tensor: StoredTensor) -> NDArray[Any]:
            begin, end = (start + int(place) for place in tensor.key.split(":"))
            return numbers(data[begin:end], tensor)

        yield read


def _rows(tensors: dict[str, StoredTensor], layers: bool, opener: Callable[[], Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"name": printable(name, 400), "shape": list(tensor.shape), "type": printable(tensor.dtype)}
        for name, tensor in tensors.items()
    ]
    if layers:
        with opener() as read:
            for row, tensor in zip(rows, tensors.values(), strict=True):
                if len(tensor.shape) >= 2 and tensor.dtype in (*TYPES, "bfloat16"):
                    row["nonzero"] = nonzero(read(tensor), tensor.dtype)
    return rows


def _told(tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """Which architecture the names and shapes are of. Without torch: whose names they are."""
    from rprune.models.guess import candidates, described, guess

    try:
        import torch  # noqa: F401
    except ImportError:
        names = candidates(tensors)
        return {"architecture": f"{' or '.join(names)} by names; shapes were not compared" if names else "unknown"}
    try:
        arch = guess({name: tensor.shape for name, tensor in tensors.items()})
    except InputError as error:
        return {"architecture": f"unknown: {error.message}"}
    return {"architecture": described(arch), "classes": arch.num_classes, "channels": arch.input_shape[0]}


def _folder(path: Path) -> dict[str, Any]:
    from rprune.files import read_json

    record = read_json(path / "stage.json", "stage record")
    metadata = record.get("metadata") if isinstance(record, dict) else None
    return {"kind": "stage folder"} | _summary(json.dumps(metadata), path)


def _summary(text: str, path: Path) -> dict[str, Any]:
    """The part of an artifact's metadata that a person asks for."""
    keys = ("stage", "architecture", "norm", "eps", "objective", "seed", "sparsity", "budget")
    try:
        metadata = json.loads(text, parse_constant=_no_number)
        found = {key: metadata[key] for key in keys} | {
            "data": metadata["data"]["source"],
            "lineage": [entry["stage"] for entry in metadata["lineage"]],
        }
        unsafe = any(entry["config"].get("loaded_unsafely") is True for entry in metadata["lineage"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} has unreadable metadata", "write it with this version of rprune") from None
    return found | ({"loaded_unsafely": True} if unsafe else {})


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _onnx(path: Path, layers: bool) -> dict[str, Any]:
    from rprune.export.session import stored_weights

    model = _model(path)
    found: dict[str, Any] = {
        "opset": next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None),
        "producer": printable(" ".join(filter(None, (str(model.producer_name), str(model.producer_version))))),
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
        "initializers": len(model.graph.initializer),
        "nodes": len(model.graph.node),
        "metadata": {str(e.key): str(e.value) for e in model.metadata_props},
    }
    domains = sorted({printable(str(e.domain)) for e in model.opset_import if e.domain not in ("", "ai.onnx")})
    found |= {"domains": domains} if domains else {}
    external = [printable(str(t.name)) for t in model.graph.initializer if t.data_location or t.external_data]
    if external:
        found["external_data"] = external
    try:
        weights = stored_weights(path)
    except InputError as error:
        return found | {"refused": printable(error.message, 400)}
    counts = {name: int(np.count_nonzero(array)) for name, array in weights.items()}
    kept, total = sum(counts.values()), sum(array.size for array in weights.values())
    found["int8"] = any(array.dtype.name in ("int8", "uint8") for array in weights.values())
    found["weights"] = {"kept": kept, "total": total, "sparsity": round(1 - kept / max(total, 1), 6)}
    found["tensors"] = [
        {"name": printable(name), "shape": list(array.shape), "type": array.dtype.name}
        | ({"nonzero": counts[name]} if layers else {})
        for name, array in weights.items()
    ]
    return found


def _model(path: Path) -> Any:
    """The protobuf of a file, parsed and nothing else."""
    from onnx import ModelProto

    from rprune.export.guard import MOST_BYTES

    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path} is larger than 2 GiB", "give a smaller model")
    try:
        return ModelProto.FromString(path.read_bytes())
    except Exception as error:  # protobuf's errors share no base
        reason = printable(str(error).partition("\n")[0]) or type(error).__name__
        raise InputError(f"{path} is not a valid ONNX file: {reason}", "export the model again") from None


def _value(value: Any) -> dict[str, Any]:
    from onnx import TensorProto

    kind = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else printable(str(dim.dim_param)) for dim in kind.shape.dim]
    known = kind.elem_type in TensorProto.DataType.values()
    return {
        "name": printable(str(value.name)),
        "shape": shape,
        "type": TensorProto.DataType.Name(kind.elem_type).lower() if known else str(kind.elem_type),
    }
