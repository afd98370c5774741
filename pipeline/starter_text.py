"""The words of a first recipe and its policy (:mod:`rprune.pipeline.starter`)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from rprune.threat import ThreatModel

SPARSITY = 0.99
FEW, MANY = 5_000, 500_000  # training images
LARGE = 96  # pixels a side, from which a stem with strides pays
FAMILIAR = {  # classes, shape, training and test images of sets that need not be here yet
    "cifar10": (10, (3, 32, 32), 50_000, 10_000),
    "cifar100": (100, (3, 32, 32), 50_000, 10_000),
    "svhn": (10, (3, 32, 32), 73_257, 26_032),
    "mnist": (10, (1, 28, 28), 60_000, 10_000),
    "fashion-mnist": (10, (1, 28, 28), 60_000, 10_000),
}
COLUMN = 28  # where comments begin
Row = str | tuple[str, ...]
"""A line of its own, or a setting with the lines of its comment."""


@dataclass(frozen=True)
class Facts:
    """What a recipe depends on; ``seen`` False: the data is not here, and the numbers are what is usual for it."""

    source: str
    classes: int
    shape: tuple[int, int, int]
    train: int
    test: int
    threat: ThreatModel
    seen: bool = True

    @property
    def side(self) -> int:
        return min(self.shape[1:])

    @property
    def text(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.classes} classes, images of {size}, {self.train:,} to train with, {self.test:,} to test"


@dataclass(frozen=True)
class Start:
    """A model file that takes the place of training: its path from the recipe, the name of an architecture that the
    recipe must say (None: the file does), and its sparsity where it is pruned already."""

    path: str
    arch: str | None
    sparsity: float | None = None


def recipe_text(facts: Facts, arch: str, start: Start | None, given: bool, kept: int, total: int, policy: str) -> str:
    """``given``: the architecture was asked for. ``kept`` of ``total`` weights: what pruning leaves, or has left."""
    sections = [
        _head(facts, arch, start, policy),
        _model(facts, arch, start, given, total),
        _data(facts),
        _threat(facts),
    ]
    sections += [] if start is not None else [_train(facts)]
    sections += [] if start is not None and start.sparsity is not None else [_prune(facts, kept, total)]
    sections += [_finetune(facts), _quantize(facts), _certify(facts), _export(facts)]
    return "\n\n".join("\n".join(map(_line, section)) for section in sections) + "\n"


def _line(row: Row) -> str:
    if isinstance(row, str):
        return row
    setting, first, *more = row
    lines = [f"{setting:<{COLUMN - 1}} # {first}"]
    return "\n".join([*lines, *(f"{'':<{COLUMN}}# {text}" for text in more)])


def _head(facts: Facts, arch: str, start: Start | None, policy: str) -> list[Row]:
    place = re.sub(r"^npz:", "", facts.source.partition("?")[0])
    stem = f"{Path(place).stem}-{arch.rpartition(':')[2]}-harp"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", stem).strip("-.")
    rows: list[Row] = [f"# {facts.source}: {facts.text}."]
    if not facts.seen:
        rows += [
            "# The data was not here when this was written, so these numbers are what is known of this set, or",
            "# those of CIFAR-10. Where they are wrong, write this again once the data is here.",
        ]
    rows += [
        "#",
        "# Try it first:  rprune run THIS --smoke      does every stage work? few images; results of no value",
        "# Ask the price: rprune run THIS --dry-run    steps, time and memory of every stage on this machine",
        "# Then:          rprune run THIS              interrupted, the same command continues",
        "# Change a value for one run: --set stage.prune.sparsity=0.95. All keys: rprune schema recipe",
        ("rprune = 1", "version of this format"),
        f"name = {json.dumps(name)}",
        ("seed = 0", "everything random follows from it"),
        (f"policy = {json.dumps(policy)}", "locked before the first stage; the report is judged by it"),
    ]
    if start is not None:
        rows.append(
            (f"checkpoint = {json.dumps(start.path)}", "takes the place of a train stage; a path from this file")
        )
    return rows


def _model(facts: Facts, arch: str, start: Start | None, given: bool, total: int) -> list[Row]:
    if start is not None and start.arch is None:
        return [f"# The checkpoint says its architecture itself: {arch}, {total:,} conv and linear weights."]
    reasons = {
        "torchvision:resnet18": "its strides make large images small early",
        "cifar-resnet18": "the papers' net for small colour images, HARP's and HYDRA's among them",
        "vgg4": "few images, or without colour; a hundredth of its weights is still a network",
    }
    others = (
        "torchvision:resnet50, torchvision:mobilenet_v3_small"
        if facts.side >= LARGE
        else "cnn-small, cnn-large, vgg4, vgg16, cifar-resnet18, wrn-28-4"
    )
    return [
        "[model]",
        f"# {total:,} conv and linear weights; {'as you asked' if given else reasons[arch]}.",
        f"# Others: {others}, file.py:factory; 'rprune list architectures'.",
        f"arch = {json.dumps(arch)}",
        "# mean = [...], std = [...]: for weights that expect normalised input; one value a channel, in [0,1] units.",
    ]


def _data(facts: Facts) -> list[Row]:
    return [
        "[data]",
        f"source = {json.dumps(facts.source)}",
        ("validation = 0.1", "share of the training images that chooses checkpoints; test images never do"),
        '# augment = "crop-flip", or none, crop, resized-crop-flip; unsaid, what is usual for the source.',
        "# download = true: may torchvision's sets be fetched; nothing else uses the network.",
    ]


def _threat(facts: Facts) -> list[Row]:
    usual = "usual for this data" + ("; 4/255 is usual for ImageNet" if facts.side >= LARGE else "")
    return [
        "[threat]",
        "# What the adversary may do: change each pixel, in [0,1], by eps. More robustness costs clean accuracy.",
        (f"norm = {json.dumps(facts.threat.norm)}", "or l2, whose eps is a length: 0.5 is usual for CIFAR-10"),
        (f"eps = {json.dumps(facts.threat.text)}", usual),
    ]


def _epochs(facts: Facts) -> tuple[int, int, int, str]:
    """Of training, pruning and fine-tuning, and why."""
    if facts.train < FEW:
        return 60, 20, 60, "few images, so an epoch is short"
    if facts.train < MANY:
        return 100, 20, 100, "as HYDRA and HARP"
    return 23, 23, 23, "as HYDRA on ImageNet, where each image is used four times"


def _batch(facts: Facts) -> str:
    return f"batch_size = {64 if facts.train < FEW else 128 if facts.train < MANY else 256}"


def _train(facts: Facts) -> list[Row]:
    epochs, _, _, why = _epochs(facts)
    objective: Row = (
        'objective = "pgd-at"', "10 steps of attack a batch. trades: more robust, less clean; mart;",
        "n-fgsm, fast-at: 5 times as fast, a little weaker; benign: no robustness;",
        "ibp, crown-ibp: for certificates; 'rprune list objectives'",
    )  # fmt: skip
    if facts.train >= MANY:
        objective = (
            'objective = "free-at"', "for sets of this size: 4 passes an image, against 11 of pgd-at.",
            "Others: n-fgsm, pgd-at, trades; 'rprune list objectives'",
        )  # fmt: skip
    return [
        "[[stage]]",
        'kind = "train"',
        objective,
        (f"epochs = {epochs}", f"{why}; --budget 2h fits a whole run into a time"),
        (_batch(facts), "images a step; less where memory is short, or accumulate = 2"),
        ("lr = 0.1", "of SGD, falling by a cosine; grows with the batch size"),
        '# average = "ema" or awp = 0.005: often worth a point of robustness; awp takes one more pass.',
        '# precision = "bf16", compile = true: faster on GPUs.',
    ]


def _prune(facts: Facts, kept: int, total: int) -> list[Row]:
    few = " Very few: 0.9 or 0.95 keeps more accuracy" if kept < 2_000 else ""
    return [
        "[[stage]]",
        'kind = "prune"',
        ('method = "harp"', "learns what to keep, and how much of each layer. hydra: scores at one rate;",
         "lwm: by magnitude, no training; robust-admm, ...; 'rprune list methods'"),
        (f"sparsity = {SPARSITY}", f"keeps {kept:,} of {total:,} weights.{few}",
         "or macs = 0.05: a budget of multiply-accumulates, which time follows"),
        (f"epochs = {_epochs(facts)[1]}", "20 are HARP's own"),
        _batch(facts),
        '# exclude = ["conv1"]: layers to keep dense, by globs of their names.',
    ]  # fmt: skip


def _finetune(facts: Facts) -> list[Row]:
    lr, why = (
        (0.05, "a short training bears more than HARP's 0.01") if facts.train < FEW else (0.01, "as HYDRA and HARP")
    )
    return [
        "[[stage]]",
        'kind = "finetune"',
        (f"epochs = {_epochs(facts)[2]}", "with the mask held; most of what pruning lost comes back here"),
        _batch(facts),
        (f"lr = {lr}", why),
        '# teacher = "dense": learn from the model before pruning as well.',
    ]


def _quantize(facts: Facts) -> list[Row]:
    return [
        "[[stage]]",
        'kind = "quantize"',
        ('mode = "ptq"', "calibration alone. qat: robust training with the integers, for fewer bits"),
        ("bits = 8", "of weights and activations; what runtimes run"),
        (f"calibration = {min(512, facts.train)}", "training images that set the ranges"),
        "# portable = true: x86 CPUs without VNNI give the same labels in any setting; costs a little accuracy.",
    ]


def _certify(facts: Facts) -> list[Row]:
    large = facts.side >= LARGE
    methods: Row = ('methods = ["smoothing"]', "randomized smoothing; bounds prove nothing of nets this large")
    if not large:
        methods = (
            'methods = ["auto", "smoothing"]', "bounds of the integers, then randomized smoothing. Few bounds hold",
            "unless training aimed at them: objective ibp or crown-ibp",
        )  # fmt: skip
    return [
        "[[stage]]",
        'kind = "certify"',
        methods,
        *([] if large else [(f"limit = {min(1000, facts.test)}", "test images that bounds are computed for")]),
        ("sigma = 0.25", "of smoothing's noise; 0.5 and 1.0 reach farther and are right less often"),
        (f"n = {10_000 if large else 100_000}", "draws an image at most: the costly part, above all on CPUs"),
        (f"smoothing_limit = {min(100, facts.test)}", "test images that it is done for"),
    ]


def _export(facts: Facts) -> list[Row]:
    few: Row = ("limit = 1000", f"of {facts.test:,} test images: known to 3 points either way; leave out for all")
    return [
        "[[stage]]",
        'kind = "export"',
        'formats = ["safetensors", "onnx", "onnx-int8", "onnx-compact", "packed"]  # "c": no runtime needed',
        ('suite = "aa-lite"', "AutoAttack's two APGD parts. aa-standard: all four, five times the cost;",
         "pgd50x5: a first look; 'rprune list suites'"),
        *([few] if facts.test > 1000 else []),
        "# bench = true: measure latencies here for the report.",
    ]  # fmt: skip


def policy_text(facts: Facts, sparsity: float) -> str:
    """A gate that holds what is known, the sparsity; bars that only the user can know are left as comments."""
    bars = (
        ("clean_accuracy", ">=", "0.80", "share of the test images, 0 to 1"),
        ("robust_accuracy", ">=", "0.40", f"under the attacks of the export stage, {facts.threat}"),
        ("certified_accuracy", ">=", "0.10", "proved, whatever the attack"),
        ("smoothed_certified_accuracy", ">=", "0.50", "of the smoothed classifier"),
        ("bytes", "<=", "1000000", "of that file"),
    )
    rows: list[Row] = [
        f"# What a model of {facts.source} must reach to ship. A run locks this file first: set the bars now.",
        "# Accuracies are judged by their 95 % Clopper-Pearson lower bound, so n samples have to be enough.",
        "[[gate]]",
        ('metric = "sparsity"', "zeros counted in the file"),
        'op = ">="',
        f"value = {sparsity:g}",
        "",
        "# Nobody can know these for you. Take away the marks and say what your application needs.",
    ]
    for metric, op, value, what in bars:
        rows += [
            "",
            "# [[gate]]",
            f'# metric = "{metric}"',
            ('# artifact = "onnx-int8"', "the file that ships"),
            f'# op = "{op}"',
            (f"# value = {value}", what),
        ]
    return "\n".join(map(_line, rows)) + "\n"
