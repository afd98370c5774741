"""The report as one HTML file: no script, no external resource, and the same bytes for the same report."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rprune.reports.schema import Claim, Interval, Layer, LineageEntry, Report, Rule

TEMPLATE = Path(__file__).with_name("report.html.j2")
STRIP = 8  # samples shown
# matplotlib writes these colours; the page's own take their place, so that a plot follows light and dark
INK, GRID, BLUE, ORANGE, GREEN, GREY = "#010101", "#010102", "#010103", "#010104", "#010105", "#010106"
COLOURS = {INK: "ink-2", GRID: "line", BLUE: "blue", ORANGE: "orange", GREEN: "green", GREY: "grey"}
METRICS = {
    "clean_accuracy": ("Clean", BLUE),
    "robust_accuracy": ("Robust", ORANGE),
    "certified_accuracy": ("Certified", GREEN),
    "smoothed_certified_accuracy": ("Smoothed", GREY),
}
WHAT = dict.fromkeys(("method", "objective", "suite", "file", "methods"), "{}") | {
    "sparsity": "sparsity {}", "bits": "{} bits", "calibration": "{} calibration images", "epochs": "{} epochs",
}  # fmt: skip
SHARES = ("accuracy", "robust", "score", "share")  # keys whose value in [0, 1] is written in percent
CURVES = {"loss": BLUE, "validation_accuracy": BLUE, "validation_robust": ORANGE, "train_accuracy": GREY}
FORMS = {"onnx": "float ONNX", "onnx-int8": "int8 ONNX"}
STYLE: Any = {
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
    **dict.fromkeys(("xtick.major.size", "xtick.minor.size", "ytick.major.size"), 0),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **{"svg.fonttype": "none", "font.size": 9.5, "grid.linewidth": 0.7, "lines.linewidth": 1.8},
    "text.parse_math": False,  # a name may hold a dollar sign
}


@dataclass(frozen=True, eq=False)
class Sample:
    """A test image, what the attack made of it, and what the file said to both."""

    index: int
    label: str
    clean_prediction: str
    adversarial_prediction: str
    clean: NDArray[np.float32]  # (c, h, w) in [0, 1]
    adversarial: NDArray[np.float32]


def render_html(report: Report, samples: Sequence[Sample] = ()) -> str:
    """The page. Optional parts that the report or the caller does not give are left out."""
    import jinja2
    from matplotlib import style

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    filters: dict[str, Callable[..., str]] = {f.__name__: f for f in (percent, size, short, duration, number, words)}
    environment.filters |= filters | {"form": lambda role: FORMS.get(role, role)}
    main = "onnx-int8" if report.subject("onnx-int8") else "onnx"
    layers = report.sparsity.by_layer
    with style.context(STYLE, after_reset=True):  # the user's own settings would change the bytes
        bars, density = _accuracy_bars(report), _density(layers)
        curves = [(claim, _curve(claim)) for claim in report.claims if claim.curve]
        stages = [(e, _what(e), _flat(e.metrics), _training(i, e)) for i, e in enumerate(report.lineage)]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        {"bars": bars, "curves": curves, "density": density, "stages": stages, "main": main, "METRICS": METRICS},
        r=report,
        verdict=verdict(report),
        of=lambda metric: report.claim(metric, main),
        layers=[(layer, int(np.prod(layer.shape))) for layer in layers],
        strip=_strip(samples[:STRIP]),
        rules=[(rule, *_sides(rule)) for rule in report.gate.rules] if report.gate else [],
        claims=[(claim, _flat(claim.settings)) for claim in report.claims],
        environment=_flat(report.environment),
        model=_flat({key: value for key, value in report.model.items() if key != "labels"}),
    )


def verdict(report: Report) -> tuple[str, str]:
    """(``passed``, ``failed`` or ``none``, the sentence for it)."""
    if report.gate is None:
        return "none", "No gate: this report was not held against a policy"
    count, missed = len(report.gate.rules), sum(not rule.passed for rule in report.gate.rules)
    if report.gate.result == "passed":
        return "passed", f"Gate passed: {'the only rule is' if count == 1 else f'all {count} rules are'} met"
    return "failed", f"Gate failed: {missed} of {count} rules {'is' if missed == 1 else 'are'} not met"


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


def _what(entry: LineageEntry) -> str:
    """The choices that tell a stage from another of its kind, in one line."""
    parts = []
    for key, text in WHAT.items():
        value = entry.config.get(key)
        value = value.get("name") if isinstance(value, dict) else value
        if value not in (None, "", []):
            parts.append(text.format(", ".join(map(str, value)) if isinstance(value, list) else number(value)))
    return " · ".join(parts)


def _sides(rule: Rule) -> tuple[str, str]:
    """Observed value and threshold in the unit of the metric."""
    shares: dict[str, Callable[[float], str]] = dict.fromkeys(METRICS, percent)
    write = {**shares, "sparsity": lambda value: percent(value, 2), "bytes": size}.get(rule.metric, number)
    return "not claimed" if rule.observed is None else write(rule.observed), write(rule.threshold)


def _axes(height: float, columns: int = 1, width: float = 4.3) -> tuple[Any, list[Any]]:
    """In inches; the default is about as wide as a phone, so that text keeps its size there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def _svg(figure: Any, name: str) -> str:
    """The figure as an element whose ids are its own and whose colours are the page's."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = re.sub(r'^.*?<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", buffer.getvalue(), count=1, flags=re.S)
    text = re.sub(r"<!--.*?-->\n?|\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"(href=\"|url\()#", rf"\1#{name}-", text).replace("xlink:href", "href")
    text = re.sub(r"font: ?([\d.]+)px[^;\"]*", r"font-size: \1px", text)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.strip()


def _accuracy_bars(report: Report) -> str:
    """Clean, robust and certified of each file. Smoothing answers another question, so it has no bar here."""
    roles = [role for role in FORMS if any(claim.artifact == role for claim in report.claims)]
    if not roles:
        return ""
    figure, (axis,) = _axes(2.8)
    for k, (metric, (label, colour)) in enumerate(list(METRICS.items())[:3]):
        found = [(i + (k - 1) * 0.28, claim) for i, role in enumerate(roles) if (claim := report.claim(metric, role))]
        if not found:
            continue
        at, values = [x for x, _ in found], [claim.value for _, claim in found]
        spread = [(c.value - c.interval.lower, c.interval.upper - c.value) for _, c in found]
        axis.bar(at, values, 0.24, color=colour, label=label)
        axis.errorbar(at, values, np.clip(spread, 0, 1).T, fmt="none", color=INK, elinewidth=1.2, capsize=3)
        for x, c in found:
            axis.annotate(percent(c.value), (x, c.interval.upper), (0, 3), textcoords="offset points", ha="center")
    axis.set_xticks(range(len(roles)), [FORMS[role] for role in roles])
    axis.set_xlim(-0.55, len(roles) - 0.45)
    axis.grid(visible=False, axis="x")
    axis.set_ylim(0, 1.08)
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.yaxis.set_major_formatter(_tick)
    figure.legend(loc="outside upper left", ncols=3)
    return _svg(figure, "accuracy")


def _curve(claim: Claim) -> str:
    figure, (axis,) = _axes(2.8)
    points = sorted(claim.curve, key=lambda point: point.at)
    norm, eps = (claim.threat.norm, claim.threat.eps.replace(" ", "")) if claim.threat else ("", "")
    of_pixels = eps.endswith("/255")  # the unit that the user thinks in
    x = [point.at * (255 if of_pixels else 1) for point in points]
    lower, upper = np.transpose([(i.lower, i.upper) for i in (Interval.of(p.correct, claim.n) for p in points)])
    colour = METRICS[claim.metric][1]
    axis.fill_between(x, lower, upper, color=colour, alpha=0.18, linewidth=0)
    axis.plot(x, [point.value for point in points], color=colour, marker="o", markersize=4)
    name = "radius" if claim.kind == "certified-probabilistic" else "eps"
    axis.set_xlabel(f"{norm.replace('linf', 'L∞').upper()} {name}{', in 1/255' if of_pixels else ''}".strip())
    axis.set_ylim(0, min(1.0, upper.max() * 1.1))
    axis.yaxis.set_major_formatter(_tick)
    return _svg(figure, re.sub(r"\W+", "-", f"curve-{claim.id}"))


def _density(layers: Sequence[Layer]) -> str:
    """Kept share of each layer; on a log axis as soon as a linear one would hide the sparse layers."""
    if not layers:
        return ""
    kept = [layer.nonzero / max(1, int(np.prod(layer.shape))) for layer in layers]
    least = min((share for share in kept if share > 0), default=1.0)
    left = 10 ** np.floor(np.log10(least) - 0.01) if least < 0.1 else 0.0
    figure, (axis,) = _axes(0.75 + 0.225 * len(layers), width=4.7)
    axis.barh(range(len(layers)), kept, 0.66, color=BLUE)
    axis.set_yticks(range(len(layers)), [layer.name.removesuffix(".weight") for layer in layers])
    axis.set_ylim(len(layers) - 0.4, -0.6)
    if left:
        axis.set_xscale("log")
    axis.set_xlim(left, 1)
    axis.xaxis.set_major_formatter(_tick)
    axis.grid(visible=False, axis="y")
    for i, share in enumerate(kept):
        axis.annotate(percent(share), (max(share, left), i), (3, 0), textcoords="offset points", va="center", size=8)
    return _svg(figure, "density")


def _training(index: int, entry: LineageEntry) -> str:
    """Loss beside the shares of right answers, by epoch, of a stage that keeps a history."""
    keys = list(dict.fromkeys(key for row in entry.history for key in row))
    shares = [key for key in keys if "accuracy" in key or "robust" in key]
    # the score repeats one of the validation shares where there are any
    shares += [key for key in keys if key == "score" and not any("validation" in share for share in shares)]
    panels = [names for names in (["loss"] if "loss" in keys else [], shares) if names]
    if not panels:
        return ""
    figure, axes = _axes(2.5, len(panels))
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            rows = [(row.get("epoch", i + 1.0), row[name]) for i, row in enumerate(entry.history) if name in row]
            marker = "o" if len(rows) <= 12 else ""
            colour = CURVES.get(name, GREEN)
            axis.plot(*zip(*rows, strict=True), color=colour, marker=marker, markersize=3, label=words(name))
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if names is shares:
            axis.yaxis.set_major_formatter(_tick)
        axis.legend(loc="lower left", bbox_to_anchor=(-0.1, 1), borderaxespad=0.2, fontsize=8.5, handlelength=1.2)
    return _svg(figure, f"stage{index}")


def _tick(share: float, _: object) -> str:
    return f"{100 * share:g} %"


def _strip(samples: Sequence[Sample]) -> dict[str, Any] | None:
    if not samples:
        return None
    largest = max(float(np.abs(s.adversarial - s.clean).max()) for s in samples)
    factor = max(1, int(0.5 / largest)) if largest > 0 else 1
    columns = [(s, _png(s.clean), _png(0.5 + factor * (s.adversarial - s.clean)), _png(s.adversarial)) for s in samples]
    return {"factor": factor, "columns": columns}


def _png(image: NDArray[np.float32]) -> str:
    """A data URI; three channels are a colour, any other number is averaged to grey."""
    from matplotlib.image import imsave

    rgb = image if image.shape[0] == 3 else np.repeat(image.mean(axis=0, keepdims=True), 3, axis=0)
    pixels = np.clip(np.round(rgb * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    buffer, unnamed = io.BytesIO(), cast("dict[str, str]", {"Software": None})
    imsave(buffer, np.ascontiguousarray(pixels), format="png", metadata=unnamed)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
