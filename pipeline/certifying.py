"""The certify stage: bounds by a cascade from the cheapest on, and randomized smoothing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from rprune.attacks.pgd import PGD
from rprune.certification.bounds import CASCADE, METHODS, Method
from rprune.certification.confidence import needed_l2
from rprune.certification.ibp import of_integers
from rprune.certification.smoothing import DRAWS, Smoothing
from rprune.data.loaders import Loader, loader
from rprune.errors import UsageError
from rprune.evaluation.accuracy import classes_of
from rprune.evaluation.certificates import Bounded, certify_bounds, certify_smoothing
from rprune.evaluation.robustness import robustness
from rprune.evaluation.target import Target
from rprune.models.graph import trace
from rprune.pipeline.artifact import Artifact
from rprune.pipeline.bench import Bench, progress_of
from rprune.pipeline.forms import Deployed
from rprune.pipeline.recipe import CertifyStage
from rprune.threat import ThreatModel

FALSIFIER = PGD(steps=40, restarts=3)
LOWER = (1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of eps: the certified curve
CLAIMS = {
    "int-exact": "every input in the ball, for the integers of the 8-bit graph, on kernels that do not saturate",
    "fp-any-order": "every input in the ball, for float32 sums in any order (not TF32, bfloat16 or Winograd kernels)",
    "real": "every input in the ball, in real arithmetic; float32 rounding of the runtime is not covered",
    "statistical": "the smoothed classifier, each sample with probability 1 - alpha",
}

Certificates = dict[str, Any]
"""JSON-able outcome of a certify stage: ``artifact`` (tensors digest), ``bounds`` and ``smoothing`` by sample."""


def certify(bench: Bench, source: Artifact, stage: CertifyStage) -> Certificates:
    """Bounds for the 8-bit network when there is one, else for the float network.

    Raises UsageError for bounds that the form does not have.
    """
    form = "onnx-int8" if source.quantization else "onnx"
    network = certified_network(source, bench)
    return {"artifact": source.digest, "form": form} | certificates(bench, network, network, stage)


def certificates(bench: Bench, network: Any, net: nn.Module, stage: CertifyStage) -> Certificates:
    """What a stage asks for: bounds of a network from ``trace``, ``simulated`` or ``lifted``; smoothing of ``net``."""
    started = time.monotonic()
    found: Certificates = {
        "data": {"source": bench.data.source, "sha256": bench.data.test.digest},
        "config": stage.model_dump(mode="json"),
        "seed": bench.seed,
    }
    if set(stage.methods) > {"smoothing"} or "smoothing" not in stage.methods:
        threat = bench.threat if stage.eps is None else ThreatModel.of(bench.threat.norm, stage.eps)
        integers = of_integers(network)
        found["bounds"] = bounded(bench, network, threat, _bounds_of(stage, integers), stage, integers)
    if "smoothing" in stage.methods:
        found["smoothing"] = smoothed(bench, net, stage)
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
    exact: bool,
) -> dict[str, Any]:
    """The cascade at eps, and intervals alone at fractions of it, where what holds at more holds too."""
    test = loader(bench.data.test, torch.device("cpu"))
    broken = _falsified(bench, network, test, threat, stage)
    found = certify_bounds(
        network, test, threat, methods, falsified=broken, limit=stage.limit, on_progress=_counting(bench, threat)
    )
    sure, levels = found.proved, [_level(threat, found.proved)]
    for factor in LOWER:
        lower = threat.scaled(factor)
        looser = certify_bounds(network, test, lower, ("ibp",), limit=stage.limit, on_progress=_counting(bench, lower))
        sure = sure | looser.proved
        levels.append(_level(lower, sure))
    return {
        "norm": threat.norm,
        "eps": threat.text,
        "n": found.clean.n,
        "methods": list(methods),
        "falsifier": f"{FALSIFIER.label}-{FALSIFIER.steps}x{FALSIFIER.restarts}" if broken is not None else None,
        "claim": "int-exact" if exact else "real",
        "counts": found.counts(),
        "fp_any_order": None if exact else int(found.rounded.sum()),
        "levels": levels,
        "samples": _rows(found),
    }


def smoothed(bench: Bench, net: nn.Module, stage: CertifyStage) -> dict[str, Any]:
    """Randomized smoothing of a net on the CPU: its settings, and a row for each sample."""
    settings: dict[str, Any] = {name: getattr(stage, name) for name in ("sigma", "test", "noise", "n0", "alpha")}
    settings["n"] = stage.n or DRAWS[stage.test]
    smoothing, dimensions = Smoothing(**settings), math.prod(bench.data.shape)
    needed = needed_l2(bench.threat.norm, bench.threat.eps, dimensions)
    target = stage.radius or (needed if needed < smoothing.reach(dimensions) else stage.sigma)
    verdicts = certify_smoothing(
        classes_of(net), loader(bench.data.test, torch.device("cpu")), len(bench.data.classes), smoothing,
        target=target, seed=bench.seed, limit=stage.smoothing_limit, on_progress=progress_of(bench, "smoothing"),
    )  # fmt: skip
    return settings | {"radius": target, "slack": smoothing.slack(dimensions), "samples": verdicts.rows()}


def _bounds_of(stage: CertifyStage, integers: bool) -> tuple[Method, ...]:
    if "auto" in stage.methods:
        return ("ibp",) if integers else CASCADE
    chosen = tuple(name for name in METHODS if name in stage.methods)
    for name in chosen:
        if integers and name != "ibp":
            raise UsageError(f"{name} does not bound integers", "use ibp for the 8-bit form; it is exact there")
    return chosen


def _falsified(
    bench: Bench, network: fx.GraphModule, test: Loader, threat: ThreatModel, stage: CertifyStage
) -> torch.Tensor | None:
    if not stage.falsify:
        return None
    found = robustness(
        Target(network, network), test, threat, (FALSIFIER,), seed=bench.seed, limit=stage.limit, grid=False,
        on_progress=lambda name, *counts: bench.reporter.progress(f"{name} eps {threat.eps:.4g}", *counts),
    )  # fmt: skip
    broken = torch.zeros(len(test), dtype=torch.bool)
    broken[found.ids] = ~found.robust & (found.clean.predicted == found.clean.labels)
    return broken


def _counting(bench: Bench, threat: ThreatModel) -> Any:
    def report(counts: Mapping[str, int], total: int) -> None:
        what = f"bounds eps {threat.eps:.4g}: {counts['falsified']} falsified, {counts['unknown']} unknown"
        bench.reporter.progress(what, sum(counts.values()), counts["certified"], total)

    return report


def _level(threat: ThreatModel, proved: torch.Tensor) -> dict[str, Any]:
    return {"eps": threat.text, "correct": int(proved.sum()), "proved": proved.int().tolist()}


def _rows(found: Bounded) -> list[dict[str, Any]]:
    """One for each sample; ``margin`` None where no bound is finite."""
    rows = zip(found.status, found.method, found.margin.tolist(), strict=True)
    return [
        {"status": status, "method": method, "margin": margin if math.isfinite(margin) else None}
        for status, method, margin in rows
    ]
