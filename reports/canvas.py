"""What all plots share: colours, style, and the way from a figure to an SVG element of a page or to a file."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import numpy as np

Format = Literal["svg", "png", "pdf"]

# on the page its CSS variables take the place of these colours, so that a plot follows light and dark;
# blue, orange, green and purple stay apart under the three kinds of colour blindness (tests/reports/test_plots.py)
INK, GRID, BLUE, ORANGE, GREEN, PURPLE = "#5b6570", "#e2e6ea", "#1b66b8", "#dc7800", "#3f9e86", "#8e2a6b"
LIGHT = {"ink-2": INK, "line": GRID, "blue": BLUE, "orange": ORANGE, "green": GREEN, "purple": PURPLE}
DARK = {
    "ink-2": "#9ea8b3", "line": "#30363e", "blue": "#5aa2f2", "orange": "#f2a541", "green": "#7fd6b8",
    "purple": "#d268ac",
}  # fmt: skip
STYLE: Any = {
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
    **dict.fromkeys(("xtick.major.size", "xtick.minor.size", "ytick.major.size", "ytick.minor.size"), 0),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **{"font.size": 9.5, "grid.linewidth": 0.7, "lines.linewidth": 1.8, "legend.fontsize": 8.5, "savefig.dpi": 200},
    **{"svg.fonttype": "none", "pdf.fonttype": 42, "font.sans-serif": ["DejaVu Sans"]},  # text stays text
    "text.parse_math": False,  # a name may hold a dollar sign
}
CHARACTER = 0.025  # its width on an x axis, as a share of the axis
NOTHING = {  # what would change the bytes from day to day
    "svg": dict.fromkeys(("Creator", "Date", "Format", "Type")),
    "png": {"Software": None},
    "pdf": dict.fromkeys(("Creator", "Producer", "CreationDate")),
}


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure with its file name, the text below it, and the text for who cannot see it."""

    name: str
    caption: str
    alt: str
    figure: Any


@contextmanager
def styled() -> Iterator[None]:
    """Figures are made and written in here; the user's own settings would change them."""
    from matplotlib import style

    with style.context(STYLE, after_reset=True):
        yield


def axes(height: float, rows: int = 1, columns: int = 1, width: float = 4.3) -> tuple[Any, list[Any]]:
    """In inches; the default is about as wide as a phone, so that text keeps its size there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def log_scale(axes: Any, which: Literal["x", "y"], tick: Any) -> None:
    """Make an axis logarithmic, its decades written by ``tick``: matplotlib's own labels are mathtext."""
    from matplotlib.ticker import NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(tick)
    axis.set_minor_formatter(NullFormatter())


def compress(axes: Any, width: float, values: list[float]) -> None:
    """Make an x axis from 0 about linear up to ``width`` and logarithmic beyond; ticks at those of ``values``, the most
    important first, that have room."""
    places = np.arcsinh(np.asarray(values) / width) / np.arcsinh(max(values) / width)
    texts, ticks = [f"{value:.3g}" for value in values], [0]
    for i in range(1, len(values)):
        room = [0.03 + CHARACTER * (len(texts[i]) + len(texts[tick])) / 2 for tick in ticks]
        if (np.abs(places[ticks] - places[i]) > room).all():
            ticks.append(i)
    axes.set_xscale("asinh", linear_width=width)
    axes.set_xlim(*(width * np.sinh(np.arcsinh(max(values) / width) * np.array([-0.03, 1.03]))))
    axes.set_xticks([values[i] for i in ticks], [texts[i] for i in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"{axes.get_xlabel()} (log scale from {width:.3g})")


def percents(share: float, _: object) -> str:
    """Ticks of an axis of shares."""
    return f"{100 * share:g} %"


def slug(name: str) -> str:
    """A file name from any name."""
    return re.sub(r"\W+", "-", name)


def element(plot: Plot) -> str:
    """The plot as an SVG element whose ids are its own and whose colours are the page's."""
    text = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", _svg(plot, True))
    text = re.sub(r'\bid="', f'id="{plot.name}-', text)
    text = re.sub(r"(href=\"|url\()#", rf"\1#{plot.name}-", text).replace("xlink:href", "href")
    text = re.sub(r"; font-family: [^;\"]*", "", text)
    for variable, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def content(plot: Plot, form: Format) -> bytes:
    """The plot as a file of its own: light colours on white, the same bytes for the same report."""
    if form != "svg":
        return _saved(plot, form, False)
    label = f'<svg role="img" aria-label="{escape(plot.alt)}" '
    return _svg(plot, False).replace("<svg ", label, 1).encode()


def _svg(plot: Plot, transparent: bool) -> str:
    """At a third of the size: coordinates to a hundredth of a point, no group that only holds others."""
    text = _saved(plot, "svg", transparent).decode()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"\s*\n\s*", "", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", tag[0]), text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    count = 1
    while count:
        text, count = re.subn(r"<g/>|<g>((?:(?!</?g\b).)*)</g>", r"\1", text)
    return text


def _saved(plot: Plot, form: Format, transparent: bool) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": plot.name}):
        plot.figure.savefig(buffer, format=form, transparent=transparent, metadata=NOTHING[form])
    return buffer.getvalue()
