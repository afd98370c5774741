"""Claims of a report, made of counts on files, and the evidence behind them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rprune.attacks.suites import suite
from rprune.certification.smoothing import needed_l2
from rprune.errors import WorkError
from rprune.evaluation.certificates import SmoothedSet
from rprune.evaluation.robustness import Robustness
from rprune.files import file_digest, write_text
from rprune.pipeline.artifact import save_tensors
from rprune.pipeline.bench import Bench
from rprune.pipeline.recipe import ExportStage
from rprune.pipeline.stages import Certificates
from rprune.reports.schema import Claim, Fidelity, Interval, Point, Role, Threat
from rprune.threat import ThreatModel


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


def empirical_claims(bench: Bench, result: Robustness, role: Role, path: Path, stage: ExportStage) -> list[Claim]:
    """Clean accuracy, and robust accuracy as an upper bound."""
    clean = result.clean
    settings = {
        "attacks": [repr(attack) for attack in suite(stage.suite)],
        "seed": bench.seed,
        "gradient": "8-bit simulation (straight-through) and float parent" if role == "onnx-int8" else "float model",
        "verdict": f"ONNX Runtime on {path.name}",
        "broken": len(result.broken_ids),
        "queries": result.queries,
        "fooled_the_search_net_only": result.misses,
    }
    bound = "an upper bound of the file's robust accuracy, by the witnesses in the evidence folder"
    kind, metric, correct, n = "empirical-upper-bound", "robust_accuracy", result.correct, clean.n
    threat = Threat.of(bench.threat)
    return [
        _claim("accuracy", "clean_accuracy", role, path, clean.correct, n, method="ONNX Runtime", sound_for="the file"),
        _claim(
            kind, metric, role, path, correct, n, threat=threat, method=stage.suite, settings=settings, sound_for=bound
        ),
    ]


def certified_claims(
    bench: Bench, certificates: Certificates, path: Path, role: Role, fidelity: list[Fidelity]
) -> list[Claim]:
    """What the certificates of a certify stage say of a file, and how far the file is what they were computed on."""
    claims = []
    if ibp := certificates.get("ibp"):
        exact = all(f.bit_equal for f in fidelity if f.file == path.name and f.source == "8-bit simulation")
        claims.append(_ibp_claim(ibp, path, role, exact))
    if smoothing := certificates.get("smoothing"):
        claims.append(_smoothing_claim(smoothing, bench, path, role))
    return claims


def _ibp_claim(ibp: dict[str, Any], path: Path, role: Role, exact: bool) -> Claim:
    levels, n = ibp["levels"], ibp["n"]
    threats = [ThreatModel.of(ibp["norm"], level["eps"]) for level in levels]
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
        method = "IBP, float64"
        sound = "every input in the ball, in real arithmetic; float32 rounding of the runtime is not covered"
    return _claim(
        "certified-lower-bound",
        "certified_accuracy",
        role,
        path,
        counts[0],
        n,
        threat=Threat.of(threats[0]),
        method=method,
        settings={"computed_on": _basis(role), "verify": "checks counts and that no certified sample is broken"},
        sound_for=sound,
        curve=[Point(at=t.eps, correct=c, value=c / n) for t, c in zip(threats, counts, strict=True)],
    )


def _basis(role: Role) -> str:
    return "the 8-bit simulation of the file" if role == "onnx-int8" else "the float model that the file was made from"


def _smoothing_claim(smoothing: dict[str, Any], bench: Bench, path: Path, role: Role) -> Claim:
    rows, sigma = smoothing["samples"], smoothing["sigma"]
    n, at = len(rows), SmoothedSet.from_rows(rows).correct_at
    settings = {key: smoothing[key] for key in ("sigma", "n0", "n", "alpha")}
    settings |= {"computed_on": _basis(role), "verify": "recomputes radii from the counts, does not draw again"}
    settings |= {
        "abstained": sum(row["prediction"] < 0 for row in rows),
        "l2_radius_that_covers_the_threat": needed_l2(
            bench.threat.norm, bench.threat.eps, int(np.prod(bench.data.shape))
        ),
        "samples": rows,
    }
    radii = [round(sigma * quarter / 4, 6) for quarter in range(13)]
    return _claim(
        "certified-probabilistic",
        "smoothed_certified_accuracy",
        role,
        path,
        at(sigma),
        n,
        threat=Threat.of(ThreatModel.of("l2", repr(sigma))),
        method="smoothing (CERTIFY)",
        settings=settings,
        sound_for=f"the smoothed classifier g of this file, each sample with probability {1 - smoothing['alpha']:g}; "
        "a device that runs the file alone does not run g",
        curve=[Point(at=r, correct=at(r), value=at(r) / n) for r in radii],
    )


def check_order(bench: Bench, certificates: Certificates, result: Robustness) -> None:
    """certified <= robust <= clean, sample by sample: a sample both certified and broken means a bug."""
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


def write_evidence(out: Path, result: Robustness, certificates: Certificates | None) -> None:
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
