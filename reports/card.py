"""The report as the README.md of a model on the Hugging Face hub: metadata in YAML, and the report, shortened.

What only the author knows (licence, intended use) is left out. https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
from typing import Any

from rprune.reports.markdown import claims, escape, files, joined, limitations, opening, recheck, sparsity, usage
from rprune.reports.schema import Claim, Report
from rprune.reports.text import BOUNDS, METRICS, data_name, file_of, flags, number, threat

SHIPPED = ("onnx", "onnx-int8", "onnx-compact", "packed", "weights", "c", "c-header")
TASK = "image-classification"


def render_card(report: Report) -> str:
    body = joined(
        f"# {escape(report.name)}",
        opening(report),
        claims(report),
        usage(report),
        sparsity(report),
        files(report, SHIPPED),
        limitations(report),
        recheck(report),
    )
    return "---\n" + "\n".join(yaml(metadata(report))) + f"\n---\n\n{body}\n"


def metadata(report: Report) -> dict[str, Any]:
    """The front matter as a table. A claim that cannot be trusted says so in the name of its metric."""
    tags = {
        "adversarial-robustness": any(claim.threat for claim in report.claims),
        "pruning": report.sparsity.overall > 0,
        "int8": report.subject("onnx-int8") is not None,
        "onnx": any(subject.role.startswith("onnx") for subject in report.subjects),
    }
    data = {
        "name": data_name(report),
        "type": report.data.source.partition(":")[0],
        "split": report.data.split,
        "revision": report.data.sha256,
    }
    metrics = [
        {"type": _type(claim), "name": _name(claim, report), "value": claim.value, "verified": False}
        for claim in report.claims
    ]
    results = [{"task": {"type": TASK}, "dataset": data, "metrics": metrics}] if metrics else []
    return {
        **({"library_name": "onnx"} if tags["onnx"] else {}),
        "pipeline_tag": TASK,
        "tags": [tag for tag, there in tags.items() if there],
        **({"model-index": [{"name": report.name, "results": results}]} if results else {}),
    }


def _type(claim: Claim) -> str:
    return "accuracy" if claim.metric == "clean_accuracy" else claim.metric


def _name(claim: Claim, report: Report) -> str:
    parts = [f"{METRICS[claim.metric]} accuracy of {file_of(claim, report)}"]
    parts += [threat(claim.threat)] if claim.threat else []
    parts += [BOUNDS[claim.kind], claim.method, f"n = {number(claim.n)}", *flags(claim)]
    return ", ".join(part for part in parts if part)


def yaml(value: Any) -> list[str]:
    """Lines of block YAML of tables, lists, text and numbers, with no key of the report's own."""
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            inner = yaml(item)
            nested = isinstance(item, dict | list)
            lines += [f"{key}:", *(f"  {line}" for line in inner)] if nested else [f"{key}: {inner[0]}"]
        return lines
    if isinstance(value, list):
        return [("  " if i else "- ") + line for item in value for i, line in enumerate(yaml(item))]
    if isinstance(value, str):
        return [f'"{"".join(map(_character, value))}"']
    text = json.dumps(value, allow_nan=False)
    if isinstance(value, float) and "." not in text:
        text = text.replace("e", ".0e")  # readers of YAML 1.1 take 1e-05 for text
    return [text]


def _character(c: str) -> str:
    """What JSON leaves as it is and YAML reads as a line break, or refuses, is written as a number."""
    if c in '"\\':
        return f"\\{c}"
    return c if c.isprintable() else f"\\U{ord(c):08x}"
