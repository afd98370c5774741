"""A report as a run at 99 % sparsity on CIFAR-10 would leave it, with made-up but consistent numbers."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np

from rprune.reports.gate import Policy, judge
from rprune.reports.html import Sample
from rprune.reports.schema import (
    AttackRow,
    Claim,
    DataUsed,
    Evidence,
    Fidelity,
    Health,
    HealthCheck,
    Interval,
    Layer,
    LineageEntry,
    Point,
    Report,
    Role,
    Sparsity,
    Subject,
    Threat,
)
from rprune.threat import ThreatModel

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LINF = ThreatModel("linf", "8/255")
PARAMETERS = 11_173_962
BARS = {"passed": 0.40, "failed": 0.48}
SUITES: dict[str, list[tuple[str, Any, int, int, int, int]]] = {  # name, kind, tried, broken, misses, queries
    "onnx": [
        ("apgd-ce", "white-box", 778, 289, 0, 61_400),
        ("apgd-t", "white-box", 489, 36, 1, 405_950),
        ("fab-t", "white-box", 453, 0, 0, 391_230),
        ("square", "black-box", 453, 1, 0, 2_261_000),
    ],
    "onnx-int8": [
        ("apgd-ce", "white-box", 660, 291, 3, 56_300),
        ("apgd-t", "white-box", 369, 36, 5, 301_200),
        ("transfer of apgd-t", "transfer", 333, 4, 0, 270_800),
        ("square", "black-box", 329, 2, 0, 1_640_000),
    ],
}
SECURITY = {  # right samples at eps in 1/255
    "onnx": {0: 778, 2: 700, 4: 621, 8: 452, 12: 306, 16: 183, 24: 66, 128: 0},
    "onnx-int8": {0: 772, 2: 694, 4: 613, 8: 439, 12: 301, 16: 178, 24: 61, 128: 0},
}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sample_report(
    gate: Literal["passed", "failed"] | None = "passed",
    *,
    curves: bool = True,
    history: bool = True,
    profile: bool = True,
    attacked: bool = True,
    weak: bool = False,
    complete: bool = True,
    **changes: Any,
) -> Report:
    """``profile``: what the prune stage says about layers and weights. ``attacked``: what the first reports did not say
    of the attacks; ``weak``: two checks of the int8 file's failed. ``changes`` replace fields before sealing.
    """
    report = Report(
        created="2026-03-02T08:15:00Z",
        name="resnet18-cifar10-harp99-int8",
        tool={"name": "rprune", "version": "0.1.0", "source_sha256": sha("source")},
        subjects=_subjects(),
        model={
            "architecture": {"name": "cifar-resnet18", "num_classes": 10, "input_shape": [3, 32, 32], "kwargs": {}},
            "parameters": PARAMETERS,
            "labels": CLASSES,
            "input": {"shape": [3, 32, 32], "range": [0, 1], "normalisation": "in-graph"},
            "tensors_sha256": sha("quantize"),
        },
        data=DataUsed(
            source="torchvision:CIFAR10?root=data",
            classes=CLASSES,
            samples=10_000,
            sha256=sha("test"),
            train_sha256=sha("train"),
            validation_sha256=sha("validation"),
            validation_samples=5_000,
        ),
        threat=Threat.of(LINF),
        recipe={"rprune": 1, "name": "resnet18-cifar10-harp99-int8"},
        recipe_sha256=sha("recipe"),
        policy_sha256=None,
        lineage=_lineage(history, profile, _sparsity()),
        sparsity=_sparsity(),
        size={"dense_float32_weights": 4 * PARAMETERS, "model.onnx": 44_731_090, "model.int8.onnx": 11_262_401},
        fidelity=[
            _fidelity("float model", "model.onnx", 512, 1.0, 7.6e-6),
            _fidelity("8-bit simulation", "model.int8.onnx", 512, 1.0, 0.0),
            _fidelity("float model", "model.int8.onnx", 256, 0.98828125, 0.1123),
        ],
        claims=_claims(curves, attacked, weak, complete),
        evidence=Evidence(witness_count=333),
        environment={
            "python": "3.11.9",
            "os": "Linux x86_64",
            "cpu": "AMD EPYC 9654 96-Core Processor",
            "device": "cuda",
            "packages": {"torch": "2.11.0", "onnx": "1.19.0", "onnxruntime": "1.23.0", "numpy": "2.4.6"},
        },
        limitations=[
            "Empirical robust accuracy is an upper bound: a stronger attack may find more.",
            "Accuracies hold for the named test samples, not for a shift of the data.",
            "ONNX Runtime's dense kernels do not run faster on unstructured zeros.",
        ],
    )  # fmt: skip
    report = report.model_copy(update=changes)
    if gate is not None:
        rules = [
            {"metric": "clean_accuracy", "value": 0.74},
            {"metric": "robust_accuracy", "value": BARS[gate]},
            {"metric": "sparsity", "value": 0.99},
            {"metric": "bytes", "op": "<=", "value": 12e6},
        ]
        policy = Policy.model_validate({"gate": rules})
        report = report.model_copy(update={"policy_sha256": policy.sha256, "gate": judge(report, policy)})
    return report.sealed()


def sample_images(count: int = 8, channels: int = 3) -> list[Sample]:
    """Smooth patterns with a sign perturbation of 8/255."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:32, 0:32] / 31
    samples = []
    for k in range(count):
        phase = rng.uniform(0, 6, (channels, 1, 1))
        clean = (0.5 + 0.4 * np.sin(phase + 5 * x[None] * rng.uniform(0.4, 1.5) + 4 * y[None])).astype(np.float32)
        noise = np.sign(rng.standard_normal(clean.shape)).astype(np.float32) * np.float32(LINF.eps)
        adversarial = np.clip(clean + noise, 0, 1)
        names = CLASSES[k % 10], CLASSES[k % 10], CLASSES[(k + 3) % 10]
        by = SUITES["onnx-int8"][k % 4][0]
        samples.append(Sample(17 * k + 3, *names, clean, adversarial, by, LINF.eps))
    return samples


