"""The export stage: files, each compared with its source; claims, each measured on a file; and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import rprune
from rprune.attacks.base import Attack
from rprune.attacks.suites import with_transfer
from rprune.data.loaders import loader
from rprune.errors import WorkError
from rprune.evaluation.ledger import Ledger
from rprune.evaluation.outcome import Robustness
from rprune.evaluation.target import Target
from rprune.export.footprint import footprint
from rprune.export.session import stored_weights
from rprune.export.speed import latencies
from rprune.files import digest_of, file_digest, write_json, write_text
from rprune.models.cost import parameters as count_parameters
from rprune.models.cost import positions
from rprune.models.prunable import prunable
from rprune.pipeline.artifact import Artifact, Metadata
from rprune.pipeline.attack import Assessment, assess, ledger_key, write_evidence
from rprune.pipeline.bench import Bench
from rprune.pipeline.certifying import Certificates
from rprune.pipeline.claims import certified_claims, empirical_claims, proved_samples
from rprune.pipeline.energy import Meter
from rprune.pipeline.environment import environment, source_digest
from rprune.pipeline.finish import LEDGER
from rprune.pipeline.forms import FILES, Deployed, write_models
from rprune.pipeline.recipe import ExportStage
from rprune.pipeline.stages import compacted
from rprune.pipeline.targets import CPU, of_export
from rprune.quantization.guarantees import exactness, saturating_pairs
from rprune.quantization.ptq import Quantization
from rprune.reports.energy import intensity
from rprune.reports.evidence import broken_samples, read_samples
from rprune.reports.gate import Policy, judge
from rprune.reports.html import render_html
from rprune.reports.pairs import Pairs
from rprune.reports.pairs import Source as Judged
from rprune.reports.schema import (
    Claim,
    DataUsed,
    Evidence,
    Footprint,
    Integers,
    Latency,
    Layer,
    LineageEntry,
    Report,
    Role,
    Sparsity,
    Subject,
    Threat,
    read_report,
)
from rprune.training.world import world

FORMS = [name for name, role in FILES.items() if role not in ("masks", "c-header")]  # of the whole network
EVIDENCE: dict[str, Role] = dict.fromkeys(("evidence/samples.csv", "evidence/adversarial.safetensors"), "evidence")
CONSTANT = (
    "The model predicts one class for every sample: it has learned nothing, and its certificates are trivially true."
)
UNSAFE = (
    "The weights come from a pickle that ran code as it was read (--trust-pickle); the import entry of the lineage "
    "names it."
)
SATURATES = (
    "Claims on model.int8.onnx hold on x86 CPUs without VNNI only with ONNX Runtime's session option "
    "session.x64quantprecision=1: their int8 kernels saturate otherwise."
)
LIMITATIONS = [
    "Empirical robust accuracy is an upper bound: a stronger attack may find more.",
    "Accuracies hold for the named test samples; the intervals cover sampling of those, not a shift of the data.",
    "ONNX Runtime's dense kernels do not run faster on unstructured zeros; the C form (--format c) does.",
    "This report is self-attested: 'rprune verify' re-checks it.",
]


@dataclass(frozen=True)
class Source:
    """Where a bundle comes from, for its report."""

    name: str
    recipe: Mapping[str, Any]
    policy: Policy | None = None
    baseline: Judged | None = None


def export(
    bench: Bench,
    artifact: Artifact,
    stage: ExportStage,
    out: Path,
    source: Source,
    certificates: Certificates | None = None,
) -> Report:
    """Write the bundle into the folder ``out``, empty or left by the same call, and return its sealed report.

    The ledgers of its attacks stay until ``finish.publish``: were they deleted here, a kill would repeat the attacks.

    Several processes (:func:`world`) attack together; the first one does the rest.

    Raises:
        WorkError: a file disagrees with what it was made from, or the claims contradict each other.
        UsageError: unknown attack suite; RPRUNE_CO2 is no number.
    """
    attacks, grams, here = bench.suite(stage.suite), intensity(), world()
    resumed = any(out.glob("model*"))
    with Meter(bench.device) as meter:
        deployed = Deployed.of(compacted(bench, artifact) if stage.compact else artifact)
        facts, result = _measured(bench, deployed, stage, out, attacks, certificates)
    made = {"seconds": round(meter.seconds, 3), "energy": meter.energy(here, resumed=resumed)}
    if not here.first:  # not from its file, which the first process may be moving
        return Report.model_validate(json.loads(here.shared(None)))
    report = _report(bench, deployed, stage, out, source, facts, result, made)
    if source.policy is not None:
        after = Judged(out, report, read_samples(out / report.evidence.samples))
        # a smoke run, which no gate passes, has too few samples to compare
        pairs = None if source.baseline is None or bench.smoke else Pairs(before=source.baseline, after=after)
        report = report.model_copy(update={"gate": judge(report, source.policy, pairs)})
    report = report.sealed()
    write_json(out / "report.json", report.to_json())
    # a rendering, not a subject: it shows the id of the report, which covers the subjects
    report = read_report(out)
    write_text(out / "report.html", render_html(report, broken_samples(out, report, bench.data.test), grams))
    here.shared(json.dumps(report.to_json()))
    return report


def _measured(
    bench: Bench,
    deployed: Deployed,
    stage: ExportStage,
    out: Path,
    attacks: tuple[Attack, ...],
    certificates: Certificates | None,
) -> tuple[dict[str, Any], Robustness]:
    """Write the files and their evidence; what the report says of them, and the attacks on the main file.

    Of several processes the first one alone has something to say.
    """
    artifact, model, twin = deployed.artifact, deployed.model, deployed.twin
    here = world()
    fidelity = write_models(deployed, stage.formats, bench, out) if here.first else []
    here.wait()
    stored = {name: stored_weights(out / name) for name in ("model.onnx", "model.int8.onnx") if (out / name).exists()}
    integers = None if deployed.quantization is None else _integers(deployed.quantization)
    sparsity = _sparsity(artifact.metadata, list(prunable(model)), stored, exact=integers is None or integers.bits >= 8)
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
    if not here.first:
        return {}, result
    if certificates is not None:
        claims += certified_claims(bench, certificates, out / shipped[main], main, fidelity)
    certified = None if certificates is None else _certified(certificates)
    write_evidence(out / "evidence", result, bench.data.shape, certified)
    facts = {
        "sparsity": sparsity,
        "integers": integers,
        "footprint": _footprint(deployed, stored[deployed.main], bench, out),
        "speed": _speed(out, stage, bench),
        "fidelity": fidelity,
        "claims": claims,
    }
    return facts, result


def _sparsity(
    metadata: Metadata, names: Sequence[str], stored: Mapping[str, Mapping[str, NDArray[Any]]], exact: bool
) -> Sparsity:
    """Counted in the files; an error when they do not hold exactly the mask's weights.

    Integers of fewer than 8 bits need not be ``exact``: a weight may round to zero, but no zero to a weight. So may
    those of a dense model.
    """
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
    if budget is not None and (kept > budget or (exact and kept != budget)):
        raise WorkError(f"{measured} holds {kept} non-zero weights, the budget is {budget}", "please report this")
    same = None
    if "model.int8.onnx" in stored:
        floats, integers = stored["model.onnx"], stored["model.int8.onnx"]
        same = all(np.array_equal(floats[name] == 0, integers[name] == 0) for name in names)
        kept_zeros = all(not integers[name][floats[name] == 0].any() for name in names)
        promised = budget is not None or any(not floats[name].all() for name in names)
        if not (same if exact and promised else kept_zeros):
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


def _integers(quantization: Quantization) -> Integers:
    found = exactness(quantization)
    pairs = sum(saturating_pairs(quantization).values())
    return Integers(bits=quantization.bits, largest=found.largest, exact=found.proved, saturating_pairs=pairs)


def _footprint(deployed: Deployed, weights: Mapping[str, NDArray[Any]], bench: Bench, out: Path) -> Footprint:
    """What the main file's network takes, beside the dense one that it was made from."""
    metadata, found = deployed.artifact.metadata, deployed.quantization
    network = deployed.network or deployed.model
    places = positions(deployed.model, bench.data.shape)
    total = sum(array.size for array in weights.values())
    dense = metadata.dense_total or total
    here = count_parameters(deployed.model)
    shrunk = [entry.metrics["parameters"]["before"] for entry in metadata.lineage if entry.stage == "shrink"]
    macs = [entry.metrics["macs"]["before"] for entry in metadata.lineage if entry.stage == "shrink"]
    side = {"biases, norms": count_parameters(network) - total}
    if found is not None:
        side = {
            "biases": sum(bias.numel() for bias in found.biases.values()),
            "weight scales": sum(scale.numel() for scale in found.weight_scales.values()),
            "activation scales": 2 * len(found.activations),
        }
    made = footprint(
        weights, places, side=side, dense_weights=dense, dense_parameters=shrunk[0] if shrunk else here,
        dense_macs=macs[0] if macs else sum(array.size * places[name] for name, array in weights.items()),
        files={name: (out / name).stat().st_size for name in FORMS if (out / name).exists()},
    )  # fmt: skip
    return Footprint.model_validate(asdict(made))


