"""The report as one HTML file: no script, no external resource, and the same bytes for the same report."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rprune.reports import plots
from rprune.reports.canvas import DARK, LIGHT, element, styled
from rprune.reports.claim_plots import accuracy
from rprune.reports.energy import counted, spent, total
from rprune.reports.schema import AttackRow, Claim, Report
from rprune.reports.text import (
    FORMS,
    KINDS,
    METRICS,
    NORMS,
    SMOKE,
    doubts,
    duration,
    flags,
    judged,
    length,
    main_role,
    number,
    percent,
    short,
    sides,
    size,
    threat,
    verdict,
    what,
    words,
)

TEMPLATE = Path(__file__).with_name("report.html.j2")
STRIP = 8  # samples shown
SHARES = ("accuracy", "robust", "score", "share")  # keys whose value in [0, 1] is written in percent
DRAWN = ("kept_by_layer", "allocations", "histogram")  # metrics that are read off a plot


@dataclass(frozen=True, eq=False)
class Sample:
    """A test image, what the attack made of it, and what the file said to both."""

    index: int
    label: str
    clean_prediction: str
    adversarial_prediction: str
    clean: NDArray[np.float32]  # (c, h, w) in [0, 1]
    adversarial: NDArray[np.float32]
    attack: str = ""
    distance: float | None = None  # norm of the perturbation


def render_html(report: Report, samples: Sequence[Sample] = (), grams: float | None = None) -> str:
    """The page. Optional parts that the report or the caller does not give are left out.

    ``grams``: of CO2 equivalent a kWh (:func:`rprune.reports.energy.intensity`), to be told beside energy.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    filters: dict[str, Callable[..., Any]] = {
        f.__name__: f for f in (percent, size, short, duration, number, words, doubts, flags, judged)
    }
    environment.filters |= filters | {"form": lambda role: FORMS.get(role, role)} | {"svg": element}
    main = main_role(report)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    with styled():
        return page.render(
            r=report,
            main=main,
            METRICS=METRICS,
            SMOKE=SMOKE,
            KINDS=KINDS,
            LIGHT=LIGHT,
            DARK=DARK,
            threat=threat,
            verdict=verdict(report),
            of=lambda metric: report.claim(metric, main),
            plots={f.__name__: f(report) for f in (accuracy, plots.layers, plots.training)},
            stages=[(entry, what(entry), _outcome(entry.metrics)) for entry in report.lineage],
            energies=[entry.energy for entry in report.lineage if entry.energy],
            counted=counted,
            spent=spent,
            total=total,
            grams=grams,
            layers=[(layer, int(np.prod(layer.shape))) for layer in report.sparsity.by_layer],
            strip=_strip(samples[:STRIP], report),
            attacks=[(claim, _contributions(claim)) for claim in report.claims if claim.health or claim.attacks],
            rules=[(rule, *sides(rule)) for rule in report.gate.rules] if report.gate else [],
            claims=[(claim, _flat(claim.settings)) for claim in report.claims],
            environment=_flat(report.environment),
            model=_flat({key: value for key, value in report.model.items() if key != "labels"}),
        )


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested tables as rows (dotted name, text); per-sample tables are left to the evidence."""
    rows: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            if not any(isinstance(v, dict | list | tuple) for v in value):
                rows.append((f"{prefix}{key}", ", ".join(number(v) for v in value)))
        else:
            share = isinstance(value, float) and 0 <= value <= 1 and any(word in key for word in SHARES)
            rows.append((f"{prefix}{key}", percent(value) if share else number(value)))
    return rows


def _outcome(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """What no plot shows, named without the table that it stands in where that says nothing."""
    rows = _flat({key: value for key, value in metrics.items() if key not in DRAWN})
    rows = [(name.removeprefix("validation.").removeprefix("search."), value) for name, value in rows]
    return [(words(name.replace(".", " ")), value) for name, value in rows if name != "score"]


def _contributions(claim: Claim) -> list[tuple[AttackRow, float, float]]:
    """Of each attack, the share of all samples that it broke, and the share that is still right after it."""
    left, rows = claim.correct + sum(row.broken for row in claim.attacks), []
    for row in claim.attacks:
        left -= row.broken
        rows.append((row, row.broken / claim.n, left / claim.n))
    return rows


def _strip(samples: Sequence[Sample], report: Report) -> dict[str, Any] | None:
    if not samples:
        return None
    largest = max(float(np.abs(s.adversarial - s.clean).max()) for s in samples)
    factor = max(1, int(0.5 / largest)) if largest > 0 else 1
    norm = NORMS[report.threat.norm]
    columns = [
        {
            "sample": s,
            "clean": _png(s.clean),
            "added": _png(0.5 + factor * (s.adversarial - s.clean)),
            "adversarial": _png(s.adversarial),
            "size": "" if s.distance is None else f"{norm} {length(s.distance, report.threat)}",
        }
        for s in samples
    ]
    return {"factor": factor, "columns": columns}


def _png(image: NDArray[np.float32]) -> str:
    """A data URI; three channels are a colour, any other number is averaged to grey."""
    from matplotlib.image import imsave

    rgb = image if image.shape[0] == 3 else np.repeat(image.mean(axis=0, keepdims=True), 3, axis=0)
    pixels = np.clip(np.round(rgb * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    buffer, unnamed = io.BytesIO(), cast("dict[str, str]", {"Software": None})
    imsave(buffer, np.ascontiguousarray(pixels), format="png", metadata=unnamed)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