def _fidelity(source: str, file: str, n: int, agreement: float, difference: float) -> Fidelity:
    same = difference == 0
    return Fidelity(
        source=source, file=file, n=n, top1_agreement=agreement, max_abs_logit_diff=difference, bit_equal=same
    )


def _subjects() -> list[Subject]:
    files: list[tuple[str, Role, int]] = [
        ("model.safetensors", "weights", 44_778_336),
        ("masks.safetensors", "masks", 11_166_912),
        ("model.onnx", "onnx", 44_731_090),
        ("model.int8.onnx", "onnx-int8", 11_262_401),
        ("evidence/samples.csv", "evidence", 18_210),
        ("evidence/adversarial.safetensors", "evidence", 4_094_712),
    ]
    return [Subject(name=name, role=role, sha256=sha(name), bytes=count) for name, role, count in files]


def _claim(kind: Any, metric: Any, role: Role, correct: int, n: int, **more: Any) -> Claim:
    name = "model.int8.onnx" if role == "onnx-int8" else "model.onnx"
    return Claim(
        id=f"{metric}@{role}",
        artifact=role,
        sha256=sha(name),
        kind=kind,
        metric=metric,
        correct=correct,
        n=n,
        value=correct / n,
        interval=Interval.of(correct, n),
        **more,
    )


def _row(name: str, kind: Any, tried: int, broken: int, misses: int, queries: int) -> AttackRow:
    return AttackRow(name=name, kind=kind, tried=tried, broken=broken, misses=misses, queries=queries)


def _attack_fields(role: str, curves: bool, weak: bool, complete: bool) -> dict[str, Any]:
    counts, weak = SECURITY[role], weak and role == "onnx-int8"
    spread = np.exp(np.random.default_rng(1).normal(np.log(8.4 / 255), 0.55, 32))
    distances = [None if i == 5 else round(float(d), 6) for i, d in enumerate(spread)]
    return {
        "attacks": [_row(*row) for row in SUITES[role]],
        "health": _health(role, weak),
        "complete": complete or role == "onnx",
        "distances": distances if curves else [],
        "curve": [Point(at=k / 255, correct=c, value=c / 1000) for k, c in counts.items()] if curves else [],
    }


