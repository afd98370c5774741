"""The quantize stage: integers by calibration or by training with them, or a codebook of few weight values."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rprune.attacks.pgd import PGD
from rprune.data.loaders import loader
from rprune.errors import UsageError
from rprune.models.cost import positions, sparse_macs
from rprune.models.graph import trace
from rprune.models.prunable import prunable
from rprune.objectives.base import OBJECTIVES, Objective
from rprune.pipeline.artifact import Artifact
from rprune.pipeline.bench import Bench
from rprune.pipeline.environment import environment
from rprune.pipeline.recipe import QuantizeStage, Trained
from rprune.pipeline.stages import (
    _fit,
    _metadata,
    _objective,
    _scores,
    _stamped,
    as_flat,
    compacted,
    epochs_of,
    recorded_objective,
)
from rprune.pruning import codebook
from rprune.quantization import ptq
from rprune.quantization.guarantees import saturating_pairs
from rprune.quantization.ptq import Quantization, simulated
from rprune.quantization.qat import fake_quantized, inputs, trained
from rprune.quantization.weights import KEEPS
from rprune.training.loop import FitResult
from rprune.training.qat import QuantizationAware

LR = 0.01


def quantize(bench: Bench, source: Artifact, stage: QuantizeStage, state_file: Path | None = None) -> Artifact:
    """The integer form beside the float weights, or float weights of few values (codebook).

    Raises InputError for layers that have no integer form.
    """
    run = {"ptq": _ptq, "qat": _qat, "codebook": _codebook}[stage.mode]
    return run(bench, compacted(bench, source) if stage.compact else source, stage, state_file)


def flattened(source: Artifact) -> Artifact:
    """The same function with batch norm folded, as architecture ``flat``; layers keep their names."""
    return as_flat(source, trace(source.model(), source.metadata.arch.input_shape))


def _ptq(bench: Bench, source: Artifact, stage: QuantizeStage, _: Path | None) -> Artifact:
    started = time.monotonic()
    network = trace(source.model(), bench.data.shape)
    found = ptq.quantize(network, _calibration(bench, stage), _settings(stage, source))
    return _finished(bench, source, replace(source, quantization=found.tensors()), network, found, stage, started)


def _qat(bench: Bench, source: Artifact, stage: QuantizeStage, state_file: Path | None) -> Artifact:
    """Training of the folded network with its integers' values, from where calibration puts them, biases included.

    The better of the two by validation stays; epoch 0 is calibration.
    """
    started = time.monotonic()
    if stage.precision != "fp32":
        raise UsageError(f"precision {stage.precision} cannot hold integers of 8 bits in training", "leave it at fp32")
    objective = _objective(stage.objective or recorded_objective(source, bench), bench)
    stage = stage.model_copy(update={"epochs": epochs_of(stage), "lr": stage.lr or LR})
    base = flattened(source)
    network = trace(base.model(), bench.data.shape)
    settings = _settings(stage, source)
    start = ptq.quantize(network, _calibration(bench, stage), settings)
    calibrated = simulated(network, start)
    ptq.take_biases(network, start)
    model = fake_quantized(network, start).to(bench.device)
    masks = {name: mask.to(bench.device) for name, mask in base.masks.items()}
    scales = {f"{name}.weight": scale for name, scale in start.weight_scales.items()}
    pruner = QuantizationAware(model, masks, scales, inputs(network, model), stage.bits, stage.portable, settings.keep)
    assert stage.epochs is not None
    fit = _fit(bench, "quantize", model, pruner, objective, stage, stage.epochs, state_file)
    state = model.state_dict() | pruner.weights()
    state = {name: state[name].detach().cpu().clone() for name in base.state}
    network.load_state_dict(state)
    final = {name.removesuffix(".weight"): scale.cpu() for name, scale in pruner.scales().items()}
    found = trained(network, model, final, stage.bits, settings.keep)
    if _score(bench, calibrated, objective) > _score(bench, simulated(network, found), objective):
        # training has not helped: what calibration gave is what stays
        network, state, found = trace(base.model(), bench.data.shape), base.state, start
        fit = replace(fit, selected_epoch=0)
    kept = {key: getattr(base.metadata, key) for key in ("sparsity", "budget", "dense_total")}
    metadata = _metadata("quantize", base.metadata.arch, bench, objective).model_copy(update=kept)
    made = Artifact(metadata, state, base.masks, found.tensors())
    resolved = stage.model_copy(update={"objective": OBJECTIVES.describe(objective)})
    return _finished(bench, source, made, network, found, resolved, started, fit)


def _score(bench: Bench, net: nn.Module, objective: Objective) -> float:
    return _scores(bench, net, objective.attack_used)["score"]


def _codebook(bench: Bench, source: Artifact, stage: QuantizeStage, _: Path | None) -> Artifact:
    """At most 2^bits - 1 values besides zero in each layer, by k-means; there is no integer form."""
    started = time.monotonic()
    made = flattened(source)
    levels = (1 << stage.bits) - 1
    for name in prunable(made.model()):
        weight = made.state[name]
        made.state[name] = codebook.quantize(weight, weight != 0, levels)
    model = made.model(bench.device)
    nonzero = {name: int(weight.count_nonzero()) for name, weight in prunable(model).items()}
    values = {name: len(torch.unique(weight[weight != 0])) for name, weight in prunable(model).items()}
    metrics = {"levels": max(values.values())} | _counts(model, nonzero, bench)
    metrics["validation"] = _scores(bench, model, PGD())
    return _done(bench, source, made, stage, started, metrics)


def _settings(stage: QuantizeStage, source: Artifact) -> ptq.Settings:
    """What the stage leaves open is as measured best (benchmarks/bits.py): below 8 bits outliers cost the rest."""
    narrow = stage.bits < KEEPS
    return ptq.Settings(
        bits=stage.bits,
        observer=stage.observer or ("mse" if narrow else "minmax"),
        percentile=stage.percentile,
        portable=stage.portable,
        bias_correction=narrow if stage.bias_correction is None else stage.bias_correction,
        keep=sparse(source),
    )


def sparse(source: Artifact) -> bool:
    """Whether zeros were promised, or are there."""
    weights = prunable(source.model()).values()
    return source.metadata.budget is not None or any(bool((weight == 0).any()) for weight in weights)


def _calibration(bench: Bench, stage: QuantizeStage) -> list[Tensor]:
    # a fixed random choice: data on disk may be sorted by class
    order = np.random.RandomState(0).permutation(len(bench.data.train))[: stage.calibration]
    chosen = loader(bench.data.train.select(np.sort(order).astype(np.int64)), torch.device("cpu"))
    return [batch.x for batch in chosen.ordered(128)]


def _finished(
    bench: Bench,
    source: Artifact,
    made: Artifact,
    network: fx.GraphModule,
    found: Quantization,
    stage: QuantizeStage,
    started: float,
    fit: FitResult | None = None,
) -> Artifact:
    """Counts of the integers, and scores of the network that computes with them."""
    nonzero = {f"{name}.weight": int(weight.count_nonzero()) for name, weight in found.weights.items()}
    floats = sum(int(weight.count_nonzero()) for weight in prunable(network).values())
    metrics = _counts(network, nonzero, bench) | {"lost": floats - sum(nonzero.values())}
    if found.bits <= KEEPS:
        metrics["saturating_pairs"] = sum(saturating_pairs(found).values())
    if fit is not None:
        metrics |= {} if fit.selected_epoch is None else {"selected_epoch": fit.selected_epoch}
    attack = PGD() if fit is None else _objective(made.metadata.objective, bench).attack_used
    metrics["validation"] = _scores(bench, simulated(network, found), attack)
    return _done(bench, source, made, stage, started, metrics, fit)


def _counts(model: nn.Module, nonzero: Mapping[str, int], bench: Bench) -> dict[str, Any]:
    places, sizes = positions(model, bench.data.shape), {n: w.numel() for n, w in prunable(model).items()}
    return {
        "kept": sum(nonzero.values()),
        "total": sum(sizes.values()),
        "macs": {"dense": sparse_macs(places, sizes), "sparse": sparse_macs(places, nonzero)},
    }


def _done(
    bench: Bench,
    source: Artifact,
    made: Artifact,
    stage: QuantizeStage,
    started: float,
    metrics: dict[str, Any],
    fit: FitResult | None = None,
) -> Artifact:
    changes = {"stage": "quantize", "data": bench.record(), "environment": environment(str(bench.device))}
    config = stage.model_dump(mode="json")
    if fit is None:  # nothing was trained
        config = {key: value for key, value in config.items() if key not in Trained.model_fields and value is not None}
    history = [] if fit is None else [{"epoch": float(log.epoch)} | log.values for log in fit.history]
    made = made.with_metadata(**changes)
    return _stamped(made, "quantize", config, source, time.monotonic() - started, metrics, history)
