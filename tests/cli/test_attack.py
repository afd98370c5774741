"""rprune attack: files of ours, ONNX files of a bundle, in parts, with a budget, with code of the user's own."""

import csv
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

INT8 = "model-lwm-0.5-finetuned-int8.pt"
OWN = """
import torch

def corner(logits_fn, x, y):
    return (x + 0.03 * torch.sign(torch.rand_like(x) - 0.5)).clamp(0, 1)
"""


@pytest.fixture
def folder(chain, tmp_path):
    """A copy of the bundle and of the model files."""
    shutil.copytree(chain / "out", tmp_path / "out")
    shutil.copy(chain / INT8, tmp_path)
    return tmp_path


def rows(folder):
    with (folder / "samples.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def attacked(chain, call, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack")
    shutil.copytree(chain / "out", folder / "out")
    said = call("attack", "out/model.int8.onnx", "--suite", "pgd10", "-n", 60, "--json", cwd=folder)
    assert said.code == 0, said.err
    return folder, said.json


def test_an_onnx_file_of_a_bundle_needs_no_further_word(attacked):
    folder, found = attacked
    (column,) = found["columns"]
    clean, robust = column["claims"]
    assert column["threat"] == "linf 0.03"
    assert found["model"]["role"] == "onnx-int8"
    assert clean["n"] == robust["n"] == 60
    assert robust["correct"] <= clean["correct"]
    assert [row["kind"] for row in robust["attacks"]] == ["white-box", "transfer"]
    assert robust["settings"]["verdict"] == "ONNX Runtime on model.int8.onnx"
    assert len(robust["health"]["checks"]) == 15
    assert robust["curve"][0]["correct"] == clean["correct"]
    assert any(point["at"] == 0.03 and point["correct"] == robust["correct"] for point in robust["curve"])
    saved = json.loads((folder / "out" / "model.int8-pgd10.attack" / "attack.json").read_text())
    assert saved["columns"] == found["columns"]


def test_the_export_found_the_same(attacked, chain):
    """The same file and samples, guided by the file's own graph instead of the model it was made from."""
    _, found = attacked
    report = json.loads((chain / "out" / "report.json").read_text())
    by_export = next(c for c in report["claims"] if c["id"] == "robust_accuracy@onnx-int8")
    assert abs(found["columns"][0]["claims"][1]["correct"] - by_export["correct"]) <= 2


def test_evidence_holds_a_point_for_every_broken_sample(attacked):
    from rprune.data.sources import load_data
    from rprune.export.session import OnnxClassifier

    folder, found = attacked
    place = folder / "out" / "model.int8-pgd10.attack"
    points, table = load_file(place / "adversarial.safetensors"), rows(place)
    assert points["x"].dtype == np.uint8
    broken = {int(row["index"]) for row in table if row["attack"]}
    assert broken == {*points["index"].tolist(), *points["float_index"].tolist()}
    assert len(broken) == found["columns"][0]["claims"][1]["settings"]["broken"] > 0
    test = load_data("digits").test
    x = np.concatenate([points["x"].astype(np.float32) / np.float32(255), points["float_x"]])
    index = np.concatenate([points["index"], points["float_index"]])
    clean = test.pixels(0, 60)[index].astype(np.float32) / 255
    assert np.abs(x - clean).max() <= 0.03 + 1e-6
    assert (OnnxClassifier(folder / "out" / "model.int8.onnx").predict(x) != test.labels[index]).all()


