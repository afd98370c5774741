"""Every reader says in one line what is wrong with a file, whatever is in it, and takes neither memory nor time for it.

Valid files are damaged in their bytes, and where they hold JSON, in their values; garbage comes by itself.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rprune.cli.console import ProgressLines
from rprune.data.sources import load_data
from rprune.errors import IntegrityError, RpruneError
from rprune.evaluation.ledger import Clean, Ledger, Row, Witness
from rprune.export.c.engine import stated
from rprune.export.session import stored_weights
from rprune.export.twin import onnx_twin
from rprune.files import file_digest, seal_of
from rprune.pipeline.artifact import Artifact, load_any, load_artifact, save_artifact
from rprune.pipeline.certificate import check
from rprune.pipeline.forms import Deployed
from rprune.pipeline.recipe import read_recipe
from rprune.pipeline.single import Request
from rprune.pipeline.unpacking import read_packed
from rprune.pipeline.verdicts import Verdicts
from rprune.reports.evidence import read_samples, read_witnesses
from rprune.reports.gate import read_policy
from rprune.reports.schema import read_report

QUIET = ProgressLines(quiet=True)
ROOT = Path(__file__).parents[2]
ROUNDS = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """``name``: of the file that is read; ``refuses``: what it may raise, RpruneError or what its docstring says."""

    name: str
    read: Callable[[Path], Any]
    refuses: tuple[type[Exception], ...] = (RpruneError,)
    seal: bool = False  # a digest inside is made to fit again


def _artifact(path: Path) -> None:
    found = load_artifact(path)
    assert len(found.digest) == len(found.identity) == 64
    Deployed.of(found)


def _any(path: Path) -> None:
    found = load_any(path)
    assert isinstance(found, Artifact | dict)


def _ledger(path: Path) -> None:
    Ledger.open(path, {"a": 1})


READERS = {
    "report": Reader("report.json", read_report),
    "policy": Reader("gate.toml", read_policy),
    "recipe": Reader("digits.toml", read_recipe),
    "packed": Reader("model.packed.safetensors", read_packed),
    "onnx": Reader("model.onnx", stored_weights),
    "int8 onnx": Reader("model.int8.onnx", onnx_twin),
    "compact onnx": Reader("model.compact.onnx", stored_weights),
    "c header": Reader("model.h", lambda path: stated(path.with_suffix(".c"))),
    "ledger": Reader("ledger.jsonl", _ledger),
    "verdicts": Reader("verdicts.jsonl", lambda path: Verdicts.open(path, {"a": 1})),
    "certificate": Reader("int8.certificates.json", lambda path: list(check(path, Request(), QUIET, 0)), seal=True),
    "artifact": Reader("artifact.safetensors", _artifact),
    "artifact pt": Reader("artifact.pt", _any),
    "stage folder": Reader("stage/stage.json", lambda path: _artifact(path.parent)),
    "npz": Reader("data.npz", lambda path: load_data(f"npz:{path}")),
    "tar": Reader("shards/train-0.tar", lambda path: load_data(f"webdataset:{path.parent}")),
    "images": Reader("images/a/0.png", lambda path: load_data(f"imagefolder:{path.parent.parent}")),
    "samples": Reader("samples.csv", read_samples, (ValueError,)),
    "witnesses": Reader("adversarial.safetensors", read_witnesses, (ValueError,)),
}
JSON = ["report", "certificate", "stage folder"]
LINES = ["ledger", "verdicts"]


@pytest.fixture(scope="module")
def folder(chain, bundle, tmp_path_factory) -> Path:
    """One valid file for each reader."""
    made = tmp_path_factory.mktemp("hostile")
    for file in [*bundle.glob("*.*"), *(bundle / "evidence").iterdir(), *(ROOT / "recipes").glob("*.toml")]:
        (made / file.name).write_bytes(file.read_bytes())
    artifact = load_artifact(chain / "model-lwm-0.5-finetuned-int8.pt")
    for name in ("artifact.safetensors", "artifact.pt", "stage"):
        save_artifact(artifact, made / name)
    name = "model-lwm-0.5-finetuned-int8"
    (made / f"{name}.pt").write_bytes((chain / f"{name}.pt").read_bytes())
    (made / "int8.certificates.json").write_bytes((chain / f"{name}.certificates.json").read_bytes())
    ledger = Ledger({"a": 1}, made / "ledger.jsonl")
    ledger.add_clean({0: Clean(1, 1), 1: Clean(2, 3)})
    point = Witness(torch.rand(1, 8, 8), 4, 0.1, False)
    ledger.add("fgsm", {0: Row("fooled", 3, -0.5, point), 1: Row("survived", 2, None)})
    row = {"label": 1, "prediction": 1, "status": "certified", "margin": 0.5, "method": "ibp", "firm": True}
    Verdicts({"a": 1}, made / "verdicts.jsonl").add("bounds", {0: row, 3: row})
    _data(made)
    return made


def _data(made: Path) -> None:
    from PIL import Image

    pixels, labels = np.random.RandomState(0).randint(0, 256, (12, 8, 8), np.uint8), np.arange(12) % 3
    np.savez_compressed(
        made / "data.npz", train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels
    )
    (made / "shards").mkdir()
    with tarfile.open(made / "shards" / "train-0.tar", "w") as archive:
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            content = io.BytesIO()
            Image.fromarray(image).save(content, "png")
            for suffix, data in (("png", content.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            path = made / "images" / "abc"[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.getvalue())


def attempt(reader: Reader, folder: Path, content: bytes) -> None:
    """Reads it, or refuses as documented, in words that can be printed after cleaning."""
    file = folder / reader.name
    kept = file.read_bytes()
    refusal: Exception | None = None
    try:
        file.write_bytes(content)
        reader.read(file)
    except reader.refuses as error:
        refusal = error
    finally:
        file.write_bytes(kept)
        for part in folder.glob("*.partial"):
            part.unlink()
    if isinstance(refusal, RpruneError):
        assert refusal.message
        assert refusal.hint
        assert len(refusal.message) < 10_000
        assert refusal.exit_code in (2, 3, 5)


@pytest.mark.parametrize("name", READERS)
def test_an_untouched_file_is_read(folder, name) -> None:
    READERS[name].read(folder / READERS[name].name)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A few changes at shares of the length, so that they fit any file."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "set", "cut", "insert", "repeat", "drop"]),
                st.floats(0, 0.999),
                st.integers(0, 255),
                st.binary(max_size=16),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def change(content: bytes) -> bytes:
        for kind, share, byte, more in steps:
            at = int(share * len(content))
            head, tail = content[:at], content[at:]
            content = {
                "flip": head + bytes([tail[0] ^ (1 << byte % 8)]) + tail[1:] if tail else head,
                "set": head + bytes([byte]) * 4 + tail[4:],
                "cut": head,
                "insert": head + more + tail,
                "repeat": head + tail[: 2 * byte] + tail,
                "drop": head + tail[byte:],
            }[kind]
        return content

    return change


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(folder, name) -> None:
    reader = READERS[name]
    valid = (folder / reader.name).read_bytes()

    @ROUNDS
    @given(damages(), st.booleans())
    def rounds(change: Callable[[bytes], bytes], at_the_start: bool) -> None:
        part = min(len(valid), 1500)  # where headers are
        attempt(reader, folder, change(valid[:part]) + valid[part:] if at_the_start else change(valid))

    rounds()


@pytest.mark.parametrize("name", ["../artifact.safetensors", "/artifact.safetensors", "stage.json"])
def test_a_stage_record_names_its_own_three_files_alone(folder, name) -> None:
    """Even with the digest that fits."""
    file = folder / "stage" / "stage.json"
    text = file.read_text()
    table = json.loads(text)
    named = str(folder / name[1:]) if name.startswith("/") else name
    table["files"][named] = file_digest(folder / "stage" / named)
    try:
        file.write_text(json.dumps(table))
        with pytest.raises(IntegrityError):
            load_artifact(file.parent)
    finally:
        file.write_text(text)


def test_no_image_starts_another_program(folder, monkeypatch) -> None:
    """Pillow gives EPS to Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given: started.append(given))
    attempt(READERS["images"], folder, GARBAGE[-1])
    assert started == []


