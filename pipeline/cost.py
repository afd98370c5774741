"""What a stage will cost: of one that trains from three of its steps, of attacks and certificates at most."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rprune.attacks.base import Attack, cross_entropy, input_gradient
from rprune.attacks.suites import with_transfer
from rprune.certification.ibp import of_integers
from rprune.certification.smoothing import DRAWS
from rprune.data.loaders import Batch, loader
from rprune.evaluation.accuracy import classes_of
from rprune.evaluation.certificates import certify_bounds
from rprune.evaluation.robustness import planned
from rprune.evaluation.target import Target, usual_batch
from rprune.models.registry import Architecture
from rprune.pipeline.artifact import Artifact
from rprune.pipeline.bench import Bench
from rprune.pipeline.certifying import FALSIFIER, LOWER, bounds_of, certified_network, threat_of
from rprune.pipeline.recipe import CertifyStage, ExportStage, FinetuneStage, PruneStage, Section, Trained
from rprune.pipeline.stages import _objective, _scores, compacted, epochs_of
from rprune.pipeline.targets import CPU, of_artifact
from rprune.pipeline.trial import trial
from rprune.threat import ThreatModel

WIDER = 8  # times eps: nothing is proved there, so every bound is tried


@dataclass(frozen=True)
class Cost:
    """Of a stage: optimizer steps, floating-point operations (convolutions and matrix products, two a
    multiply-accumulate; of training without validation), seconds on this machine, and the largest memory so far in
    bytes: of the GPU, else of the whole process. ``once``: seconds that do not grow with the epochs. ``at_most``: as
    if every sample survived every attack and needed every bound."""

    steps: int
    flops: float
    seconds: float
    memory: int
    once: float = 0.0
    at_most: bool = False

    def to_json(self) -> dict[str, Any]:
        return vars(self).copy()


def cost(
    bench: Bench,
    stage: Section,
    source: Artifact | None,
    arch: Architecture | None = None,
    teacher: Artifact | None = None,
) -> tuple[Cost, Artifact]:
    """The cost of a stage, and what its trial left: a stand-in for the stages behind it. Writes nothing.

    Of three steps one warms up, one is counted, one is timed. Time before the first step, of methods that score
    weights on data, is that of three batches.
    """
    if isinstance(stage, CertifyStage | ExportStage):
        assert source is not None
        if isinstance(stage, CertifyStage):
            flops, seconds = _of_certificates(bench, stage, source)
        else:
            flops, seconds = _of_attacks(bench, stage, source)
        return Cost(0, flops, seconds, _memory(bench.device), seconds, at_most=True), source
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    counter, epochs = Flops(), epochs_of(stage)
    tried = trial(bench, stage, source, arch, teacher, [None, counter, None])
    if not epochs:
        return Cost(0, 0.0, tried.around, _memory(bench.device), tried.around), tried.made
    assert isinstance(stage, Trained)
    share = stage.data_fraction if isinstance(stage, PruneStage) else 1.0
    epochs *= stage.soup if isinstance(stage, FinetuneStage) else 1
    steps = epochs * math.ceil(round(len(bench.data.train) * share) / stage.batch_size)
    small, whole = tried.bench.data.validation, bench.data.validation
    model = tried.made.model(bench.device)
    attack = _objective(tried.made.metadata.objective, bench).attack_used
    validation = _seconds(lambda: _scores(tried.bench, model, attack)) * len(whole) / len(small)
    seconds = tried.around + steps * tried.steps[-1] + epochs * validation
    return Cost(steps, float(steps * counter.total), seconds, _memory(bench.device), tried.around), tried.made


def _of_attacks(bench: Bench, stage: ExportStage, source: Artifact) -> tuple[float, float]:
    """Operations and seconds of an export's suite on each form; not those of the checks of its health."""
    attacks, flops, seconds = bench.suite(stage.suite), 0.0, 0.0
    samples = min(stage.limit or len(bench.data.test), len(bench.data.test))
    artifact = compacted(bench, source) if stage.compact else source
    for form, target in of_artifact(artifact, bench.device).items():
        device = bench.device if form == "float" else CPU
        more = _of_suite(bench, target, with_transfer(attacks, target.parents), device)
        flops, seconds = flops + samples * more[0], seconds + samples * more[1]
    return flops, seconds


def _of_suite(bench: Bench, target: Target, attacks: tuple[Attack, ...], device: torch.device) -> tuple[float, float]:
    """Operations and seconds of a sample that survives."""
    test, classes, flops, seconds = loader(bench.data.test, device), len(bench.data.classes), 0.0, 0.0
    batch = test.take(torch.arange(min(len(test), usual_batch(test.take(torch.arange(1)).x))))
    known: dict[tuple[nn.Module, bool], tuple[float, float]] = {}
    for step in planned(attacks, target):
        if step.net is None:
            continue
        how = step.net, step.kind != "black-box"
        if how not in known:
            known[how] = _of_pass(*how, batch)
        passes = step.attack.queries(classes)
        flops, seconds = flops + passes * known[how][0], seconds + passes * known[how][1]
    return flops, seconds


def _of_pass(net: nn.Module, gradient: bool, batch: Batch) -> tuple[float, float]:
    """Operations and seconds of one image's forward, with the gradient of the image where that is wanted."""

    def once() -> None:
        if gradient:
            input_gradient(net, batch.x, cross_entropy(batch.y))
        else:
            with torch.no_grad():
                net(batch.x)

    once()  # a net may try itself at first
    with Flops() as counter:
        once()
    return counter.total / len(batch.y), _seconds(once) / len(batch.y)


def _of_certificates(bench: Bench, stage: CertifyStage, source: Artifact) -> tuple[float, float]:
    """Operations and seconds of all draws of smoothing, and of all bounds behind an attack that breaks nothing."""
    network, test, flops, seconds = certified_network(source, bench), bench.data.test, 0.0, 0.0
    first = loader(test, CPU).take(torch.arange(1))
    if "smoothing" in stage.methods:
        several = loader(test, CPU).take(torch.arange(min(len(test), usual_batch(first.x))))
        draws = (stage.n0 + (stage.n or DRAWS[stage.test])) * min(stage.smoothing_limit, len(test))
        one = _of_pass(network, False, several)
        flops, seconds = flops + draws * one[0], seconds + draws * one[1]
    if set(stage.methods) != {"smoothing"}:
        samples = min(stage.limit or len(test), len(test))
        # one sample, of the class that the net says: others need no bound
        said = replace(test.select(slice(0, 1)), labels=classes_of(network)(first.x).numpy())
        threat, methods = threat_of(bench, stage), bounds_of(stage, of_integers(network))
        wide = ThreatModel.of(threat.norm, repr(WIDER * threat.eps))

        def prove() -> None:
            certify_bounds(network, loader(said, CPU), wide, methods, falsified=set(), ids=torch.arange(1))
            for _ in LOWER:
                certify_bounds(network, loader(said, CPU), wide, ("ibp",), ids=torch.arange(1))

        with Flops() as counter:
            spent = _seconds(prove)
        more = _of_pass(network, True, first) if stage.falsify else (0.0, 0.0)
        flops += samples * (counter.total + FALSIFIER.queries() * more[0])
        seconds += samples * (spent + FALSIFIER.queries() * more[1])
    return flops, seconds


def _seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - started


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    """Counts what is executed inside. FlopCounterMode would hook the modules, which gradients of images do not bear."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        rule = flop_registry.get(func.overloadpacket)
        if rule is not None:
            self.total += rule(*args, **(kwargs or {}), out_val=found)
        return found
