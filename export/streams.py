"""Byte streams in one safetensors file: Brotli, byte planes, strict JSON. NumPy and Brotli only, no torch.

Everything here may come from a hostile file: sizes are known before a stream is decompressed, and a stream that does
not have exactly the promised size is refused without ever holding more of it than that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import brotli
import numpy as np
import safetensors
from numpy.typing import NDArray

from rprune.errors import InputError
from rprune.files import canonical_json

QUALITY, QUALITY_LARGE, LARGE = 11, 6, 1 << 22
"""Brotli's best costs a second for half a megabyte: streams over 4 MiB, those of dense networks, take a faster one."""
HEADER_LIMIT = 1 << 16  # bytes of the safetensors header
STEP = 1 << 22  # bytes decompressed at a time
METADATA = "__metadata__"


def compress(raw: bytes) -> bytes:
    found: bytes = brotli.compress(raw, quality=QUALITY if len(raw) <= LARGE else QUALITY_LARGE)
    return found


def decompress(stream: bytes, name: str, limit: int) -> bytes:
    """The content, of at most ``limit`` bytes. Raises InputError when it is longer, damaged, cut off or followed by
    anything."""
    decoder = brotli.Decompressor()
    parts: list[bytes] = []
    size = 0
    while not decoder.is_finished():
        try:
            # bytes after the end of a stream are an error of the decoder's own
            part = decoder.process(b"" if parts else stream, output_buffer_limit=min(STEP, limit - size + 1))
        except brotli.error:
            raise InputError(f"stream '{name}' is damaged") from None
        size += len(part)
        if size > limit:
            raise InputError(f"stream '{name}' is longer than {limit} bytes")
        if parts and not part and not decoder.is_finished():
            raise InputError(f"stream '{name}' ends early")
        parts.append(part)
    return b"".join(parts)


def planes(array: NDArray[Any]) -> bytes:
    """All first (lowest) bytes, then all second ones, and so on: bytes of one place resemble each other."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()


def from_planes(raw: bytes, dtype: Any) -> NDArray[Any]:
    kind = np.dtype(dtype)
    columns = np.frombuffer(raw, np.uint8).reshape(kind.itemsize, -1)
    little: NDArray[Any] = np.ascontiguousarray(columns.T).view(kind.newbyteorder("<"))
    return little.reshape(-1).astype(kind, copy=False)


def zigzag(array: NDArray[np.int32]) -> NDArray[np.uint32]:
    """0, -1, 1, -2 ... to 0, 1, 2, 3 ...: the high bytes of small numbers are 0, whatever the sign."""
    return ((array << 1) ^ (array >> 31)).view(np.uint32)


def from_zigzag(array: NDArray[np.uint32]) -> NDArray[np.int32]:
    return ((array >> 1) ^ (0 - (array & 1))).view(np.int32)


def save(streams: Mapping[str, bytes], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of one-dimensional U8 tensors. Equal content gives equal bytes, unlike ``safetensors.save``,
    which writes its metadata in random order."""
    header: dict[str, Any] = {METADATA: dict(metadata)}
    start = 0
    for name, stream in sorted(streams.items()):
        end = start + len(stream)
        header[name] = {"dtype": "U8", "shape": [len(stream)], "data_offsets": [start, end]}
        start = end
    text = canonical_json(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(stream for _, stream in sorted(streams.items()))


def load(content: bytes) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(streams, metadata) of a file from :func:`save`. Raises InputError for any other."""
    size = int.from_bytes(content[:8], "little")
    if size > HEADER_LIMIT:
        raise InputError(f"its header has {size} bytes, more than {HEADER_LIMIT}")
    header = strict_json(content[8 : 8 + size])
    try:
        tensors = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise InputError(f"it is no safetensors file: {error}") from None
    for name, tensor in tensors:
        if tensor["dtype"] != "U8" or len(tensor["shape"]) != 1:
            raise InputError(f"stream '{name}' is not a row of bytes")
    return {name: bytes(tensor["data"]) for name, tensor in tensors}, header.get(METADATA) or {}


def strict_json(content: bytes) -> dict[str, Any]:
    """A JSON object without repeated keys, NaN and infinities. Raises InputError for anything else."""
    try:
        found = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"its JSON cannot be read: {reason}") from None
    if not isinstance(found, dict):
        raise InputError("its JSON is not an object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")
