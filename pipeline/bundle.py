"""The export stage: files, each compared with its source; claims, each measured on a file; and the report."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

import rprune
from rprune.attacks.suites import suite
from rprune.certification.smoothing import needed_l2
from rprune.data.loaders import loader
from rprune.errors import WorkError
from rprune.evaluation.robustness import Robustness, robustness
from rprune.export.onnx import float_model, stamp
from rprune.export.qdq import qdq_model
from rprune.export.session import OnnxClassifier, weight_counts
from rprune.files import atomic, digest_of, file_digest, write_json, write_text
from rprune.models.prunable import prunable
from rprune.pipeline.artifact import Artifact, save_tensors
from rprune.pipeline.environment import environment, source_digest
from rprune.pipeline.recipe import ExportStage
from rprune.pipeline.stages import Bench, Certificates, networks
from rprune.reports.evidence import broken_samples
from rprune.reports.gate import Policy, judge
from rprune.reports.html import render_html
from rprune.reports.schema import (
    Claim,
    DataUsed,
    Evidence,
    Fidelity,
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

CHECK_SAMPLES = 256
TOLERANCE = 1e-4  # of the largest logit: float kernels sum in another order
AGREEMENT = 0.99
FILES: dict[str, Role] = {
    "model.safetensors": "weights",
    "masks.safetensors": "masks",
    "model.onnx": "onnx",
    "model.int8.onnx": "onnx-int8",
    "evidence/samples.csv": "evidence",
    "evidence/adversarial.safetensors": "evidence",
}
LIMITATIONS = [
    "Empirical robust accuracy is an upper bound: a stronger attack may find more.",
    "Accuracies hold for the named test samples; the intervals cover sampling of those, not a shift of the data.",
    "ONNX Runtime's dense kernels do not run faster on unstructured zeros.",
    "This report is self-attested: 'rprune verify' re-checks it.",
]


@dataclass(frozen=True)
class Source:
    """Where a bundle comes from, for its report."""

    name: str
    recipe: Mapping[str, Any]
    policy: Policy | None = None


def export(
    bench: Bench,
    artifact: Artifact,
    stage: ExportStage,
    out: Path,
    source: Source,
    certificates: Certificates | None = None,
) -> Report:
    """Write the bundle into the empty folder ``out`` and return its sealed report.

    Raises:
        WorkError: a file disagrees with what it was made from, or the claims contradict each other.
        UsageError: unknown attack suite.
    """
    started = time.monotonic()
    attacks = suite(stage.suite)
    model, twin = networks(artifact)
    fidelity = write_models(artifact, model, twin, bench, out)
    counts = {name: weight_counts(out / name) for name in ("model.onnx", "model.int8.onnx") if (out / name).exists()}
    sparsity = _sparsity(artifact, counts, out)
    shipped: dict[Role, tuple[str, nn.Module]] = {"onnx": ("model.onnx", model.to(bench.device))}
    if twin is not None:
        shipped["onnx-int8"] = ("model.int8.onnx", twin)
    claims: list[Claim] = []
    results: dict[Role, Robustness] = {}
    for role, (name, search) in shipped.items():
        results[role] = _attack(bench, search, out / name, attacks, stage, role)
        claims += _empirical(bench, results[role], role, out / name, stage)
    main: Role = "onnx-int8" if twin is not None else "onnx"
    result = results[main]
    if certificates is not None:
        claims += _certified(bench, certificates, out / shipped[main][0], main)
        _check_order(bench, certificates, result)
    _write_evidence(out, bench, result, certificates)
    seconds = round(time.monotonic() - started, 3)
    report = _report(bench, artifact, stage, out, source, sparsity, fidelity, claims, result, seconds)
    if source.policy is not None:
        report = report.model_copy(update={"gate": judge(report, source.policy)})
    report = report.sealed()
    write_json(out / "report.json", report.to_json())
    # a rendering, not a subject: it shows the id of the report, which covers the subjects
    write_text(out / "report.html", render_html(report, broken_samples(out, report, bench.data.test)))
    return report


def write_models(
    artifact: Artifact, model: nn.Module, twin: nn.Module | None, bench: Bench, out: Path
) -> list[Fidelity]:
    """Write the model files and compare each, as read back, with its source."""
    save_tensors(out / "model.safetensors", artifact.state)
    if artifact.masks:
        save_tensors(out / "masks.safetensors", artifact.masks)
    for name, source in (("model.safetensors", artifact.state), ("masks.safetensors", artifact.masks)):
        read = load_file(out / name) if source else {}
        if set(read) != set(source) or not all(torch.equal(read[key], source[key]) for key in source):
            raise WorkError(f"{name} does not hold what was written", "check the disk and export again")
    x = torch.cat([batch.x.cpu() for batch in loader(bench.data.test, torch.device("cpu")).ordered(128, CHECK_SAMPLES)])
    x = torch.cat(
        [x, torch.rand(x.shape, generator=torch.Generator().manual_seed(0))]
    )  # noise reaches other activations
    classes = len(bench.data.classes)
    _save_onnx(float_model(artifact.model(), bench.data.shape), artifact, out / "model.onnx")
    fidelity = [_compare(model.cpu(), out / "model.onnx", x, "float model")]
    if twin is not None:
        _save_onnx(qdq_model(twin, bench.data.shape, classes), artifact, out / "model.int8.onnx")
        fidelity.append(_compare(twin, out / "model.int8.onnx", x, "8-bit simulation"))
        fidelity.append(_compare(model, out / "model.int8.onnx", x[: len(x) // 2], "float model", tolerance=None))
    return fidelity


def _save_onnx(model: onnx.ModelProto, artifact: Artifact, path: Path) -> None:
    metadata = artifact.metadata
    stamp(
        model,
        {
            "rprune.version": rprune.__version__,
            "rprune.labels": "\n".join(metadata.data.classes),
            "rprune.input_range": "0..1",
            "rprune.normalisation": "in-graph",
            "rprune.tensors_sha256": artifact.digest,
        },
    )
    onnx.checker.check_model(model, full_check=True)
    with atomic(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _compare(
    source: nn.Module, path: Path, x: Float[Tensor, "n c h w"], name: str, tolerance: float | None = TOLERANCE
) -> Fidelity:
    """Logits of a file beside those of its source; with a tolerance, disagreement is an error."""
    with torch.no_grad():
        wanted = torch.cat([source(part) for part in x.split(128)]).numpy()
    got = OnnxClassifier(path).logits(x.numpy())
    difference = float(np.abs(wanted - got).max())
    agreement = float((wanted.argmax(1) == got.argmax(1)).mean())
    if tolerance is not None and (
        difference > tolerance * max(1.0, float(np.abs(wanted).max())) or agreement < AGREEMENT
    ):
        raise WorkError(
            f"{path.name} disagrees with the {name}: largest difference {difference:.3g}, same label on {agreement:.1%}",
            "ONNX Runtime on this CPU computes something else; please report it with 'rprune --version'",
        )
    bit_equal = bool(np.array_equal(wanted, got))
    return Fidelity(
        source=name,
        file=path.name,
        n=len(x),
        top1_agreement=agreement,
        max_abs_logit_diff=difference,
        bit_equal=bit_equal,
    )


def _sparsity(
    artifact: Artifact, counts: Mapping[str, Mapping[str, tuple[tuple[int, ...], int]]], out: Path
) -> Sparsity:
    """Counted in the files; an error when they do not hold exactly the mask's weights."""
    names = list(prunable(artifact.model()))
    for file, table in counts.items():
        missing = [name for name in names if name not in table]
        if missing:
            raise WorkError(f"{file} has no initializer {missing[0]}", "please report this architecture")
    measured = "model.int8.onnx" if "model.int8.onnx" in counts else "model.onnx"
    layers = []
    for name in names:
        shape, nonzero = counts[measured][name]
        layers.append(
            Layer(name=name, shape=list(shape), nonzero=nonzero, sparsity=1 - nonzero / max(1, int(np.prod(shape))))
        )
    kept = sum(entry.nonzero for entry in layers)
    total = sum(int(np.prod(entry.shape)) for entry in layers)
    budget = artifact.metadata.budget
    if budget is not None and kept != budget:
        raise WorkError(f"{measured} holds {kept} non-zero weights, the budget is {budget}", "please report this")
    same = None
    if "model.int8.onnx" in counts:
        float_zeros, int_zeros = _zeros(out / "model.onnx", names), _zeros(out / "model.int8.onnx", names)
        same = all(np.array_equal(float_zeros[name], int_zeros[name]) for name in names)
        if not same:
            raise WorkError("the int8 file has other zeros than the float file", "please report this")
    return Sparsity(
        target=artifact.metadata.sparsity,
        budget=budget,
        kept=kept,
        total=total,
        overall=1 - kept / total,
        measured_on="onnx-int8" if measured == "model.int8.onnx" else "onnx",
        float_nonzero=sum(counts["model.onnx"][name][1] for name in names),
        int8_zeros_equal_float_zeros=same,
        by_layer=layers,
    )


