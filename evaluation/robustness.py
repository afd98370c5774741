"""Robust accuracy over a split: found on the search net, counted on the artifact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from rprune.attacks.apgd import APGD
from rprune.attacks.base import Attack, Found
from rprune.attacks.noise import Keyed
from rprune.attacks.norms import into_ball, size, within
from rprune.attacks.pgd import PGD
from rprune.attacks.transfer import Transfer
from rprune.data.loaders import Batch, Loader
from rprune.errors import UsageError, WorkError
from rprune.evaluation.accuracy import Predictions
from rprune.evaluation.ledger import Clean, Ledger, Row, Status, Witness
from rprune.evaluation.outcome import Kind, Robustness, Tally
from rprune.evaluation.target import INVALID, Target, usual_batch
from rprune.threat import ThreatModel

Progress = Callable[[str, int, int, int], None]
"""(attack, samples done, samples still robust, samples in all)"""
CROSS_CHECK = PGD(steps=10)  # on samples whose robustness is proved: it must find nothing
ONTO_GRID: tuple[Attack, ...] = (
    PGD(steps=20, loss="margin", overshoot=math.inf),
    APGD(steps=20, loss="margin", targets=9, overshoot=math.inf),  # for what only targeted attacks break
)
"""For points that lose their effect in 8-bit pixels, one after another."""


def chosen(total: int, limit: int | None = None, shard: tuple[int, int] = (0, 1)) -> Int64[Tensor, " n"]:
    """Sample ids: the first ``limit``, of those every n-th for shard (i, n), i from 0."""
    index, shards = shard
    return torch.arange(min(total, limit or total))[index::shards]


@dataclass(frozen=True)
class _Step:
    """One attack of the plan, and the net that it searches on (None: there is none, so it cannot run)."""

    name: str
    kind: Kind
    attack: Attack
    net: nn.Module | None


def robustness(
    target: Target,
    data: Loader,
    threat: ThreatModel,
    attacks: Sequence[Attack],
    *,
    seed: int = 0,
    limit: int | None = None,
    ids: Int64[Tensor, " n"] | None = None,
    batch_size: int | None = None,
    ledger: Ledger | None = None,
    budget: float = math.inf,
    certified: Bool[Tensor, " n"] | None = None,
    grid: bool = True,
    together: bool = False,
    on_progress: Progress = lambda name, done, robust, total: None,
) -> Robustness:
    """Attack samples, each attack on all that the artifact still gets right: the pointwise worst case.

    The result depends on target, data, threat, attacks and seed alone, never on batch size, order, shards or resuming.

    Args:
        limit: the first so many samples; or ``ids``: exactly these, in this order.
        batch_size: samples under attack at a time; it bounds memory. None: what suits size and device of the images.
        ledger: rows that are in it already are not computed again.
        budget: seconds after which no further batch begins; the outcome is then not ``complete``.
        certified: by sample id, those proved robust under this threat. They are skipped but for one cheap PGD.
        grid: look for a point of 8-bit pixels for every broken sample (a search of its own where rounding fails).
        together: all processes (:func:`rprune.training.world.world`) call this with equal arguments, each attacks its
            share of the samples, and all return the outcome of all.

    The outcome is not ``complete`` either when the target has no net with gradients for attacks that need one.

    Raises:
        WorkError: a certified sample was broken: a bound or the attack is wrong.
        UsageError: no attack can run on the target at all.
    """
    ledger = Ledger() if ledger is None else ledger
    plan = planned(attacks, target)
    ids = chosen(len(data), limit) if ids is None else ids
    rows_at_once = batch_size or usual_batch(data.take(ids[:1]).x)
    deadline = time.monotonic() + budget

    def search(ledger: Ledger, ids: Tensor) -> None:
        for batch in _batches(data, (i for i in ids.tolist() if i not in ledger.clean), rows_at_once):
            found = zip(batch.ids.tolist(), batch.y.tolist(), target.verdict(batch.x).tolist(), strict=True)
            ledger.add_clean({i: Clean(*row) for i, *row in found})
        right, proved = _right(ledger, ids, certified)
        if proved and target.search is not None:
            _cross_check(target, data, threat, sorted(proved), seed, rows_at_once)
        for step in plan:
            if step.net is None:
                continue
            done = ledger.tried(step.name)
            open_ids = [i for i in right if i not in ledger.witnesses and i not in proved]
            waiting = [i for i in open_ids if i not in done]
            robust, count = len(open_ids) + len(proved), len(open_ids) - len(waiting)
            if waiting:
                on_progress(step.name, count, robust, len(open_ids))
            for batch in _batches(data, waiting, rows_at_once):
                if time.monotonic() > deadline:
                    break
                rows = _attack(step, target, batch, threat, seed, grid)
                ledger.add(step.name, rows)
                count, robust = count + len(rows), robust - sum(row.witness is not None for row in rows.values())
                on_progress(step.name, count, robust, len(open_ids))

    if together:
        ledger.spread(ids, search)
    else:
        search(ledger, ids)
    return _outcome(ledger, plan, ids, *_right(ledger, ids, certified))


def _right(ledger: Ledger, ids: Tensor, certified: Tensor | None) -> tuple[list[int], set[int]]:
    """Samples that the artifact gets right, and those of them that are proved."""
    right = [i for i in ids.tolist() if ledger.clean[i].label == ledger.clean[i].predicted]
    return right, {i for i in right if certified is not None and i < len(certified) and bool(certified[i])}


def planned(attacks: Sequence[Attack], target: Target) -> list[_Step]:
    """The attacks with the nets that they search on. Raises UsageError where none can run: no gradients, no parents."""
    plan: list[_Step] = []
    names: dict[str, int] = {}

    def add(name: str, kind: Kind, attack: Attack, net: nn.Module | None) -> None:
        names[name] = names.get(name, 0) + 1
        plan.append(_Step(name if names[name] == 1 else f"{name} {names[name]}", kind, attack, net))

    for attack in attacks:
        if isinstance(attack, Transfer):
            for net in target.parents or (None,):
                add(attack.label, "transfer", attack, net)
        elif attack.needs_gradient:
            add(attack.label, "white-box", attack, target.search)
        else:
            add(attack.label, "black-box", attack, target.artifact)
    if plan and all(step.net is None for step in plan):
        raise UsageError(
            f"{', '.join(step.name for step in plan)} cannot run: there is no net to search on",
            "square needs no gradients; transfer needs a parent",
        )
    return plan


def _batches(data: Loader, ids: Iterable[int], batch_size: int) -> Iterator[Batch]:
    for part in torch.split(torch.tensor(list(ids), dtype=torch.int64), batch_size):
        if len(part):
            yield data.take(part)


def _attack(step: _Step, target: Target, batch: Batch, threat: ThreatModel, seed: int, grid: bool) -> dict[int, Row]:
    """One attack on samples that the artifact gets right, with the artifact's verdict on each point found."""
    assert step.net is not None
    x, y, ids = batch
    found = step.attack.evaluate(step.net, x, y, threat, Keyed(seed, ids))
    verdict = target.verdict(found.x)
    missed = torch.nonzero(found.broken & (verdict == y)).flatten()
    if len(missed) and step.kind == "white-box":
        # over the search net's boundary, not over the artifact's: go on instead of stopping there
        again = step.attack.for_transfer().evaluate(step.net, x[missed], y[missed], threat, Keyed(seed, ids[missed]))
        found = _replaced(found, missed, again)
        verdict[missed] = target.verdict(again.x)
    fooled = (verdict != y) & (verdict != INVALID)
    points, exact = found.x, torch.zeros_like(fooled)
    if grid:
        points, exact = _witnesses(found.x, fooled, verdict, target, batch, threat, seed)
    sizes = size(points - x, threat.norm).tolist()
    margins = found.margin.tolist()
    rows = {}
    for k, i in enumerate(ids.tolist()):
        status: Status = "survived"
        witness = None
        if fooled[k]:
            status = "fooled"
            witness = Witness(points[k].cpu(), int(verdict[k]), sizes[k], bool(exact[k]))
        elif verdict[k] == INVALID:
            status = "invalid"
        elif step.kind == "white-box" and found.broken[k]:
            status = "miss"
        rows[i] = Row(status, int(found.queries[k]), margins[k] if math.isfinite(margins[k]) else None, witness)
    return rows


