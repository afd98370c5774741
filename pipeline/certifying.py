"""The certify stage: bounds by a cascade from the cheapest on, and randomized smoothing."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, fx, nn

from rprune.attacks.pgd import PGD
from rprune.certification.bounds import CASCADE, METHODS, Method
from rprune.certification.compat import BATCH, hydra_box, hydra_threat
from rprune.certification.confidence import needed_l2
from rprune.certification.ibp import margins, of_integers, proved
from rprune.certification.smoothing import DRAWS, Smoothing
from rprune.data.loaders import Loader, loader
from rprune.errors import UsageError
from rprune.evaluation.accuracy import classes_of
from rprune.evaluation.certificates import STATUS, Bounded, SmoothedSet, certify_bounds, certify_smoothing
from rprune.evaluation.robustness import robustness
from rprune.evaluation.target import Target
from rprune.models.graph import trace
from rprune.pipeline.artifact import Artifact
from rprune.pipeline.bench import Bench
from rprune.pipeline.environment import source_digest
from rprune.pipeline.forms import Deployed
from rprune.pipeline.recipe import CertifyStage
from rprune.pipeline.verdicts import Part, Row, Section, Verdicts, key_of
from rprune.threat import ThreatModel

FALSIFIER = PGD(steps=40, restarts=3)
LOWER = (1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of eps: the certified curve
BLOCK, CHEAP_BLOCK = 50, 250  # samples whose verdicts are kept together; an interruption loses one block at most
CLAIMS = {
    "int-exact": "every input in the ball, for the integers of the 8-bit graph, on kernels that do not saturate",
    "any-kernel": "every input in the ball, for integers on kernels that do not saturate, and for float32 sums in any "
    "order, between the same quantisers",
    "fp-any-order": "every input in the ball, for float32 sums in any order (not TF32, bfloat16 or Winograd kernels)",
    "real": "every input in the ball, in real arithmetic; float32 rounding of the runtime is not covered",
    "statistical": "the smoothed classifier, each sample with probability 1 - alpha",
}

CLAIMS_OF = {True: ("int-exact", "any-kernel"), False: ("real", "fp-any-order")}  # of integers, of floats

Certificates = dict[str, Any]
"""JSON-able outcome of a certify stage: what it speaks of and its settings; ``bounds`` and ``smoothing`` by sample."""


def certify(bench: Bench, source: Artifact, stage: CertifyStage, part: Part | None = None) -> Certificates:
    """Bounds for the 8-bit network when there is one, else for the float network.

    Raises UsageError for bounds that the form does not have.
    """
    network = certified_network(source, bench)
    return certificates(bench, network, network, stage, said_of(source), part or Part())


def said_of(source: Artifact) -> dict[str, str]:
    return said("onnx-int8" if source.quantization else "onnx", source.identity, source.digest)


def said(form: str, identity: str, artifact: str | None = None) -> dict[str, str]:
    """What a certificate says of its model: its form, a digest of all that decides its answers, and of its tensors."""
    return {"form": form, "identity": identity} | ({} if artifact is None else {"artifact": artifact})


def certificates(
    bench: Bench, network: Any, net: nn.Module, stage: CertifyStage, says: Mapping[str, str], part: Part
) -> Certificates:
    """What a stage asks for: bounds of a network from ``trace``, ``simulated`` or ``lifted``; smoothing of ``net``.

    ``says``: of the model, from :func:`said`.
    """
    started = time.monotonic()
    threat = threat_of(bench, stage)
    found: Certificates = {
        **says,
        "threat": {"norm": threat.norm, "eps": threat.text, "domain": [0, 1]},
        "data": {"source": bench.data.source, "sha256": bench.data.test.digest},
        "config": stage.model_dump(mode="json"),
        "seed": bench.seed,
    }
    if bench.smoke:
        found["smoke"] = True
    if part.shard != (0, 1):
        found["shard"] = part.name
    methods = bounds_of(stage, of_integers(network)) if set(stage.methods) != {"smoothing"} else ()
    limits: dict[Section, int | None] = {"bounds": stage.limit} if methods else {}
    if "smoothing" in stage.methods:
        limits["smoothing"] = stage.smoothing_limit
    ids = part.ids(len(bench.data.test), limits)
    verdicts = part.open(key_of(found, source_digest()))
    if "bounds" in ids:
        found["bounds"] = bounded(bench, network, threat, methods, stage, ids["bounds"], verdicts)
    if "smoothing" in ids:
        found["smoothing"] = smoothed(bench, net, threat, stage, ids["smoothing"], verdicts)
    found["seconds"] = time.monotonic() - started
    return found


def certified_network(source: Artifact, bench: Bench) -> Any:
    """What certificates of an artifact speak of: its 8-bit simulation, or its float network with batch norm folded."""
    deployed = Deployed.of(source)
    return trace(deployed.model, bench.data.shape, real=True) if deployed.twin is None else deployed.twin


def bounded(
    bench: Bench,
    network: fx.GraphModule,
    threat: ThreatModel,
    methods: tuple[Method, ...],
    stage: CertifyStage,
    ids: Int64[Tensor, " n"],
    verdicts: Verdicts,
) -> dict[str, Any]:
    """The cascade at eps, and intervals alone at fractions of it, where what holds at more holds too."""
    test, exact = loader(bench.data.test, torch.device("cpu")), of_integers(network)
    lower = [threat.scaled(factor) for factor in LOWER]

    def prove(verdicts: Verdicts, own: Tensor) -> None:
        total = len(verdicts.rows("bounds", ids)) + len(own)
        for block in _blocks(own, CHEAP_BLOCK if methods == ("ibp",) else BLOCK):
            report = _counting(bench, threat, verdicts.rows("bounds", ids), total)
            report({})
            broken = _falsified(bench, network, test, threat, stage, block)
            found = certify_bounds(network, test, threat, methods, falsified=broken, ids=block, on_progress=report)
            sure, looser = found.proved, []
            for less in lower:
                sure = sure | certify_bounds(network, test, less, ("ibp",), ids=block).proved
                looser.append(sure.int())
            rows = _rows(found, torch.stack(looser, 1).tolist())
            verdicts.add("bounds", dict(zip(block.tolist(), rows, strict=True)))

    verdicts.spread(verdicts.missing("bounds", ids), prove)
    rows = verdicts.rows("bounds", ids)
    levels = [_level(threat, [int(row["status"] == "certified") for row in rows])]
    levels += [_level(less, [row["lower"][place] for row in rows]) for place, less in enumerate(lower)]
    claim, firm = CLAIMS_OF[exact]
    return {
        "norm": threat.norm,
        "eps": threat.text,
        "n": len(rows),
        "methods": list(methods),
        "falsifier": falsifier_of(stage),
        "claim": claim,
        "counts": {status: sum(row["status"] == status for row in rows) for status in STATUS},
        "firm": {"claim": firm, "correct": sum(row["firm"] for row in rows)},
        "levels": levels,
        "samples": _numbered(ids, rows),
    } | ({} if stage.compat is None else {"as_hydra": as_hydra(network, test, threat, ids)})


def as_hydra(network: fx.GraphModule, test: Loader, threat: ThreatModel, ids: Tensor) -> dict[str, Any]:
    """What HYDRA's code would count: intervals, its eps, its box."""
    threat, correct = hydra_threat(threat), 0
    for part in _blocks(ids, BATCH):
        batch = test.take(part)
        lower = margins(network, *hydra_box(batch.x.double(), threat), batch.y)
        correct += int(proved(lower, batch.y).sum())
    return {"eps": threat.text, "correct": correct, "n": len(ids)}