def _health(role: str, weak: bool) -> Health:
    checks = [
        ("R1", "outputs differ between passes", 0.0, 1e-4, "5 passes over 128 images"),
        ("R2", "probabilities or invalid logits", 0.0, 0.0, "logits from -13.1 to 17.9"),
        ("R3", "no input gradient", 0.0, 0.01, "share of 128 images"),
        ("R4", "black-box beats white-box", 0.031 if weak else 0.002, 0.002, "square after apgd-t"),
        ("R5", "random corners beat white-box", 0.0, 0.0, "5 draws"),
        ("R6", "right at a huge eps", 0.064 if weak else 0.0, 0.01, "eps 128/255"),
        ("R7", "accuracy rises with eps", 0.0, 0.01, "eps 4/255, 8/255, 16/255"),
        ("R8", "not converged", 0.004, 0.005, "what twice the steps still gain"),
        ("R9", "losses disagree", 0.041, 0.2, "cross-entropy against the difference of logits"),
        ("R10", "transfer beats white-box", 0.004 if weak else 0.001, 0.002, "from the float parent"),
        ("R11", "certified samples broken", 0.0, 0.0, "one PGD on 112 samples"),
        ("R12", "training behaviour", 0.0, 0.0, "no layer is in training mode"),
        ("R13", "search net and file disagree", 0.0008, 0.001, "share of successes"),
        ("R14", "lost in 8-bit pixels", 0.003, 0.01, "witnesses rounded"),
        ("R15", "gradient through rounding", 0.01, 0.05, "straight-through against finite differences"),
    ]  # fmt: skip
    if role == "onnx":
        checks[9:11] = [("R10", "transfer beats white-box", None, 0.002, "there is no other net"),
                        ("R11", "certified samples broken", None, 0.0, "nothing is certified")]  # fmt: skip
    return Health.of([HealthCheck.of(*check) for check in checks])


def _claims(curves: bool, attacked: bool, weak: bool, complete: bool) -> list[Claim]:
    claims = []
    counts: tuple[tuple[Role, int, int], ...] = (("onnx", 778, 452), ("onnx-int8", 772, 439))
    for role, clean, robust in counts:
        claims.append(
            _claim("accuracy", "clean_accuracy", role, clean, 1000, method="ONNX Runtime", sound_for="the file")
        )
        settings = {
            "attacks": ["APGD(steps=100, loss='ce')", "APGD(steps=100, targets=9)"],
            "seed": 0,
            "gradient": "8-bit simulation, straight-through",
            "broken": clean - robust,
            "queries": 251_000,
        }
        claims.append(
            _claim("empirical-upper-bound", "robust_accuracy", role, robust, 1000, threat=Threat.of(LINF),
                   method="aa-quant" if role == "onnx-int8" else "aa-standard",
                   settings=settings,
                   sound_for="an upper bound of the file's robust accuracy, by the witnesses in the evidence folder",
                   **(_attack_fields(role, curves, weak, complete) if attacked else {}))
        )  # fmt: skip
    proved = {1: 112, 1 / 2: 287, 1 / 4: 462, 1 / 8: 601, 1 / 16: 689}
    points = [Point(at=LINF.eps * f, correct=k, value=k / 1000) for f, k in proved.items()]
    claims.append(
        _claim("certified-lower-bound", "certified_accuracy", "onnx-int8", 112, 1000, threat=Threat.of(LINF),
               method="interval bound propagation, exact integers", curve=points if curves else [],
               sound_for="every input in the ball, for the integer arithmetic of the file that was run")
    )  # fmt: skip
    radii = [max(0, 71 - round(5.6 * i)) for i in range(13)]
    points = [Point(at=round(0.25 * i / 4, 6), correct=k, value=k / 100) for i, k in enumerate(radii)]
    settings = {
        "sigma": 0.25,
        "n0": 100,
        "n": 10_000,
        "alpha": 0.001,
        "samples": [{"prediction": 3, "radius": 0.41}] * 100,
    }
    claims.append(
        _claim("certified-probabilistic", "smoothed_certified_accuracy", "onnx-int8", radii[4], 100,
               threat=Threat.of(ThreatModel("l2", "0.25")), method="randomized smoothing (CERTIFY)", settings=settings,
               curve=points if curves else [],
               sound_for="the smoothed classifier g of this file, each sample with probability 0.999")
    )  # fmt: skip
    return claims


def _sparsity() -> Sparsity:
    shapes = {"conv1.weight": [64, 3, 3, 3]}
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            shapes[f"layer{stage}.{block}.conv1.weight"] = [width, before, 3, 3]
            shapes[f"layer{stage}.{block}.conv2.weight"] = [width, width, 3, 3]
            if before != width:
                shapes[f"layer{stage}.{block}.shortcut.0.weight"] = [width, before, 1, 1]
            before = width
    shapes["linear.weight"] = [10, 512]
    layers = []
    for i, (name, shape) in enumerate(shapes.items()):
        total = int(np.prod(shape))
        nonzero = max(1, round(total * min(0.9, 900 / total + 0.0067 + 0.002 * (i % 3))))
        layers.append(Layer(name=name, shape=shape, nonzero=nonzero, sparsity=1 - nonzero / total))
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    kept = sum(layer.nonzero for layer in layers)
    return Sparsity(
        target=0.99,
        budget=kept,
        kept=kept,
        total=total,
        overall=1 - kept / total,
        measured_on="onnx-int8",
        float_nonzero=kept,
        int8_zeros_equal_float_zeros=True,
        by_layer=layers,
    )


