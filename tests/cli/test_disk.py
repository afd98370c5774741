"""A disk that is full or may not be written: one line, nothing half-written, and what was there before is intact."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rprune.errors import UsageError, WorkError
from rprune.evaluation.journal import Journal
from rprune.evaluation.ledger import Clean, Ledger
from rprune.files import atomic, check_ours, write_text
from rprune.training.state import load_state, save_state

TRAIN = ("train", "-d", "digits", "--objective", "benign", "--epochs", 2, "--device", "cpu", "-q")


@pytest.fixture
def disk(tmp_path):
    """``disk("size=1m")``: a file system of its own, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("no file system can be mounted here")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


WRITERS = {
    "bytes": lambda path: path.write_bytes(bytes(4_000_000)),
    "safetensors": lambda path: save_file({"a": torch.zeros(1_000_000)}, path),
}


def test_a_full_disk_leaves_what_was_there(disk):
    place = disk("size=1m")
    for name, writer in WRITERS.items():
        write_text(place / name, "before")
        with (
            pytest.raises(WorkError, match=f"cannot write .*{name}: No space left on device"),
            atomic(place / name) as temporary,
        ):
            writer(temporary)
        assert (place / name).read_text() == "before"
    save_state(place / "state", {"epoch": 1})
    with pytest.raises(WorkError, match="state: No space left on device"):
        save_state(place / "state", {"a": torch.zeros(1_000_000)})
    assert load_state(place / "state") == {"epoch": 1}
    assert names(place) == ["bytes", "safetensors", "state"]


def test_training_on_a_full_disk_goes_on_when_there_is_space(disk, call, tmp_path):
    place = disk("size=1m")
    (place / "others").write_bytes(bytes(700_000))  # leaves room for one state of the net, not for two
    said = call(*TRAIN, "-o", place / "n.pt", cwd=tmp_path)
    assert "No space left on device" in said.refused(4)
    assert names(place) == ["key.json", "n.pt.partial", "others"] or "resume.pt" in names(place)
    assert not [name for name in names(place) if name.startswith(".")]
    (place / "others").unlink()
    assert call(*TRAIN, "-o", place / "n.pt", cwd=tmp_path).code == 0
    assert names(place) == ["n.pt"]


@pytest.mark.parametrize(
    "command",
    [
        (*TRAIN, "-o"), ("certify", "model.pt", "-m", "ibp", "-n", 2, "-q", "-o"),
        ("attack", "model.pt", "--suite", "fgsm", "-n", 2, "-q", "-o"),
        ("export", "model-lwm-0.5-finetuned-int8.pt", "-q", "-o"),
    ],
)  # fmt: skip
def test_a_place_that_may_not_be_written_is_found_before_any_work(disk, call, chain, tmp_path, monkeypatch, command):
    def worked(*_arguments, **_options):
        raise AssertionError("work was begun")

    for name in ("pipeline.single.run_stage", "pipeline.single.export", "evaluation.certificates.certified"):
        monkeypatch.setattr(f"rprune.{name}", worked, raising=False)
    place = disk("ro")
    command = [chain / word if str(word).startswith("model") else word for word in command]
    said = call(*command, place / "n.pt" if command[0] == "train" else place / "n", cwd=tmp_path)
    assert "Read-only file system" in said.refused(2)


def test_what_the_system_refuses_is_told_by_its_kind(tmp_path):
    for number, kind in (
        (errno.ENOSPC, WorkError), (errno.EDQUOT, WorkError), (errno.EIO, WorkError),
        (errno.EACCES, UsageError), (errno.EROFS, UsageError),
    ):  # fmt: skip
        with pytest.raises(kind, match=r"cannot write .*file"), atomic(tmp_path / "file"):
            raise OSError(number, os.strerror(number))
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "file"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_ledger_keeps_its_whole_lines_when_the_disk_is_full(tmp_path, monkeypatch):
    """Half of a line was written when the space ended."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path, {"a": 1})
    ledger.add_clean({0: Clean(1, 1)})

    def full(_handle):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 5)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(WorkError, match="No space left"):
            ledger.add_clean({1: Clean(2, 2)})
    again: Journal = Ledger.open(path, {"a": 1})
    assert again.clean == {0: Clean(1, 1)}


def test_what_a_killed_process_left_of_a_file_is_overwritten(tmp_path):
    (tmp_path / ".file.tmp").write_text("cut o")
    write_text(tmp_path / "file", "whole")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "whole"


def test_a_folder_that_was_only_just_begun_is_no_strangers(tmp_path):
    check_ours(tmp_path)
    for name in (".lock", ".key.json.tmp"):
        (tmp_path / name).write_text("")
    check_ours(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="did not write"):
        check_ours(tmp_path)
