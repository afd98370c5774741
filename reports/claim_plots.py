"""The plots of a report's claims: accuracies, curves over eps and radius, distances to the decision boundary."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rprune.reports.canvas import BLUE, GREEN, INK, ORANGE, PURPLE, Plot, axes, compress, percents, slug
from rprune.reports.schema import Claim, Interval, Point, Report
from rprune.reports.text import FORMS, METRICS, NORMS, flags, in_steps, length, number, percent, threat, words

COLOURS = dict(zip(METRICS, (BLUE, ORANGE, GREEN, PURPLE), strict=True))
FAR = 4  # times eps, from where on an axis of distances is compressed


def accuracy(report: Report) -> list[Plot]:
    """Accuracies of each file, a curve for each claim that holds for several radii, and smallest perturbations."""
    bars = _accuracy_bars(report)
    curves = {claim.id: claim for claim in report.claims if claim.curve}
    proofs = {claim.id: _proofs(claim, list(curves.values())) for claim in curves.values()}
    drawn = {proof.id for beside in proofs.values() for proof in beside}
    made = [bars, *(_curve(claim, proofs[name]) for name, claim in curves.items() if name not in drawn)]
    made += [_distances(claim) for claim in report.claims]
    return [plot for plot in made if plot is not None]


def _proofs(claim: Claim, others: list[Claim]) -> list[Claim]:
    """Certified accuracies that stand in the axes of a security curve: of the same file, in the same norm."""
    if claim.metric != "robust_accuracy" or claim.threat is None:
        return []
    proofs = [c for c in others if c.metric == "certified_accuracy" and c.artifact == claim.artifact and c.threat]
    return [c for c in proofs if c.threat is not None and c.threat.norm == claim.threat.norm]


def _accuracy_bars(report: Report) -> Plot | None:
    """Clean, robust and certified of each file. Smoothing answers another question, so it has no bar here."""
    roles = [role for role in FORMS if any(claim.artifact == role for claim in report.claims)]
    if not roles:
        return None
    figure, (axis,) = axes(2.8)
    said = []
    for k, (metric, label) in enumerate(list(METRICS.items())[:3]):
        found = [(i + (k - 1) * 0.28, claim) for i, role in enumerate(roles) if (claim := report.claim(metric, role))]
        if not found:
            continue
        at, values = [x for x, _ in found], [claim.value for _, claim in found]
        spread = [(c.value - c.interval.lower, c.interval.upper - c.value) for _, c in found]
        for bar, (_, c) in zip(axis.bar(at, values, 0.24, color=COLOURS[metric], label=label), found, strict=True):
            if flags(c):
                bar.set(fill=False, linestyle="--", linewidth=1.4, edgecolor=COLOURS[metric])
        axis.errorbar(at, values, np.clip(spread, 0, 1).T, fmt="none", color=INK, elinewidth=1.2, capsize=3)
        for x, c in found:
            axis.annotate(percent(c.value), (x, c.interval.upper), (0, 3), textcoords="offset points", ha="center")
            said.append(" ".join([label.lower(), percent(c.value), *flags(c), f"({FORMS[c.artifact]})"]))
    names = {role: FORMS[role] for role in roles}
    for claim in report.claims:
        if claim.artifact in names:
            names[claim.artifact] += "".join(f"\n{METRICS[claim.metric]}: {flag}" for flag in flags(claim))
    axis.set_xticks(range(len(roles)), list(names.values()))
    axis.set_xlim(-0.55, len(roles) - 0.45)
    axis.grid(visible=False, axis="x")
    axis.set_ylim(0, 1.08)
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.set_ylabel("share of test images")
    axis.yaxis.set_major_formatter(percents)
    figure.legend(loc="outside upper left", ncols=3)
    caption = (
        f"Each file by itself, with 95 % Clopper-Pearson intervals. Robust: {threat(report.threat)}, an upper bound; "
        "certified: a lower bound."
    )
    return Plot("accuracy", caption, f"Accuracy of each file: {', '.join(said)}", figure)


def _curve(claim: Claim, proofs: list[Claim]) -> Plot:
    """Accuracy over eps or radius; ``proofs`` are certified accuracies below it in the same axes."""
    figure, (axis,) = axes(2.8)
    eps, scale, unit = _unit(claim)
    name = "radius" if claim.kind == "certified-probabilistic" else "eps"
    highest, said = 0.0, []
    for c in (claim, *proofs):
        points = _points(c)
        x = [point.at * scale for point in points]
        lower, upper = np.transpose([(i.lower, i.upper) for i in (Interval.of(p.correct, c.n) for p in points)])
        # between two points an upper bound is that of the smaller eps, a lower bound that of the larger
        step, marker = ("post", "o") if c.kind == "empirical-upper-bound" else ("pre", "s")
        style = {"color": COLOURS[c.metric], "marker": marker, "markersize": 4, "label": _name(c)}
        axis.fill_between(x, lower, upper, color=COLOURS[c.metric], alpha=0.18, linewidth=0, step=step)
        axis.plot(x, [point.value for point in points], drawstyle=f"steps-{step}", **style)
        ends = [f"{percent(p.value)} at {x:.3g}" for p, x in zip((points[0], points[-1]), (x[0], x[-1]), strict=True)]
        said.append(f"{words(c.metric)} by {name}{unit}: {' to '.join(ends)}")
        highest = max(highest, upper.max())
    if claim.metric == "robust_accuracy":
        axis.axvline(eps, color=INK, linestyle=":", linewidth=1)
        _note(axis, claim, percent(claim.value), xy=(eps, claim.interval.upper), xytext=(4, 3))
        said[0] += " ".join([f", {percent(claim.value)} at {eps:.3g}", *flags(claim)])
    axis.set_xlabel(f"{_norm(claim)} {name}{unit}".strip())
    at = [point.at * scale for point in _points(claim)]
    if claim.metric == "robust_accuracy" and at[-1] > FAR * eps > 0:
        least = min(
            [eps, *(proof.threat.eps_float * scale for proof in proofs if proof.threat and proof.threat.eps_float)]
        )
        compress(axis, least / 4, [at[-1], eps, at[0], *at[1:-1]])
    axis.set_ylim(0, min(1.0, highest * 1.1))
    axis.set_ylabel("share of test images" if proofs else words(claim.metric))
    axis.yaxis.set_major_formatter(percents)
    if proofs:
        figure.legend(loc="outside upper left", ncols=2)
    lines = [f"{words(claim.metric).capitalize()}, {_form(claim)}: {claim.method}, n = {number(claim.n)}"]
    lines += [f"{words(proof.metric)}: {proof.method}, n = {number(proof.n)}" for proof in proofs]
    caption = f"{'; '.join(lines)}. Steps: what the points imply. Band: 95 % Clopper-Pearson"
    return Plot(slug(f"curve-{claim.id}"), _with_flags(caption, claim), f"{_form(claim)}: {'; '.join(said)}", figure)


def _distances(claim: Claim) -> Plot | None:
    """How many of the samples that were right fall to a perturbation of at most a size."""
    eps, scale, unit = _unit(claim)
    found, n = sorted(distance * scale for distance in claim.distances if distance is not None), len(claim.distances)
    if not found or claim.threat is None:
        return None
    figure, (axis,) = axes(2.8)
    shares = [count / n for count in range(len(found) + 1)]
    axis.step([0.0, *found], shares, where="post", color=COLOURS[claim.metric])
    axis.axvline(eps, color=INK, linestyle=":", linewidth=1)
    _note(axis, claim, xy=(1, 0), xycoords="axes fraction", xytext=(-4, 4), ha="right")
    axis.set_xlabel(f"{_norm(claim)} size of the perturbation{unit}")
    if found[-1] > FAR * eps > 0:
        doubled = [eps * 2.0**k for k in range(-2, math.ceil(math.log2(found[-1] / eps)) + 1)]
        compress(axis, eps / 4, [doubled[-1], eps, 0.0, *doubled])
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("share of images that fall")
    axis.yaxis.set_major_formatter(percents)
    half = f"half fall to {length(found[(n - 1) // 2] / scale, claim.threat)} or less" if 2 * len(found) >= n else ""
    none = f"none was found for {number(n - len(found))}" if len(found) < n else ""
    figures = ", ".join(text for text in (half, none) if text)
    caption = f"Smallest perturbation found (FAB) for {number(n)} images that are right, {_form(claim)}"
    caption = f"{': '.join([caption, figures] if figures else [caption])}. Dotted: eps"
    alt = (
        f"{_form(claim)}: share of {number(n)} images that fall to a perturbation of at most a size{unit}, from "
        f"{found[0]:.3g} to {found[-1]:.3g}{f'; {figures}' if figures else ''}"
    )
    return Plot(slug(f"distances-{claim.id}"), _with_flags(caption, claim), alt, figure)


def _points(claim: Claim) -> list[Point]:
    return sorted(claim.curve, key=lambda point: point.at)


def _unit(claim: Claim) -> tuple[float, float, str]:
    """(eps, factor from [0,1] pixels, name of the unit): the unit that the user thinks in."""
    if claim.threat is None:
        return 0.0, 1, ""
    scale = 255 if in_steps(claim.threat) else 1
    return claim.threat.eps_float * scale, scale, ", in 1/255" if scale > 1 else ""


def _form(claim: Claim) -> str:
    return FORMS.get(claim.artifact, claim.artifact)


def _norm(claim: Claim) -> str:
    return NORMS[claim.threat.norm] if claim.threat else ""


def _name(claim: Claim) -> str:
    return f"{words(claim.metric)}, {'at most' if claim.kind == 'empirical-upper-bound' else 'at least'}"


def _note(axis: Any, claim: Claim, *lines: str, **place: Any) -> None:
    """Lines of text in a plot, the flags of the claim above them."""
    weight = "bold" if flags(claim) else "normal"
    axis.annotate("\n".join([*flags(claim), *lines]), textcoords="offset points", weight=weight, **place)


def _with_flags(caption: str, claim: Claim) -> str:
    return f"{caption}. {' and '.join(flags(claim))}: see Attacks." if flags(claim) else f"{caption}."
