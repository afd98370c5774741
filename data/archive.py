"""Arrays of an .npz file that takes no more memory than its size allows for. NumPy only."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_TIMES = 200  # the size of the file; deflated zeros come to 1,000, images and labels to 10
ALWAYS = 1 << 26  # bytes that any file may ask for
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """The arrays of these names that the file has; nothing else of it is read, and no pickle.

    Raises ValueError for arrays that their members do not hold, and where they come to more than ``MOST_TIMES`` the
    file; and what zipfile, zlib and numpy raise for damaged files.
    """
    with zipfile.ZipFile(path) as archive:
        there = {member.filename: member for member in archive.infolist()}
        members = {name: there[f"{name}.npy"] for name in names if f"{name}.npy" in there}
        asked, size = sum(member.file_size for member in members.values()), path.stat().st_size
        if asked > max(ALWAYS, MOST_TIMES * size):
            raise ValueError(f"its {size:,} bytes unpack to {asked:,}")
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