def _replaced(found: Found, rows: Tensor, other: Found) -> Found:
    x, margin, queries = found.x.clone(), found.margin.clone(), found.queries.clone()
    x[rows], margin[rows] = other.x, other.margin
    queries[rows] += other.queries
    return Found(x, margin, queries)


def _witnesses(
    points: Float[Tensor, "b c h w"],
    fooled: Bool[Tensor, " b"],
    verdict: Int64[Tensor, " b"],
    target: Target,
    batch: Batch,
    threat: ThreatModel,
    seed: int,
) -> tuple[Float[Tensor, "b c h w"], Bool[Tensor, " b"]]:
    """The points, on the grid of 8-bit pixels where such a point breaks the sample too; ``verdict`` follows them."""
    points, exact = points.clone(), torch.zeros_like(fooled)

    def settle(rows: Tensor, candidates: Tensor) -> None:
        rounded = on_grid(candidates, batch.x[rows], threat)
        classes = target.verdict(rounded)
        good = (classes != batch.y[rows]) & (classes != INVALID) & within(rounded, batch.x[rows], threat)
        exact[rows[good]] = True
        points[rows[good]] = rounded[good]
        verdict[rows[good]] = classes[good]

    rows = torch.nonzero(fooled).flatten()
    if len(rows):
        settle(rows, points[rows])
    room = grid_room(threat, batch.x[0].numel())
    for attack in ONTO_GRID:
        rows = torch.nonzero(fooled & ~exact).flatten()
        if len(rows) and target.search is not None and room.eps > 0:
            # a point just over the boundary falls back when rounded: look further inside
            x, y, ids = (part[rows] for part in batch)
            settle(rows, attack.evaluate(target.search, x, y, room, Keyed(seed, ids)).x)
    return points, exact


