"""A first recipe for a data set and a model: every choice with its reason and its alternatives in a comment."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rprune.data.sources import TORCHVISION, load_data
from rprune.errors import InputError, UsageError
from rprune.models.prunable import prunable
from rprune.models.registry import Architecture, build, is_trusted
from rprune.pipeline.artifact import Artifact, load_any, load_state
from rprune.pipeline.bench import check_fits
from rprune.pipeline.starter_text import FAMILIAR, FEW, LARGE, SPARSITY, Facts, Start, policy_text, recipe_text
from rprune.pruning.budget import Budget
from rprune.threat import ThreatModel

VALIDATED = 0.1


@dataclass(frozen=True)
class Starter:
    """The two files, and what they are about."""

    recipe: str
    policy: str
    facts: Facts
    arch: str


def starter(
    source: str | None,
    arch: str | None = None,
    model: Path | None = None,
    folder: Path = Path(),
    policy: str = "gate.toml",
) -> Starter:
    """Recipe and gate policy for a data source; ``folder``: where they will lie, ``policy``: the latter's name.

    Raises:
        UsageError: unknown data or architecture; nothing says which data.
        InputError: the model cannot be read, is of no architecture that is known, or does not fit; data that is there
            cannot be read.
    """
    found = None if model is None else load_any(model, arch)
    if isinstance(found, Artifact):
        source = source or found.metadata.data.source
    if source is None:
        raise UsageError("no data is named", "say which: --data digits; 'rprune list data' shows all kinds")
    facts = look(source)
    if found is None:
        name = arch or architecture_for(facts)
        network = _meta(Architecture(name, facts.classes, facts.shape))
        return _written(facts, name, network, None, arch is not None, policy)
    assert model is not None
    place = os.path.relpath(model, folder)
    if isinstance(found, Artifact):
        own = found.metadata.arch
        if arch not in (None, own.name):
            raise UsageError(f"{model} is a {own.name}, not a {arch}", "leave out --arch: the file says what it is")
        if found.quantization:
            raise InputError(f"{model} is quantized already", "start from the model before that, or 'rprune export' it")
        if facts.seen:
            check_fits(found, load_data(source))
        sparsity = _sparsity(found) if found.masks else None
        facts = Facts(
            source, own.num_classes, own.input_shape, facts.train, facts.test, found.metadata.threat, facts.seen
        )
        start = Start(place, None if is_trusted(own.name) else own.name, sparsity)
        return _written(facts, own.name, _meta(own), start, True, policy)
    if arch is None:
        built = found.guessed(facts.shape if facts.seen else None, facts.classes, source)
        return _written(facts, built.name, _meta(built), Start(place, None), True, policy)
    built = Architecture(arch, facts.classes, facts.shape)
    load_state(build(built), found.state, arch)
    return _written(facts, arch, _meta(built), Start(place, arch), True, policy)


def look(source: str) -> Facts:
    """The data itself where it is; else what is known of it, or CIFAR-10's size.

    Raises UsageError for an unknown kind, InputError for data that is there and cannot be read.
    """
    kind, _, place = source.partition(":")
    try:
        data = load_data(source)
    except InputError:
        if kind in TORCHVISION:
            classes, shape, train, test = FAMILIAR[kind]
            threat = ThreatModel("linf", TORCHVISION[kind][4])
        elif Path(place.partition("?")[0]).exists():
            raise
        else:
            (classes, shape, train, test), threat = FAMILIAR["cifar10"], ThreatModel("linf", "8/255")
        return Facts(source, classes, shape, round(train * (1 - VALIDATED)), test, threat, seen=False)
    return Facts(source, len(data.classes), data.shape, len(data.train), len(data.test), data.threat)


def architecture_for(facts: Facts) -> str:
    """One that takes these images, learns against attacks at the usual rates, and has weights to spare at 0.99.

    cnn-large has the weights, but no batch norm: with PGD-AT it stayed at chance on digits at any rate from 0.02 on.
    """
    if facts.side >= LARGE:
        return "torchvision:resnet18"
    if facts.side < 4 or (facts.shape[0] == 3 and facts.train >= FEW):
        return "cifar-resnet18"
    return "vgg4"


def _meta(arch: Architecture) -> nn.Module:
    with torch.device("meta"):
        return build(arch)


def _written(facts: Facts, arch: str, network: nn.Module, start: Start | None, given: bool, policy: str) -> Starter:
    sizes = {name: weight.numel() for name, weight in prunable(network).items()}
    total = sum(sizes.values())
    kept = Budget.of(sizes, SPARSITY).kept
    recipe = recipe_text(facts, arch, start, given, kept, total, policy)
    sparsity = SPARSITY if start is None or start.sparsity is None else start.sparsity
    return Starter(recipe, policy_text(facts, sparsity), facts, arch)


def _sparsity(artifact: Artifact) -> float:
    """Of a pruned model, rounded down to four digits."""
    kept = sum(int(mask.sum()) for mask in artifact.masks.values())
    total = artifact.metadata.dense_total or sum(mask.numel() for mask in artifact.masks.values())
    return math.floor(1e4 * (1 - kept / total)) / 1e4
