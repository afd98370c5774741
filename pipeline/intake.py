"""What is in a file, found without running anything in it and without torch."""

from __future__ import annotations

import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, Literal

from rprune.errors import InputError

Kind = Literal["safetensors", "checkpoint", "torchscript", "exported program", "onnx", "old pickle", "unknown"]
STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "ema")
_HEADER_LIMIT = 100 << 20
# all that torch needs to rebuild plain tensors; anything else in a pickle is code of somebody
_REBUILD = ("_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_tensor", "_rebuild_qtensor")
_DTYPES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
SAFE_GLOBALS = frozenset(
    {"collections.OrderedDict", "_codecs.encode", "torch.Size", "torch.storage.UntypedStorage"}
    | {f"torch._utils.{name}" for name in _REBUILD}
    | {f"torch.{name}Storage" for name in _DTYPES}
)


def classify(path: Path) -> Kind:
    """The kind of a model file, from its first bytes and its archive's member names.

    Raises InputError when the file is missing, empty, or an archive that is cut short.
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
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name.partition("/")[2] or name for name in archive.namelist()]
        except zipfile.BadZipFile:
            raise InputError(f"{path} is cut short or damaged", "copy or write the file again") from None
        if any(name.startswith("code/") or name == "constants.pkl" for name in names):
            return "torchscript"
        if any(name.startswith("models/") or name == "archive_format" for name in names):
            return "exported program"
        return "checkpoint" if "data.pkl" in names else "unknown"
    size = struct.unpack("<Q", head[:8])[0] if len(head) >= 9 else 0
    if head[8:9] == b"{" and 0 < size < _HEADER_LIMIT:
        return "safetensors"
    if head[:1] == b"\x80":
        return "old pickle"
    return "onnx" if path.suffix == ".onnx" else "unknown"


def explain(kind: Kind) -> str:
    return {
        "torchscript": "a TorchScript program, not weights",
        "exported program": "a torch.export program, not weights",
        "onnx": "an ONNX file, not weights",
        "old pickle": "a bare pickle, which is never run",
        "unknown": "no model file that rprune knows",
    }.get(kind, f"a {kind} file")


def pickled_names(path: Path) -> tuple[list[str], list[str]]:
    """(unsafe globals, strings) of a checkpoint's pickle, read opcode by opcode; nothing is unpickled.

    A global whose name cannot be read off the opcodes is listed as unsafe.
    """
    with zipfile.ZipFile(path) as archive:
        member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        data = archive.read(member)
    found: set[str] = set()
    strings: list[str] = []
    recent: list[str | None] = []  # the last values pushed; None where it is no string
    memo: dict[int, str | None] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST"):
                found.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.add(".".join(part or "<hidden>" for part in (recent[-2:] or ["<hidden>"])))
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = recent[-1] if recent else None
            elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(str(argument))] = recent[-1] if recent else None
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                recent.append(memo.get(int(str(argument))))
            elif opcode.stack_after or opcode.name in ("GLOBAL", "INST"):
                recent.append(argument if isinstance(argument, str) and "UNICODE" in opcode.name else None)
                if isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} has a damaged pickle: {error}", "write the file again") from None
    return sorted(found - SAFE_GLOBALS), strings


def safetensors_header(path: Path) -> dict[str, Any]:
    """Names, types and shapes of a safetensors file. Raises InputError when its header is damaged."""
    import json

    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        try:
            header = json.loads(file.read(size))
        except ValueError as error:
            raise InputError(f"{path} has a damaged header: {error}", "write the file again") from None
    assert isinstance(header, dict)
    return header