def grid_room(threat: ThreatModel, pixels: int) -> ThreatModel:
    """The ball in which points may lie that are then rounded to 8-bit pixels and shall stay inside ``threat``.

    linf: the largest multiple of 1/255. l2: less what rounding adds to the square of the norm, its mean and three
    standard deviations, for errors that are uniform and independent.
    """
    if threat.norm == "linf":
        return ThreatModel("linf", repr(math.floor(threat.eps * 255 + 1e-9) / 255))
    deviation = 1 / 255 / math.sqrt(12)
    return ThreatModel(
        "l2", repr(math.sqrt(max(0.0, threat.eps**2 - pixels * deviation**2 - 6 * threat.eps * deviation)))
    )


def on_grid(
    points: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"], threat: ThreatModel
) -> Float[Tensor, "b c h w"]:
    """Points of 8-bit pixels near these, around images that are such themselves. In l2 a few may leave the ball."""
    steps = (into_ball(points - x, grid_room(threat, x[0].numel())) * 255).round()
    return ((x * 255).round() + steps).clamp(0, 255) / 255


def _cross_check(
    target: Target, data: Loader, threat: ThreatModel, proved: list[int], seed: int, batch_size: int
) -> None:
    assert target.search is not None
    for batch in _batches(data, proved, batch_size):
        point = CROSS_CHECK.evaluate(target.search, batch.x, batch.y, threat, Keyed(seed, batch.ids)).x
        broken = batch.ids[target.verdict(point) != batch.y].tolist()
        if broken:
            raise WorkError(
                f"samples {broken[:5]} are certified and broken by PGD",
                "a bound or the 8-bit simulation is wrong; please report this",
            )


def _outcome(ledger: Ledger, plan: list[_Step], ids: Tensor, right: list[int], proved: set[int]) -> Robustness:
    left = {i for i in right if i not in ledger.witnesses and i not in proved}
    complete = all(
        step.kind == "transfer" if step.net is None else ledger.tried(step.name).keys() >= left for step in plan
    )
    ids = ids.sort().values
    order = ids.tolist()
    clean = [ledger.clean[i] for i in order]
    predictions = Predictions(*(torch.tensor(column, dtype=torch.int64) for column in zip(*clean, strict=True)))
    broken = [i for i in order if i in ledger.witnesses]
    names, witnesses = zip(*(ledger.witnesses[i] for i in broken), strict=True) if broken else ((), ())
    tallies = []
    lowest, spent = dict.fromkeys(order, math.nan), dict.fromkeys(order, 0)
    for step in plan:
        rows = {i: row for i, row in ledger.tried(step.name).items() if i in lowest}
        count = {status: sum(row.status == status for row in rows.values()) for status in ("fooled", "miss", "invalid")}
        queries = sum(row.queries for row in rows.values())
        for i, row in rows.items():
            spent[i] += row.queries
            if row.margin is not None and not row.margin > lowest[i]:  # the first number replaces nan
                lowest[i] = row.margin
        tallies.append(
            Tally(step.name, step.kind, len(rows), count["fooled"], count["miss"], count["invalid"], queries)
        )
    return Robustness(
        ids=ids,
        clean=predictions,
        broken_ids=torch.tensor(broken, dtype=torch.int64),
        points=torch.stack([w.x for w in witnesses]) if broken else torch.zeros(0, 0, 0, 0),
        adversarial=torch.tensor([w.predicted for w in witnesses], dtype=torch.int64),
        exact=torch.tensor([w.exact for w in witnesses], dtype=torch.bool),
        broken_by=list(names),
        tallies=tuple(tallies),
        margin=torch.tensor([lowest[i] for i in order]),
        queries=torch.tensor([spent[i] for i in order]),
        size=torch.tensor([w.size for w in witnesses]),
        certified=torch.tensor([i in proved for i in order], dtype=torch.bool),
        complete=complete,
    )
