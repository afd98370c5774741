"""The export stage: files, each compared with its source; claims, each measured on a file; and the report."""

from __future__ import annotations

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
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, fx, nn

import rprune
from rprune.attacks.base import Attack
from rprune.attacks.suites import with_transfer
from rprune.data.loaders import loader
from rprune.errors import WorkError
from rprune.evaluation.ledger import Ledger
from rprune.evaluation.outcome import Robustness
from rprune.evaluation.target import Target
from rprune.export.onnx import float_model, stamp
from rprune.export.qdq import qdq_model
from rprune.export.session import OnnxClassifier, stored_weights
from rprune.files import atomic, digest_of, file_digest, write_json, write_text
from rprune.models.prunable import prunable
from rprune.pipeline.artifact import Artifact, Metadata, save_tensors
from rprune.pipeline.attack import Assessment, assess, ledger_key, write_evidence
from rprune.pipeline.bench import Bench
from rprune.pipeline.claims import certified_claims, empirical_claims, proved_samples
from rprune.pipeline.environment import environment, source_digest
from rprune.pipeline.recipe import ExportStage
from rprune.pipeline.stages import Certificates, networks
from rprune.pipeline.targets import CPU, of_export
from rprune.reports.evidence import broken_samples
from rprune.reports.gate import Policy, judge
from rprune.reports.html import render_html
from rprune.reports.schema import (
    Claim,
    DataUsed,
    Evidence,
    Fidelity,
    Layer,
    LineageEntry,
    Report,
    Role,
    Sparsity,
    Subject,
    Threat,
    read_report,
)