def test_shards_merge_to_the_whole(folder, call):
    whole = call("attack", INT8, "--suite", "fgsm", "-n", 40, "--no-health", "-o", "whole", cwd=folder)
    assert whole.code == 0, whole.err
    for part in (1, 2, 3):
        said = call(
            "attack", INT8, "--suite", "fgsm", "-n", 40, "--shard", f"{part}/3", "-o", f"part{part}", cwd=folder
        )
        assert said.code == 0, said.err
    merge = [option for part in (1, 2, 3) for option in ("--merge", f"part{part}")]
    merged = call("attack", INT8, "--suite", "fgsm", "-n", 40, "--no-health", *merge, "-o", "merged", cwd=folder)
    assert merged.code == 0, merged.err
    for name in ("samples.csv", "samples.jsonl", "adversarial.safetensors"):
        assert (folder / "merged" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    other = call("attack", INT8, "--suite", "pgd10", "-n", 40, "--merge", "part1", "-o", "other", cwd=folder)
    assert other.code == 2
    assert "suite differ" in other.err


def test_a_budget_leaves_an_incomplete_result_that_the_next_call_completes(folder, call):
    arguments = ("attack", INT8, "--suite", "pgd10", "-n", 20, "--no-health", "-o", "a")
    first = call(*arguments, "--budget", "0s", cwd=folder)
    assert first.code == 0, first.err
    assert "INCOMPLETE" in first.out
    second = call(*arguments, cwd=folder)
    assert "INCOMPLETE" not in second.out
    assert all(row["queries"] != "0" for row in rows(folder / "a") if row["label"] == row["clean_prediction"])


def test_a_table_has_a_column_for_every_suite_and_a_row_for_every_eps(folder, call, monkeypatch):
    from rprune.attacks import suites

    monkeypatch.setitem(suites.TABLES, "harp-table", {"FGSM": "fgsm", "PGD-10": "pgd10"})
    options = ("--suite", "harp-table", "-n", 20, "--eps", "8/255", "--no-health", "-o", "t")
    said = call("attack", INT8, *options, cwd=folder)
    assert said.code == 0, said.err
    table = said.out.splitlines()
    assert table[1].split() == ["threat", "clean", "FGSM", "PGD-10"]
    assert table[2].startswith("linf 8/255")
    assert table[3].startswith("linf 0.031")
    found = json.loads((folder / "t" / "attack.json").read_text())
    assert [(c["name"], c["threat"]) for c in found["columns"]] == [
        ("FGSM", "linf 8/255"),
        ("PGD-10", "linf 8/255"),
        ("FGSM", "linf 0.031"),
        ("PGD-10", "linf 0.031"),
    ]
    assert {c["claims"][1]["attacks"][0]["tried"] for c in found["columns"]} == {
        found["columns"][0]["claims"][0]["correct"]
    }


def test_an_attack_of_the_users_own_has_a_place_in_a_suite(folder, call):
    (folder / "own.py").write_text(OWN)
    said = call(
        "attack", "out/model.onnx", "--suite", "fgsm,own.py:corner", "-n", 20, "--no-health", "--json", cwd=folder
    )
    assert said.code == 0, said.err
    attacks = said.json["columns"][0]["claims"][1]["attacks"]
    assert [row["name"] for row in attacks] == ["fgsm", "corner"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("out/model.onnx", "--suite", "aa-standart"), 2, "aa-standard"),
        (("out/model.onnx", "--suite", "fgsm", "--shard", "4/3"), 2, "--shard"),
        (("out/model.onnx", "--suite", "fgsm", "-n", 3, "--shard", "5/8"), 2, "at most 3 shards"),
        (("out/model.onnx", "--suite", "fgsm", "--merge", "part2"), 3, "part2"),
        (("out/model.onnx", "--suite", "fgsm", "--budget", "soon"), 2, "--budget"),
        (("out/model.onnx", "--suite", "transfer"), 2, "needs a parent"),
        (("out/model.onnx", "--suite", "fgsm", "-o", "."), 2, "did not write"),
        (("out/model.onnx", "--suite", "fgsm", "--data", "npz:missing.npz"), 3, "missing.npz"),
        (("out/missing.onnx", "--suite", "fgsm", "--data", "digits"), 3, "is not there"),
        ((INT8, "--suite", "fgsm", "--parent", "out/model.onnx"), 2, "--parent"),
        (("out/model.onnx", "--suite", "own.py:nothing"), 3, "own.py"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(folder, call, contents, arguments, code, words):
    before = contents(folder)
    said = call("attack", *arguments, cwd=folder)
    assert said.code == code, said.err
    assert words in said.err
    assert said.err.count("error:") == 1
    assert contents(folder) == before


def test_a_foreign_onnx_file_needs_data(folder, call):
    shutil.copy(folder / "out" / "model.onnx", folder / "net.onnx")
    missing = call("attack", "net.onnx", "--suite", "fgsm", cwd=folder)
    assert (missing.code, "--data" in missing.err) == (2, True)
    said = call("attack", "net.onnx", "--suite", "fgsm", "--data", "digits", "--eps", "0.03", "-n", 20, cwd=folder)
    assert said.code == 0, said.err
    assert "attack health" in said.out or "UNRELIABLE" in said.out