def _lineage(history: bool, profile: bool, sparsity: Sparsity) -> list[LineageEntry]:
    kept = sparsity.kept
    trades = {"name": "trades", "beta": 6.0}
    plan: list[tuple[str, dict[str, Any], float, dict[str, Any], int]] = [
        ("train", {"objective": trades, "epochs": 100}, 10_423.2, {"selected_epoch": 96, **_scores(0.829, 0.512)}, 100),
        ("prune", {"method": {"name": "harp"}, "objective": trades, "sparsity": 0.99, "epochs": 20}, 1_843.5,
         {"kept": kept, "total": 11_164_352, "selected_epoch": 17, "target_met": True,
          "search": {"gamma": 0.11, "hardware_loss": 0.0, "kept_share": 0.01003},
          **_scores(0.741, 0.419), **(_profile(sparsity) if profile else {})}, 20),
        ("finetune", {"objective": trades, "epochs": 100}, 8_110.0,
         {"selected_epoch": 88, **_scores(0.782, 0.461)}, 100),
        ("quantize", {"bits": 8, "calibration": 512}, 41.2, {"kept": kept, **_scores(0.778, 0.455)}, 0),
        ("export", {"suite": "aa-quant", "limit": 1000}, 612.9, {}, 0),
    ]  # fmt: skip
    entries: list[LineageEntry] = []
    for stage, config, seconds, metrics, epochs in plan:
        parent = entries[-1].output if entries else None
        output = entries[-1].output if stage == "export" else sha(stage)
        entries.append(
            LineageEntry(
                stage=stage,
                config={"kind": stage, **config},
                parent=parent,
                output=output,
                seconds=seconds,
                metrics=metrics,
                history=_history(epochs, stage == "prune") if history else [],
            )
        )
    return entries


def _scores(clean: float, robust: float) -> dict[str, Any]:
    return {"validation": {"validation_accuracy": clean, "validation_robust": robust, "score": robust}}


def _profile(sparsity: Sparsity) -> dict[str, Any]:
    """Kept weights of each layer beside the fixed allocations, and of each bin of the dense weights."""
    sizes = {layer.name: int(np.prod(layer.shape)) for layer in sparsity.by_layer}
    dims = {layer.name: sum(layer.shape) for layer in sparsity.by_layer}
    share, scale = sparsity.kept / sparsity.total, 0.35 * sparsity.kept / sum(dims.values())
    edges = np.linspace(-0.61, 0.61, 42)
    middle = (edges[1:] + edges[:-1]) / 2
    weights = np.exp(-np.abs(middle) / 0.045)
    weights = weights / weights.sum() * sparsity.total
    kept = weights * np.clip(0.004 + np.abs(middle) * 0.3, 0, 1)
    return {
        "kept_by_layer": {layer.name: layer.nonzero for layer in sparsity.by_layer},
        "allocations": {
            "uniform": {name: round(share * size) for name, size in sizes.items()},
            "erk": {name: min(sizes[name], round(scale * dim)) for name, dim in dims.items()},
            "lamp": {name: min(size, round(10 * size**0.5)) for name, size in sizes.items()},
        },
        "histogram": {
            "edges": [round(float(edge), 6) for edge in edges],
            "kept": [int(count) for count in kept],
            "pruned": [int(count) for count in weights - kept],
        },
    }


def _history(epochs: int, searching: bool = False) -> list[dict[str, float]]:
    rows = []
    for epoch in range(1, epochs + 1):
        done = 1 - np.exp(-4 * epoch / epochs)
        wave = 0.012 * np.sin(1.7 * epoch)
        robust = round(float(0.2 + 0.28 * done + wave), 4)
        search = {
            "gamma": 0.01 * min(epoch, 11),
            "hardware_loss": round(max(0.0, 9.0 - 0.9 * epoch), 4),
            "kept_share": round(max(0.01003, 0.1 - 0.009 * epoch), 5),
        }
        rows.append(
            (search if searching else {})
            | {
                "ce": round(float(1.4 - 0.6 * done + wave), 4),
                "kl": round(float(0.13 - 0.03 * done), 4),
                "epoch": float(epoch),
                "loss": round(float(2.2 - 0.8 * done + wave), 4),
                "train_accuracy": round(float(0.25 + 0.5 * done), 4),
                "validation_accuracy": round(float(0.35 + 0.44 * done + wave), 4),
                "validation_robust": robust,
                "score": robust,
            }
        )
    return rows
