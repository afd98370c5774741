"""The plots of a report: those of its claims, kept share of each layer, weights kept and pruned, curves by epoch.

What a report does not hold is left out.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from rprune.reports.canvas import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    Format,
    Plot,
    axes,
    content,
    log_scale,
    percents,
    slug,
    styled,
)
from rprune.reports.claim_plots import accuracy
from rprune.reports.schema import LineageEntry, Report
from rprune.reports.text import SMOKE, number, percent, what, words

SHARES = {  # dashes tell lines apart where colours do not
    "validation_accuracy": ("-", BLUE),
    "validation_robust": ("--", ORANGE),
    "train_accuracy": ("-.", PURPLE),
    "certified": (":", GREEN),
}
DASHES, WHEEL = ("--", "-.", ":"), (BLUE, ORANGE, GREEN, PURPLE)
ALLOCATIONS = {"uniform": ("uniform", "D", ORANGE), "erk": ("ERK", "s", GREEN), "lamp": ("LAMP", "o", PURPLE)}
LONGEST = 32  # characters of a layer's name beside its bar
FEW = 12  # epochs up to which each has a dot of its own


def plot_files(report: Report, form: Format = "svg") -> dict[str, bytes]:
    """Every plot as a file, by file name; the same bytes for the same report."""
    with styled():
        made = plots(report)
        for plot in made if report.smoke else ():  # a picture travels without the page that says so
            plot.figure.supxlabel(SMOKE.partition(":")[0], color="red", weight="bold")
        return {f"{plot.name}.{form}": content(plot, form) for plot in made}


def plots(report: Report) -> list[Plot]:
    """All plots of a report, in the order of the page. To be called, like the others, inside :func:`styled`."""
    return [*accuracy(report), *layers(report), *training(report)]


def layers(report: Report) -> list[Plot]:
    """Kept share of each layer beside uniform, ERK and LAMP at the same budget (HARP, Fig. 4 and 11)."""
    return [_density(report)] if report.sparsity.by_layer else []


def training(report: Report) -> list[Plot]:
    """Of each stage, its curves (HARP, Fig. 2 and 10) and what it kept of the weights (HYDRA, Fig. 3 and 10 to 13)."""
    makers = (_epochs, _search, _histogram)
    made = [make(place, entry) for place, entry in enumerate(report.lineage, 1) for make in makers]
    return [plot for plot in made if plot is not None]


def _density(report: Report) -> Plot:
    """Kept share of each layer; on a log axis as soon as a linear one would hide the sparse layers."""
    sizes = {layer.name: max(1, int(np.prod(layer.shape))) for layer in report.sparsity.by_layer}
    kept = {layer.name: layer.nonzero / sizes[layer.name] for layer in report.sparsity.by_layer}
    others = _allocated(report, sizes)
    shares = [*kept.values(), *(share for other in others.values() for share in other.values())]
    least = min((share for share in shares if share > 0), default=1.0)
    left = 10 ** np.floor(np.log10(least) - 0.01) if least < 0.1 else 0.0
    names, rows = list(kept), range(len(kept))
    figure, (axis,) = axes(0.95 + 0.225 * len(names) + 0.2 * bool(others), width=4.7)
    bars = axis.barh(rows, kept.values(), 0.66, color=BLUE, alpha=0.4 if others else 1)
    marks = []
    for kind, other in others.items():
        label, marker, colour = ALLOCATIONS[kind]
        at = [(max(other[name], left), i) for i, name in enumerate(names) if name in other]
        style = {"markerfacecolor": "none", "markeredgewidth": 1.4, "linestyle": "none", "clip_on": False}
        marks += axis.plot(*zip(*at, strict=True), marker, color=colour, markersize=4.5, label=label, **style)
    titles = [name.removesuffix(".weight") for name in names]
    axis.set_yticks(rows, [title if len(title) <= LONGEST else f"…{title[1 - LONGEST :]}" for title in titles])
    axis.set_ylim(len(names) - 0.4, -0.6)
    if left:
        log_scale(axis, "x", percents)
    axis.set_xlim(left, 1)
    axis.xaxis.set_major_formatter(percents)
    axis.set_xlabel(f"kept share of the layer's weights{' (log scale)' if left else ''}")
    axis.grid(visible=False, axis="y")
    for i, share in enumerate(kept.values()):
        where = (1, i) if others else (max(share, left), i)
        axis.annotate(percent(share), where, (6 if others else 3, 0), textcoords="offset points", va="center", size=8)
    if others:
        figure.legend(handles=[bars, *marks], labels=["this model", *(ALLOCATIONS[k][0] for k in others)],
                      loc="outside upper left", ncols=4, columnspacing=1.2, handlelength=1.2)  # fmt: skip
    low, high = min(kept, key=kept.__getitem__), max(kept, key=kept.__getitem__)
    beside = f", beside {_list([ALLOCATIONS[kind][0] for kind in others])} at the same budget" if others else ""
    caption = f"Share of weights kept in each layer{beside}."
    alt = f"{caption[:-1]}: from {percent(kept[low])} in {low} to {percent(kept[high])} in {high}"
    return Plot("density", caption, alt, figure)


def _allocated(report: Report, sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """Kept shares that the fixed strategies give at the budget of the last pruning."""
    found = next((t for entry in reversed(report.lineage) if (t := _table(entry.metrics, "allocations"))), {})
    counts = {kind: _table(found, kind) for kind in ALLOCATIONS}
    shares = {kind: {n: count / sizes[n] for n, count in by.items() if n in sizes} for kind, by in counts.items()}
    # more weights than a layer has: the file holds other layers than those that were pruned
    return {kind: of for kind, of in shares.items() if of and max(of.values()) <= 1}


def _histogram(place: int, entry: LineageEntry) -> Plot | None:
    """How many weights of each size were kept, and how many pruned: on a log axis, or the kept ones would vanish."""
    table = _table(entry.metrics, "histogram")
    edges, kept, pruned = (np.asarray(table.get(key, []), dtype=float) for key in ("edges", "kept", "pruned"))
    filled = kept + pruned if kept.shape == pruned.shape else np.zeros(0)
    if len(edges) != len(filled) + 1 or not filled.any():
        return None
    figure, (axis,) = axes(2.5)
    for counts, label, colour in ((pruned, "pruned", ORANGE), (kept, "kept", BLUE)):
        axis.stairs(counts, edges, color=colour, fill=True, alpha=0.25 if label == "pruned" else 0.5)
        axis.stairs(counts, edges, color=colour, linewidth=1.5, label=f"{label}: {number(int(counts.sum()))}")
    log_scale(axis, "y", _counts)
    axis.set_ylim(0.7, 2 * filled.max())
    used = np.flatnonzero(filled)
    axis.set_xlim(edges[used[0]], edges[used[-1] + 1])
    axis.set_xlabel("weight before pruning")
    axis.set_ylabel("weights per bin (log scale)")
    figure.legend(loc="outside upper left", ncols=2)
    inside = np.flatnonzero(kept) if kept.any() else used
    alt = (
        f"Histogram of the weights before pruning: {number(int(kept.sum()))} kept, between {edges[inside[0]]:.3g} and "
        f"{edges[inside[-1] + 1]:.3g}; {number(int(pruned.sum()))} pruned"
    )
    return Plot(slug(f"weights-{place:02d}-{entry.stage}"), f"{entry.stage}: weights kept and pruned.", alt, figure)


def _epochs(place: int, entry: LineageEntry) -> Plot | None:
    """The loss with its parts beside the shares of right answers, by epoch."""
    keys = _keys(entry)
    shares = [key for key in keys if key not in _figures(entry) and _is_share(key)]
    losses = [key for key in keys if key not in _figures(entry) and not _is_share(key)]
    if "score" in shares and any("validation" in key for key in shares):
        shares.remove("score")  # which repeats one of them
    losses.sort(key=lambda key: key != "loss")
    shares.sort(key=lambda key: list(SHARES).index(key) if key in SHARES else len(SHARES))
    caption = what(entry) or "curves by epoch"
    return _curves("epochs", place, entry, {"loss": losses, "share of images": shares}, 2.5, caption)


def _search(place: int, entry: LineageEntry) -> Plot | None:
    """Each figure that the pruner logs, by epoch."""
    panels = {words(key): [key] for key in _keys(entry) if key in _figures(entry)}
    return _curves("search", place, entry, panels, 0.2 + 1.8 * math.ceil(len(panels) / 2), "figures of the method")


def _keys(entry: LineageEntry) -> list[str]:
    return sorted({key for row in entry.history for key in row} - {"epoch"})


def _figures(entry: LineageEntry) -> dict[str, Any]:
    return _table(entry.metrics, "search")


def _curves(
    kind: str, place: int, entry: LineageEntry, panels: dict[str, list[str]], height: float, caption: str
) -> Plot | None:
    """A panel for each label of a y axis that has keys of the history to show; ``height`` in inches."""
    panels = {label: names for label, names in panels.items() if names}
    if not panels:
        return None
    figure, cells = axes(height, math.ceil(len(panels) / 2), min(2, len(panels)))
    for cell in cells[len(panels) :]:
        cell.remove()
    selected = entry.metrics.get("selected_epoch")
    said = []
    for axis, (label, names) in zip(cells, panels.items(), strict=False):
        parts, values = zip(itertools.cycle(DASHES), itertools.cycle(WHEEL), strict=False), []
        for name in names:
            line = [(row.get("epoch", i), row[name]) for i, row in enumerate(entry.history, 1) if name in row]
            said.append(f"{words(name)} {_text(name, line[0][1])} to {_text(name, line[-1][1])}")
            values += [value for _, value in line]
            dash, colour = _look(name, names) or next(parts)
            marker = "o" if len(line) <= FEW else ""
            axis.plot(*zip(*line, strict=True), dash, color=colour, marker=marker, markersize=3, label=words(name))
        if selected is not None:
            axis.axvline(selected, color=INK, linestyle=":", linewidth=1)
        if names == ["kept_share"] and isinstance(sparsity := entry.config.get("sparsity"), int | float):
            axis.axhline(1 - sparsity, color=INK, linestyle="--", linewidth=1, label="budget")
        tick = percents if _is_share(names[0]) else _counts
        if label != "share of images" and max(values) > 100 * min(values) > 0:
            log_scale(axis, "y", tick)
        elif tick is percents:
            axis.yaxis.set_major_formatter(tick)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel(label)
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(loc="lower left", bbox_to_anchor=(-0.1, 1), borderaxespad=0.2, handlelength=2.4,
                        ncols=2 if max(map(len, names)) < 7 else 1)  # fmt: skip
    dotted = "" if selected is None else f"; dotted: the selected epoch, {number(selected)}"
    alt = f"{entry.stage}, {len(entry.history)} epochs: {'; '.join(said)}"
    return Plot(slug(f"{kind}-{place:02d}-{entry.stage}"), f"{entry.stage}: {caption}{dotted}.", alt, figure)


def _is_share(key: str) -> bool:
    return key in SHARES or key == "score" or key.endswith(("accuracy", "share"))


def _look(name: str, beside: list[str]) -> tuple[str, str] | None:
    """Dash and colour of a line; None for parts of the loss, which take theirs in turn."""
    if name == "loss":
        return "-", INK
    return SHARES.get(name, ("-", GREEN)) if _is_share(name) or len(beside) == 1 else None


def _table(tables: dict[str, Any], key: str) -> dict[str, Any]:
    found = tables.get(key)
    return found if isinstance(found, dict) else {}


def _list(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _text(key: str, value: float) -> str:
    return percent(value) if _is_share(key) else f"{value:.3g}"


def _counts(count: float, _: object) -> str:
    power = min(3, math.floor(math.log10(count) / 3 + 1e-9)) if count >= 1 else 0
    return f"{count / 1000**power:g}{('', 'k', 'M', 'G')[power]}"
