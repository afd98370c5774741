"""rprune unpack: the export's own files come back, and whatever else a file holds is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rprune.export.packed import pack_float
from rprune.export.session import OnnxClassifier, stored_weights
from rprune.export.streams import compress, load, save

NAME = "model.packed.safetensors"


@pytest.fixture
def folder(bundle, tmp_path):
    shutil.copy(bundle / NAME, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def packed_float(load_helper) -> bytes:
    from rprune.models.graph import trace

    nets = load_helper("quantization/nets.py")
    return pack_float(trace(nets.make("cnn-small", 0.2), nets.SHAPE), {})


def test_the_dense_files_come_back(folder, call, bundle):
    said = call("unpack", NAME, "-o", "back", cwd=folder)
    assert (said.code, said.err) == (0, "")
    assert {path.name for path in (folder / "back").iterdir()} == {"model.int8.onnx", "model.int8.safetensors"}
    assert (folder / "back" / "model.int8.onnx").read_bytes() == (bundle / "model.int8.onnx").read_bytes()
    assert f"{NAME} -> back" in said.out
    tensors = load_file(folder / "back" / "model.int8.safetensors")
    for name, weight in stored_weights(bundle / "model.int8.onnx").items():
        assert tensors[name].dtype == np.int8
        assert np.array_equal(tensors[name], weight)


def test_every_form_comes_back_and_json_says_so(folder, call, bundle):
    forms = "safetensors, onnx-int8,onnx-compact,c"
    said = call("unpack", NAME, "-o", "deep/back", "--format", forms, "--json", cwd=folder)
    assert (said.code, said.err) == (0, "")
    files = {file["name"]: file["bytes"] for file in said.json["files"]}
    assert files == {path.name: path.stat().st_size for path in (folder / "deep" / "back").iterdir()}
    assert set(files) == {
        "model.int8.safetensors", "model.int8.onnx", "model.compact.onnx", "model.c", "model.h",
    }  # fmt: skip
    for name in set(files) - {"model.int8.safetensors"}:
        assert (folder / "deep" / "back" / name).read_bytes() == (bundle / name).read_bytes(), name


def test_a_float_network_comes_back(folder, call, packed_float):
    (folder / "f.packed.safetensors").write_bytes(packed_float)
    said = call("unpack", "f.packed.safetensors", "-o", "back", "--json", cwd=folder)
    assert [file["name"] for file in said.json["files"]] == ["model.safetensors", "model.onnx"]
    weights = stored_weights(folder / "back" / "model.onnx")
    tensors = load_file(folder / "back" / "model.safetensors")
    assert weights
    assert all(np.array_equal(tensors[name], weight) for name, weight in weights.items())
    assert OnnxClassifier(folder / "back" / "model.onnx").input_shape == (1, 8, 8)
    call("unpack", "f.packed.safetensors", "-o", "more", "--format", "onnx-int8", cwd=folder).refused(2)
    assert not (folder / "more").exists()


def test_what_exists_is_kept_without_force(folder, call, contents):
    (folder / "full").mkdir()
    (folder / "full" / "model.int8.onnx").write_text("precious")
    (folder / "file").write_text("precious")
    before = contents(folder)
    for output in ("full", "file", NAME):
        assert f"{output} exists" in call("unpack", NAME, "-o", output, cwd=folder).refused(2)
    for output in ("file", NAME):
        error = call("unpack", NAME, "-o", output, "--force", cwd=folder).refused(2)
        assert f"{output} exists" in error
    assert contents(folder) == before


def test_force_replaces_files_and_deletes_none(folder, call, contents, bundle):
    assert call("unpack", NAME, "-o", "back", cwd=folder).code == 0
    first = contents(folder / "back")
    (folder / "back" / "notes.txt").write_text("precious")
    (folder / "back" / "model.int8.onnx").write_text("another")
    assert call("unpack", NAME, "-o", "back", "--force", cwd=folder).code == 0
    assert contents(folder / "back") == first | {"notes.txt": b"precious"}
    assert call("unpack", NAME, "-o", ".", "--force", cwd=folder).code == 0, "beside the packed file"
    assert (folder / NAME).read_bytes() == (bundle / NAME).read_bytes()
    assert (folder / "model.int8.onnx").read_bytes() == (bundle / "model.int8.onnx").read_bytes()


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ("onnx-compct", "unknown format 'onnx-compct'"),
        ("", "unknown format ''"),
        ("onnx-int8,", "unknown format ''"),
        ("masks", "unknown format"),
        ("c,onnx", "no form onnx"),
        ("packed", "no form packed"),
    ],
)
def test_formats_that_it_does_not_have(folder, call, contents, formats, words):
    before = contents(folder)
    assert words in call("unpack", NAME, "-o", "back", "--format", formats, cwd=folder).refused(2)
    assert contents(folder) == before


def test_near_names_are_offered(folder, call):
    said = call("unpack", NAME, "-o", "back", "--format", "onnx-compct", cwd=folder)
    assert "did you mean 'onnx-compact'?" in said.err


def flipped(content: bytes) -> bytes:
    return content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]


def bomb(content: bytes) -> bytes:
    """A table that says little, before 64 MiB of zeros."""
    streams, header = load(content)
    return save(streams | {"values": compress(bytes(64 << 20))}, header)


def forged(content: bytes) -> bytes:
    """Another weight under the old digest."""
    import brotli

    streams, header = load(content)
    values = bytearray(brotli.decompress(streams["values"]))
    values[0] = values[0] + 1 if values[0] not in (127, 255) else values[0] - 1
    return save(streams | {"values": compress(bytes(values))}, header)


def evil_names(content: bytes) -> bytes:
    streams, header = load(content)
    return save(streams | {"\x1b[2Jerror: all is well\n": b"x"}, header)


def evil_table(content: bytes) -> bytes:
    """A layer whose name would be a path, and a line of its own in a terminal."""
    import brotli

    streams, header = load(content)
    table = json.loads(brotli.decompress(streams["graph"]))
    text = json.dumps(table).replace("features", "../../evil\\n\\u001b[31m")
    return save(streams | {"graph": compress(text.encode())}, header)


DAMAGES = {
    "empty": lambda content: b"",
    "text": lambda content: b"this is no model\n" * 100,
    "cut off": lambda content: content[:-1],
    "only its start": lambda content: content[:200],
    "longer": lambda content: content + b"\0",
    "one bit": flipped,
    "huge header": lambda content: (1 << 62).to_bytes(8, "little") + content[8:],
    "bomb": bomb,
    "forged": forged,
    "names": evil_names,
    "table": evil_table,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_hostile_files(bundle, tmp_path, call, contents, damage):
    (tmp_path / "bad.packed.safetensors").write_bytes(DAMAGES[damage]((bundle / NAME).read_bytes()))
    before = contents(tmp_path)
    error = call("unpack", "bad.packed.safetensors", "-o", "back", cwd=tmp_path).refused(3)
    assert "bad.packed.safetensors: not a sound packed file" in error
    assert contents(tmp_path) == before
    assert not (tmp_path / "back").exists()


def test_files_that_are_no_packed_files(folder, call, bundle):
    assert "not a sound packed file" in call("unpack", bundle / "model.safetensors", "-o", "back", cwd=folder).refused(
        3
    )
    assert "not a sound packed file" in call("unpack", bundle / "model.onnx", "-o", "back", cwd=folder).refused(3)
    assert "cannot read none" in call("unpack", "none", "-o", "back", cwd=folder).refused(3)
    assert "report.json is not there" in call("unpack", ".", "-o", "back", cwd=folder).refused(
        3
    )  # a folder is a bundle
    with Path(folder / "huge").open("wb") as file:
        file.truncate((1 << 30) + 1)  # a hole, which takes no disk
    assert "larger than 1 GiB" in call("unpack", "huge", "-o", "back", cwd=folder).refused(3)
    assert not (folder / "back").exists()
