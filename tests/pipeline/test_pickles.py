"""Pickles are read as data: every name in them is found, and nothing of them runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rprune.errors import InputError
from rprune.pipeline.pickles import SAFE_GLOBALS, StoredTensor, leaves, read_pickle


class Touch:
    def __init__(self, path: str, function=os.system) -> None:
        self.path, self.function = path, function

    def __reduce__(self):
        return self.function, (f"touch {self.path}",)


class Nested:
    """What is called is what a call gave: getattr(module, 'system')."""

    def __reduce__(self):
        return getattr, (collections.OrderedDict(a=Touch("/never")), "system")


def unsafe(data: bytes) -> list[str]:
    return read_pickle(data, "x.pt").unsafe


@pytest.mark.parametrize("protocol", range(6))
def test_os_system_is_named_and_never_run(tmp_path, protocol):
    made = tmp_path / "made"
    assert unsafe(pickle.dumps({"weights": [Touch(str(made))]}, protocol)) == [f"{os.system.__module__}.system"]
    assert not made.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_names_in_nested_calls_are_found(protocol):
    assert {f"{os.system.__module__}.system", "builtins.getattr"} <= set(unsafe(pickle.dumps(Nested(), protocol)))


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"(S'/never'\nios\nsystem\n.", "os.system"),  # INST
        (b"(cos\nsystem\nS'/never'\no.", "os.system"),  # OBJ
        # the names of something harmless follow those of the harmful, which STACK_GLOBAL takes from the memo
        (
            b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94h\x00h\x01\x93.",
            "os.system",
        ),
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x8c\x08harmless0\x93.", "os.system"),  # POP between
        (b"\x80\x04\x8c\x02os2\x93.", "os.os"),  # DUP
        (b"\x80\x04\x8c\x05torch\x8c\x08hub.load\x93.", "torch.hub.load"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02c__builtin__\neval\n.", "builtins.eval"),
        (b"\x80\x02\x82\x05.", "<extension>.5"),
        (b"\x80\x04K\x01K\x02\x93.", "<hidden>"),
        (b"\x80\x04\x8c\x02os)\x93.", "<hidden>"),
        (b"\x80\x02cos\n\x1b[2Jsystem\n.", r"os.\x1b[2Jsystem"),
    ],
    ids=["inst", "obj", "memo", "pop", "dup", "dotted", "torch.load", "python 2", "ext", "numbers", "tuple", "escape"],
)
def test_names_cannot_be_hidden(data, wanted):
    assert wanted in unsafe(data)


def test_no_name_of_the_list_runs_anything():
    """Every name of the list makes a container, a number, a path or a tensor."""
    modules = {"builtins", "collections", "argparse", "types", "pathlib", "pathlib._local", "_codecs", "torch",
               "torch._utils", "torch.storage", "torch.nn.parameter", "numpy", "numpy.dtypes", "numpy.core.multiarray",
               "numpy._core.multiarray"}  # fmt: skip
    assert {name.rpartition(".")[0] for name in SAFE_GLOBALS} == modules
    assert not {"builtins.eval", "builtins.getattr", "torch.load", "types.FunctionType"} & SAFE_GLOBALS


def tensor_pickle(entries: int, shape: str, stride: str, offset: int = 0) -> bytes:
    """What torch.save writes for a float tensor, in protocol 0; ``shape``: numbers, one a line after I."""
    storage = f"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{entries}\ntQ"
    return f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I{offset}\n({shape}t({stride}tI00\n}}tR.".encode()


def test_a_tensor_of_the_size_of_its_storage_is_read():
    found = read_pickle(tensor_pickle(4, "I2\nI2\n", "I2\nI1\n"), "x.pt")
    assert found.tensors == (StoredTensor("float32", (2, 2), (2, 1), 0, "0", 4),)
    assert found.root is found.tensors[0]


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ("I2\nI3\n", "I3\nI1\n", 0),
        ("I2\nI2\n", "I2\nI1\n", 1),
        ("I2\nI1000000000\n", "I0\nI0\n", 0),
        ("I2\n", "I9\n", 0),
    ],
    ids=["more entries", "offset", "repeated without end", "stride"],
)
def test_a_tensor_that_is_larger_than_its_storage_is_refused(shape, stride, offset):
    with pytest.raises(InputError, match="storage of 4 entries"):
        read_pickle(tensor_pickle(4, shape, stride, offset), "x.pt")


@pytest.mark.parametrize(("shape", "stride"), [("I-2\n", "I1\n"), ("I2\n", "I1\nI1\n"), ("S'a'\n", "I1\n")])
def test_a_tensor_whose_shape_is_none_is_refused(shape, stride):
    with pytest.raises(InputError, match="damaged"):
        read_pickle(tensor_pickle(4, shape, stride), "x.pt")


def test_keys_that_would_take_for_ever_to_hash_are_not_hashed():
    deep: tuple = ()
    for _ in range(200):
        deep = (deep, deep)
    # Python's own pickler would hash for ever as well, so the table is written by hand
    data = pickle.dumps(deep, 2)[:-1]
    data = b"\x80\x02}" + data[2:] + b"K\x01s."
    started = time.process_time()
    assert len(read_pickle(data, "x.pt").root) == 1
    assert time.process_time() - started < 5


def test_tables_that_hold_each_other_many_times_are_gone_into_once():
    table: dict = {"leaf": 1}
    for _ in range(60):
        table = {"a": table, "b": table}
    assert list(leaves(read_pickle(pickle.dumps(table, 2), "x.pt").root)) == []
    again: dict = {}
    again["me"] = again
    assert list(leaves(read_pickle(pickle.dumps(again, 2), "x.pt").root)) == []


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=30,
)


@settings(deadline=None, max_examples=100)
@given(values, st.integers(0, 5))
def test_plain_values_are_what_they_were(value, protocol):
    found = read_pickle(pickle.dumps(value, protocol), "x.pt")
    if protocol >= 3 or not _bytes_in(value):  # old protocols write bytes as calls
        assert found.root == value
        assert found.unsafe == []


def _bytes_in(value) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, bytes) or (isinstance(value, list | tuple) and any(map(_bytes_in, value)))


def test_tensors_are_described_as_they_are():
    base = torch.zeros(4, 6)
    tensors = {
        "a": base,
        "b": base.t(),
        "c": base[1:, ::2],
        "d": torch.zeros(3, dtype=torch.int64),
        "e": torch.zeros(()),
    }
    data = io.BytesIO()
    torch.save(tensors, data)
    with zipfile.ZipFile(data) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        found = read_pickle(archive.read(name), "x.pt").root
    assert all(isinstance(value, StoredTensor) for value in found.values())
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].stride) == (tuple(tensor.shape), tensor.stride())
        assert (found[name].offset, f"torch.{found[name].dtype}") == (tensor.storage_offset(), str(tensor.dtype))