def _speed(out: Path, stage: ExportStage, bench: Bench) -> list[Latency]:
    if not stage.bench:
        return []
    files = [out / name for name in FILES if (out / name).exists() and name.endswith((".onnx", ".c"))]
    rows = latencies(files, on_progress=lambda done, total: bench.reporter.progress("speed", done, None, total))
    return [Latency.model_validate(asdict(row)) for row in rows]


def _attack(
    bench: Bench,
    target: Target,
    path: Path,
    attacks: tuple[Attack, ...],
    stage: ExportStage,
    role: str,
    proved: Tensor | None,
) -> Assessment:
    """The suite on one file. Its ledger lies beside the file until the export is whole, so that it continues."""
    attacks = with_transfer(attacks, target.parents)
    # the search runs where the data lies; the 8-bit simulation is exact on the CPU alone
    device = CPU if target.parents else bench.device
    test = bench.data.test
    key = ledger_key(
        file_digest(path), test.digest, bench.threat, attacks, bench.seed, device.type, certified=proved is not None
    )
    ledger = Ledger.open(path.with_suffix(LEDGER), key)
    return assess(
        target, loader(test, device), bench.threat, attacks, seed=bench.seed, limit=stage.limit, ledger=ledger,
        certified=proved, health=stage.health,
        on_progress=lambda name, *counts: bench.reporter.progress(f"{name} on {role}", *counts),
    )  # fmt: skip


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
    proved = certificates.get("bounds", {}).get("levels", [{}])[0].get("proved", [])
    return {i: bool(verdict) for i, verdict in enumerate(proved)}


