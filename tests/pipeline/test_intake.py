"""Every kind of model file is told apart, bombs are not unpacked, and damage is an InputError and nothing else."""

from __future__ import annotations

import contextlib
import pickle
import struct
import zipfile

import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from safetensors.torch import save_file
from torch import nn

from rprune.errors import InputError
from rprune.pipeline import intake
from rprune.pipeline.inspection import contents
from rprune.pipeline.intake import classify
from rprune.pipeline.pt2 import read_package

KINDS = {
    "state.pt": "checkpoint", "old.pt": "old checkpoint", "bare.pkl": "bare pickle", "module.pt": "checkpoint",
    "script.pt": "torchscript", "program.pt2": "exported program", "x.safetensors": "safetensors", "x.onnx": "onnx",
}  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 6 * 6, 10)).eval()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """One small file of every kind."""
    folder = tmp_path_factory.mktemp("corpus")
    model = net()
    state = model.state_dict()
    torch.save(state, folder / "state.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "bare.pkl").write_bytes(pickle.dumps({"a": [1, 2]}))
    torch.save(model, folder / "module.pt")
    with contextlib.suppress(FutureWarning), pytest.warns():
        torch.jit.trace(model, torch.rand(1, 1, 8, 8)).save(folder / "script.pt")
    torch.export.save(torch.export.export(model, (torch.rand(2, 1, 8, 8),)), folder / "program.pt2")
    save_file(state, folder / "x.safetensors", {"author": "somebody"})
    weight = helper.make_tensor("w", 1, [2, 2], [1.0, 0.0, 2.0, 3.0])
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="n")
    values = [helper.make_tensor_value_info(name, 1, ["b", 2]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "x.onnx")
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_told_and_inspected(corpus, name):
    assert classify(corpus / name) == KINDS[name]
    found = contents(corpus / name, layers=True)
    assert found["kind"] == KINDS[name]
    if name not in ("bare.pkl", "x.onnx"):
        shapes = {t["name"]: t["shape"] for t in found["tensors"]}
        assert shapes == {n: list(t.shape) for n, t in net().state_dict().items()}
    if name in ("state.pt", "module.pt", "script.pt", "program.pt2", "x.safetensors"):
        counts = {t["name"]: t["nonzero"] for t in found["tensors"] if "nonzero" in t}
        assert counts == {"0.weight": 18, "3.weight": 720}


def test_what_an_onnx_file_says_of_itself(corpus):
    found = contents(corpus / "x.onnx", layers=True)
    assert found["opset"] == 17
    assert found["inputs"] == [{"name": "x", "shape": ["b", 2], "type": "float"}]
    assert found["outputs"] == [{"name": "y", "shape": ["b", 2], "type": "float"}]
    assert (found["initializers"], found["int8"]) == (1, False)
    assert found["tensors"] == [{"name": "w", "shape": [2, 2], "type": "float32", "nonzero": 3}]


def test_external_data_of_an_onnx_file_is_told_and_not_followed(corpus, tmp_path):
    model = onnx.load(corpus / "x.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = 1
    tensor.external_data.add(key="location", value="/etc/passwd")
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    found = contents(tmp_path / "x.onnx")
    assert found["external_data"] == ["w"]
    assert "another file" in found["refused"]


def test_metadata_of_safetensors(corpus):
    assert contents(corpus / "x.safetensors")["metadata"] == {"author": "somebody"}


def test_numbers_of_bfloat16_and_of_views_are_counted(tmp_path):
    base = torch.eye(8, dtype=torch.bfloat16)
    base[0, 0] = -0.0
    tensors = {"a": base, "b": base[2:, ::2], "c": base.t()}
    torch.save(tensors, tmp_path / "x.pt")
    counts = {t["name"]: t["nonzero"] for t in contents(tmp_path / "x.pt", layers=True)["tensors"]}
    assert counts == {name: int(tensor.count_nonzero()) for name, tensor in tensors.items()}
    save_file({"a": base}, tmp_path / "x.safetensors")
    assert contents(tmp_path / "x.safetensors", layers=True)["tensors"][0]["nonzero"] == 7


def zipped(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "C:/x", "C:\\x", "a\\..\\..\\x", "\\\\host\\x"])
def test_members_that_lead_out_of_the_archive_are_refused(tmp_path, name):
    path = zipped(tmp_path / "x.pt", [("a/data.pkl", b"."), (name, b"x")])
    with pytest.raises(InputError, match="leads out"):
        classify(path)


def test_a_member_that_grows_absurdly_is_refused(tmp_path):
    bomb = [("a/data.pkl", b"\0" * (4 << 20))]
    path = zipped(tmp_path / "x.pt", bomb, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="unpack to 4,194,304"):
        contents(path)


def test_many_small_members_that_grow_absurdly_are_refused(tmp_path):
    members = [("a/data.pkl", b"."), *((f"a/data/{number}", b"\0" * (1 << 20)) for number in range(4))]
    path = zipped(tmp_path / "x.pt", members, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="unpack to 4,194,305"):
        contents(path)


def _with_size(path, size):
    """The central directory claims ``size`` bytes for the only member."""
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 24 : place + 28] = struct.pack("<I", size)
    path.write_bytes(data)