GARBAGE = [
    b"", b"\0", b"\xff" * 64, b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"a = " + b"[" * 100_000,
    b"PK\x03\x04" + b"\0" * 64, b"\xff" * 7 + b"\x7f{}", b"\x08\0\0\0\0\0\0\0{}      ", b"\x80\x04.", b"NaN",
    b'{"format":"rprune.ledger/1","key":[]}\n', b'{"format":"rprune.verdicts/1","key":{"a":1}}\n[]\n5\n{}\n',
    b'{"format":"rprune.ledger/1","key":{"a":1}}\n' + b"[" * 100_000 + b"\n", b"\x89PNG\r\n\x1a\n",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
]  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_garbage_is_refused(folder, name) -> None:
    for content in GARBAGE:
        attempt(READERS[name], folder, content)


JUNK: list[Any] = [
    None, True, -1, 0, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "\ud800", "../x", "1e999999999",
    "x" * 2000, [], {}, [[]], {"": 0}, [0] * 1000, "linf",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [*JSON, *LINES])
def test_changed_values_are_read_or_refused(folder, name) -> None:
    reader = READERS[name]
    text = (folder / reader.name).read_text()
    valid = [json.loads(line) for line in text.splitlines()] if name in LINES else json.loads(text)

    @ROUNDS
    @given(st.integers(0, 10**9), st.sampled_from(range(len(JUNK))), st.booleans())
    def rounds(number: int, junk: int, drop: bool) -> None:
        table = copy.deepcopy(valid)
        places = list(_places(table))
        owner, key = places[number % len(places)]
        if drop:
            del owner[key]
        else:
            owner[key] = JUNK[junk]
        if reader.seal:
            with contextlib.suppress(ValueError):  # NaN: then its digest cannot fit
                table["digest"] = seal_of(table)
        lines = table if name in LINES else [table]
        attempt(reader, folder, "\n".join(map(json.dumps, lines)).encode() + b"\n")

    rounds()


def _places(value: Any) -> Any:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


@pytest.mark.slow
def test_small_files_that_ask_for_much_get_little(chain, python, tmp_path) -> None:
    """Each in a few seconds of the CPU, and all of them within what making the files takes (256 MiB twice)."""
    (tmp_path / "model.pt").write_bytes((chain / "model.pt").read_bytes())
    said = python(Path(__file__).with_name("bombs.py"), tmp_path, cwd=tmp_path)
    found = [json.loads(line) for line in said.out.splitlines()]
    assert said.code == 0, (found[-1:], said.err)
    assert {bomb["of"]: bomb["to"] for bomb in found} == dict.fromkeys([bomb["of"] for bomb in found], "refused")
    assert len(found) == 16
    assert max(bomb["memory"] for bomb in found) < 1024
    assert max(bomb["seconds"] for bomb in found) < 30
