"""Results of a track as Markdown, beside published figures, and as a plot of accuracy against sparsity."""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from rprune.evaluation.statistics import clopper_pearson

HERE = Path(__file__).parent
CLEAN, DENSE = "clean", "dense"
LABELS = {
    CLEAN: "clean",
    "pgd10": "PGD-10",
    "pgd20": "PGD-20",
    "pgd50x10": "PGD-50x10",
    "cw20-harp": "C&W-20",
    "apgd50x5": "APGD 50x5",
    "aa-lite": "AA-lite",
    "aa-torchattacks10": "AA of 10 steps",
    "aa-standard": "AA",
    "aa-quant": "AA, 8-bit",
    "square": "Square",
}
METRICS = {
    "nat": "clean",
    "pgd": "PGD",
    "pgd10": "PGD-10",
    "pgd50": "PGD-50",
    "cw": "C&W",
    "apgd": "APGD",
    "aa": "AA",
    "square": "Square",
}  # published


class Results:
    """Rows of a result file, by what they have in common but for the seed."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.track, self.unfinished = result["track"], len(result["unfinished"])
        self.share: float = result["share_of_epochs"]
        self.axes = list(self.track["axis"])
        self.groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in result["rows"]:
            key = (row["method"], *(row.get(axis, "") for axis in self.axes))
            self.groups.setdefault(key, []).append(row)
        self.sources: list[dict[str, Any]] = self.track.get("published", [])
        self.columns = {form: [CLEAN, *suites] for form, suites in self.track["suites"].items()}

    def whole(self) -> str:
        """How much of the track the figures are of."""
        counts = {len(rows) for rows in self.groups.values()}
        if not counts:
            return "Not run yet."
        low, high = min(counts), max(counts)
        words = [f"Mean of {high} seed{'s' * (high > 1)}." if low == high else f"Mean of {low} to {high} seeds."]
        if self.unfinished:
            are = "row is" if self.unfinished == 1 else "rows are"
            words.append(f"Not all is run yet: {self.unfinished} {are} missing.")
        if self.share != 1:
            words.append(f"Trained for {self.share:g} of the recipes' epochs.")
        return " ".join(words)

    def counts(self, key: tuple[str, ...], form: str, column: str) -> dict[int, tuple[int, int]]:
        """(right, n) by seed; clean ones are those of the suite with the most images."""
        found = {row["seed"]: row["counts"][form] for row in self.groups.get(key, []) if form in row["counts"]}
        if column == CLEAN:
            most = {seed: max(suites.values(), key=lambda c: c["n"]) for seed, suites in found.items()}
            return {seed: (best["clean"], best["n"]) for seed, best in most.items()}
        return {seed: (suites[column]["robust"], suites[column]["n"]) for seed, suites in found.items()}

    def shares(self, key: tuple[str, ...], form: str, column: str) -> dict[int, float]:
        """Percent by seed."""
        return {seed: 100 * right / n for seed, (right, n) in self.counts(key, form, column).items()}

    def mean(self, key: tuple[str, ...], form: str, column: str) -> float | None:
        """Over seeds, in percent."""
        shares = self.shares(key, form, column)
        return statistics.mean(shares.values()) if shares else None

    def leads(self, one: tuple[str, ...], other: tuple[str, ...], form: str, column: str) -> list[float]:
        """By how many points one has the higher accuracy, from each seed that both have."""
        ones, others = (self.shares(key, form, column) for key in (one, other))
        return [ones[seed] - others[seed] for seed in ones.keys() & others.keys()]

    def cell(self, key: tuple[str, ...], form: str, column: str) -> str:
        """Mean over seeds, and the 95 % interval of one with as many images (seeds share them)."""
        counts, mean = self.counts(key, form, column), self.mean(key, form, column)
        if mean is None:
            return "–"
        n = next(iter(counts.values()))[1]
        low, high = clopper_pearson(round(mean / 100 * n), n)
        return f"{mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    def published(self, names: dict[str, Any] | None, key: tuple[str, ...], form: str, column: str) -> float | None:
        """What a source of the track reports at this place, of this form."""
        if names is None or form != names.get("form", "float"):
            return None
        method = names["methods"].get(key[0], key[0])
        places = dict(zip(self.axes, key[1:], strict=True))
        sparsity = f"{100 * float(places['sparsity']):g}" if places["sparsity"] else "0"
        net = places.get("net", "")
        wanted = {
            "arch": names["arch"].get(net, names["arch"].get("", "")),
            "adv_training": names["training"].get(places.get("training", net), names["training"].get("", "")),
            "method": method,
            "sparsity": sparsity,
            "metric": names["metrics"].get(column, ""),
        }
        for row in _published():
            if row["source"].startswith(names["source"]) and all(row[k] == v for k, v in wanted.items()):
                return float(row["value"])
        return None


@cache
def _published() -> list[dict[str, str]]:
    with (HERE / "published.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(result: dict[str, Any]) -> str:
    """Every row with intervals, beside what the track's first source has, and the difference where settings agree."""
    found = Results(result)
    first = found.sources[0] if found.sources else None
    lines = [found.whole(), ""]
    for form, columns in found.columns.items():
        heads = [*found.axes, "method", *(LABELS.get(c, c) for c in columns)]
        known = [c for c in columns if any(found.published(first, key, form, c) is not None for key in found.groups)]
        heads += [f"paper: {METRICS[first['metrics'][c]]}" for c in known if first]
        rows = []
        for key in _in_order(found):
            if all(found.mean(key, form, c) is None for c in columns):
                continue
            places = [place or "0" for place in key[1:]]
            cells = [found.cell(key, form, c) for c in columns]
            rows.append([*places, key[0], *cells, *(_beside(found, first, key, form, c) for c in known)])
        if rows:
            lines += [f"Form: {form}.", ""] if len(found.columns) > 1 else []
            lines += [*_markdown(heads, rows), ""]
    return "\n".join(lines).rstrip()


