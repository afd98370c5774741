"""The report as a bill of materials for machine learning: CycloneDX 1.6 JSON. https://cyclonedx.org"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rprune.reports.intoto import REPORT
from rprune.reports.schema import Claim, Report, Subject
from rprune.reports.text import architecture, data_name, doubts, file_of, flags, image, main_role, number, threat

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
MODEL = "model"


def bom(report: Report) -> dict[str, Any]:
    """The model with its card, every file of the bundle, and the data sets by digest."""
    data, files = _data(report), [_file(i, subject) for i, subject in enumerate(report.subjects, 1)]
    made = f"{REPORT}#{report.id or report.computed_id()}"
    parts = [component["bom-ref"] for component in (*files, *data)]
    return {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, made)}",
        "version": 1,
        "metadata": {**_timestamp(report.created), "tools": {"components": [_tool(report)]}},
        "components": [_model(report, [component["bom-ref"] for component in data]), *files, *data],
        "dependencies": [{"ref": MODEL, "dependsOn": parts}],
    }


def _model(report: Report, data: list[str]) -> dict[str, Any]:
    main = report.subject(main_role(report))
    return {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": report.name,
        **(_hashes(main.sha256) if main else {}),
        "modelCard": {
            "modelParameters": _parameters(report) | {"datasets": [{"ref": ref} for ref in data]},
            "quantitativeAnalysis": {"performanceMetrics": [_metric(claim, report) for claim in report.claims]},
            "considerations": {"technicalLimitations": [*_doubts(report), *report.warnings, *report.limitations]},
        },
        "properties": [{"name": f"rprune:{name}", "value": value} for name, value in _properties(report)],
    }


def _parameters(report: Report) -> dict[str, Any]:
    taken, name, classes = image(report), architecture(report), len(report.data.classes)
    convolutional = any(len(layer.shape) == 4 for layer in report.sparsity.by_layer)
    return {
        "task": "image classification",
        **({"architectureFamily": "convolutional neural network"} if convolutional else {}),
        **({"modelArchitecture": name} if name else {}),
        **({"inputs": [{"format": taken}]} if taken else {}),
        **({"outputs": [{"format": f"logits of {number(classes)} classes"}]} if classes else {}),
    }


def _metric(claim: Claim, report: Report) -> dict[str, Any]:
    """The type of a number that cannot be trusted is another one, so that nobody takes it for the sound one."""
    under = [threat(claim.threat)] if claim.threat else []
    part = [file_of(claim, report), f"{data_name(report)}/{report.data.split}, n = {number(claim.n)}", *under]
    return {
        "type": " ".join([claim.metric, *flags(claim)]),
        "value": repr(claim.value),
        "slice": "; ".join(part),
        "confidenceInterval": {"lowerBound": repr(claim.interval.lower), "upperBound": repr(claim.interval.upper)},
    }


def _doubts(report: Report) -> list[str]:
    return [f"{claim.id}: {doubt}" for claim in report.claims for doubt in doubts(claim)]


def _properties(report: Report) -> Iterator[tuple[str, str]]:
    yield "report:schema", report.schema_
    yield "report:id", report.id
    if report.smoke:
        yield "smoke", "true"
    yield "threat:norm", report.threat.norm
    yield "threat:eps", report.threat.eps
    yield "threat:space", report.threat.space
    yield "sparsity", repr(report.sparsity.overall)
    yield "sparsity:kept", str(report.sparsity.kept)
    yield "sparsity:total", str(report.sparsity.total)
    if report.gate is not None:
        yield "gate", report.gate.result
        yield "gate:policy_sha256", report.gate.policy_sha256
    for claim in report.claims:
        at = f"claim:{claim.id}"
        yield f"{at}:kind", claim.kind
        yield f"{at}:sha256", claim.sha256
        yield f"{at}:count", f"{claim.correct}/{claim.n}"
        if claim.threat is not None:
            yield f"{at}:norm", claim.threat.norm
            yield f"{at}:eps", claim.threat.eps
        if claim.kind == "empirical-upper-bound":
            yield f"{at}:suite", claim.method
            yield f"{at}:health", claim.health.status if claim.health else "not examined"
            yield f"{at}:complete", "true" if claim.complete else "false"


def _file(index: int, subject: Subject) -> dict[str, Any]:
    said = {"rprune:role": subject.role, "rprune:bytes": str(subject.bytes)}
    return {
        "type": "file",
        "bom-ref": f"file:{index}",
        "name": subject.name,
        **_hashes(subject.sha256),
        "properties": [{"name": name, "value": value} for name, value in said.items()],
    }


def _data(report: Report) -> list[dict[str, Any]]:
    """A data set a split. Its digest is one of pixels and labels, so no hash of a file."""
    said, name = report.data, data_name(report)
    splits = {
        "train": (said.train_sha256, None),
        "validation": (said.validation_sha256, said.validation_samples),
        "test": (said.sha256, said.samples),
    }
    return [
        {
            "type": "data",
            "bom-ref": f"data:{split}",
            "name": f"{name}/{split}",
            "data": [
                {"type": "dataset", "name": f"{name}/{split}"}
                | ({} if count is None else {"description": f"{number(count)} images"})
            ],
            "properties": [{"name": "rprune:pixels_and_labels_sha256", "value": digest}],
        }
        for split, (digest, count) in splits.items()
    ]


def _tool(report: Report) -> dict[str, str]:
    said = {"type": "application", "name": report.tool.get("name", "rprune")}
    return said | ({"version": report.tool["version"]} if "version" in report.tool else {})


def _hashes(sha256: str) -> dict[str, Any]:
    return {"hashes": [{"alg": "SHA-256", "content": sha256}]} if re.fullmatch(r"[0-9a-fA-F]{64}", sha256) else {}


def _timestamp(created: str) -> dict[str, str]:
    """Only a moment is one; a date, or a time of nobody's clock, is not."""
    try:
        at = datetime.fromisoformat(created)
        return {} if at.tzinfo is None else {"timestamp": at.astimezone(UTC).isoformat()}
    except (ValueError, OverflowError):
        return {}