def smoothed(
    bench: Bench, net: nn.Module, threat: ThreatModel, stage: CertifyStage, ids: Int64[Tensor, " n"], verdicts: Verdicts
) -> dict[str, Any]:
    """Randomized smoothing of a net on the CPU: its settings, and a row for each sample."""
    smoothing, settings = smoothing_of(stage, threat, math.prod(bench.data.shape))
    target = settings["radius"]
    test, predict = loader(bench.data.test, torch.device("cpu")), classes_of(net)

    def draw(verdicts: Verdicts, own: Tensor) -> None:
        total = len(verdicts.rows("smoothing", ids)) + len(own)
        for block in _blocks(own, BLOCK):
            known = SmoothedSet.from_rows(verdicts.rows("smoothing", ids))

            def report(done: int, right: int, _: int, known: SmoothedSet = known) -> None:
                bench.reporter.progress("smoothing", len(known.labels) + done, known.correct_at(target) + right, total)

            found = certify_smoothing(
                predict, test, len(bench.data.classes), smoothing, target=target, seed=bench.seed, ids=block,
                on_progress=report,
            )  # fmt: skip
            verdicts.add("smoothing", dict(zip(block.tolist(), found.rows(), strict=True)))

    verdicts.spread(verdicts.missing("smoothing", ids), draw)
    rows = _numbered(ids, verdicts.rows("smoothing", ids))
    return settings | {"samples": rows}


