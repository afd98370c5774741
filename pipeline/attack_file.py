"""An attack on one model file, of ours or of a stranger: what ``rprune attack`` runs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rprune
from rprune.attacks.base import Attack
from rprune.attacks.names import TABLES
from rprune.attacks.suites import HARP_EPS, with_transfer
from rprune.data.loaders import loader
from rprune.errors import InputError, UsageError
from rprune.evaluation.ledger import Ledger
from rprune.evaluation.robustness import chosen, planned
from rprune.files import KEY_FILE, LOCK, check_ours, digest_of, write_json, write_text
from rprune.locks import working_in
from rprune.pipeline.attack import Assessment, assess, ledger_key, write_evidence
from rprune.pipeline.claims import empirical_claims
from rprune.pipeline.environment import environment, source_digest
from rprune.pipeline.shipped import Opened
from rprune.reports.schema import Claim
from rprune.threat import ThreatModel
from rprune.training.world import world

SCHEMA = "rprune.attack/1"


@dataclass(frozen=True)
class Plan:
    """What to run. ``suite`` None: aa-standard, or aa-quant for an 8-bit file. ``shard``: (i, n), i from 0."""

    suite: str | None = None
    limit: int | None = None
    shard: tuple[int, int] = (0, 1)
    budget: float = math.inf
    batch_size: int | None = None
    resume: bool = True
    merge: tuple[Path, ...] = ()
    health: bool = True

    def suite_for(self, opened: Opened) -> str:
        return self.suite or ("aa-quant" if opened.target.parents or opened.role == "onnx-int8" else "aa-standard")


@dataclass(frozen=True, eq=False)
class Column:
    """One suite under one threat: its claims of clean and robust accuracy."""

    name: str
    suite: str
    threat: ThreatModel
    found: Assessment
    claims: Sequence[Claim]

    @property
    def robust(self) -> Claim:
        return self.claims[1]

    def to_json(self) -> dict[str, Any]:
        claims = [claim.model_dump(mode="json", exclude_none=True) for claim in self.claims]
        return {"name": self.name, "suite": self.suite, "threat": str(self.threat), "claims": claims}


@dataclass(frozen=True, eq=False)
class Result:
    opened: Opened
    columns: list[Column] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        opened, data = self.opened, self.opened.bench.data
        return {
            "schema": SCHEMA,
            "tool": {"name": "rprune", "version": rprune.__version__, "source_sha256": source_digest()},
            "model": {"file": opened.path.name, "sha256": opened.digest, "role": opened.role}
            | ({"loaded_unsafely": True} if opened.ran else {}),
            "data": {"source": data.source, "split": "test", "sha256": data.test.digest},
            "seed": opened.bench.seed,
            "columns": [column.to_json() for column in self.columns],
            "environment": environment(str(opened.bench.device)),
        } | ({"smoke": True} if opened.bench.smoke else {})


def check_plan(plan: Plan, opened: Opened) -> None:
    """Whether the plan can be run, before anything is written.

    Raises:
        UsageError: a name that is neither a suite, an attack, nor a table of suites; a suite of which nothing can run;
            a shard without samples.
        InputError: a part to merge is not there.
    """
    name = plan.suite_for(opened)
    for suite in TABLES.get(name, {name: name}).values():
        planned(_attacks(opened, suite), opened.target)
    total = len(opened.bench.data.test)
    if not len(chosen(total, plan.limit, plan.shard)):
        part, n = f"{plan.shard[0] + 1}/{plan.shard[1]}", min(total, plan.limit or total)
        raise UsageError(f"shard {part} of {n} samples has none", f"use at most {n} shards")
    for other in plan.merge:
        if not other.exists():
            raise InputError(f"{other} is not there", "name the folder of another part of this attack")


@contextmanager
def folder_for(out: Path, force: bool) -> Iterator[None]:
    """The folder of an attack, held while the block works in it; an earlier attack in it is continued.

    Raises UsageError when it is not rprune's, cannot be written, or another process is at work in it.
    """
    if not world().first:
        yield
        return
    check_ours(out)
    if out.is_file():
        raise UsageError(f"{out} is a file", "choose another -o: it becomes a folder")
    with working_in(out):
        write_json(out / KEY_FILE, {"key": "attack"})
        for path in out.iterdir() if force else ():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (KEY_FILE, LOCK):
                path.unlink()
        yield


def attack_file(opened: Opened, plan: Plan, out: Path) -> Result:
    """Run every column of the plan's suite, with ledgers and evidence in ``out``; called again, it continues.

    Of several processes (:func:`world`) each attacks its share of the samples, and the first one writes the result.

    Raises:
        UsageError: unknown suite, or a ledger of another attack.
        WorkError: a certified sample was broken.
    """
    name = plan.suite_for(opened)
    result = Result(opened)
    for threat in _threats(name, opened.bench.threat):
        for column, suite in TABLES.get(name, {name: name}).items():
            result.columns.append(_column(opened, plan, out, column, suite, threat))
    if world().first:
        write_json(out / "attack.json", result.to_json())
    return result


def _attacks(opened: Opened, suite: str) -> tuple[Attack, ...]:
    attacks = opened.bench.suite(suite)
    return with_transfer(attacks, opened.target.parents)


def _threats(name: str, threat: ThreatModel) -> list[ThreatModel]:
    """HARP's table is shown with the eps of its text and with the one of its code."""
    if name == "harp-table" and threat.norm == "linf" and threat.eps == 8 / 255:
        return [threat, ThreatModel.of("linf", HARP_EPS)]
    return [threat]


def _column(opened: Opened, plan: Plan, out: Path, column: str, suite: str, threat: ThreatModel) -> Column:
    bench, target = opened.bench, opened.target
    attacks = _attacks(opened, suite)
    test = loader(bench.data.test, bench.device)
    key = ledger_key(
        f"{opened.identity}/{opened.role}", bench.data.test.digest, threat, attacks, bench.seed, bench.device.type
    )
    table = TABLES.get(plan.suite_for(opened))
    alone = table is None
    # of a table the strongest column, its last, is examined; the others are there to be compared
    examined = plan.health and plan.shard == (0, 1) and (table is None or column == list(table)[-1])
    folder = out if alone else out / f"{suite}-{digest_of(str(threat))[:6]}"
    others = [o / folder.relative_to(out) / "ledger.jsonl" if o.is_dir() else o for o in plan.merge]
    ledger = Ledger.open(folder / "ledger.jsonl", key, resume=plan.resume, merge=others)
    found = assess(
        target, test, threat, attacks, seed=bench.seed, ids=chosen(len(test), plan.limit, plan.shard), ledger=ledger,
        batch_size=plan.batch_size, budget=plan.budget, health=examined,
        on_progress=lambda name, *counts: bench.reporter.progress(name if alone else f"{column}: {name}", *counts),
    )  # fmt: skip
    if world().first:
        write_evidence(folder, found.outcome, bench.data.shape)
        write_text(folder / "samples.jsonl", ledger.canonical())
    settings = {
        "seed": bench.seed, "gradient": opened.gradient, "verdict": opened.verdict, "suite": key["suite"],
        "broken": len(found.outcome.broken_ids), "queries": int(found.outcome.queries.sum()),
    }  # fmt: skip
    if plan.shard != (0, 1):
        settings["shard"] = f"{plan.shard[0] + 1}/{plan.shard[1]}"
    claims = empirical_claims(found, threat, opened.role, opened.digest, suite, settings)
    return Column(column, suite, threat, found, claims)
