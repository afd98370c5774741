"""What is in a model file, found without running anything in it and without torch.

docs/models.md says what rprune does with each kind.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rprune.data.archive import wrong_with
from rprune.errors import InputError
from rprune.files import parsed_json
from rprune.pipeline.pickles import WIDTHS, Pickle, read_pickle

Kind = Literal[
    "safetensors", "checkpoint", "torchscript", "exported program", "onnx", "old checkpoint", "bare pickle", "unknown"
]
PROGRAMS = ("torchscript", "exported program")
PICKLED = ("checkpoint", "old checkpoint", "bare pickle")
OLD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of torch.save before 1.6
MOST_MEMBER, MOST_ARCHIVE, MOST_PICKLE = 4 << 30, 16 << 30, 256 << 20  # bytes, unpacked
SPARE = 1 << 20  # bytes that any archive may unpack to
_HEADER_LIMIT = 100 << 20


def classify(path: Path) -> Kind:
    """The kind of a model file, from its first bytes and its archive's member names.

    Raises InputError when the file is missing, empty, an archive that is cut short, or one that :func:`opened` refuses.
    """
    if path.is_dir():
        files = ", ".join(sorted(p.name for p in path.glob("*.*"))[:6])
        raise InputError(f"{path} is a folder", f"name a file in it: {files}")
    if not path.is_file():
        raise InputError(f"model file {path} is not there", "check the path")
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise InputError(f"{path} is empty", "write the model again")
    if head[:4] == b"PK\x03\x04":
        with opened(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
        if any(name.startswith("code/") for name in names) or "constants.pkl" in names:
            return "torchscript"
        if any(name.startswith("models/") for name in names) or "archive_format" in names:
            return "exported program"
        return "checkpoint" if "data.pkl" in names else "unknown"
    size = struct.unpack("<Q", head[:8])[0] if len(head) >= 9 else 0
    if head[8:9] == b"{" and 0 < size < _HEADER_LIMIT:
        return "safetensors"
    if head[:15] == OLD:
        return "old checkpoint"
    if head[:1] == b"\x80":
        return "bare pickle"
    return "onnx" if path.suffix == ".onnx" else "unknown"


def explain(kind: Kind) -> str:
    return {
        "torchscript": "a TorchScript program, not weights",
        "exported program": "a torch.export program, not weights",
        "onnx": "an ONNX file, not weights",
        "bare pickle": "a bare pickle, which is never run",
        "unknown": "no model file that rprune knows",
    }.get(kind, f"a {kind} file")


def opened(path: Path) -> zipfile.ZipFile:
    """A ZIP archive with nothing :func:`wrong_with` it, and of no more than models come to.

    Raises InputError otherwise; nothing was unpacked then.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error):
        raise InputError(f"{path} is cut short or damaged", "copy or write the file again") from None
    sizes = [entry.file_size for entry in archive.infolist()]
    wrong = wrong_with(archive, path.stat().st_size, SPARE)
    if max(sizes, default=0) > MOST_MEMBER or sum(sizes) > MOST_ARCHIVE:
        wrong = wrong or f"it unpacks to more than {MOST_MEMBER >> 30} GiB a member or {MOST_ARCHIVE >> 30} GiB in all"
    if wrong is not None:
        archive.close()
        raise InputError(f"{path}: {wrong}", "nothing of it was unpacked; get the file from a source you trust")
    return archive


def member(archive: zipfile.ZipFile, name: str, most: int = MOST_MEMBER) -> bytes:
    """The bytes of a member. Raises InputError when it is not there, damaged, or larger than ``most``."""
    where = archive.filename
    try:
        entry = archive.getinfo(name)
        if entry.file_size > most:
            raise InputError(f"{where}: {name!r:.80} has {entry.file_size:,} bytes", "give a smaller model")
        return archive.read(entry)
    except KeyError:
        raise InputError(f"{where} has no {name!r:.80}", "write the file again") from None
    except Exception as error:  # zlib, zipfile and codecs share no base; InputError is one of them
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} is damaged at {name!r:.80}", "copy or write the file again") from None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a pickled file holds; ``place``: before the names of its storages in the archive."""

    pickle: Pickle
    place: str | None = None


def read_checkpoint(path: Path, kind: Kind) -> Checkpoint:
    """The pickle of a checkpoint, a TorchScript program or a bare pickle, as data.

    Raises InputError when it is damaged, or a tensor in it is larger than what is stored.
    """
    if kind in ("checkpoint", "torchscript"):
        with opened(path) as archive:
            place = top(archive, path, "data.pkl")
            pickle = read_pickle(member(archive, f"{place}data.pkl", MOST_PICKLE), str(path))
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        for tensor in pickle.tensors:
            held, wanted = sizes.get(f"{place}data/{tensor.key}", 0), tensor.entries * WIDTHS.get(tensor.dtype, 1)
            if held < wanted:
                raise InputError(f"{path}: a tensor asks for {wanted:,} bytes of {held:,}", "write the file again")
        return Checkpoint(pickle, f"{place}data/")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if kind == "bare pickle":
            return Checkpoint(read_pickle(data, str(path)))
        parts = [read_pickle(data, str(path)) for _ in range(5)]  # magic, version, machine; the content; its storages
        held = data.size() - data.tell()
    stored = {t.key: t.entries * WIDTHS.get(t.dtype, 1) for t in parts[3].tensors}
    if sum(stored.values()) > held:
        raise InputError(f"{path} is cut short or damaged", "copy or write the file again")
    names = frozenset(name for part in parts for name in part.globals)
    return Checkpoint(Pickle(parts[3].root, names, parts[3].tensors))


def top(archive: zipfile.ZipFile, path: Path, name: str) -> str:
    """The folder, with its slash, in which an archive keeps everything. Raises InputError when it cannot be told."""
    found = [entry[: -len(name)] for entry in archive.namelist() if entry.partition("/")[2] == name or entry == name]
    if len(found) != 1:
        raise InputError(f"{path} has {len(found)} members '{name}'", "write the file again")
    return found[0]


def safetensors_header(path: Path) -> dict[str, Any]:
    """Names, types, shapes and places of a safetensors file; ``__metadata__`` is a table of text, where there is one.

    Raises InputError when the header is damaged, or says other than the file holds.
    """
    hint = "write the file again"
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        held = path.stat().st_size - 8 - size
        try:
            header = parsed_json(file.read(min(size, _HEADER_LIMIT)).decode())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} has a damaged header: {error}", hint) from None
    if not isinstance(header, dict) or not _texts(header.get("__metadata__", {})):
        raise InputError(f"{path} has a damaged header: it is no table of tensors", hint)
    for name, entry in header.items():
        if name != "__metadata__" and not _placed(entry, held):
            raise InputError(f"{path} has a damaged header: {name!r:.80} is no tensor of it", hint)
    return header


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _placed(entry: Any, held: int) -> bool:
    """Whether a header's entry is a tensor within so many bytes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(place, list) or len(place) != 2:
        return False
    return all(type(n) is int and n >= 0 for n in (*shape, *place)) and place[0] <= place[1] <= held