def _zeros(path: Path, names: Sequence[str]) -> dict[str, Any]:
    arrays = {t.name: t for t in onnx.load(str(path)).graph.initializer}
    return {name: onnx.numpy_helper.to_array(arrays[name]) == 0 for name in names}


def _attack(
    bench: Bench, search: nn.Module, path: Path, attacks: Sequence[Any], stage: ExportStage, role: str
) -> Robustness:
    session = OnnxClassifier(path)
    device = next((p.device for p in search.parameters()), torch.device("cpu"))
    return robustness(
        search,
        lambda x: torch.from_numpy(session.predict(x.detach().cpu().numpy())),
        loader(bench.data.test, device),
        bench.threat,
        attacks,
        seed=bench.seed,
        limit=stage.limit,
        on_progress=lambda done, good, total: bench.reporter.progress(f"{stage.suite} on {role}", done, good, total),
    )


def _claim(kind: Any, metric: Any, role: Role, path: Path, correct: int, n: int, **more: Any) -> Claim:
    return Claim(
        id=f"{metric}@{role}",
        artifact=role,
        sha256=file_digest(path),
        kind=kind,
        metric=metric,
        correct=correct,
        n=n,
        value=correct / n,
        interval=Interval.of(correct, n),
        **more,
    )


def _empirical(bench: Bench, result: Robustness, role: Role, path: Path, stage: ExportStage) -> list[Claim]:
    clean = result.clean
    settings = {
        "attacks": [repr(attack) for attack in suite(stage.suite)],
        "seed": bench.seed,
        "gradient": "8-bit simulation, straight-through" if role == "onnx-int8" else "float model",
        "verdict": f"ONNX Runtime on {path.name}",
        "broken": len(result.broken_ids),
        "queries": result.queries,
        "fooled_the_search_net_only": result.misses,
    }
    return [
        _claim("accuracy", "clean_accuracy", role, path, clean.correct, clean.n, method="ONNX Runtime", sound_for="the file"),
        _claim(
            "empirical-upper-bound", "robust_accuracy", role, path, result.correct, clean.n,
            threat=Threat.of(bench.threat), method=stage.suite, settings=settings,
            sound_for="an upper bound of the file's robust accuracy, by the witnesses in the evidence folder",
        ),
    ]  # fmt: skip


