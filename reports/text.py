"""Numbers and names of a report in words."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np

from rprune.data.sources import TORCHVISION
from rprune.reports.schema import Claim, LineageEntry, Report, Rule, Threat

METRICS = {
    "clean_accuracy": "Clean",
    "robust_accuracy": "Robust",
    "certified_accuracy": "Certified",
    "smoothed_certified_accuracy": "Smoothed",
}
FORMS = {"onnx": "float ONNX", "onnx-int8": "int8 ONNX", "c": "C"}
KINDS = {
    "accuracy": "measured",
    "empirical-upper-bound": "upper bound (attack)",
    "certified-lower-bound": "lower bound (proof)",
    "certified-probabilistic": "lower bound (likely)",
}
BOUNDS = {
    "accuracy": "", "empirical-upper-bound": "at most", "certified-lower-bound": "at least",
    "certified-probabilistic": "likely at least",
}  # fmt: skip
NORMS = {"linf": "L∞", "l2": "L2"}
WHAT = dict.fromkeys(("method", "objective", "suite", "file", "methods"), "{}") | {
    "sparsity": "sparsity {}", "macs": "{} of the MACs", "bits": "{} bits",
    "calibration": "{} calibration images", "epochs": "{} epochs",
}  # fmt: skip


SMOKE = "SMOKE RUN: it shows that the chain works; its numbers mean nothing"


def percent(share: float, digits: int = 1) -> str:
    """Enough digits that what is not 0 % or 100 % never reads so."""
    while digits < 6 and 0 < share < 1 and float(f"{100 * share:.{digits}f}") in (0, 100):
        digits += 1
    return f"{100 * share:.{digits}f}\u00a0%"


def size(count: float) -> str:
    power = min(3, int(np.log10(max(1.0, count * 1.0005)) // 3))
    return f"{count / 1000**power:.3g}\u00a0{('B', 'KB', 'MB', 'GB')[power]}"


def short(digest: str) -> str:
    return f"{digest[:8]}…{digest[-4:]}" if len(digest) > 16 else digest


def duration(seconds: float) -> str:
    return f"{seconds:.1f}\u00a0s" if seconds < 60 else f"{timedelta(seconds=round(seconds))}"


def number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def words(name: str) -> str:
    return name.replace("_", " ")


def judged(rule: Rule) -> str:
    """What a rule is about: the metric, under which threat, and whether its drop."""
    parts = (rule.metric, rule.norm, rule.eps, "drop" if rule.drop else None)
    return " ".join(part for part in parts if part)


def bar(op: str, value: float | str) -> str:
    """``>= 0.45``, ``<= 1000000``."""
    if isinstance(value, float):
        return f"{op} {int(value) if value.is_integer() else f'{value:g}'}"
    return f"{op} {value}"


def threat(threat: Threat) -> str:
    return f"{NORMS[threat.norm]}, eps {threat.eps}"


def length(distance: float, threat: Threat) -> str:
    """A perturbation's norm in the unit of the threat's eps."""
    return f"{255 * distance:.3g}/255" if in_steps(threat) else f"{distance:.3g}"


def in_steps(threat: Threat) -> bool:
    """eps was written in steps of 8-bit pixels."""
    return threat.eps.replace(" ", "").endswith("/255")


def main_role(report: Report) -> str:
    """The file that the report is about first of all."""
    return "onnx-int8" if report.subject("onnx-int8") else "onnx"


def verdict(report: Report) -> tuple[str, str]:
    """(``passed``, ``failed`` or ``none``, the sentence for it)."""
    if report.gate is None:
        return "none", "No gate: this report was not held against a policy"
    count, missed = len(report.gate.rules), sum(not rule.passed for rule in report.gate.rules)
    if report.gate.result == "passed":
        return "passed", f"Gate passed: {'the only rule is' if count == 1 else f'all {count} rules are'} met"
    return "failed", f"Gate failed: {missed} of {count} rules {'is' if missed == 1 else 'are'} not met"


def sides(rule: Rule) -> tuple[str, str]:
    """Observed value and threshold of a rule, in the unit of the metric."""
    shares: dict[str, Callable[[float], str]] = dict.fromkeys(METRICS, percent)
    write = {**shares, "sparsity": lambda value: percent(value, 2), "bytes": size}.get(rule.metric, number)
    unit = "\u00a0ms" if rule.metric == "latency" else ""
    return "not claimed" if rule.observed is None else write(rule.observed) + unit, write(rule.threshold) + unit


def file_of(claim: Claim, report: Report) -> str:
    """The name of the file that a claim speaks of."""
    found = report.subject(claim.artifact)
    return found.name if found is not None and found.sha256 == claim.sha256 else claim.artifact


def data_name(report: Report) -> str:
    """The data set without the folders of whoever made the report: ``cifar10``, ``imagefolder:flowers``."""
    kind, _, place = report.data.source.partition(":")
    place = place.partition("?")[0].rstrip("/").rpartition("/")[2]
    return kind if kind in TORCHVISION or not place else f"{kind}:{place}"


def architecture(report: Report) -> str | None:
    """Its name; of a network whose channels were removed, that of the network which it was."""
    said, recipe = report.model.get("architecture"), report.recipe.get("model")
    name = said.get("name") if isinstance(said, dict) else None
    before = recipe.get("arch") if isinstance(recipe, dict) else None
    if name == "flat" and isinstance(before, str):
        return f"{before}, channels removed"
    return name if isinstance(name, str) else None


def image(report: Report) -> str | None:
    """What the model takes, as far as the report says it."""
    said = report.model.get("input")
    if not isinstance(said, dict) or not isinstance(shape := said.get("shape"), list):
        return None
    parts = [f"image of {'×'.join(map(str, shape))} (channels, height, width)"]
    if isinstance(bounds := said.get("range"), list) and len(bounds) == 2:
        parts.append(f"pixels in [{bounds[0]}, {bounds[1]}]")
    if said.get("normalisation") == "in-graph":
        parts.append("normalised in the graph")
    return ", ".join(parts)


def doubts(claim: Claim) -> list[str]:
    """Why a claim is weaker than its kind says; each begins with the word that flags its number."""
    found = []
    if claim.health is not None and claim.health.failed:
        found.append("UNRELIABLE: " + ", ".join(f"{check.id} {check.name}" for check in claim.health.failed))
    if claim.health is None and not claim.reliable:
        found.append("UNEXAMINED: the health of the attack was not checked")
    if not claim.complete:
        found.append("INCOMPLETE: not every attack of the suite ran to its end")
    return found


def flags(claim: Claim) -> list[str]:
    """The words to stand beside the number of a claim, in every rendering."""
    return [doubt.partition(":")[0] for doubt in doubts(claim)]


def what(entry: LineageEntry) -> str:
    """The choices that tell a stage from another of its kind, in one line."""
    parts = []
    for key, text in WHAT.items():
        value = entry.config.get(key)
        value = value.get("name") if isinstance(value, dict) else value
        if value not in (None, "", []):
            parts.append(text.format(", ".join(map(str, value)) if isinstance(value, list) else number(value)))
    return " · ".join(parts)
