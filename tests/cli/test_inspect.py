"""inspect tells what a file is and would do, and does none of it."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import pytest
import torch

from rprune.pipeline.inspection import contents


class Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _checkpoint(path, data: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
    return path


def test_metadata_of_rprune_files(chain):
    found = contents(chain / "model-lwm-0.5-finetuned-int8.pt")
    assert found["kind"] == "checkpoint"
    assert found["unsafe_globals"] == []
    assert [stage for stage in found["lineage"] if stage != "shrink"] == ["train", "prune", "finetune", "quantize"]
    assert (found["sparsity"], found["eps"], found["data"]) == (0.5, "0.03", "digits")
    assert 10_000 < found["budget"] <= 11124  # weights of dead channels are gone
    assert found["architecture"]["name"] in ("cnn-small", "flat")


def test_onnx(chain):
    found = contents(chain / "out" / "model.int8.onnx")
    stated = json.loads((chain / "out" / "report.json").read_text())["sparsity"]
    kept, total = stated["kept"], stated["total"]
    assert found["weights"] == {"kept": kept, "total": total, "sparsity": round(1 - kept / total, 6)}
    assert found["metadata"]["rprune.labels"].split() == [str(digit) for digit in range(10)]


def test_safetensors(chain, call, tmp_path):
    found = contents(chain / "out" / "model.safetensors")
    assert {t["name"] for t in found["tensors"]} >= {"features.0.weight", "classifier.2.bias"}
    assert call("quantize", chain / "model.pt", "-o", "q.safetensors", "-q", cwd=tmp_path).code == 0
    assert contents(tmp_path / "q.safetensors")["stage"] == "quantize"


def test_unsafe_globals_are_listed_and_not_run(call, tmp_path):
    trap = tmp_path / "trap"
    torch.save({"a": torch.zeros(2), "b": Touch(str(trap)), "c": torch.nn.Linear(1, 1)}, tmp_path / "evil.pt")
    said = call("inspect", "evil.pt", "--json", cwd=tmp_path)
    assert said.code == 0
    unsafe = said.json["unsafe_globals"]
    assert {"posix.mkdir", "torch.nn.modules.linear.Linear"} <= set(unsafe)
    assert not any(name.startswith(("collections.", "torch._utils")) for name in unsafe)
    assert "posix.mkdir" in call("inspect", "evil.pt", cwd=tmp_path).out
    assert not trap.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    path = _checkpoint(tmp_path / "x.pt", pickle.dumps(Touch(str(tmp_path / "trap")), protocol))
    assert contents(path)["unsafe_globals"] == ["posix.mkdir"]


@pytest.mark.parametrize(
    "data",
    [
        b"(S'/tmp/never'\niposix\nmkdir\n.",  # INST
        # the names of a harmless global follow those of the harmful one, which STACK_GLOBAL takes from the memo
        b"\x80\x04\x8c\x05posix\x94\x8c\x05mkdir\x94\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94h\x00h\x01\x93.",
        b"\x80\x04\x8c\x05torch\x8c\x08hub.load\x93.",
        b"\x80\x02ctorch\nload\n.",
    ],
    ids=["inst", "memo", "dotted", "torch.load"],
)
def test_unsafe_globals_cannot_be_hidden(tmp_path, data):
    assert contents(_checkpoint(tmp_path / "x.pt", data))["unsafe_globals"] != []
