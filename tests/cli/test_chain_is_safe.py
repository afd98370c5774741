"""What the chain leaves can be opened by anyone without running anything: no pickle, no other file, no script.

That it uses no network is a matter of the fixtures ``chain`` and ``bundle``: they are made with sockets that refuse.
"""

from __future__ import annotations

import json
import re
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rprune.errors import InputError
from rprune.export.c.origin import need_origin
from rprune.export.session import load_onnx
from rprune.pipeline.pickles import read_pickle
from rprune.reports.evidence import read_samples


def pt(file: Path) -> None:
    """What torch's loader of plain tensors takes, and nothing that it would have to be asked twice for."""
    torch.load(file, weights_only=True)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(file) == []
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if archive.read(name)[:1] == b"\x80"]
        for name in pickles:
            with archive.open(name) as content:
                assert not read_pickle(content, name).unsafe
    assert [name.rpartition("/")[2] for name in pickles] in (["data.pkl"], [])


def tensors(file: Path) -> None:
    with safe_open(file, "np") as found:
        assert found.keys()


def onnx(file: Path) -> None:
    """Nothing in other files: they would be refused (export.guard)."""
    assert not load_onnx(file).functions


def c(file: Path) -> None:
    need_origin(file.with_suffix(".c"))


def html(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.search(r"""(src|href)\s*=\s*(?!["']?(data:|#))""", text)


def xml(file: Path) -> None:
    """Of no document type, in which entities could name files."""
    text = file.read_text(encoding="utf-8")
    assert text.startswith("<?xml")
    assert "<!" not in text


def csv(file: Path) -> None:
    assert read_samples(file)


READERS = {
    ".pt": pt,
    ".safetensors": tensors,
    ".onnx": onnx,
    ".c": c,
    ".h": c,
    ".html": html,
    ".csv": csv,
    ".xml": xml,
    ".json": lambda file: json.loads(file.read_text(encoding="utf-8")),
}


@pytest.mark.parametrize("whose", ["chain", "bundle"])
def test_no_file_of_the_chain_is_or_holds_a_pickle_that_runs(request, whose) -> None:
    made = request.getfixturevalue(whose)
    files = [file for file in getattr(made, "folder", made).rglob("*") if not file.is_dir()]
    assert len(files) > 10
    for file in files:
        assert file.is_file()
        assert not file.is_symlink()
        READERS[file.suffix](file)  # a file of another kind has no reader


def test_the_state_of_unfinished_training_is_no_pickle_that_runs(call, tmp_path, monkeypatch) -> None:
    from rprune.training import loop

    kept, save = [], loop.save_state

    def keep(path: Path, state: dict) -> None:
        save(path, state)
        kept.append(path.read_bytes())

    monkeypatch.setattr(loop, "save_state", keep)
    said = call(
        "train", "--data", "digits", "--objective", "benign", "--epochs", 1, "--batch-size", 64, "-q", cwd=tmp_path
    )
    assert said.code == 0, said.err
    (tmp_path / "state.pt").write_bytes(kept[0])
    pt(tmp_path / "state.pt")


def test_the_tests_notice_a_pickle(tmp_path) -> None:
    """The readers above would not pass everything."""
    torch.save({"a": socket.socket}, tmp_path / "x.pt")
    with pytest.raises(Exception, match=r"weights_only|WeightsUnpickler|Unsupported"):
        pt(tmp_path / "x.pt")
    (tmp_path / "model.h").write_text("#define MODEL_FORMAT 1\n")
    (tmp_path / "model.c").write_text("int x;\n")
    with pytest.raises(InputError):
        c(tmp_path / "model.c")
