"""The numbers of tensors that a file stores as they are: read with numpy, so that they can be counted without torch."""

from __future__ import annotations

import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError
from rprune.pipeline.intake import member
from rprune.pipeline.pickles import StoredTensor

AS = {"bfloat16": np.dtype("<u2")}  # numpy has no such type; the same bits
TYPES = {
    "float32": "<f4", "float64": "<f8", "float16": "<f2", "int64": "<i8", "int32": "<i4", "int16": "<i2",
    "int8": "<i1", "uint8": "<u1", "bool": "|b1",
}  # fmt: skip


def numbers(data: bytes | memoryview, tensor: StoredTensor) -> NDArray[Any]:
    """The tensor's entries out of the bytes of its storage; those of bfloat16 as the bits that they are.

    Raises InputError for types that numpy does not have, and for storages that are too short.
    """
    kind = AS.get(tensor.dtype) or (np.dtype(TYPES[tensor.dtype]) if tensor.dtype in TYPES else None)
    if kind is None:
        raise InputError(f"tensors of {tensor.dtype!r:.40} cannot be read", "store them as float32")
    if tensor.reach * kind.itemsize > len(data):
        raise InputError("a tensor is larger than what is stored", "write the file again")
    if not tensor.reach:
        return np.empty(tensor.shape, kind)
    flat = np.frombuffer(data, kind, tensor.reach)
    steps = tuple(step * kind.itemsize for step in tensor.stride)
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps, writeable=False)


def nonzero(values: NDArray[Any], dtype: str) -> int:
    """Entries that are not zero; bfloat16 has two zeros among its bits."""
    return int(np.count_nonzero(values & 0x7FFF if dtype == "bfloat16" else values))


def of_archive(archive: zipfile.ZipFile, place: str, tensor: StoredTensor) -> NDArray[Any]:
    """The entries of a tensor whose storage is a member of an archive."""
    return numbers(member(archive, f"{place}{tensor.key}"), tensor)