def _certified(bench: Bench, certificates: Certificates, path: Path, role: Role) -> list[Claim]:
    claims = []
    if ibp := certificates.get("ibp"):
        first, n = ibp["levels"][0], ibp["n"]
        threat = ThreatModel.of(ibp["norm"], first["eps"])
        points = [Point(at=ThreatModel.of("linf", level["eps"]).eps, correct=level["correct"], value=level["correct"] / n)
                  for level in ibp["levels"]]  # fmt: skip
        integers = role == "onnx-int8"
        sound = (
            "every input in the ball, for the integer arithmetic of the QDQ graph that ONNX Runtime ran here "
            "(kernels that saturate 16-bit sums, on CPUs without VNNI, are not covered)"
            if integers
            else "every input in the ball, in real arithmetic; float32 rounding of the runtime is not covered"
        )
        method = "interval bound propagation, exact integers" if integers else "interval bound propagation, float64"
        claims.append(
            _claim(
                "certified-lower-bound", "certified_accuracy", role, path, first["correct"], n,
                threat=Threat.of(threat), method=method, sound_for=sound, curve=points,
            )
        )  # fmt: skip
    if smooth := certificates.get("smoothing"):
        rows, sigma = smooth["samples"], smooth["sigma"]
        n = len(rows)

        def at(radius: float) -> int:
            return sum(row["prediction"] == row["label"] and row["radius"] >= radius for row in rows)

        points = [Point(at=r, correct=at(r), value=at(r) / n) for r in [round(sigma * i / 4, 6) for i in range(13)]]
        dimensions = int(np.prod(bench.data.shape))
        settings = {key: smooth[key] for key in ("sigma", "n0", "n", "alpha")}
        settings |= {
            "abstained": sum(row["prediction"] < 0 for row in rows),
            "l2_radius_that_covers_the_threat": needed_l2(bench.threat.norm, bench.threat.eps, dimensions),
            "samples": rows,
        }
        claims.append(
            _claim(
                "certified-probabilistic", "smoothed_certified_accuracy", role, path, at(sigma), n,
                threat=Threat.of(ThreatModel.of("l2", repr(sigma))), method="randomized smoothing (CERTIFY)",
                settings=settings, curve=points,
                sound_for=f"the smoothed classifier g of this file, each sample with probability {1 - smooth['alpha']:g}; "
                "a device that runs the file alone does not run g",
            )
        )  # fmt: skip
    return claims


