"""Numbers and names of a report in words."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np

from rprune.reports.schema import Claim, LineageEntry, Threat

METRICS = {
    "clean_accuracy": "Clean",
    "robust_accuracy": "Robust",
    "certified_accuracy": "Certified",
    "smoothed_certified_accuracy": "Smoothed",
}
FORMS = {"onnx": "float ONNX", "onnx-int8": "int8 ONNX", "c": "C"}
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


def threat(threat: Threat) -> str:
    return f"{NORMS[threat.norm]}, eps {threat.eps}"


def length(distance: float, threat: Threat) -> str:
    """A perturbation's norm in the unit of the threat's eps."""
    return f"{255 * distance:.3g}/255" if in_steps(threat) else f"{distance:.3g}"


def in_steps(threat: Threat) -> bool:
    """eps was written in steps of 8-bit pixels."""
    return threat.eps.replace(" ", "").endswith("/255")


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
