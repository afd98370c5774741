"""Reading the packed format: few Brotli streams that hold every number of a sparse network. docs/formats.md says
which byte is where. NumPy, pydantic and Brotli alone: nothing here needs torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError, printable
from rprune.export import gaps
from rprune.export.gaps import Gaps
from rprune.export.packed_table import FORMAT, Kind, Scale, StoredWeight, Table, parse
from rprune.export.streams import decompress, from_planes, from_zigzag, load

TABLE = "graph"
TABLE_LIMIT = 1 << 22  # bytes of JSON
BIAS_LIMIT = 1 << 30
CHUNK = 1 << 20  # entries that are placed at a time: their int64 positions take 8 MiB, however many there are
HINT = "get the file again from where it was made"

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Packed:
    """The content of a packed file: a network as arrays, dense and in C order, by the names of its layers.

    ``layers``: those of ``models.flat.describe``. ``affine``: float32 (scale, shift) of channel-wise layers.
    ``metadata``: what the ONNX files are stamped with. Kind "int8": ``weights`` int8 (o, ...) within +-127, ``biases``
    int32 (o,) within +-2^30, ``scales`` of the weights float32 (o,) above 0, ``activations`` the scales of those layers
    whose output has one of its own (``quantization.ptq.Plan.scaled``), ``bits`` 2 to 8. Kind "float32": ``weights`` and
    ``biases`` float32, ``bits`` None, nothing of the rest.
    """

    kind: Kind
    input_shape: tuple[int, int, int]
    classes: int
    layers: list[dict[str, Any]]
    metadata: Mapping[str, str]
    weights: Mapping[str, Array]
    biases: Mapping[str, Array]
    affine: Mapping[str, tuple[Array, Array]]
    scales: Mapping[str, Array]
    activations: Mapping[str, Scale]
    bits: int | None

    def digest(self, table: bytes) -> str:
        """sha256 over the JSON of the table and all arrays, layer by layer: weight, scales and bias, or scale and
        shift."""
        sha = hashlib.sha256(table)
        for layer in self.layers:
            name = layer["name"]
            parts = [found[name] for found in (self.weights, self.scales, self.biases) if name in found]
            for array in (*parts, *self.affine.get(name, ())):
                sha.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
        return sha.hexdigest()


def unpack(file: bytes) -> Packed:
    """The content of a file from ``export.packed.pack``, proved by its digest.

    Raises InputError for any other bytes. Whatever they say, 2^29 bytes of streams and the arrays of 2^29 weights are
    the most that is decoded (below 5 GiB with all copies), each only when all that came before fits together.
    """
    try:
        return _unpack(file)
    except InputError as error:
        reason = error.message
    except MemoryError:
        reason = "it needs more memory than there is"
    # the file's own words may be part of it
    raise InputError(f"not a sound packed file: {printable(reason, 300)}", HINT)


def sizes(file: bytes) -> dict[str, int]:
    """Bytes of each stream as it lies in the file, of the ``header`` in front, and of all (``total``)."""
    streams = {name: len(stream) for name, stream in sorted(load(file)[0].items())}
    return {"header": len(file) - sum(streams.values()), **streams, "total": len(file)}


def _unpack(file: bytes) -> Packed:
    streams, header = load(file)
    if header.get("format") != FORMAT:
        raise InputError(f"its format is not '{FORMAT}', which this version reads")
    text = decompress(streams.pop(TABLE, b""), TABLE, TABLE_LIMIT)
    table, layers = parse(text)
    raw = _content(streams, table.lengths)
    numbers = {name: _Row(from_planes(raw[name], kind)) for name, kind in table.types.items()}
    for name, row in numbers.items():
        if row.array.dtype.kind == "f" and not bool(np.isfinite(row.array).all()):
            raise InputError(f"stream '{name}' has a number that is not finite")
    integers = table.kind == "int8"
    scales, biases, affine = numbers["scales"], numbers["biases"], numbers["affine"]
    if not bool((scales.array > 0).all()):
        raise InputError("a scale of weights is not above 0")
    if integers:
        biases.array = from_zigzag(biases.array)
        if not bool(((biases.array <= BIAS_LIMIT) & (biases.array >= -BIAS_LIMIT)).all()):
            raise InputError("a bias is not within +-2^30")
    products = table.products
    found = Packed(
        kind=table.kind,
        input_shape=table.input_shape,
        classes=table.classes,
        layers=layers,
        metadata=table.metadata,
        weights=_weights(table, raw["gaps"], raw["values"]),
        biases={layer.name: biases.take(layer.shape[:1]) for layer in products if table.has_bias(layer)},
        affine={layer.name: (affine.take(layer.shape), affine.take(layer.shape)) for layer in table.affine},
        scales={layer.name: scales.take(layer.shape[:1]).astype(np.float32) for layer in products if integers},
        activations=table.activations,
        bits=table.bits,
    )
    if header != {"format": FORMAT, "kind": table.kind, "sha256": found.digest(text)}:
        raise InputError("its content has another sha256 than its header says")
    return found


def _content(streams: Mapping[str, bytes], lengths: Mapping[str, int]) -> dict[str, bytes]:
    """Each stream decompressed to exactly its length; one of no bytes is not in the file."""
    wanted = {name for name, length in lengths.items() if length}
    if streams.keys() != wanted:
        raise InputError(f"it has the streams {sorted(streams)}, its table needs {sorted(wanted)}")
    found = {name: decompress(streams[name], name, lengths[name]) if name in wanted else b"" for name in lengths}
    for name, content in found.items():
        if len(content) != lengths[name]:
            raise InputError(f"stream '{name}' has {len(content)} bytes, its table says {lengths[name]}")
    return found


class _Row:
    """Arrays that lie one behind the other."""

    def __init__(self, array: Array) -> None:
        self.array, self.place = array, 0

    def take(self, shape: tuple[int, ...]) -> Array:
        start = self.place
        self.place += int(np.prod(shape, dtype=np.int64))
        return self.array[start : self.place].reshape(shape)


def _weights(table: Table, gap_bytes: bytes, value_bytes: bytes) -> dict[str, Array]:
    small = sum(stored.entries for stored in table.weights if stored.gaps == "uint8")
    single = sum(stored.entries for stored in table.weights if stored.levels or table.kind == "int8")
    gap_rows = {
        "none": _Row(np.zeros(0, np.uint8)),
        "uint8": _Row(np.frombuffer(gap_bytes, np.uint8, small)),
        "uint16": _Row(from_planes(gap_bytes[small:], np.uint16)),
    }
    codes = _Row(np.frombuffer(value_bytes, np.int8 if table.kind == "int8" else np.uint8, single))
    floats = _Row(from_planes(value_bytes[single:], np.float32))
    found = {}
    for layer, stored in zip(table.products, table.weights, strict=True):
        count = (stored.entries,)
        values = (codes if stored.levels or table.kind == "int8" else floats).take(count)
        try:
            gap = None if stored.gaps == "none" else gap_rows[stored.gaps].take(count)
            found[layer.name] = _weight(stored, gap, values, floats.take((stored.levels,)), layer.shape)
        except InputError as error:
            raise InputError(f"layer '{layer.name}': {error.message}") from None
    return found


def _weight(stored: StoredWeight, gap: Array | None, values: Array, levels: Array, shape: tuple[int, ...]) -> Array:
    if values.dtype == np.int8 and bool((values == -128).any()):
        raise InputError("an entry is -128")
    if values.dtype == np.float32 and not bool(np.isfinite(values).all()):
        raise InputError("an entry is not a finite number")
    book = None
    if stored.levels:
        ascending = bool((levels[1:] > levels[:-1]).all())
        if not ascending or not bool((np.isfinite(levels) & (levels != 0)).all()):
            raise InputError("its levels are not finite numbers other than 0, in ascending order")
        if int(values.max()) > stored.levels:
            raise InputError("an entry has no level")
        book = np.concatenate([np.zeros(1, np.float32), levels])
    if gap is None:
        return (values.copy() if book is None else book[values]).reshape(shape)
    size = int(np.prod(shape, dtype=np.int64))
    gaps.check(Gaps(gap, values), size)
    dense = np.zeros(size, values.dtype if book is None else np.float32)
    start = 0
    for first in range(0, stored.entries, CHUNK):
        part = Gaps(gap[first : first + CHUNK], values[first : first + CHUNK])
        places = gaps.positions(part) + start
        dense[places] = part.values if book is None else book[part.values]
        start = int(places[-1]) + 1
    return dense.reshape(shape)
