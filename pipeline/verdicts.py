"""Verdicts of bounds and smoothing by sample, kept as they are found: what resumes, shards and merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from rprune.errors import InputError, UsageError
from rprune.evaluation.journal import Journal
from rprune.evaluation.robustness import chosen
from rprune.files import read_json, seal_of

SCHEMA = "rprune.certificate/1"
LIMITS = ("limit", "smoothing_limit")  # of a stage; more samples change nothing in those that are done
Section = Literal["bounds", "smoothing"]
Row = dict[str, Any]


@dataclass(eq=False)
class Verdicts(Journal):
    """JSON-able rows by section and sample id."""

    FORMAT, WHAT, WORK, COMMAND = "rprune.verdicts/1", "list of verdicts", "certification", "rprune certify"

    def __post_init__(self) -> None:
        self._rows: dict[Section, dict[int, Row]] = {}

    def add(self, section: Section, rows: Mapping[int, Row]) -> None:
        self.of(section).update(rows)
        if rows:
            self._append({"section": section, "rows": [[i, row] for i, row in rows.items()]})

    def of(self, section: Section) -> dict[int, Row]:
        return self._rows.setdefault(section, {})

    def missing(self, section: Section, ids: Int64[Tensor, " n"]) -> Int64[Tensor, " m"]:
        return torch.tensor([i for i in ids.tolist() if i not in self.of(section)], dtype=torch.int64)

    def rows(self, section: Section, ids: Int64[Tensor, " n"]) -> list[Row]:
        """The rows of these samples that are known, in this order."""
        known = self.of(section)
        return [known[i] for i in ids.tolist() if i in known]

    def merge(self, path: Path) -> None:
        """Take over the rows of a certificate with the same key: a shard, or an earlier run.

        Raises:
            UsageError: it is of another model, data set, threat, or of other settings.
            InputError: it is no certificate, or was changed.
        """
        found = read_json(path, "certificate")
        try:
            if found["schema"] != SCHEMA or found["digest"] != seal_of(found):
                raise ValueError("schema or digest")
            self._need_key(path, key_of(found))
            other = Verdicts(self.key)
            for section, rows in rows_of_certificate(found).items():
                other.add(section, rows)
            self._take_over(other)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise InputError(
                f"{path} is no certificate, or was changed", "name one that 'rprune certify' wrote"
            ) from None

    def _take_over(self, other: Verdicts) -> None:
        for section, rows in other._rows.items():
            known = self.of(section)
            self.add(section, {i: row for i, row in rows.items() if i not in known})

    def _take_line(self, line: dict[str, Any]) -> None:
        self.of(line["section"]).update({int(i): dict(row) for i, row in line["rows"]})


@dataclass(frozen=True)
class Part:
    """Which samples to certify, and what is known already. ``shard``: (i, n), i from 0; ``journal``: None is memory."""

    shard: tuple[int, int] = (0, 1)
    journal: Path | None = None
    resume: bool = True
    merge: tuple[Path, ...] = field(default=())

    def open(self, key: Mapping[str, Any]) -> Verdicts:
        """What is known; every process (:func:`rprune.training.world.world`) has it."""
        if self.journal is not None:
            return Verdicts.open(self.journal, key, resume=self.resume, merge=self.merge)
        verdicts = Verdicts(key)
        for path in self.merge:
            verdicts.merge(path)
        return verdicts

    def ids(self, total: int, limits: Mapping[Section, int | None]) -> dict[Section, Int64[Tensor, " n"]]:
        """The samples of each section. Raises UsageError where the shard has none in any."""
        found = {section: chosen(total, limit, self.shard) for section, limit in limits.items()}
        if not any(map(len, found.values())):
            count = max(min(total, limit or total) for limit in limits.values())
            raise UsageError(f"shard {self.name} of {count} samples has none", f"use at most {count} shards")
        return found

    @property
    def name(self) -> str:
        return f"{self.shard[0] + 1}/{self.shard[1]}"

    def done(self) -> None:
        """Once the certificate is written."""
        if self.journal is not None:
            self.journal.unlink(missing_ok=True)


def key_of(found: Mapping[str, Any], code: str | None = None) -> dict[str, Any]:
    """What the verdicts of a certificate, or of one that begins, hold for; ``code``: of which rprune, None as it says.

    Its ``identity`` stands for the model: equal tensors may answer differently.
    """
    settings = {name: value for name, value in found["config"].items() if name not in LIMITS}
    return {
        "model": found["identity"], "data": found["data"]["sha256"],
        "threat": [found["threat"]["norm"], found["threat"]["eps"]], "settings": settings, "seed": found["seed"],
        "code": code or found["tool"]["source_sha256"],
    }  # fmt: skip


def rows_of_certificate(found: Mapping[str, Any]) -> dict[Section, dict[int, Row]]:
    """The rows from which its content was made."""
    tables: dict[Section, dict[int, Row]] = {}
    if bounds := found.get("bounds"):
        _, *lower = (level["proved"] for level in bounds["levels"])
        tables["bounds"] = {
            row["index"]: without_index(row) | {"lower": [proved[place] for proved in lower]}
            for place, row in enumerate(bounds["samples"])
        }
    if smoothing := found.get("smoothing"):
        tables["smoothing"] = {row["index"]: without_index(row) for row in smoothing["samples"]}
    return tables


def without_index(row: Mapping[str, Any]) -> Row:
    return {name: value for name, value in row.items() if name != "index"}
