"""rprune bench: a table or one JSON document of what the files of a model take, and clear errors."""

from __future__ import annotations

import shutil
import zlib

import pytest

FILES = ["model.c", "model.compact.onnx", "model.int8.onnx", "model.onnx", "model.packed.safetensors"]
QUICK = ("--rounds", 1, "--batch-size", "1,3", "--threads", "1")

pytestmark = pytest.mark.usefixtures("c_cache")


@pytest.mark.slow
def test_json_of_a_folder(bundle, call, contents):
    before = contents(bundle)
    said = call("bench", bundle, *QUICK, "--seed", 3, "--json", cwd=bundle)
    assert (said.code, said.err) == (0, "")
    found = said.json
    assert [row["file"] for row in found["files"]] == FILES
    for row in found["files"]:
        content = (bundle / row["file"]).read_bytes()
        assert (row["bytes"], row["zipped"]) == (len(content), len(zlib.compress(content, 9)))
        assert row["load_ms"] > 0
    rows = {(row["file"], row["batch"]): row for row in found["latency"] if row["runtime"] != "OpenVINO"}
    assert set(rows) == {(name, batch) for name in FILES[:-1] for batch in (1, 3)}
    assert {(row["threads"], row["calls"]) for row in rows.values()} == {(1, 5)}
    assert all(0 < row["p50"] <= row["p95"] and row["ratio"] > 0 for row in rows.values())
    assert rows["model.onnx", 1]["ratio"] == rows["model.onnx", 3]["ratio"] == 1
    assert {name: row["runtime"] for (name, _), row in rows.items()} == {
        "model.c": "C", "model.compact.onnx": "ONNX Runtime", "model.int8.onnx": "ONNX Runtime",
        "model.onnx": "ONNX Runtime",
    }  # fmt: skip
    assert (found["rounds"], found["seed"]) == (1, 3)
    assert found["environment"]["packages"]["onnxruntime"]
    assert contents(bundle) == before


def test_tables_of_files(bundle, call):
    said = call("bench", "model.c", "model.packed.safetensors", *QUICK, cwd=bundle)
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    at = lines.index("latency; times as fast as ONNX Runtime on the float file")
    assert lines[1].split() == ["file", "size", "zipped", "load", "ms", "memory"]
    assert [line.split()[0] for line in lines[2:at]] == ["model.c", "model.packed.safetensors"]
    assert [line.split()[:4] for line in lines[at + 2 :]] == [["model.c", "C", "1", "1"], ["model.c", "C", "3", "1"]]
    assert "x" not in lines[-1].split()[-1], "there is no float file to compare with"
    assert "bench  2/2" in said.err
    assert "the C form leaves them out, on one thread" in said.err


def test_nothing_to_time_makes_no_empty_table(bundle, call):
    said = call("bench", "model.packed.safetensors", *QUICK, "-q", cwd=bundle)
    assert (said.code, said.err) == (0, "")
    assert "latency" not in said.out
    assert call("bench", "model.packed.safetensors", *QUICK, "--json", cwd=bundle).json["latency"] == []


@pytest.fixture
def folder(bundle, tmp_path):
    for name in ("model.c", "model.h", "model.onnx"):
        shutil.copy(bundle / name, tmp_path)
    (tmp_path / "cut.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:5000])
    packed = (bundle / "model.packed.safetensors").read_bytes()
    (tmp_path / "cut.packed.safetensors").write_bytes(packed[:-1])
    (tmp_path / "alone.c").write_bytes((bundle / "model.c").read_bytes())
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("model.c", "none.onnx"), 3, "none.onnx is not there"),
        (("notes.txt",), 3, "notes.txt cannot be run"),
        (("model.h",), 3, "model.h cannot be run"),
        (("empty",), 3, "empty holds no exported model"),
        (("cut.onnx",), 3, "cut.onnx is not a valid ONNX file"),
        (("cut.packed.safetensors",), 3, "cut.packed.safetensors: not a sound packed file"),
        (("alone.c",), 3, "alone.h"),
        (("model.c",), 3, "model.c is code"),  # what lies beside is the float file, of another network
        (("model.c", "--batch-size", "0"), 2, "--batch-size 0"),
        (("model.c", "--batch-size", "1;2"), 2, "--batch-size 1;2"),
        (("model.c", "--batch-size", ""), 2, "--batch-size"),
        (("model.c", "--threads", "two"), 2, "--threads two"),
        (("model.c", "--threads", "-1"), 2, "--threads -1"),
        (("none.onnx", "--threads", "x"), 2, "--threads x"),
    ],
)
def test_errors_are_one_line(folder, call, contents, arguments, code, words):
    before = contents(folder)
    assert words in call("bench", *arguments, cwd=folder).refused(code)
    assert contents(folder) == before


def test_errors_of_the_parser(folder, call):
    assert call("bench", "model.c", "--rounds", 0, cwd=folder).code == 2
    assert call("bench", cwd=folder).code == 2


def test_models_of_different_images(folder, call):
    from rprune.export.onnx import plain_model
    from rprune.models.graph import trace
    from rprune.models.registry import Architecture, build

    shape = (3, 32, 32)
    other = plain_model(trace(build(Architecture("cnn-small", 10, shape)).eval(), shape), shape, 10)
    (folder / "other.onnx").write_bytes(other.SerializeToString())
    error = call("bench", "model.c", "other.onnx", *QUICK, "--trust-c", cwd=folder).refused(3)
    assert "different sizes: [(1, 8, 8), (3, 32, 32)]" in error
