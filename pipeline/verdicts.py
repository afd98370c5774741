"""Verdicts of bounds and smoothing by sample, kept as they are found: what resumes, shards and merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Int64
from torch import Tensor

from rprune.errors import InputError, UsageError
from rprune.evaluation.journal import Journal
from rprune.evaluation.robustness import chosen
from rprune.files import read_json, seal_of
from rprune.pipeline.bench import Bench
from rprune.pipeline.environment import source_digest
from rprune.pipeline.recipe import CertifyStage

SCHEMA = "rprune.certificate/1"
VERDICTS = "verdicts.jsonl"
LIMITS = ("limit", "smoothing_limit")  # of a stage; more samples change nothing in those that are done
Section = Literal["bounds", "smoothing"]
Row = dict[str, Any]


@dataclass(eq=False)
class Verdicts(Journal):
    """JSON-able rows by section and sample id."""

    FORMAT, WHAT, WORK, COMMAND = "rprune.verdicts/1", "list of verdicts", "certification", "rprune certify"

    def __post_init__(self) -> None:
        self._rows: dict[str, dict[int, Row]] = {}

    def add(self, section: Section, rows: Mapping[int, Row]) -> None:
        self.of(section).update(rows)
        if rows:
            self._append({"section": section, "rows": [[i, row] for i, row in rows.items()]})

    def of(self, section: Section) -> dict[int, Row]:
        return self._rows.setdefault(section, {})

    def missing(self, section: Section, ids: Int64[Tensor, " n"]) -> list[int]:
        return [i for i in ids.tolist() if i not in self.of(section)]

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
            self._need_key(path, key_of_certificate(found))
            for section, rows in rows_of_certificate(found).items():
                known = self.of(section)
                self.add(section, {i: row for i, row in rows.items() if i not in known})
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise InputError(
                f"{path} is no certificate, or was changed", "name one that 'rprune certify' wrote"
            ) from None

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
        verdicts = Verdicts(key) if self.journal is None else Verdicts.open(self.journal, key, resume=self.resume)
        for path in self.merge:
            verdicts.merge(path)
        return verdicts

    def ids(self, total: int, limit: int | None) -> Int64[Tensor, " n"]:
        """Raises UsageError where the shard has no samples."""
        ids = chosen(total, limit, self.shard)
        if not len(ids):
            count = min(total, limit or total)
            raise UsageError(f"shard {self.name} of {count} samples has none", f"use at most {count} shards")
        return ids

    @property
    def name(self) -> str:
        return f"{self.shard[0] + 1}/{self.shard[1]}"

    def done(self) -> None:
        """Once the certificate is written."""
        if self.journal is not None:
            self.journal.unlink(missing_ok=True)


def key_of(model: str, bench: Bench, stage: CertifyStage) -> dict[str, Any]:
    """What verdicts hold for; ``model``: digest of the tensors of an artifact, sha256 of a file."""
    return _key(
        model, bench.data.test.digest, [bench.threat.norm, bench.threat.text], stage.model_dump(mode="json"),
        bench.seed, source_digest(),
    )  # fmt: skip


def key_of_certificate(found: Mapping[str, Any]) -> dict[str, Any]:
    return _key(
        found["artifact"] if "artifact" in found else found["file"]["sha256"], found["data"]["sha256"],
        [found["threat"]["norm"], found["threat"]["eps"]], found["config"], found["seed"],
        found["tool"]["source_sha256"],
    )  # fmt: skip


def _key(
    model: str, data: str, threat: Sequence[str], config: Mapping[str, Any], seed: int, code: str
) -> dict[str, Any]:
    settings = {name: value for name, value in config.items() if name not in LIMITS}
    return {"model": model, "data": data, "threat": list(threat), "settings": settings, "seed": seed, "code": code}


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