def _check_order(bench: Bench, certificates: Certificates, result: Robustness) -> None:
    """certified <= robust <= clean, sample by sample: a certified sample that was broken means a bug in one of the two."""
    ibp = certificates.get("ibp")
    if ibp is None:
        return
    threat = ThreatModel.of(ibp["norm"], ibp["levels"][0]["eps"])
    if threat.norm != bench.threat.norm or threat.eps < bench.threat.eps:
        return
    proved = torch.tensor(ibp["levels"][0]["proved"], dtype=torch.bool)
    n = min(len(proved), result.clean.n)
    wrong = torch.nonzero(proved[:n] & ~result.robust[:n]).flatten().tolist()
    if wrong:
        raise WorkError(
            f"samples {wrong[:5]} are certified and broken", "a bound or an attack is wrong; please report this"
        )


def _write_evidence(out: Path, bench: Bench, result: Robustness, certificates: Certificates | None) -> None:
    """samples.csv: one row a sample. adversarial.safetensors: for each broken sample the point that breaks it."""
    proved = (certificates or {}).get("ibp", {}).get("levels", [{}])[0].get("proved", [])
    broken = {int(i): k for k, i in enumerate(result.broken_ids.tolist())}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["index", "label", "clean_prediction", "adversarial_prediction", "attack", "certified"])
    for i, (label, predicted) in enumerate(
        zip(result.clean.labels.tolist(), result.clean.predicted.tolist(), strict=True)
    ):
        k = broken.get(i)
        found = ["", ""] if k is None else [int(result.adversarial[k]), result.broken_by[k]]
        rows.writerow([i, label, predicted, *found, proved[i] if i < len(proved) else ""])
    write_text(out / "evidence" / "samples.csv", text.getvalue())
    save_tensors(out / "evidence" / "adversarial.safetensors", {"index": result.broken_ids, "x": result.points})


def _subjects(out: Path) -> list[Subject]:
    return [
        Subject(name=name, role=role, sha256=file_digest(out / name), bytes=(out / name).stat().st_size)
        for name, role in FILES.items()
        if (out / name).exists()
    ]


def _report(
    bench: Bench,
    artifact: Artifact,
    stage: ExportStage,
    out: Path,
    source: Source,
    sparsity: Sparsity,
    fidelity: list[Fidelity],
    claims: list[Claim],
    result: Robustness,
    seconds: float,
) -> Report:
    metadata, data = artifact.metadata, bench.data
    arch = metadata.arch
    parameters = sum(p.numel() for p in artifact.model().parameters())
    entry = LineageEntry(
        stage="export",
        config=stage.model_dump(mode="json"),
        parent=artifact.digest,
        output=artifact.digest,
        seconds=seconds,
    )
    subjects = _subjects(out)
    size = {subject.name: subject.bytes for subject in subjects if subject.role in ("onnx", "onnx-int8", "weights")}
    return Report(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        name=source.name,
        tool={"name": "rprune", "version": rprune.__version__, "source_sha256": source_digest()},
        subjects=subjects,
        model={
            "architecture": arch.to_dict(),
            "parameters": parameters,
            "labels": list(data.classes),
            "input": {"shape": list(data.shape), "range": [0, 1], "normalisation": "in-graph"},
            "tensors_sha256": artifact.digest,
        },
        data=DataUsed(
            source=data.source,
            classes=list(data.classes),
            samples=len(data.test),
            sha256=data.test.digest,
            train_sha256=data.train.digest,
            validation_sha256=data.validation.digest,
            validation_samples=len(data.validation),
        ),
        threat=Threat.of(bench.threat),
        recipe=dict(source.recipe),
        recipe_sha256=digest_of(source.recipe),
        policy_sha256=None if source.policy is None else source.policy.sha256,
        lineage=[*metadata.lineage, entry],
        sparsity=sparsity,
        size={"dense_float32_weights": 4 * parameters, **size},
        fidelity=fidelity,
        claims=claims,
        evidence=Evidence(witness_count=len(result.broken_ids)),
        environment=environment(str(bench.device)),
        limitations=LIMITATIONS,
    )
