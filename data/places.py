"""Where the bytes of images lie: in files of their own, or inside tar shards. NumPy only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError

Names: TypeAlias = NDArray[Any]
"""Bytes of one width (dtype S), as the system encodes names."""


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """The bytes of one image: ``size`` bytes of a file from ``offset`` on, or all to its end where size is -1."""

    path: Path
    member: str = ""  # its name inside a shard
    offset: int = 0
    size: int = -1

    def __str__(self) -> str:
        return f"{self.member} in {self.path}" if self.member else str(self.path)

    def read(self) -> bytes:
        """Raises InputError when the file is gone, or not readable."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise InputError(f"cannot read image {self}: {error}", "remove or repair the file") from None


@dataclass(frozen=True, eq=False)
class ImagePlaces:
    """n images, one array a property: worker processes share arrays, while objects for each image would be copied."""

    files: Names  # (f,) paths
    file: NDArray[np.int64]  # (n,) which of the files
    member: Names  # (n,)
    offset: NDArray[np.int64]  # (n,)
    size: NDArray[np.int64]  # (n,)

    @classmethod
    def whole(cls, paths: Sequence[bytes]) -> ImagePlaces:
        """Files of one image each."""
        count = len(paths)
        none = np.zeros(count, np.int64)
        return cls(np.array(paths, np.bytes_), np.arange(count), np.zeros(count, "S1"), none, none - 1)

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> ImagePlace:
        path = Path(os.fsdecode(self.files[self.file[index]]))
        return ImagePlace(path, os.fsdecode(self.member[index]), int(self.offset[index]), int(self.size[index]))

    def __iter__(self) -> Iterator[ImagePlace]:
        return map(self.__getitem__, range(len(self)))

    def select(self, indices: NDArray[np.int64]) -> ImagePlaces:
        at = indices
        return ImagePlaces(self.files, self.file[at], self.member[at], self.offset[at], self.size[at])

    def as_on_disk(self) -> NDArray[np.int64]:
        """Indices of the images in the order in which they lie, so that a shard is read from front to back."""
        return np.lexsort((self.offset, self.file))