CHECK_SAMPLES = 256
TOLERANCE = 1e-4  # of the largest logit: float kernels sum in another order
AGREEMENT = 0.99
LEDGER = ".ledger.jsonl"
FILES: dict[str, Role] = {
    "model.safetensors": "weights",
    "masks.safetensors": "masks",
    "model.onnx": "onnx",
    "model.int8.onnx": "onnx-int8",
    "evidence/samples.csv": "evidence",
    "evidence/adversarial.safetensors": "evidence",
}
CONSTANT = (
    "The model predicts one class for every sample: it has learned nothing, and its certificates are trivially true."
)
LIMITATIONS = [
    "Empirical robust accuracy is an upper bound: a stronger attack may find more.",
    "Accuracies hold for the named test samples; the intervals cover sampling of those, not a shift of the data.",
    "Claims on model.int8.onnx hold on x86 CPUs without VNNI only with ONNX Runtime's session option "
    "session.x64quantprecision=1: their int8 kernels saturate otherwise.",
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
    attacks = bench.suite(stage.suite)
    model, twin = networks(artifact)
    fidelity = write_models(artifact, model, twin, bench, out)
    stored = {name: stored_weights(out / name) for name in ("model.onnx", "model.int8.onnx") if (out / name).exists()}
    sparsity = _sparsity(artifact.metadata, list(prunable(model)), stored)
    shipped: dict[Role, str] = {"onnx": "model.onnx"}
    if twin is not None:
        shipped["onnx-int8"] = "model.int8.onnx"
    main: Role = "onnx-int8" if twin is not None else "onnx"
    proved = proved_samples(bench, certificates)
    claims: list[Claim] = []
    for role, name in shipped.items():
        target = of_export(out / name, model, twin if role == "onnx-int8" else None, bench.data.shape, bench.device)
        found = _attack(bench, target, out / name, attacks, stage, role, proved if role == main else None)
        settings = _settings(bench, target, found, name)
        claims += empirical_claims(found, bench.threat, role, file_digest(out / name), stage.suite, settings)
    result = found.outcome
    if certificates is not None:
        claims += certified_claims(bench, certificates, out / shipped[main], main, fidelity)
    certified = None if certificates is None else _certified(certificates)
    write_evidence(out / "evidence", result, bench.data.shape, certified)
    seconds = round(time.monotonic() - started, 3)
    parameters = sum(p.numel() for p in model.parameters())
    report = _report(bench, artifact, parameters, stage, out, source, sparsity, fidelity, claims, result, seconds)
    if source.policy is not None:
        report = report.model_copy(update={"gate": judge(report, source.policy)})
    report = report.sealed()
    write_json(out / "report.json", report.to_json())
    # a rendering, not a subject: it shows the id of the report, which covers the subjects
    report = read_report(out)
    write_text(out / "report.html", render_html(report, broken_samples(out, report, bench.data.test)))
    return report


def write_models(
    artifact: Artifact, model: nn.Module, twin: fx.GraphModule | None, bench: Bench, out: Path
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
    generator = torch.Generator().manual_seed(0)
    # noise reaches other activations; smoothing feeds pixels outside [0,1]
    noise = torch.rand(x.shape, generator=generator), x + 0.25 * torch.randn(x.shape, generator=generator)
    x = torch.cat([x, *noise])
    classes = len(bench.data.classes)
    _save_onnx(float_model(artifact.model(), bench.data.shape), artifact, out / "model.onnx")
    fidelity = [_compare(model.cpu(), out / "model.onnx", x, "float model")]
    if twin is not None:
        _save_onnx(qdq_model(twin, bench.data.shape, classes), artifact, out / "model.int8.onnx")
        fidelity.append(_compare(twin, out / "model.int8.onnx", x, "8-bit simulation"))
        fidelity.append(_compare(model, out / "model.int8.onnx", x[: len(x) // 3], "float model", tolerance=None))
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
        wanted = torch.cat([source(part) for part in torch.split(x, 128)]).numpy()
    got = OnnxClassifier(path).logits(x.numpy())
    difference = float(np.abs(wanted - got).max())
    agreement = float((wanted.argmax(1) == got.argmax(1)).mean())
    if tolerance is not None and (
        difference > tolerance * max(1.0, float(np.abs(wanted).max())) or agreement < AGREEMENT
    ):
        raise WorkError(
            f"{path.name} disagrees with the {name}: by {difference:.3g}, same label on {agreement:.1%}",
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


def _sparsity(metadata: Metadata, names: Sequence[str], stored: Mapping[str, Mapping[str, NDArray[Any]]]) -> Sparsity:
    """Counted in the files; an error when they do not hold exactly the mask's weights."""
    for file, table in stored.items():
        missing = [name for name in names if name not in table]
        if missing:
            raise WorkError(f"{file} has no initializer {missing[0]}", "please report this architecture")
    measured = "model.int8.onnx" if "model.int8.onnx" in stored else "model.onnx"
    layers = []
    for name in names:
        weight = stored[measured][name]
        nonzero = int(np.count_nonzero(weight))
        layers.append(
            Layer(name=name, shape=list(weight.shape), nonzero=nonzero, sparsity=1 - nonzero / max(1, weight.size))
        )
    kept = sum(entry.nonzero for entry in layers)
    total = sum(int(np.prod(entry.shape)) for entry in layers)
    budget = metadata.budget
    if budget is not None and kept != budget:
        raise WorkError(f"{measured} holds {kept} non-zero weights, the budget is {budget}", "please report this")
    same = None
    if "model.int8.onnx" in stored:
        floats, integers = stored["model.onnx"], stored["model.int8.onnx"]
        same = all(np.array_equal(floats[name] == 0, integers[name] == 0) for name in names)
        if not same:
            raise WorkError("the int8 file has other zeros than the float file", "please report this")
    return Sparsity(
        target=metadata.sparsity,
        budget=budget,
        kept=kept,
        total=total,
        dense_total=metadata.dense_total,
        overall=1 - kept / (metadata.dense_total or total),
        measured_on="onnx-int8" if measured == "model.int8.onnx" else "onnx",
        float_nonzero=sum(int(np.count_nonzero(stored["model.onnx"][name])) for name in names),
        int8_zeros_equal_float_zeros=same,
        by_layer=layers,
    )


def _attack(
    bench: Bench,
    target: Target,
    path: Path,
    attacks: tuple[Attack, ...],
    stage: ExportStage,
    role: str,
    proved: Tensor | None,
) -> Assessment:
    """The suite on one file. Its ledger lies beside the file until the end, so that an interrupted export continues."""
    if target.parents:
        attacks = with_transfer(attacks)
    # the search runs where the data lies; the 8-bit simulation is exact on the CPU alone
    device = CPU if target.parents else bench.device
    test = bench.data.test
    key = ledger_key(
        file_digest(path), test.digest, bench.threat, attacks, bench.seed, device.type, certified=proved is not None
    )
    ledger = Ledger.open(path.with_suffix(LEDGER), key)
    found = assess(
        target, loader(test, device), bench.threat, attacks, seed=bench.seed, limit=stage.limit, ledger=ledger,
        certified=proved, health=stage.health,
        on_progress=lambda name, *counts: bench.reporter.progress(f"{name} on {role}", *counts),
    )  # fmt: skip
    path.with_suffix(LEDGER).unlink()
    return found


def _settings(bench: Bench, target: Target, found: Assessment, name: str) -> dict[str, Any]:
    return {
        "seed": bench.seed,
        "gradient": "8-bit simulation (straight-through) and float parent" if target.parents else "float model, folded",
        "verdict": f"ONNX Runtime on {name}",
        "broken": len(found.outcome.broken_ids),
        "queries": int(found.outcome.queries.sum()),
        "certified_and_skipped": int(found.outcome.certified.sum()),
    }


def _certified(certificates: Certificates) -> dict[int, bool]:
    """Verdicts of the bounds by sample id."""
    proved = certificates.get("ibp", {}).get("levels", [{}])[0].get("proved", [])
    return {i: bool(verdict) for i, verdict in enumerate(proved)}


def _subjects(out: Path) -> list[Subject]:
    return [
        Subject(name=name, role=role, sha256=file_digest(out / name), bytes=(out / name).stat().st_size)
        for name, role in FILES.items()
        if (out / name).exists()
    ]


def _report(
    bench: Bench,
    artifact: Artifact,
    parameters: int,
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
        warnings=[CONSTANT] if int(torch.unique(result.clean.predicted).numel()) == 1 else [],
    )
