"""What every attack did to every sample, kept as it goes: an append-only file that survives a kill.

The first line of the file is its key: what the rows hold for (artifact, data, suite, threat, seed, code). Every further
line is one attack on some samples, whole or not there. Rows do not depend on how samples were put into batches, on
their order, on shards, or on where a run was interrupted.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from rprune.evaluation.journal import Journal
from rprune.files import canonical_json

MOST_BYTES = 1 << 28  # of one image
Status = Literal["survived", "fooled", "miss", "invalid"]
"""Survived; fooled by the artifact's verdict; the search net's success that the artifact does not share; logits that
are not finite at the point found. An attack without a row did not run on the sample."""


class Witness(NamedTuple):
    """A point that breaks a sample: the artifact's class there, its distance, and whether it is one of 8-bit pixels."""

    x: Tensor
    predicted: int
    size: float
    exact: bool


class Row(NamedTuple):
    """One attack on one sample. ``margin``: the lowest that the search net had; None where nothing was found."""

    status: Status
    queries: int
    margin: float | None
    witness: Witness | None = None


class Clean(NamedTuple):
    label: int
    predicted: int


@dataclass(eq=False)
class Ledger(Journal):
    """Rows by attack and sample id. Without ``path`` they stay in memory."""

    FORMAT, WHAT, WORK, COMMAND = "rprune.ledger/1", "ledger", "attack", "rprune attack"

    def __post_init__(self) -> None:
        self.clean: dict[int, Clean] = {}
        self.rows: dict[str, dict[int, Row]] = {}
        self.witnesses: dict[int, tuple[str, Witness]] = {}  # sample -> the attack that broke it first, and its point

    def _take_over(self, other: Ledger) -> None:
        self.add_clean({i: row for i, row in other.clean.items() if i not in self.clean})
        for attack, rows in other.rows.items():
            self.add(attack, {i: row for i, row in rows.items() if i not in self.rows.get(attack, {})})

    def add_clean(self, rows: Mapping[int, Clean]) -> None:
        self.clean |= rows
        if rows:
            self._append({"clean": [[i, *row] for i, row in rows.items()]})

    def add(self, attack: str, rows: Mapping[int, Row]) -> None:
        self._take(attack, rows)
        if rows:
            self._append({"attack": attack, "rows": [[i, *_plain(row)] for i, row in rows.items()]})

    def tried(self, attack: str) -> Mapping[int, Row]:
        """Rows of an attack by sample id."""
        return self.rows.get(attack, {})

    def canonical(self) -> str:
        """The rows in the order of samples, one JSON line each: equal for equal results."""
        lines = [canonical_json({"format": self.FORMAT, "key": None if self.key is None else dict(self.key)})]
        for i in sorted(self.clean):
            attacks = {name: _plain(rows[i]) for name, rows in self.rows.items() if i in rows}
            lines.append(canonical_json({"id": i, **self.clean[i]._asdict(), "attacks": attacks}))
        return "\n".join(lines) + "\n"

    def _take(self, attack: str, rows: Mapping[int, Row]) -> None:
        self.rows.setdefault(attack, {}).update(rows)
        for i, row in rows.items():
            if row.witness is not None:
                self.witnesses.setdefault(i, (attack, row.witness))

    def _take_line(self, line: dict[str, Any]) -> None:
        if "clean" in line:
            self.clean |= {int(i): Clean(int(label), int(guess)) for i, label, guess in line["clean"]}
        else:
            self._take(str(line["attack"]), {int(i): _row(values) for i, *values in line["rows"]})


def _plain(row: Row) -> list[Any]:
    return [*row[:3], None if row.witness is None else _encode(row.witness)]


def _row(values: Iterable[Any]) -> Row:
    status, queries, margin, witness = values
    if status not in get_args(Status):
        raise ValueError(f"status {status!r:.40}")
    margin = None if margin is None else float(margin)
    return Row(status, int(queries), margin, None if witness is None else _decode(witness))


def _encode(witness: Witness) -> dict[str, Any]:
    """8-bit points as bytes, others as float32; level 1: speed counts, and the points are mostly noise."""
    array = witness.x.numpy()
    array = np.round(array * 255).astype(np.uint8) if witness.exact else array.astype("<f4")
    text = base64.b64encode(zlib.compress(array.tobytes(), 1)).decode()
    return {
        "predicted": witness.predicted,
        "size": witness.size,
        "exact": witness.exact,
        "shape": list(array.shape),
        "x": text,
    }


def _decode(table: Mapping[str, Any]) -> Witness:
    kind, shape = np.dtype(np.uint8 if table["exact"] else "<f4"), tuple(map(int, table["shape"]))
    size = math.prod(shape) * kind.itemsize
    if not 0 < size <= MOST_BYTES:
        raise ValueError(f"a witness has shape {shape}")
    # never more than is promised, however much it would be
    array = np.frombuffer(zlib.decompressobj().decompress(base64.b64decode(table["x"]), size), kind).reshape(shape)
    x = torch.from_numpy(array.astype(np.float32))
    return Witness(
        x / 255 if table["exact"] else x, int(table["predicted"]), float(table["size"]), bool(table["exact"])
    )
