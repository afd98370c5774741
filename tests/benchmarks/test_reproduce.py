"""The reproduction: tracks are whole; a small one runs, is interrupted and goes on; its table says what it found."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "reproduce"
RECIPE = """
rprune = 1
name = "{name}"
[model]
arch = "benchmarks/reproduce/cpu/mini_vgg.py:MiniVGG"
[data]
source = "npz:images.npz"
[threat]
eps = "8/255"
[[stage]]
kind = "train"
objective = {{ name = "pgd-at", attack = {{ steps = 1 }} }}
epochs = 2
batch_size = 16
[[stage]]
kind = "prune"
method = "{method}"
sparsity = 0.5
batch_size = 16
{epochs}
[[stage]]
kind = "finetune"
epochs = 2
batch_size = 16
[[stage]]
kind = "quantize"
calibration = 16
"""
TRACK = """
recipes = ["lwm", "harp"]
seeds = [0]
[suites.float]
fgsm = 20
[suites.8-bit]
fgsm = 10
[suites.codebook]
fgsm = 10
[axis.sparsity]
"0.5" = ["stage.prune.sparsity=0.5"]
"0.9" = ["stage.prune.sparsity=0.9"]
"""


def module(name: str) -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[name] = found  # dataclasses look their module up
        spec.loader.exec_module(found)
    finally:
        sys.path.remove(str(FOLDER))
    return found


@pytest.fixture(scope="module")
def track() -> Any:
    return module("track")


@pytest.fixture(scope="module")
def tables() -> Any:
    return module("tables")


TRACKS = sorted(path.parent.name for path in FOLDER.glob("*/track.toml"))


@pytest.mark.parametrize("name", TRACKS)
def test_every_row_of_a_track_is_a_recipe_that_can_run(track: Any, name: str, monkeypatch: pytest.MonkeyPatch):
    from rprune.attacks.suites import suite
    from rprune.models.registry import Architecture, build
    from rprune.objectives.base import OBJECTIVES
    from rprune.pruning.base import METHODS
    from rprune.training.schedules import schedule

    monkeypatch.chdir(ROOT)
    found = track.Track.read(name)
    rows = list(found.rows())
    assert len({row.name for row in rows}) == len(rows) > 0
    architectures: set[str] = set()
    for row in rows:
        recipe = track.recipe_of(found, row, "npz:images.npz")
        prune = next(stage for stage in recipe.stage if stage.kind == "prune")
        METHODS.build(prune.method)
        OBJECTIVES.build(recipe.stage[0].objective, threat=recipe.threat.model())
        for stage in recipe.stage:
            if hasattr(stage, "schedule"):
                schedule(stage.schedule)
        architectures.add(recipe.model.arch)
        assert str(prune.sparsity) == row.places["sparsity"]
        assert recipe.seed == row.seed
    for name in architectures:
        side = found.table.get("subset", {"side": 32})["side"]
        with torch.device("meta"):
            build(Architecture(name, 10, (3, side, side)))
    for suites in found.suites.values():
        assert all(suite(text) for text in suites)


def test_rows_share_a_dense_start_when_nothing_before_pruning_differs(track: Any):
    found = track.Track.read("paper")
    starts: dict[str, set[tuple[str, str]]] = {}
    for row in found.rows():
        key = track.digest(track.dense_of(found, row, "cifar10"))
        starts.setdefault(key, set()).add((row.places["net"], row.places["training"]))
    assert len(starts) == 6
    assert all(len(places) == 1 for places in starts.values())


def test_settings_hold_in_every_row_and_changes_add_up(track: Any, tmp_path: Path):
    (tmp_path / "lwm.toml").write_text(RECIPE.format(name="LWM", method="lwm", epochs=""))
    (tmp_path / "track.toml").write_text("""
    recipes = ["lwm"]
    seeds = [3]
    settings = ["stage.train.lr=0.5"]
    cumulative = ["change"]
    [suites]
    [axis.change]
    none = []
    one = ["stage.finetune.lr=0.1"]
    two = ["stage.finetune.epochs=7", "stage.finetune.lr=0.2"]
    [axis.sparsity]
    "0.5" = ["stage.prune.sparsity=0.5"]
    """)
    rows = list(track.Track.read(tmp_path).rows())
    first, last = ["stage.train.lr=0.5"], ["stage.prune.sparsity=0.5", "seed=3"]
    one, two = ["stage.finetune.lr=0.1"], ["stage.finetune.epochs=7", "stage.finetune.lr=0.2"]
    assert [list(row.settings) for row in rows] == [[*first, *more, *last] for more in ([], one, [*one, *two])]
    tune = track.recipe_of(track.Track.read(tmp_path), rows[2], "digits").stage[2]
    assert (tune.lr, tune.epochs) == (0.2, 7), "the later change wins"


def test_a_shorter_track_says_so_in_every_stage(track: Any):
    whole, short = track.Track.read("paper"), track.Track.read("paper", 0.1)
    row = next(row for row in whole.rows() if row.method == "HARP")
    epochs = [[getattr(s, "epochs", None) for s in track.recipe_of(t, row, "cifar10").stage] for t in (whole, short)]
    assert epochs == [[100, 20, 100, None], [10, 2, 10, None]]


def result(**more: Any) -> dict[str, Any]:
    published = {
        "source": "HARP (ICLR 2023)",
        "label": "HARP",
        "arch": {"": "ResNet18"},
        "training": {"": "PGD-AT"},
        "methods": {"dense": "Pre-trained"},
        "metrics": {"clean": "nat", "aa-standard": "aa"},
    }
    counts = [
        ("dense", {}, 0, 840, 460),
        ("HARP", {"sparsity": "0.99"}, 0, 800, 440),
        ("HARP", {"sparsity": "0.99"}, 1, 820, 450),
        ("HYDRA", {"sparsity": "0.99"}, 0, 700, 400),
    ]
    rows = [
        {"method": m, "seed": s, **places, "counts": {"float": {"aa-standard": {"clean": c, "robust": r, "n": 1000}}}}
        for m, places, s, c, r in counts
    ]
    suites = {"float": {"aa-standard": 1000}}
    axis = {"sparsity": {"0.99": ["stage.prune.sparsity=0.99"], "0.999": ["stage.prune.sparsity=0.999"]}}
    track = {"suites": suites, "axis": axis, "published": [published | more]}
    left = ["rows/HARP-0.999-0", "rows/HYDRA-0.999-0"]
    return {"track": track, "share_of_epochs": 1.0, "rows": rows, "unfinished": left}


def test_the_table_has_means_intervals_and_what_is_published(tables: Any):
    from rprune.evaluation.statistics import clopper_pearson

    low, high = (100 * value for value in clopper_pearson(445, 1000))
    first, _, *lines = tables.table(result()).splitlines()
    assert first == "Mean of 1 to 2 seeds. Not all is run yet: 2 rows are missing."
    assert lines[0] == "| sparsity | method | clean | AA | paper: clean | paper: AA |"
    assert lines[2].startswith("| 0 | dense | 84.0 [")
    assert lines[2].endswith("| 82.9 | 45.3 |")
    assert f"| 44.5 [{low:.1f}, {high:.1f}] | 80.1 | 45.6 |" in lines[3]
    assert lines[3].startswith("| 0.99 | HARP | 81.0 [")


def test_differences_stand_where_the_setting_is_the_papers(tables: Any):
    lines = tables.table(result(same_setting=True)).splitlines()
    assert lines[5].endswith("| 80.1 (+0.9) | 45.6 (-1.1) |")
    lines = tables.table(result(same_setting=True) | {"share_of_epochs": 0.1}).splitlines()
    assert lines[0].endswith("Trained for 0.1 of the recipes' epochs.")
    assert lines[5].endswith("| 80.1 | 45.6 |"), "a shorter training is another setting"


def test_a_track_that_has_no_rows_yet_says_so(tables: Any):
    assert tables.table(result() | {"rows": []}).splitlines()[0] == "Not run yet."


def test_the_brief_table_has_a_line_a_method_and_a_gap_for_what_is_missing(tables: Any):
    lines = tables.brief(result()).splitlines()
    assert lines[0].startswith("clean / AA. Dense: 84.0 / 46.0. Mean of 1 to 2 seeds.")
    assert lines[-2:] == ["| HARP | 81.0 / 44.5 | – / – |", "| HYDRA | 70.0 / 40.0 | – / – |"]


def test_the_order_counts_pairs_in_the_mean_and_in_every_seed(tables: Any):
    lines = tables.order(result()).splitlines()[4:]
    assert lines == [
        "| HARP | 0.99 | clean | HARP 80.1 > HYDRA 75.5 | HARP 81.0 > HYDRA 70.0 | 1 of 1 | 1 of 1 |",
        "| HARP | 0.99 | AA | HARP 45.6 > HYDRA 40.9 | HARP 44.5 > HYDRA 40.0 | 1 of 1 | 1 of 1 |",
    ]
    found = result()
    rows = found["rows"]
    rows.append(rows[3] | {"seed": 1, "counts": {"float": {"aa-standard": {"clean": 900, "robust": 480, "n": 1000}}}})
    clean, aa = tables.order(found).splitlines()[4:]
    assert clean.endswith("| HARP 81.0 > HYDRA 80.0 | 1 of 1 | 0 of 1 |"), "better in the mean, worse from seed 1"
    assert aa.endswith("| HARP 44.5 > HYDRA 44.0 | 1 of 1 | 0 of 1 |")


def test_the_order_has_every_source_and_the_seeds_that_two_methods_share(tables: Any):
    found = result()
    hydra = {
        "source": "HYDRA (NeurIPS 2020)",
        "label": "HYDRA",
        "arch": {"": "VGG16"},
        "training": {"": "Madry PGD-AT"},
    }
    names = {"methods": {"HARP": "Adv-ADMM"}, "metrics": {"clean": "nat", "aa-standard": "pgd50"}}
    found["track"]["published"].append(hydra | names)
    found["rows"][2]["counts"]["float"]["aa-standard"]["clean"] = 100  # of a seed that HYDRA has not
    lines = tables.order(found).splitlines()[4:]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| HARP", "0.99", "clean"], ["| HARP", "0.99", "AA"], ["| HYDRA", "0.99", "clean"], ["| HYDRA", "0.99", "AA"]
    ]  # fmt: skip
    assert lines[0].endswith("| HYDRA 70.0 > HARP 45.0 | 1 of 1 | 1 of 1 |")
    assert lines[2].endswith("| HYDRA 59.9 > HARP 55.2 | HYDRA 70.0 > HARP 45.0 | 0 of 1 | 0 of 1 |")


def test_the_plot_is_drawn(tables: Any, tmp_path: Path):
    for name in ("plot", "again"):
        tables.plot(result(), tmp_path / f"{name}.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "<svg" in drawn
    assert drawn == (tmp_path / "again.svg").read_text()


def test_figures_without_their_net_say_what_to_remove(track: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    found = track.Track.read("cpu-bits")
    row = next(found.rows())
    with pytest.raises(SystemExit, match=f"{row.name}.json has figures, but no net .* remove that file"):
        track.make_row(found, row, "npz:images.npz", tmp_path, "cpu", ["float", "8-bit"], {"counts": {"float": {}}})


@pytest.mark.slow
def test_a_track_stops_when_its_time_is_up_and_goes_on(tmp_path: Path):
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, n in (("train", 64), ("test", 20)):
        arrays[f"{name}_images"] = random.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
        arrays[f"{name}_labels"] = np.arange(n) % 4
    np.savez(tmp_path / "images.npz", **arrays)
    (tmp_path / "small").mkdir()
    for method, epochs in (("lwm", ""), ("harp", "epochs = 2")):
        text = RECIPE.format(name=method.upper(), method=method, epochs=epochs)
        (tmp_path / "small" / f"{method}.toml").write_text(text)
    (tmp_path / "small" / "track.toml").write_text(TRACK)
    command = [sys.executable, FOLDER / "run.py", tmp_path / "small", "--data", f"npz:{tmp_path}/images.npz"]
    command += ["--work", tmp_path / "work", "--output", tmp_path / "result.json", "--shorten", "0.5"]

    stopped = subprocess.run([*command, "--budget", "1s"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert stopped.returncode == 130, stopped.stderr
    assert "goes on" in stopped.stderr
    assert json.loads((tmp_path / "result.json").read_text())["unfinished"]

    only = subprocess.run([*command, "--forms", "float"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert only.returncode == 0, only.stderr + "".join(p.read_text() for p in (tmp_path / "work").glob("*/*.log"))
    found = json.loads((tmp_path / "result.json").read_text())
    assert [list(row["counts"]) for row in found["rows"]] == [["float"]] * 5
    assert len(found["unfinished"]) == 4, "all but the dense start want 8 bits, too"

    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr + "".join(p.read_text() for p in (tmp_path / "work").glob("*/*.log"))
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["unfinished"] == []
    assert found["share_of_epochs"] == 0.5
    assert [row["method"] for row in found["rows"]] == ["dense", "LWM", "LWM", "HARP", "HARP"]
    for row in found["rows"]:
        assert row["counts"]["float"]["fgsm"]["n"] == 20
        if row["method"] != "dense":
            assert [row["counts"][form]["fgsm"]["n"] for form in ("8-bit", "codebook")] == [10, 10]
            assert row["kept"] == {"0.5": 403_928, "0.9": 80_785}[row["sparsity"]]
    assert "| 0.9 | HARP |" in done.stdout
    for row in (tmp_path / "work" / "small").glob("*.json"):
        spent = float(row.with_suffix(".seconds").read_text())
        assert json.loads(row.read_text())["seconds"] == round(spent), "of all processes that worked on it"

    (tmp_path / "other").mkdir()
    for path in (tmp_path / "small").iterdir():
        text = path.read_text().replace("fgsm = 20", "pgd10 = 5").replace('["lwm", "harp"]', '["lwm"]')
        (tmp_path / "other" / path.name).write_text(text)
    other = [*command[:2], tmp_path / "other", *command[3:], "--output", tmp_path / "other.json", "--forms", "float"]
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "dense").rglob("*.safetensors")}
    subprocess.run(other, capture_output=True, cwd=ROOT, check=True)
    rows = json.loads((tmp_path / "other.json").read_text())["rows"]
    assert [list(row["counts"]["float"]) for row in rows] == [["pgd10"]] * 3, "each track measures what it wants"
    assert {path: path.stat().st_mtime_ns for path in trained} == trained, "and trains no start again"

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "small").glob("*.json")}
    assert len(before) == 5
    subprocess.run(command, capture_output=True, cwd=ROOT, check=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before

    (tmp_path / "work").rename(tmp_path / "of-another-machine")
    kept = [*command, "--keep"]
    again = subprocess.run(kept, capture_output=True, text=True, cwd=ROOT, check=True)
    assert (": done" in again.stdout, again.stderr) == (False, "")
    assert json.loads((tmp_path / "result.json").read_text()) == found, "all rows stand in the result file"

    here = found["environments"]
    found["environments"] = [{"device": "another"}]
    missing = found["rows"].pop()
    (tmp_path / "result.json").write_text(json.dumps(found))
    only = [*kept, "--only", "LWM-0.9", "--forms", "8-bit"]
    again = subprocess.run(only, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "4 rows" in again.stderr, "those of one dense start stay together"
    assert [line.split("/")[-1] for line in again.stdout.splitlines() if line.endswith(": done")][1:] == [
        "LWM-0.9-0: done"
    ]
    again = subprocess.run([*only[:-1], "float"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert again.stdout.count(": done") == 1
    then = json.loads((tmp_path / "result.json").read_text())
    assert then["environments"] == here
    assert [(row["method"], row.get("sparsity")) for row in then["rows"]] == [("dense", None), ("LWM", "0.9")]
    assert then["rows"][1]["counts"].keys() == {"8-bit", "float"}
    assert [name.split("/")[-1] for name in then["unfinished"]] == [
        "LWM-0.5-0",
        "LWM-0.9-0",
        "HARP-0.5-0",
        "HARP-0.9-0",
    ]

    found["rows"].append(missing)
    found["track"]["suites"]["float"]["fgsm"] = 19
    (tmp_path / "result.json").write_text(json.dumps(found))
    wrong = subprocess.run(kept, capture_output=True, text=True, cwd=ROOT, check=False)
    assert wrong.returncode != 0
    assert wrong.stderr.splitlines()[-1].endswith("has another [suites] than track.toml; leave it away to start anew")
