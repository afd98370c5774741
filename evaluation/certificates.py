"""Certified accuracy over a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, fx

from rprune.certification.ibp import certified
from rprune.certification.smoothing import Smoothed, Smoothing
from rprune.data.loaders import Loader
from rprune.evaluation.accuracy import Predict, Predictions
from rprune.threat import ThreatModel

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True, eq=False)
class Certified:
    """Per sample: right, and proved to stay right."""

    clean: Predictions
    proved: Bool[Tensor, " n"]

    @property
    def correct(self) -> int:
        return int(self.proved.sum())


def certify_ibp(
    network: fx.GraphModule,
    data: Loader,
    threat: ThreatModel,
    *,
    limit: int | None = None,
    batch_size: int = 250,
    on_progress: Progress = lambda done, proved, total: None,
) -> Certified:
    """Interval bounds for the true class of each of the first ``limit`` samples, on the CPU in float64."""
    total = min(limit or len(data), len(data))
    labels, predicted, proved = [], [], []
    done = count = 0
    for batch in data.ordered(batch_size, limit):
        x, y = batch.x.cpu(), batch.y.cpu()
        with torch.no_grad():
            classes = network(x).argmax(1)
        found = certified(network, x, y, threat) & (classes == y)
        labels.append(y)
        predicted.append(classes)
        proved.append(found)
        done, count = done + len(y), count + int(found.sum())
        on_progress(done, count, total)
    return Certified(Predictions(torch.cat(labels), torch.cat(predicted)), torch.cat(proved))


@dataclass(frozen=True, eq=False)
class SmoothedSet:
    """Verdicts of smoothing for the first n samples."""

    labels: list[int]
    verdicts: list[Smoothed]

    def rows(self) -> list[dict[str, Any]]:
        """JSON-able form; :meth:`from_rows` reads it back."""
        return [vars(v) | {"label": label} for v, label in zip(self.verdicts, self.labels, strict=True)]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> SmoothedSet:
        tables = [dict(row) for row in rows]
        labels = [int(table.pop("label")) for table in tables]
        return cls(labels, [Smoothed(**table) for table in tables])

    def correct_at(self, radius: float) -> int:
        """Samples whose smoothed class is the label with at least this certified l2 radius."""
        pairs = zip(self.labels, self.verdicts, strict=True)
        return sum(v.prediction == label and v.radius >= radius for label, v in pairs)


def certify_smoothing(
    predict: Predict,
    data: Loader,
    classes: int,
    smoothing: Smoothing,
    *,
    seed: int = 0,
    limit: int | None = None,
    on_progress: Progress = lambda done, proved, total: None,
) -> SmoothedSet:
    """CERTIFY for each of the first ``limit`` samples."""
    total = min(limit or len(data), len(data))
    labels: list[int] = []
    verdicts: list[Smoothed] = []
    for batch in data.ordered(100, limit):
        for x, y, sample in zip(batch.x, batch.y.tolist(), batch.ids.tolist(), strict=True):
            labels.append(y)
            verdicts.append(smoothing.certify(predict, x, classes, seed, sample))
            on_progress(len(labels), sum(v.prediction == y for v, y in zip(verdicts, labels, strict=True)), total)
    return SmoothedSet(labels, verdicts)
