from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rprune.reports import claim_plots as claim_plots_module
from rprune.reports import plots
from rprune.reports.canvas import DARK, LIGHT, Plot, element, styled
from rprune.reports.plots import plot_files
from rprune.reports.schema import Interval, LineageEntry, Report, Threat
from rprune.threat import ThreatModel


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_report", Path(__file__).with_name("sample_report.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sample = _load()
NAMES = {
    "accuracy",
    "curve-robust_accuracy-onnx",
    "curve-robust_accuracy-onnx-int8",
    "distances-robust_accuracy-onnx",
    "distances-robust_accuracy-onnx-int8",
    "curve-smoothed_certified_accuracy-onnx-int8",
    "density",
    "epochs-01-train",
    "epochs-02-prune",
    "search-02-prune",
    "weights-02-prune",
    "epochs-03-finetune",
}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return plot_files(sample.sample_report())


def with_metrics(stage: str = "prune", **metrics: Any) -> Report:
    """The sample with metrics of a stage replaced; None takes one away."""
    lineage = [
        entry.model_copy(update={"metrics": {k: v for k, v in (entry.metrics | metrics).items() if v is not None}})
        if entry.stage == stage
        else entry
        for entry in sample.sample_report().lineage
    ]
    return sample.sample_report(lineage=lineage)


def drawn(report: Report, draw: Callable[[Report], list[Plot]]) -> dict[str, Any]:
    """The figures by name; making one costs much less than writing it."""
    with styled():
        return {plot.name: plot.figure for plot in draw(report)}


