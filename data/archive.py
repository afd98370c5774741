"""What no ZIP archive may be, and the arrays of an .npz file, within what its size allows for. NumPy only."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_MEMBERS = 100_000
MOST_TIMES = 200  # the size of the file; deflated zeros come to 1,000, images and labels to 10
ARRAYS = 1 << 26  # bytes that any .npz file may ask for
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def wrong_with(archive: zipfile.ZipFile, size: int, spare: int) -> str | None:
    """Why an archive of ``size`` bytes is not to be unpacked: a member lies outside or is there twice, or it grows
    absurdly. ``spare``: bytes that it may unpack to, however small it is.
    """
    entries = archive.infolist()
    if len(entries) > MOST_MEMBERS:
        return f"it has {len(entries):,} members"
    if len({entry.filename for entry in entries}) < len(entries):
        return "a member is in it twice"
    if sum(entry.compress_size for entry in entries) > size:
        return "its members overlap"
    asked = sum(entry.file_size for entry in entries)
    if asked > max(spare, MOST_TIMES * size):
        return f"its {size:,} bytes unpack to {asked:,}"
    for entry in entries:
        name = f"its member {entry.filename!r:.80}"
        ways = PurePosixPath(entry.filename), PureWindowsPath(entry.filename)
        if any(way.is_absolute() or way.drive or ".." in way.parts for way in ways):
            return f"{name} leads out of it"
        if entry.flag_bits & 1:
            return f"{name} is encrypted"
    return None


def read_npz(path: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """The arrays of these names that the file has; nothing else of it is read, and no pickle.

    Raises ValueError for what is :func:`wrong_with` it and for arrays that their members do not hold; and what zipfile,
    zlib and numpy raise for damaged files.
    """
    with zipfile.ZipFile(path) as archive:
        if wrong := wrong_with(archive, path.stat().st_size, ARRAYS):
            raise ValueError(wrong)
        there = {member.filename: member for member in archive.infolist()}
        members = {name: there[f"{name}.npy"] for name in names if f"{name}.npy" in there}
        found = {}
        for name, member in members.items():
            with archive.open(member) as file:
                _check(file, member.file_size, name)
            with archive.open(member) as file:
                found[name] = np.lib.format.read_array(file, allow_pickle=False)
        return found


def _check(file: Any, size: int, name: str) -> None:
    """Its shape asks for the bytes that are there: memory is taken by the shape."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"{name} has format {version}")
    shape, _, kind = HEADERS[version](file)
    if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != size - file.tell():
        raise ValueError(f"{name} has not the bytes of {kind}{shape}")
