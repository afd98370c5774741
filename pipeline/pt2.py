"""The files of ``torch.export.save`` read as the data that they are, without torch.

``torch.export.load`` would unpickle what a file marks as pickled, import what its tree specifications name, evaluate
its symbolic shapes as Python and call any function of torch by name. None of that is done here.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rprune.errors import InputError
from rprune.files import parsed_json
from rprune.pipeline.intake import member, opened, top
from rprune.pipeline.pickles import WIDTHS, StoredTensor

SCALARS = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64", 12: "bool",
    13: "bfloat16",
}  # fmt: skip
"""Types of entries by the numbers of the schema (torch/_export/serde/schema.py, ScalarType)."""

MOST_JSON = 64 << 20
HINT = "export it again with this version of torch, or give a state_dict"


@dataclass(frozen=True, eq=False)
class Package:
    """``graph``: the table of the graph module; ``tensors``: weights, buffers and constants by name.

    ``weights``: the names that are the state_dict's.
    """

    path: Path
    graph: dict[str, Any]
    tensors: dict[str, StoredTensor]
    weights: tuple[str, ...]
    version: str = ""


def read_package(path: Path) -> Package:
    """The one program of a .pt2 file. Raises InputError when it is damaged, older than torch 2.8, or holds pickles."""
    with opened(path) as archive:
        place = top(archive, path, "archive_format")
        models = [n for n in archive.namelist() if n.startswith(f"{place}models/") and n.endswith(".json")]
        if len(models) != 1:
            raise InputError(f"{path} holds {len(models)} programs", "export one")
        name = Path(models[0]).stem
        model = _json(archive, models[0])
        weights = _tensors(archive, path, f"{place}data/weights/", f"{name}_weights_config.json")
        constants = _tensors(archive, path, f"{place}data/constants/", f"{name}_constants_config.json")
    graph = model.get("graph_module")
    if not isinstance(graph, dict) or not isinstance(graph.get("graph"), dict):
        raise InputError(f"{path} has no graph", HINT)
    return Package(path, graph, constants | weights, tuple(weights), str(model.get("torch_version", "")))


def _tensors(archive: zipfile.ZipFile, path: Path, folder: str, config: str) -> dict[str, StoredTensor]:
    table = _json(archive, folder + config).get("config")
    if not isinstance(table, dict):
        raise InputError(f"{path}: {config} is no table of tensors", HINT)
    return {name: _stored(archive, path, folder, name, entry) for name, entry in table.items()}


def _stored(archive: zipfile.ZipFile, path: Path, folder: str, name: str, entry: Any) -> StoredTensor:
    try:
        if entry["use_pickle"] or not isinstance(entry["tensor_meta"], dict):
            raise InputError(f"{path}: {name!r:.80} is pickled, and pickles in such files are never run", HINT)
        meta, key = entry["tensor_meta"], folder + entry["path_name"]
        sizes, strides = ([_int(n) for n in meta[field]] for field in ("sizes", "strides"))
        held = archive.getinfo(key).file_size
        kind = SCALARS[meta["dtype"]]
        offset, entries = _int(meta["storage_offset"]), held // WIDTHS[kind]
        found = StoredTensor(kind, tuple(sizes), tuple(strides), offset, key, entries)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {name!r:.80} is no tensor of it: {error!r:.80}", HINT) from None
    if len(sizes) != len(strides) or not found.fits:
        raise InputError(f"{path}: {name!r:.80} is larger than what is stored", HINT)
    return found


def _int(number: Any) -> int:
    value = number["as_int"]
    if type(value) is not int or value < 0:
        raise ValueError("a size that is no number")
    return value


def _json(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    try:
        found = parsed_json(member(archive, name, MOST_JSON).decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{archive.filename}: {name!r:.80} cannot be read: {error!s:.80}", HINT) from None
    if not isinstance(found, dict):
        raise InputError(f"{archive.filename}: {name!r:.80} is no table", HINT)
    return found
