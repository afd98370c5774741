"""Small files that ask for much: run as a program, it reads each of them, and prints what came of it, time and memory.

Its argument is a folder with the artifact of a tiny net, model.pt.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import resource
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rprune.data.sources import load_data
from rprune.errors import RpruneError
from rprune.evaluation.ledger import Ledger
from rprune.files import read_json
from rprune.pipeline.artifact import load_any, load_artifact, save_artifact
from rprune.pipeline.recipe import read_recipe
from rprune.reports.evidence import read_witnesses
from rprune.threat import ThreatModel

HUGE = 1 << 40


def npz(folder: Path, **changes: bytes) -> Path:
    """A valid file, but for members that ``changes`` replace."""
    path, pixels, labels = folder / "x.npz", np.zeros((4, 8, 8), np.uint8), np.arange(4) % 2
    arrays = {"train_images": pixels, "train_labels": labels, "test_images": pixels, "test_labels": labels}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(f"{name}.npy", changes.get(name, content.getvalue()))
    return path


def header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": kind, "fortran_order": False, "shape": shape})
    return content.getvalue()


def saved(array: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def zeros_that_unpack(folder: Path) -> Any:
    return load_data(f"npz:{npz(folder, train_images=header((1 << 28,)) + bytes(1 << 28))}")


def shape_without_bytes(folder: Path) -> Any:
    return load_data(f"npz:{npz(folder, train_images=header((HUGE,)) + bytes(9))}")


def long_strings(folder: Path) -> Any:
    return load_data(f"npz:{npz(folder, train_labels=header((4,), f'<U{1 << 30}'))}")


def label_beyond_counting(folder: Path) -> Any:
    return load_data(f"npz:{npz(folder, train_labels=saved(np.array([0, 1, 2, HUGE])))}")


def image_of_few_bytes(folder: Path) -> Any:
    """A PNG of 60,000 x 60,000 pixels, all black."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return load_data(f"imagefolder:{folder}?size=8")


def shard(folder: Path, members: list[tuple[str, bytes]], change: Callable[[bytearray], None] | None = None) -> str:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    changed = bytearray(content.getvalue())
    if change is not None:
        change(changed)
    (folder / "train-0.tar").write_bytes(changed)
    return f"webdataset:{folder}"


def one_long_name_among_many(folder: Path) -> Any:
    """An array of names gives each the room of the longest: 2 MB times 2,000."""
    members = [(f"{i}.{suffix}", b"0") for i in range(2000) for suffix in ("png", "cls")]
    return load_data(shard(folder, [*members, ("x" * 2_000_000 + ".png", b""), ("x" * 2_000_000 + ".cls", b"0")]))


def member_that_leads_back(folder: Path) -> Any:
    """A negative size: some versions of tarfile go round in circles."""

    def change(content: bytearray) -> None:
        content[124:136] = (256**12 - 1024).to_bytes(12, "big")  # base 256
        content[148:156] = b" " * 8
        content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()

    return load_data(shard(folder, [("0.txt", b""), ("1.png", b""), ("1.cls", b"0")], change))


def header_longer_than_the_file(folder: Path) -> Any:
    (folder / "x.safetensors").write_bytes((HUGE).to_bytes(8, "little") + b"{}")
    return load_any(folder / "x.safetensors")


def witnesses_without_bytes(folder: Path) -> Any:
    table = {"x": {"dtype": "U8", "shape": [HUGE, 1, 8, 8], "data_offsets": [0, HUGE * 64]}}
    text = json.dumps(table).encode()
    (folder / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    try:
        return read_witnesses(folder / "x.safetensors")
    except ValueError as error:  # as it says
        raise RpruneError(str(error)) from None


def view_of_one_number(folder: Path) -> Any:
    """A tensor of 2^40 entries, all of them the same number in memory."""
    found = load_artifact(folder.parent / "model.pt")
    found.state["features.0.weight"] = torch.zeros(1).expand(HUGE)
    save_artifact(found, folder / "x.pt")
    return load_artifact(folder / "x.pt").digest


def layer_beyond_memory(folder: Path) -> Any:
    found = load_artifact(folder.parent / "model.pt")
    architecture = found.metadata.architecture | {"name": "lenet", "num_classes": 10, "kwargs": {"width": 1 << 22}}
    save_artifact(found.with_metadata(architecture=architecture), folder / "x.safetensors")
    return load_artifact(folder / "x.safetensors").model()


def witness_that_unpacks(folder: Path) -> Any:
    packed = base64.b64encode(zlib.compress(bytes(1 << 28))).decode()
    witness = {"predicted": 1, "size": 0.1, "exact": True, "shape": [1, 1, 8, 8], "x": packed}
    lines = [
        {"format": "rprune.ledger/1", "key": {}},
        {"attack": "a", "rows": [[0, "fooled", 1, 0.0, witness]] * 3},
    ]
    (folder / "x.jsonl").write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    ledger = Ledger.open(folder / "x.jsonl", {})
    assert ledger.witnesses[0][1].x.shape == (1, 1, 8, 8)
    raise RpruneError("no more than its shape was unpacked")


def text_beyond_reason(folder: Path) -> Any:
    with (folder / "x.json").open("wb") as file:
        file.truncate(1 << 34)
    return read_json(folder / "x.json", "report")


def brackets_in_brackets(folder: Path) -> Any:
    (folder / "x.json").write_text("[" * 1_000_000)
    return read_json(folder / "x.json", "report")


def recipe_of_brackets(folder: Path) -> Any:
    (folder / "x.toml").write_text("a = " + "[" * 1_000_000)
    return read_recipe(folder / "x.toml")


def radius_of_many_digits(_: Path) -> Any:
    return ThreatModel.of("linf", "1e999999999")


BOMBS = [
    zeros_that_unpack, shape_without_bytes, long_strings, label_beyond_counting, image_of_few_bytes,
    one_long_name_among_many, member_that_leads_back, header_longer_than_the_file, witnesses_without_bytes,
    view_of_one_number, layer_beyond_memory, witness_that_unpacks, text_beyond_reason, brackets_in_brackets,
    recipe_of_brackets, radius_of_many_digits,
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Came:
    """``memory``: MiB that the process had needed at most when it was over, beyond what it had needed before any."""

    of: str
    to: str
    memory: int
    seconds: float


def main(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
    load_artifact(folder / "model.pt").model()  # whatever that imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb in BOMBS:
        (folder / bomb.__name__).mkdir()
        started = time.process_time()
        try:
            bomb(folder / bomb.__name__)
            came = "read"
        except RpruneError as error:
            came = "refused" if error.message else "no word"
        except Exception as error:
            came = f"{type(error).__name__}: {error}"[:300]
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        print(
            json.dumps(dataclasses.asdict(Came(bomb.__name__, came, memory, time.process_time() - started))), flush=True
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