def test_a_member_that_claims_gigabytes_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = zipped(tmp_path / "x.pt", [("a/data.pkl", b".")])
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("was read"))
    _with_size(path, 0xFFFFFFF0)
    with pytest.raises(InputError, match="unpack to 4,294,967,280"):
        contents(path)
    monkeypatch.setattr(intake, "MOST_MEMBER", 1000)
    _with_size(path, 2000)
    with pytest.raises(InputError, match="unpacks to more"):
        contents(path)
    monkeypatch.setattr(intake, "MOST_MEMBER", 3000)
    monkeypatch.setattr(intake, "MOST_ARCHIVE", 1000)
    with pytest.raises(InputError, match="unpacks to more"):
        contents(path)


def test_members_twice_and_members_over_each_other_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = zipped(tmp_path / "x.pt", [("a/data.pkl", b"."), ("a/data.pkl", b"..")])
    with pytest.raises(InputError, match="twice"):
        classify(path)
    path = zipped(tmp_path / "y.pt", [("a/data.pkl", b"."), ("a/x", b"x" * 5000)])
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02")  # the first member takes the bytes of the second as well
    data[place + 20 : place + 28] = struct.pack("<II", 9000, 9000)
    path.write_bytes(data)
    with pytest.raises(InputError, match="overlap"):
        classify(path)


def test_a_storage_that_is_smaller_than_its_tensor_is_refused(tmp_path):
    torch.save({"a": torch.zeros(100)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    short = [(name, data[:40] if name.endswith("data/0") else data) for name, data in members]
    with pytest.raises(InputError, match="asks for 400 bytes of 40"):
        contents(zipped(tmp_path / "y.pt", short))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": 99}, {"sizes": [{"as_int": 10**15}]}, {"sizes": [{"as_expr": "x"}]},
        {"storage_offset": {"as_int": -1}}, {"strides": [{"as_int": 1}] * 9},
    ],
    ids=str,
)  # fmt: skip
def test_weights_of_a_program_that_are_none_are_refused(corpus, tmp_path, change):
    def edit(config):
        config["config"]["0.weight"]["tensor_meta"] |= change

    with pytest.raises(InputError, match=r"0\.weight"):
        read_package(edited(corpus / "program.pt2", tmp_path, "weights_config.json", edit))


def test_pickles_in_a_program_are_never_run(corpus, tmp_path):
    def edit(config):
        config["config"]["0.weight"]["use_pickle"] = True

    path = edited(corpus / "program.pt2", tmp_path, "weights_config.json", edit)
    with pytest.raises(InputError, match="never run"):
        contents(path)


def edited(source, folder, ending, change):
    """A copy of an archive with one JSON member changed."""
    import json

    with zipfile.ZipFile(source) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    for place, (name, data) in enumerate(members):
        if name.endswith(ending):
            table = json.loads(data)
            change(table)
            members[place] = name, json.dumps(table).encode()
    return zipped(folder / source.name, members)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(KINDS)), data=st.data())
def test_a_file_that_was_changed_anywhere_is_read_or_refused(corpus, tmp_path, name, data):
    whole = bytearray((corpus / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "drop"])):
            case "set":
                whole[place] = data.draw(st.integers(0, 255))
            case "cut":
                del whole[max(place, 1) :]
            case "insert":
                whole[place:place] = data.draw(st.binary(max_size=8))
            case "drop":
                del whole[place : place + data.draw(st.integers(1, 64))]
        whole = whole or bytearray(b"x")
    path = tmp_path / f"changed-{name}"
    path.write_bytes(whole)
    with contextlib.suppress(InputError):
        assert contents(path, layers=True)["kind"] in {*KINDS.values(), "unknown"}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x20\0\0\0\0\0\0\0{", b"\x08\x09"]), rest=st.binary())
@pytest.mark.parametrize("name", ["x.pt", "x.onnx"])
def test_bytes_of_all_kinds_are_read_or_refused(tmp_path, name, head, rest):
    (tmp_path / name).write_bytes(head + rest)
    with contextlib.suppress(InputError):
        contents(tmp_path / name, layers=True)


pickles = st.lists(
    st.sampled_from(
        [b"(", b")", b"}", b"]", b"0", b"1", b"2", b"N", b"t", b"\x85", b"l", b"d", b"s", b"u", b"a", b"e", b"R", b"b",
         b"o", b"Q", b"\x93", b"\x81", b"\x92", b"\x94", b"h\x00", b"h\x01", b"q\x00", b"K\x01", b"\x8c\x01a", b"\x8f",
         b"\x90", b"\x91", b"cos\nsystem\n", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n"]
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(parts=pickles)
def test_any_sequence_of_opcodes_is_read_or_refused(parts):
    from rprune.pipeline.pickles import read_pickle

    data = b"\x80\x04" + b"".join(parts) + b"."
    with contextlib.suppress(InputError):
        assert ("os.system" in read_pickle(data, "x").globals) == (b"cos\n" in data)