def legend(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def entry(history: list[dict[str, float]], **metrics: Any) -> Report:
    made = LineageEntry(stage="prune", config={}, output="x", seconds=1.0, metrics=metrics, history=history)
    return sample.sample_report(lineage=[made])


def test_every_plot_of_the_page_is_a_file(files: dict[str, bytes]) -> None:
    assert set(files) == {f"{name}.svg" for name in NAMES}


def test_all_plots_of_a_resnet_are_small(files: dict[str, bytes]) -> None:
    assert len(sample.sample_report().sparsity.by_layer) == 21
    assert sum(map(len, files.values())) < 165_000
    with styled():
        inline = [element(plot) for plot in plots.plots(sample.sample_report())]
    assert sum(len(text.encode()) for text in inline) < 135_000


@pytest.mark.parametrize(("form", "start"), [("svg", b"<svg "), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_files_are_of_their_kind_and_always_the_same(form: Any, start: bytes) -> None:
    report = sample.sample_report(history=False, curves=False)
    once, again = plot_files(report, form), plot_files(report, form)
    assert once == again
    assert all(name.endswith(f".{form}") and content.startswith(start) for name, content in once.items())


def test_svg_files_stand_alone(files: dict[str, bytes]) -> None:
    for content in files.values():
        root = ET.fromstring(content)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert b"var(--" not in content
        ids = set(re.findall(rb' id="([^"]+)"', content))
        assert set(re.findall(rb"(?:url\(|href=\")#([\w.-]+)", content)) == ids
        assert b"fill: #ffffff" in content  # a page of its own, so that a dark viewer shows it too


def test_every_axis_has_a_label() -> None:
    with styled():
        made = plots.plots(sample.sample_report())
        for plot in made:
            for axis in plot.figure.axes:
                named = [axis.get_xlabel() or axis.get_xticklabels()[0].get_text()]
                named.append(axis.get_ylabel() or axis.get_yticklabels()[0].get_text())
                assert all(named), plot.name


def test_density_stands_beside_the_fixed_allocations() -> None:
    report = sample.sample_report()
    figure = drawn(report, plots.layers)["density"]
    assert legend(figure) == ["this model", "uniform", "ERK", "LAMP"]
    (axis,) = figure.axes
    sizes = [int(np.prod(layer.shape)) for layer in report.sparsity.by_layer]
    wanted = report.lineage[1].metrics["allocations"]
    for line, kind in zip(axis.lines, ("uniform", "erk", "lamp"), strict=True):
        np.testing.assert_allclose(np.asarray(line.get_xdata()) * sizes, list(wanted[kind].values()))
    widths = [bar.get_width() for bar in axis.patches]
    np.testing.assert_allclose(np.multiply(widths, sizes), [layer.nonzero for layer in report.sparsity.by_layer])


@pytest.mark.parametrize(
    "table",
    [None, {}, "x", {"uniform": {}}, {"uniform": {"elsewhere": 3}}, {"uniform": {"conv1.weight": 1729}}],
)
def test_density_does_without_allocations(table: Any) -> None:
    figure = drawn(with_metrics(allocations=table), plots.layers)["density"]
    assert not legend(figure)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "conv1"


def test_allocations_are_those_of_the_last_pruning() -> None:
    report = sample.sample_report()
    first = report.lineage[1]
    later = first.model_copy(update={"metrics": first.metrics | {"allocations": {"erk": {"conv1.weight": 864}}}})
    axis = drawn(sample.sample_report(lineage=[*report.lineage, later]), plots.layers)["density"].axes[0]
    assert [list(line.get_xdata()) for line in axis.lines] == [[0.5]]


def test_histogram_shows_the_counts() -> None:
    table = {"edges": [-1.0, 0.0, 1.0, 2.0], "kept": [1, 0, 20], "pruned": [0, 300, 0]}
    figure = drawn(with_metrics(histogram=table), plots.training)["weights-02-prune"]
    (axis,) = figure.axes
    assert axis.get_yscale() == "log"
    said = [patch.get_data().values.tolist() for patch in axis.patches]
    assert said == [[0, 300, 0]] * 2 + [[1, 0, 20]] * 2
    assert legend(figure) == ["pruned: 300", "kept: 21"]


@pytest.mark.parametrize(
    "table",
    [
        None,
        [],
        {},
        {"edges": [0, 1], "kept": [1]},
        {"edges": [0, 1], "kept": [1, 2], "pruned": [1, 2]},
        {"edges": [0, 1], "kept": [0], "pruned": [0]},
    ],
)
def test_histogram_is_left_out_when_it_does_not_hold_together(table: Any) -> None:
    assert "weights-02-prune" not in drawn(with_metrics(histogram=table), plots.training)


@pytest.mark.parametrize("counts", [([0], [5]), ([5], [0])])
def test_histogram_of_all_or_nothing(counts: tuple[list[int], list[int]]) -> None:
    table = {"edges": [0.0, 1.0], "kept": counts[0], "pruned": counts[1]}
    report = sample.sample_report(lineage=with_metrics(histogram=table).lineage[1:2], history=False, claims=[])
    assert ET.fromstring(plot_files(report)["weights-01-prune.svg"]) is not None


def test_curves_hold_the_history() -> None:
    report = sample.sample_report()
    history = report.lineage[1].history
    figures = drawn(report, plots.training)
    cells = [*figures["epochs-02-prune"].axes, *figures["search-02-prune"].axes]
    lines = {line.get_label(): line for cell in cells for line in cell.lines if not line.get_label().startswith("_")}
    assert [cell.get_ylabel() for cell in cells] == ["loss", "share of images", "gamma", "hardware loss", "kept share"]
    assert set(lines) - {"budget"} == {key.replace("_", " ") for row in history for key in row} - {"epoch", "score"}
    for key in ("loss", "ce", "kl", "gamma", "validation_robust"):
        assert list(lines[key.replace("_", " ")].get_ydata()) == [row[key] for row in history]
    assert lines["budget"].get_ydata()[0] == pytest.approx(0.01)
    assert cells[0].lines[-1].get_xdata()[0] == 17  # the selected epoch


def test_curves_of_a_method_and_an_objective_of_ones_own() -> None:
    parts = {f"part_{i}": 1.0 for i in range(14)}
    rows = [{"loss": 2.0, "temperature": 10.0**-e, **(parts if e else {})} for e in range(5)]
    figures = drawn(entry(rows, search={"temperature": 0.1}), plots.training)
    assert figures["search-01-prune"].axes[0].get_yscale() == "log"
    lines = figures["epochs-01-prune"].axes[0].lines
    assert len(lines) == 15
    looks = {(line.get_linestyle(), line.get_color()) for line in lines}
    assert len(looks) == 13  # 12 looks for parts, one for the loss


@pytest.mark.parametrize(
    ("history", "metrics", "names"),
    [
        ([], {}, set()),
        ([{"epoch": 1.0}], {}, set()),
        ([{"loss": 0.0}], {}, {"epochs-01-prune"}),
        ([{"score": 0.5}], {}, {"epochs-01-prune"}),
        ([{"gamma": -1.0}], {"search": {"gamma": 1}}, {"search-01-prune"}),
        ([{"gamma": 1.0}], {"search": "no table"}, {"epochs-01-prune"}),
    ],
)
def test_curves_of_whatever_a_history_holds(
    history: list[dict[str, float]], metrics: dict[str, Any], names: set[str]
) -> None:
    assert set(drawn(entry(history, **metrics), plots.training)) == names


def test_old_reports_lose_only_what_they_do_not_say() -> None:
    attacked = {name for name in NAMES if "robust_accuracy" in name}
    assert set(drawn(sample.sample_report(profile=False), plots.plots)) == NAMES - {"weights-02-prune"}
    first = drawn(sample.sample_report(attacked=False), plots.plots)
    assert set(first) == NAMES - attacked | {"curve-certified_accuracy-onnx-int8"}


def claim_plots(**changes: Any) -> dict[str, Any]:
    """The plots of the int8 file's robust accuracy, with fields of that claim replaced."""
    claims = [
        claim.model_copy(update=changes) if claim.id == "robust_accuracy@onnx-int8" else claim
        for claim in sample.sample_report().claims
        if claim.metric in ("robust_accuracy", "certified_accuracy") and claim.artifact == "onnx-int8"
    ]
    return drawn(sample.sample_report(None, claims=claims), claim_plots_module.accuracy)


def test_security_curve_holds_the_counts_beside_the_proofs() -> None:
    figure = claim_plots()["curve-robust_accuracy-onnx-int8"]
    (axis,) = figure.axes
    attacked, eps, proved = (axis.lines[i] for i in (0, 2, 1))
    counts = sample.SECURITY["onnx-int8"]
    np.testing.assert_allclose(attacked.get_xdata(), list(counts))
    np.testing.assert_allclose(attacked.get_ydata(), np.divide(list(counts.values()), 1000))
    np.testing.assert_allclose(proved.get_xdata(), [0.5, 1, 2, 4, 8])
    assert (attacked.get_drawstyle(), proved.get_drawstyle()) == ("steps-post", "steps-pre")  # so they never cross
    assert list(eps.get_xdata()) == pytest.approx([8, 8])
    assert legend(figure) == ["robust accuracy, at most", "certified accuracy, at least"]
    for band, line, n in zip(axis.collections, (attacked, proved), (1000, 1000), strict=True):
        edges = band.get_paths()[0].vertices
        for x, share in zip(line.get_xdata(), line.get_ydata(), strict=True):
            interval = Interval.of(round(share * n), n)
            for bound in (interval.lower, interval.upper):
                assert np.isclose(edges, (x, bound)).all(axis=1).any()


def test_huge_eps_leaves_room_for_the_others() -> None:
    """Half of the width is for eps up to twice the claim's; a tick stands at 0, eps and the huge eps."""
    (axis,) = claim_plots()["curve-robust_accuracy-onnx-int8"].axes
    place = axis.transData.transform([(x, 0) for x in (0, 8, 16, 128)])[:, 0]
    assert axis.get_xscale() == "asinh"
    assert (place[2] - place[0]) / (place[3] - place[0]) > 0.5
    labels = [text.get_text() for text in axis.get_xticklabels()]
    assert {"0", "8", "128"} <= set(labels)
    assert np.diff(sorted(axis.transData.transform([(float(x), 0) for x in labels])[:, 0])).min() > 0.08 * np.ptp(place)
    near = [point for point in sample.sample_report().claim("robust_accuracy").curve if point.at < 0.1]
    assert claim_plots(curve=near)["curve-robust_accuracy-onnx-int8"].axes[0].get_xscale() == "linear"


def test_proofs_in_another_norm_stand_alone() -> None:
    l2 = Threat.of(ThreatModel("l2", "0.5"))
    figures = claim_plots(threat=l2)
    assert set(figures) == {
        "accuracy", "curve-robust_accuracy-onnx-int8", "curve-certified_accuracy-onnx-int8",
        "distances-robust_accuracy-onnx-int8",
    }  # fmt: skip
    assert not legend(figures["curve-robust_accuracy-onnx-int8"])
    assert figures["distances-robust_accuracy-onnx-int8"].axes[0].get_xlabel() == "L2 size of the perturbation"


@pytest.mark.parametrize(
    ("distances", "x", "y"),
    [
        ([0.2, 0.1], [0, 0.1, 0.2], [0, 0.5, 1]),
        ([None, 0.1, None, 0.0], [0, 0, 0.1], [0, 0.25, 0.5]),
        ([None, None, 0.4], [0, 0.4], [0, 1 / 3]),
        ([0.0], [0, 0], [0, 1]),
    ],
)
def test_distances_are_an_empirical_distribution(distances: list[float | None], x: Any, y: Any) -> None:
    (axis,) = claim_plots(distances=distances)["distances-robust_accuracy-onnx-int8"].axes
    line = axis.lines[0]
    np.testing.assert_allclose(np.divide(line.get_xdata(), 255), x)
    np.testing.assert_allclose(line.get_ydata(), y)


@pytest.mark.parametrize("distances", [[], [None, None]])
def test_no_distance_no_plot(distances: list[None]) -> None:
    assert "distances-robust_accuracy-onnx-int8" not in claim_plots(distances=distances)


def test_weak_attack_is_marked_in_the_files_too() -> None:
    """Captions are on the page alone."""
    report = sample.sample_report(None, weak=True, complete=False, history=False, profile=False)
    for name, content in plot_files(report).items():
        marked = name.startswith("accuracy") or "robust_accuracy-onnx-int8" in name
        assert (b">UNRELIABLE<" in content or b": UNRELIABLE<" in content) == marked, name
        assert (b"INCOMPLETE" in content) == marked, name
    bars = drawn(report, claim_plots_module.accuracy)["accuracy"].axes[0].patches
    assert [bar.get_fill() for bar in bars] == [True, True, True, False, True]


def test_text_for_who_cannot_see_says_what_is_shown() -> None:
    with styled():
        alt = {plot.name: plot.alt.replace("\u00a0", " ") for plot in plots.plots(sample.sample_report())}
    assert "clean 77.2 % (int8 ONNX)" in alt["accuracy"]
    curve = alt["curve-robust_accuracy-onnx-int8"]
    assert "robust accuracy by eps, in 1/255: 77.2 % at 0 to 0.0 % at 128, 43.9 % at 8;" in curve
    assert "68.9 % at 0.5 to 11.2 % at 8" in curve
    assert alt["distances-robust_accuracy-onnx"].startswith("float ONNX: share of 32 images that fall")
    assert re.search(
        r"; half fall to \d\.\d+/255 or less, none was found for 1$", alt["distances-robust_accuracy-onnx"]
    )
    assert "beside uniform, ERK and LAMP" in alt["density"]
    assert re.search(r"from 0.7 % in layer4\S+ to 52.8 % in conv1", alt["density"])
    assert re.search(r"validation robust 26.3 % to \d", alt["epochs-02-prune"])
    assert "gamma 0.01 to 0.11" in alt["search-02-prune"]
    assert "kept, between -0.61 and 0.61" in alt["weights-02-prune"]


def test_no_name_leaves_the_folder() -> None:
    lineage = [entry.model_copy(update={"stage": "../../etc/<x>"}) for entry in sample.sample_report().lineage[1:2]]
    for name, content in plot_files(sample.sample_report(lineage=lineage, claims=[])).items():
        assert re.fullmatch(r"[\w.-]+", name)
        assert ".." not in name
        ET.fromstring(content)


# Machado et al., IEEE TVCG 2009, table 1, severity 1.0
SIGHT = {
    "normal": np.eye(3).tolist(),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.95047, 1, 1.08883])
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def luminance(colour: str) -> float:
    return float([0.2126, 0.7152, 0.0722] @ linear(colour))


@pytest.mark.parametrize(("palette", "card"), [(LIGHT, "#ffffff"), (DARK, "#1c2026")], ids=["light", "dark"])
def test_colours_stay_apart_for_every_sight(palette: dict[str, str], card: str) -> None:
    series = [palette[name] for name in ("blue", "orange", "green", "purple")]
    for matrix in SIGHT.values():
        for one, other in itertools.combinations(series, 2):
            assert np.linalg.norm(lab(matrix @ linear(one)) - lab(matrix @ linear(other))) > 15
    for colour in [*series, palette["ink-2"]]:
        low, high = sorted((luminance(colour), luminance(card)))
        assert (high + 0.05) / (low + 0.05) >= (4.5 if colour == palette["ink-2"] else 3)


def short_report() -> Report:
    return sample.sample_report(history=False, curves=False, profile=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "report.json").write_text(json.dumps(short_report().to_json()))
    return tmp_path


def call(*arguments: object) -> int | str | None:
    from rprune.cli.app import main

    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def test_command_writes_every_plot_and_overwrites_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = plot_files(short_report())
    assert not call("report", folder, "--plots", folder / "plots")
    assert {path.name: path.read_bytes() for path in (folder / "plots").iterdir()} == wanted
    assert capsys.readouterr().out.split() == [str(folder / "plots" / name) for name in wanted]
    assert call("report", folder, "--plots", folder / "plots") == 2
    assert not call("report", folder, "--plots", folder / "plots", "--force", "--json")
    assert json.loads(capsys.readouterr().out) == {"files": [str(folder / "plots" / name) for name in wanted]}


def test_command_writes_the_format_that_is_asked_for(folder: Path) -> None:
    assert not call("report", folder, "--plots", folder / "plots", "--plot-format", "png")
    assert {path.suffix for path in (folder / "plots").iterdir()} == {".png"}
    assert call("report", folder, "--plots", folder / "plots", "--plot-format", "gif") == 2


def test_plots_need_no_torch() -> None:
    code = (
        "import runpy, sys; from rprune.reports.plots import plot_files; assert 'matplotlib' not in sys.modules; "
        f"sample = runpy.run_path({str(Path(sample.__file__ or ''))!r}); "
        "plot_files(sample['sample_report'](claims=[], history=False), 'pdf'); "
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