def smoothing_of(stage: CertifyStage, threat: ThreatModel, dimensions: int) -> tuple[Smoothing, dict[str, Any]]:
    """What a stage asks of smoothing, and the same as a certificate says it; ``radius``: l2, what is to be proved."""
    settings: dict[str, Any] = {name: getattr(stage, name) for name in ("sigma", "test", "noise", "n0", "alpha")}
    settings["n"] = stage.n or DRAWS[stage.test]
    smoothing, needed = Smoothing(**settings), needed_l2(threat.norm, threat.eps, dimensions)
    radius = stage.radius or (needed if needed < smoothing.reach(dimensions) else stage.sigma)
    return smoothing, settings | {"radius": radius, "slack": smoothing.slack(dimensions)}


def threat_of(bench: Bench, stage: CertifyStage) -> ThreatModel:
    return bench.threat if stage.eps is None else ThreatModel.of(bench.threat.norm, stage.eps)


def falsifier_of(stage: CertifyStage) -> str | None:
    return f"{FALSIFIER.label}-{FALSIFIER.steps}x{FALSIFIER.restarts}" if stage.falsify else None


def _blocks(ids: Tensor, size: int) -> Sequence[Tensor]:
    return torch.split(ids, size) if len(ids) else ()  # torch splits nothing into one empty part


def bounds_of(stage: CertifyStage, integers: bool) -> tuple[Method, ...]:
    if "auto" in stage.methods:
        return ("ibp",) if integers else CASCADE
    chosen = tuple(name for name in METHODS if name in stage.methods)
    for name in chosen:
        if integers and name != "ibp":
            raise UsageError(f"{name} does not bound integers", "use ibp for the 8-bit form; it is exact there")
    return chosen


def _falsified(
    bench: Bench, network: fx.GraphModule, test: Loader, threat: ThreatModel, stage: CertifyStage, ids: Tensor
) -> set[int]:
    if not stage.falsify:
        return set()
    found = robustness(Target(network, network), test, threat, (FALSIFIER,), seed=bench.seed, ids=ids, grid=False)
    right = found.clean.predicted == found.clean.labels
    return set(found.ids[~found.robust & right].tolist())


def _counting(
    bench: Bench, threat: ThreatModel, known: Sequence[Row], total: int
) -> Callable[[Mapping[str, int]], None]:
    before = Counter(str(row["status"]) for row in known)

    def report(counts: Mapping[str, int]) -> None:
        seen = before + Counter(counts)
        what = f"bounds eps {threat.eps:.4g}: {seen['falsified']} falsified, {seen['unknown']} unknown"
        bench.reporter.progress(what, sum(seen.values()), seen["certified"], total)

    return report


def _level(threat: ThreatModel, proved: list[int]) -> dict[str, Any]:
    return {"eps": threat.text, "correct": sum(proved), "proved": proved}


def _rows(found: Bounded, lower: list[list[int]]) -> list[Row]:
    """One for each sample; ``margin`` None where no bound is finite; ``lower``: proved at each fraction of eps."""
    columns = {
        "label": found.clean.labels.tolist(),
        "prediction": found.clean.predicted.tolist(),
        "status": found.status,
        "method": found.method,
        "margin": [margin if math.isfinite(margin) else None for margin in found.margin.tolist()],
        "firm": found.rounded.tolist(),
        "lower": lower,
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _numbered(ids: Tensor, rows: Sequence[Row]) -> list[Row]:
    """The rows as a certificate holds them; what is proved at less stands in its levels."""
    kept = [{name: value for name, value in row.items() if name != "lower"} for row in rows]
    return [{"index": i} | row for i, row in zip(ids.tolist(), kept, strict=True)]
