"""An attack as users run it: a suite with its ledger, the health of the attack, the security curve, the evidence."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from rprune.attacks.base import ATTACKS, Attack
from rprune.data.loaders import Loader
from rprune.evaluation.curve import distances, security_curve
from rprune.evaluation.health import Check, examine
from rprune.evaluation.ledger import Ledger
from rprune.evaluation.outcome import Robustness
from rprune.evaluation.robustness import Progress, robustness
from rprune.evaluation.target import Target
from rprune.files import write_text
from rprune.pipeline.artifact import save_tensors
from rprune.pipeline.environment import referenced_files, source_digest
from rprune.threat import ThreatModel
from rprune.training.world import world

PROBE = 128  # samples that the checks of health look at


@dataclass(frozen=True, eq=False)
class Assessment:
    """What a suite left, and how far that number can be trusted. ``curve``: (eps, right samples)."""

    outcome: Robustness
    checks: tuple[Check, ...] = ()
    curve: tuple[tuple[float, int], ...] = ()
    distances: tuple[float | None, ...] = ()  # of the probe's samples; None: no perturbation was found


def ledger_key(
    artifact: str, data: str, threat: ThreatModel, attacks: Sequence[Attack], seed: int, device: str, **more: Any
) -> dict[str, Any]:
    """What the rows of a ledger hold for. ``artifact`` and ``data`` are sha256 digests."""
    specs = [repr(attack) for attack in attacks]
    code = [ATTACKS.describe(attack) for attack in attacks]
    return {
        "artifact": artifact, "data": data, "threat": [threat.norm, threat.eps], "suite": specs, "seed": seed,
        "device": device, "code": source_digest(), "user_code": referenced_files(code), **more,
    }  # fmt: skip


def assess(
    target: Target,
    data: Loader,
    threat: ThreatModel,
    attacks: Sequence[Attack],
    *,
    seed: int = 0,
    ids: Tensor | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    ledger: Ledger | None = None,
    budget: float = math.inf,
    certified: Bool[Tensor, " n"] | None = None,
    health: bool = True,
    on_progress: Progress = lambda name, done, robust, total: None,
) -> Assessment:
    """Run a suite (see :func:`robustness`), then its checks of health and the curve, unless ``health`` is False.

    Several processes (:func:`world`) attack together; the first one alone looks at health and curve.
    """
    outcome = robustness(
        target, data, threat, attacks, seed=seed, ids=ids, limit=limit, batch_size=batch_size, ledger=ledger,
        budget=budget, certified=certified, together=True, on_progress=on_progress,
    )  # fmt: skip
    if not health or not world().first:
        return Assessment(outcome)
    right = outcome.ids[outcome.clean.right]
    probe = data.take(right[:PROBE])
    checks = tuple(examine(target, probe, threat, outcome, seed))
    if not len(right) or threat.eps == 0:
        return Assessment(outcome, checks)
    curve = tuple(security_curve(target, data.take, threat, outcome, seed))
    found = distances(target, probe, threat.norm, seed).tolist() if target.search is not None else []
    return Assessment(outcome, checks, curve, tuple(d if math.isfinite(d) else None for d in found))


def write_evidence(
    folder: Path, outcome: Robustness, shape: tuple[int, int, int], proved: Mapping[int, bool] | None = None
) -> None:
    """samples.csv: one row a sample. adversarial.safetensors: for each broken sample the point that breaks it.

    Points on the grid of 8-bit pixels are stored as such (``x``), others as float32 (``float_x``).
    """
    broken = {int(i): k for k, i in enumerate(outcome.broken_ids.tolist())}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        ["index", "label", "clean_prediction", "adversarial_prediction", "attack", "certified", "queries", "margin",
         "distance", "witness"]
    )  # fmt: skip
    columns = (outcome.ids, outcome.clean.labels, outcome.clean.predicted, outcome.queries, outcome.margin)
    for i, label, predicted, queries, margin in zip(*(column.tolist() for column in columns), strict=True):
        k = broken.get(i)
        found: list[Any] = ["", "", "", ""]
        if k is not None:
            kind = "uint8" if outcome.exact[k] else "float"
            found = [int(outcome.adversarial[k]), outcome.broken_by[k], repr(float(outcome.size[k])), kind]
        certified = "" if proved is None or i not in proved else int(proved[i])
        lowest = "" if math.isnan(margin) else repr(margin)
        rows.writerow([i, label, predicted, *found[:2], certified, queries, lowest, *found[2:]])
    write_text(folder / "samples.csv", text.getvalue())
    points = outcome.points if len(outcome.points) else torch.zeros(0, *shape)
    exact = outcome.exact
    tensors = {
        "index": outcome.broken_ids[exact],
        "x": (points[exact] * 255).round().to(torch.uint8),
        "float_index": outcome.broken_ids[~exact],
        "float_x": points[~exact],
    }
    save_tensors(folder / "adversarial.safetensors", tensors)
