"""Claims of a report, made of counts on files, and the evidence behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rprune.certification.confidence import needed_l2
from rprune.evaluation.certificates import SmoothedSet
from rprune.files import file_digest
from rprune.pipeline.attack import Assessment
from rprune.pipeline.bench import Bench
from rprune.pipeline.certifying import CLAIMS, Certificates
from rprune.reports.schema import AttackRow, Claim, Fidelity, Health, HealthCheck, Interval, Point, Role, Threat
from rprune.threat import ThreatModel


def _claim(kind: Any, metric: Any, role: Role, sha256: str, correct: int, n: int, **more: Any) -> Claim:
    return Claim(
        id=f"{metric}@{role}",
        artifact=role,
        sha256=sha256,
        kind=kind,
        metric=metric,
        correct=correct,
        n=n,
        value=correct / n,
        interval=Interval.of(correct, n),
        **more,
    )


def empirical_claims(
    found: Assessment, threat: ThreatModel, role: Role, sha256: str, suite: str, settings: dict[str, Any]
) -> list[Claim]:
    """Clean accuracy, and robust accuracy as an upper bound with the health of the attack behind it."""
    outcome, n = found.outcome, found.outcome.clean.n
    verdict = str(settings.get("verdict", "torch"))
    clean = _claim(
        "accuracy", "clean_accuracy", role, sha256, outcome.clean.correct, n, method=verdict.split(" on ")[0],
        sound_for="the file",
    )  # fmt: skip
    checks = [
        HealthCheck(id=c.id, name=c.name, value=c.value, limit=c.limit, passed=c.passed, detail=c.detail)
        for c in found.checks
    ]
    robust = _claim(
        "empirical-upper-bound",
        "robust_accuracy",
        role,
        sha256,
        outcome.correct,
        n,
        threat=Threat.of(threat),
        method=suite,
        settings=settings | {"rounded_away": int((~outcome.exact).sum())},
        sound_for="an upper bound of the file's robust accuracy, by the witnesses in the evidence folder",
        curve=[Point(at=eps, correct=correct, value=correct / n) for eps, correct in found.curve],
        attacks=[
            AttackRow(
                name=t.name,
                kind=t.kind,
                tried=t.tried,
                broken=t.broken,
                misses=t.misses,
                invalid=t.invalid,
                queries=t.queries,
            )
            for t in outcome.tallies
        ],
        health=Health.of(checks) if checks else None,
        distances=list(found.distances),
        complete=outcome.complete,
    )
    return [clean, robust]


def certified_claims(
    bench: Bench, certificates: Certificates, path: Path, role: Role, fidelity: list[Fidelity]
) -> list[Claim]:
    """What the certificates of a certify stage say of a file, and how far the file is what they were computed on."""
    claims = []
    if bounds := certificates.get("bounds"):
        exact = all(f.bit_equal for f in fidelity if f.file == path.name and f.source == "8-bit simulation")
        claims.append(_bounds_claim(bounds, path, role, exact))
    if smoothing := certificates.get("smoothing"):
        claims.append(_smoothing_claim(smoothing, bench, path, role))
    return claims


def _bounds_claim(bounds: dict[str, Any], path: Path, role: Role, exact: bool) -> Claim:
    levels, n = bounds["levels"], bounds["n"]
    threats = [ThreatModel.of(bounds["norm"], level["eps"]) for level in levels]
    counts = [int(level["correct"]) for level in levels]
    if role == "onnx-int8" and not exact:
        method = "IBP, integers of the simulation"
        sound = (
            "every input in the ball, for the 8-bit simulation; on this CPU ONNX Runtime's logits differ from it, "
            "so the file itself is not covered"
        )
    elif role == "onnx-int8":
        method = "IBP, exact integers"
        sound = (
            "every input in the ball, for the integer arithmetic of the QDQ graph that ONNX Runtime ran here "
            "(kernels that saturate 16-bit sums, on CPUs without VNNI, are not covered)"
        )
    else:
        method = f"{', '.join(bounds['methods'])}, float64"
        sound = CLAIMS["real"]
    return _claim(
        "certified-lower-bound",
        "certified_accuracy",
        role,
        file_digest(path),
        counts[0],
        n,
        threat=Threat.of(threats[0]),
        method=method,
        settings={
            "computed_on": _basis(role),
            "verify": "checks counts and that no certified sample is broken",
            "status": bounds["counts"],
            "also": bounds["firm"],
        },
        sound_for=sound,
        curve=[Point(at=t.eps, correct=c, value=c / n) for t, c in zip(threats, counts, strict=True)],
    )


def _basis(role: Role) -> str:
    return "the 8-bit simulation of the file" if role == "onnx-int8" else "the float model that the file was made from"


def _smoothing_claim(smoothing: dict[str, Any], bench: Bench, path: Path, role: Role) -> Claim:
    rows, sigma, target = smoothing["samples"], smoothing["sigma"], smoothing["radius"]
    n, at = len(rows), SmoothedSet.from_rows(rows).correct_at
    settings = {key: smoothing[key] for key in ("sigma", "test", "noise", "n0", "n", "alpha", "slack")}
    settings |= {"computed_on": _basis(role), "verify": "recomputes radii from the counts, does not draw again"}
    settings |= {
        "abstained": sum(row["prediction"] < 0 for row in rows),
        "draws_a_sample": smoothing["n0"] + sum(row["n"] for row in rows) / n,
        "l2_radius_that_covers_the_threat": needed_l2(
            bench.threat.norm, bench.threat.eps, int(np.prod(bench.data.shape))
        ),
        "samples": rows,
    }
    radii = sorted({target, *(round(sigma * quarter / 4, 6) for quarter in range(13))})
    return _claim(
        "certified-probabilistic",
        "smoothed_certified_accuracy",
        role,
        file_digest(path),
        at(target),
        n,
        threat=Threat.of(ThreatModel.of("l2", repr(target))),
        method="smoothing (CERTIFY)" if smoothing["test"] == "fixed" else "smoothing (sequential test)",
        settings=settings,
        sound_for=f"the smoothed classifier g of this file, each sample with probability {1 - smoothing['alpha']:g}; "
        "a device that runs the file alone does not run g",
        curve=[Point(at=r, correct=at(r), value=at(r) / n) for r in radii],
    )


def proved_samples(bench: Bench, certificates: Certificates | None) -> torch.Tensor | None:
    """By sample id, which ones the certificates prove robust under the threat; None where they do not cover it."""
    bounds = (certificates or {}).get("bounds")
    if bounds is None:
        return None
    threat = ThreatModel.of(bounds["norm"], bounds["eps"])
    if threat.norm != bench.threat.norm or threat.eps < bench.threat.eps:
        return None
    return torch.tensor(bounds["levels"][0]["proved"], dtype=torch.bool)
