"""Certified accuracy over a split."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, fx

from rprune.certification.bounds import Method, lower_margins, rounded_margins, smallest, together
from rprune.certification.ibp import of_integers, proved
from rprune.certification.smoothing import Smoothed, Smoothing
from rprune.data.loaders import Loader
from rprune.evaluation.accuracy import Predict, Predictions
from rprune.evaluation.robustness import chosen
from rprune.threat import ThreatModel

Progress = Callable[[int, int, int], None]
BATCH = 250  # images whose noise shares batches


STATUS = ("certified", "falsified", "unknown", "misclassified")


@dataclass(frozen=True, eq=False)
class Bounded:
    """What bounds and attacks say of each sample; ``margin`` is the best lower bound of the smallest margin.

    ``method``: what decided, an attack's name or a bound's; empty where nothing did. ``rounded``: certified for float32
    sums in any order, too; of integers, for any kernel between the quantisers.
    """

    clean: Predictions
    status: list[str]
    method: list[str]
    margin: Float[Tensor, " n"]
    rounded: Bool[Tensor, " n"]

    @property
    def proved(self) -> Bool[Tensor, " n"]:
        return torch.tensor([status == "certified" for status in self.status])

    @property
    def correct(self) -> int:
        return int(self.proved.sum())

    def counts(self) -> dict[str, int]:
        return {status: self.status.count(status) for status in STATUS}


def certify_bounds(
    network: fx.GraphModule,
    data: Loader,
    threat: ThreatModel,
    methods: Sequence[Method] = ("ibp",),
    *,
    falsified: Collection[int] = (),
    limit: int | None = None,
    ids: Int64[Tensor, " n"] | None = None,
    on_progress: Callable[[Mapping[str, int]], None] = lambda counts: None,
) -> Bounded:
    """Each bound for what the ones before it left of the first ``limit`` samples, or of ``ids``, on the CPU in float64.

    ``falsified``: ids of samples whose label an attack has changed; no bound is asked for them.
    """
    labels, predicted = [], []
    status: list[str] = []
    method: list[str] = []
    margins, rounded = [], []
    exact = exactly(network)
    for part in torch.split(chosen(len(data), limit) if ids is None else ids, BATCH):
        batch = data.take(part)
        x, y = batch.x.cpu(), batch.y.cpu()
        with torch.no_grad():
            classes = network(x).argmax(1)
        labels.append(y)
        predicted.append(classes)
        right = classes == y
        attacked = right & torch.tensor([i in falsified for i in part.tolist()])
        before = Counter(status) + Counter(misclassified=int((~right).sum()), falsified=int(attacked.sum()))

        def report(done: int, left: int, before: Counter[str] = before) -> None:
            seen = before + Counter(certified=done, unknown=left)
            on_progress({name: seen[name] for name in STATUS})

        by, best, firm = cascade(exact, x, y, threat, methods, right & ~attacked, report)
        for place, found in enumerate(by):
            ends = "certified" if found else "falsified" if attacked[place] else "unknown" if right[place] else ""
            status.append(ends or "misclassified")
            method.append(found or ("attack" if attacked[place] else ""))
        margins.append(best)
        rounded.append(firm)
    clean = Predictions(torch.cat(labels), torch.cat(predicted))
    return Bounded(clean, status, method, torch.cat(margins), torch.cat(rounded))


def exactly(network: fx.GraphModule) -> fx.GraphModule:
    """The network as bounds take it: float64, or integers as they are."""
    return network if of_integers(network) else copy.deepcopy(network).double()


def cascade(
    network: fx.GraphModule,
    x: Float[Tensor, "b c h w"],
    y: Int64[Tensor, " b"],
    threat: ThreatModel,
    methods: Sequence[Method],
    wanted: Bool[Tensor, " b"],
    on_progress: Callable[[int, int], None] = lambda done, left: None,
) -> tuple[list[str], Float[Tensor, " b"], Bool[Tensor, " b"]]:
    """The bound that proves each ``wanted`` image of a batch, or ""; the best margin; whether float32 sums keep it.

    Progress: images proved, and left.
    """
    left, by = wanted.clone(), [""] * len(y)
    best, firm = torch.full((len(y),), -torch.inf, dtype=torch.float64), torch.zeros_like(wanted)
    for name in methods:
        for places in torch.split(left.nonzero().flatten(), together(network, name)):
            lower = lower_margins(network, x[places], y[places], threat, name)
            best[places] = torch.fmax(best[places], smallest(lower, y[places]))
            sure = places[done := proved(lower, y[places])]
            for place in sure.tolist():
                by[place] = name
            if len(sure):
                firm[sure] = proved(rounded_margins(network, x[sure], y[sure], threat, lower[done]), y[sure])
            left[sure] = False
            on_progress(int((wanted & ~left).sum()), int(left.sum()))
    return by, best, firm


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
        names = [entry.name for entry in fields(Smoothed)]
        verdicts = [Smoothed(**{name: table[name] for name in names}) for table in tables]
        return cls([int(table["label"]) for table in tables], verdicts)

    def correct_at(self, radius: float) -> int:
        """Samples whose smoothed class is the label with at least this certified l2 radius."""
        pairs = zip(self.labels, self.verdicts, strict=False)  # a batch that is being worked on has no labels yet
        return sum(v.prediction == label and v.radius >= radius for label, v in pairs)


def certify_smoothing(
    predict: Predict,
    data: Loader,
    classes: int,
    smoothing: Smoothing,
    *,
    target: float | None = None,
    seed: int = 0,
    limit: int | None = None,
    ids: Int64[Tensor, " n"] | None = None,
    on_progress: Progress = lambda done, proved, total: None,
) -> SmoothedSet:
    """Verdicts for the first ``limit`` samples, or ``ids``; progress counts those right at ``target``, or at any."""
    ids = chosen(len(data), limit) if ids is None else ids
    total = len(ids)
    found = SmoothedSet([], [])
    for part in torch.split(ids, BATCH):
        batch = data.take(part)

        def working(done: int, size: int = len(part)) -> None:
            if done < size:  # the end of a batch is told once its labels count
                on_progress(len(found.labels) + done, found.correct_at(target or 0.0), total)

        found.verdicts.extend(
            smoothing.certify(predict, batch.x, batch.ids.tolist(), classes, seed, target, on_done=working)
        )
        found.labels.extend(batch.y.tolist())
        on_progress(len(found.labels), found.correct_at(target or 0.0), total)
    return found
