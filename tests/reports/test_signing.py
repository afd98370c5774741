"""Signatures: of all files, by one key, and nothing more, less or other passes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from rprune.errors import InputError, UsageError
from rprune.reports.signing import SIGNATURE, check_signature, sign

pytest.importorskip("model_signing.signing")


@pytest.fixture(scope="module")
def pair(load_helper):
    return load_helper("reports/keys.py").pair


@pytest.fixture
def signed(pair, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a signature, and the key that checks it."""
    folder = tmp_path / "bundle"
    (folder / "evidence").mkdir(parents=True)
    for name in ("report.json", "model.onnx", "evidence/samples.csv"):
        (folder / name).write_text(name)
    private, public = pair(tmp_path, "mine")
    assert sign(folder, private) == folder / SIGNATURE
    return folder, public


CHANGES = {
    "a file changed": lambda folder: (folder / "evidence" / "samples.csv").write_text("other"),
    "a file more": lambda folder: (folder / "more").write_text(""),
    "a file less": lambda folder: (folder / "model.onnx").unlink(),
    "a file renamed": lambda folder: (folder / "model.onnx").rename(folder / "model2.onnx"),
    "a link": lambda folder: (
        (folder / "model.onnx").rename(folder.parent / "m") and (folder / "model.onnx").symlink_to(folder.parent / "m")
    ),
    "no signature": lambda folder: (folder / SIGNATURE).unlink(),
    "an empty signature": lambda folder: (folder / SIGNATURE).write_text(""),
    "a signature of nothing": lambda folder: (folder / SIGNATURE).write_text("{}"),
    "a signature cut short": lambda folder: (folder / SIGNATURE).write_bytes((folder / SIGNATURE).read_bytes()[:-9]),
}


def test_what_was_signed_passes_again_and_again(pair, signed) -> None:
    folder, public = signed
    assert check_signature(folder, public) == (True, "all files are signed by the key of mine.pub.pem")
    assert check_signature(folder, public)[0]
    moved = folder.parent / "elsewhere"
    shutil.copytree(folder, moved)
    assert check_signature(moved, public)[0]
    again, other = pair(folder.parent, "other", b"secret")
    sign(folder, again, "secret")
    assert check_signature(folder, other)[0]
    assert not check_signature(folder, public)[0]


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_does_not(signed, change: str) -> None:
    folder, public = signed
    CHANGES[change](folder)
    passed, detail = check_signature(folder, public)
    assert not passed
    assert SIGNATURE in detail
    assert "\n" not in detail


def test_another_key_does_not(pair, signed) -> None:
    folder, _ = signed
    _, other = pair(folder.parent, "other")
    assert not check_signature(folder, other)[0]


def test_keys_that_cannot_be_used(pair, signed, tmp_path: Path) -> None:
    folder, public = signed
    (tmp_path / "bad.pem").write_text("no key")
    before = (folder / SIGNATURE).read_bytes()
    for key in (tmp_path / "bad.pem", tmp_path / "missing.pem"):
        with pytest.raises(InputError):
            sign(folder, key)
        with pytest.raises(InputError):
            check_signature(folder, key)
    locked, _ = pair(tmp_path, "locked", b"secret")
    with pytest.raises(InputError, match="cannot sign"):
        sign(folder, locked)
    with pytest.raises(InputError, match="cannot read"):
        check_signature(folder, locked)
    assert (folder / SIGNATURE).read_bytes() == before
    assert check_signature(folder, public)[0]
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_without_the_extra(signed, monkeypatch) -> None:
    folder, public = signed
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    with pytest.raises(UsageError, match="model-signing"):
        check_signature(folder, public)