def brief(result: dict[str, Any]) -> str:
    """One line a method, one column a sparsity: means of all columns of the first form."""
    found = Results(result)
    form, columns = next(iter(found.columns.items()))
    words = " / ".join(LABELS.get(c, c) for c in columns)

    def cell(key: tuple[str, ...]) -> str:
        means = [found.mean(key, form, c) for c in columns]
        return " / ".join("–" if mean is None else f"{mean:.1f}" for mean in means)

    others = [key[1:-1] for key in found.groups if key[0] != DENSE]
    rows, sparsities = [], list(found.track["axis"]["sparsity"])
    for place in dict.fromkeys(others):
        for method in dict.fromkeys(key[0] for key in found.groups if key[0] != DENSE):
            rows.append([*place, method, *(cell((method, *place, s)) for s in sparsities)])
    dense = [key for key in found.groups if key[0] == DENSE]
    starts = "; ".join(" ".join([*key[1:-1], cell(key)]) for key in dense)
    heads = [*found.axes[:-1], "method", *(f"sparsity {s}" for s in sparsities)]
    return "\n".join([f"{words}. Dense: {starts}. {found.whole()}", "", *_markdown(heads, rows)])


def order(result: dict[str, Any]) -> str:
    """Wherever a source has two of the methods or more: its order, ours, and how many pairs agree.

    Each pair over the seeds that both have.
    """
    found = Results(result)
    form, columns = next(iter(found.columns.items()))
    rows = []
    places = dict.fromkeys(key[1:] for key in _in_order(found) if key[0] != DENSE)
    for source, place, column in itertools.product(found.sources, places, columns):
        values = {key: found.published(source, key, form, column) for key in found.groups if key[1:] == place}
        papers = {key: value for key, value in values.items() if value is not None}
        ours = {key: mean for key in papers if (mean := found.mean(key, form, column)) is not None}
        if len(ours) < 2:
            continue
        pairs = list(itertools.combinations(sorted(papers, key=lambda key: -papers[key]), 2))
        leads = [found.leads(better, worse, form, column) for better, worse in pairs]
        means = sum(statistics.mean(lead) > 0 for lead in leads if lead)
        seeds = sum(min(lead) > 0 for lead in leads if lead)
        agree = [f"{n} of {len(pairs)}" for n in (means, seeds)]
        rows.append([source["label"], *place, LABELS.get(column, column), _ranked(papers), _ranked(ours), *agree])
    heads = ["paper", *found.axes, "accuracy", "its order", "here", "pairs that agree in the mean", "and in every seed"]
    return "\n".join([found.whole(), "", *_markdown(heads, rows)])


def _ranked(values: dict[tuple[str, ...], float]) -> str:
    return " > ".join(f"{key[0]} {values[key]:.1f}" for key in sorted(values, key=lambda key: -values[key]))


def _in_order(found: Results) -> Iterator[tuple[str, ...]]:
    """Dense first, then by place, in each place by method."""
    yield from (key for key in found.groups if key[0] == DENSE)
    rest = [key for key in found.groups if key[0] != DENSE]
    for place in dict.fromkeys(key[1:] for key in sorted(rest, key=lambda key: _rank(found, key))):
        yield from (key for key in rest if key[1:] == place)


def _rank(found: Results, key: tuple[str, ...]) -> list[int]:
    return [list(found.track["axis"][axis]).index(place) for axis, place in zip(found.axes, key[1:], strict=True)]


def _beside(found: Results, source: dict[str, Any] | None, key: tuple[str, ...], form: str, column: str) -> str:
    value, mean = found.published(source, key, form, column), found.mean(key, form, column)
    if source is None or value is None or mean is None:
        return "–"
    return f"{value:.1f} ({mean - value:+.1f})" if source.get("same_setting") and found.share == 1 else f"{value:.1f}"


def _markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *("| " + " | ".join(r) + " |" for r in rows)]


def plot(result: dict[str, Any], path: Path) -> None:
    """One panel a column: accuracy in percent against sparsity, a line a method.

    Bars reach from the lowest to the highest seed; sparsities stand at equal distances.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = ""  # the same file from the same figures
    import matplotlib.pyplot as plt

    found = Results(result)
    form, columns = next(iter(found.columns.items()))
    sparsities = list(found.track["axis"]["sparsity"])
    figure, panels = plt.subplots(1, len(columns), figsize=(4.2 * len(columns), 3.8), layout="constrained")
    for panel, column in zip(panels, columns, strict=True):
        dense = found.mean((DENSE, *[""] * len(found.axes)), form, column)
        if dense is not None:
            panel.axhline(dense, color="0.5", linestyle=":", label="dense")
        for index, method in enumerate(dict.fromkeys(key[0] for key in found.groups if key[0] != DENSE)):
            places, values, low, high = [], [], [], []
            for place, sparsity in enumerate(sparsities):
                shares = found.shares((method, sparsity), form, column).values()
                if shares:
                    mean = statistics.mean(shares)
                    places.append(place + 0.04 * (index - 2.5))
                    values.append(mean)
                    low.append(mean - min(shares))
                    high.append(max(shares) - mean)
            panel.errorbar(places, values, yerr=[low, high], marker="osD^vP"[index % 6], capsize=2, label=method)
        panel.set_xticks(range(len(sparsities)), sparsities)
        panel.set(title=LABELS.get(column, column), xlabel="sparsity")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, %")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