def _warnings(artifact: Artifact, result: Robustness) -> list[str]:
    constant = int(torch.unique(result.clean.predicted).numel()) == 1
    return ([CONSTANT] if constant else []) + ([UNSAFE] if artifact.loaded_unsafely else [])


def _subjects(out: Path) -> list[Subject]:
    return [
        Subject(name=name, role=role, sha256=file_digest(out / name), bytes=(out / name).stat().st_size)
        for name, role in (FILES | EVIDENCE).items()
        if (out / name).exists()
    ]


def _report(
    bench: Bench,
    deployed: Deployed,
    stage: ExportStage,
    out: Path,
    source: Source,
    facts: Mapping[str, Any],
    result: Robustness,
    made: Mapping[str, Any],
) -> Report:
    """``made``: what the line of the lineage says of time and energy."""
    artifact, parameters = deployed.artifact, count_parameters(deployed.model)
    metadata, data, integers = artifact.metadata, bench.data, facts["integers"]
    arch = metadata.arch
    entry = LineageEntry(
        stage="export",
        config=stage.model_dump(mode="json"),
        parent=artifact.digest,
        output=artifact.digest,
        **made,
    )
    subjects = _subjects(out)
    size = {subject.name: subject.bytes for subject in subjects if subject.role not in ("masks", "evidence")}
    return Report(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        name=source.name,
        smoke=bench.smoke,
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
            limit=bench.section.limit,
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
        **facts,
        size={"dense_float32_weights": 4 * parameters, **size},
        evidence=Evidence(witness_count=len(result.broken_ids)),
        environment=environment(str(bench.device)),
        limitations=[*LIMITATIONS, *([SATURATES] if integers is not None and integers.saturating_pairs else [])],
        warnings=_warnings(artifact, result),
    )
