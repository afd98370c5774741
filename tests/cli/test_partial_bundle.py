"""A bundle that was passed on without some of its files: the packed file gives the forms back, and verify --partial
checks all that is here, names what is not, and accepts no other file in its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rprune.files import digest_of

EVIDENCE = ["evidence/samples.csv", "evidence/adversarial.safetensors"]
FORMS = ["model.int8.onnx", "model.compact.onnx", "model.c", "model.h"]
ELSEWHERE = ["model.safetensors", "masks.safetensors", "model.onnx"]
PACKED = "model.packed.safetensors"
UNCHECKED = ["zeros of the float file", "clean_accuracy@onnx"]


@pytest.fixture
def slim(bundle: Path, tmp_path: Path) -> Path:
    """Packed file, report and evidence."""
    for name in ("report.json", PACKED, *EVIDENCE):
        (tmp_path / "slim" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle / name, tmp_path / "slim" / name)
    return tmp_path / "slim"


@pytest.fixture
def whole(slim: Path, call) -> Path:
    said = call("unpack", "slim", "-o", "whole", "--json", cwd=slim.parent)
    assert (said.code, said.err) == (0, "")
    assert [file["name"] for file in said.json["files"]] == FORMS
    assert said.json["absent"] == ELSEWHERE
    return slim.parent / "whole"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_packed_file_gives_the_forms_back_to_the_byte(slim, whole, bundle):
    assert names(whole) == {"report.json", PACKED, *EVIDENCE, *FORMS}
    for name in names(whole):
        assert (whole / name).read_bytes() == (bundle / name).read_bytes(), name
    assert [path.name for path in slim.parent.iterdir() if path.name.startswith(".")] == []


def test_what_is_here_is_checked_and_what_is_not_is_named(whole, bundle, call):
    full = call("verify", bundle, "--json", cwd=whole.parent).json
    found = call("verify", whole, "--partial", "--json", cwd=whole.parent).json
    assert found["passed"]
    assert found["absent"] == ELSEWHERE
    assert found["unchecked"] == UNCHECKED
    assert full["absent"] == full["unchecked"] == []
    done = {check["name"] for check in found["checks"]}
    assert {check["name"] for check in full["checks"]} - done == {"zeros", "replay clean_accuracy@onnx"}
    said = call("verify", whole, "--partial", cwd=whole.parent)
    assert "VERIFIED level=replay" in said.out
    assert said.out.splitlines()[-1].startswith("not here: model.safetensors, masks.safetensors, model.onnx; unchecked")


def test_a_whole_bundle_has_nothing_left_out(bundle, call, tmp_path):
    said = [call("verify", bundle, *flag, "--json", cwd=tmp_path).json for flag in ([], ["--partial"])]
    assert said[0] == said[1]


def test_reattack_goes_on_without_the_float_file(whole, call):
    said = call("verify", whole, "--partial", "--level", "reattack", "-n", 2, "-q", cwd=whole.parent)
    assert said.code == 0, said.out + said.err
    assert "attacked anew" in said.out


def test_without_partial_a_missing_file_fails_and_says_what_helps(slim, whole, call):
    said = call("verify", whole, cwd=slim.parent)
    assert said.code == 5
    assert "model.safetensors is missing; --partial does without it" in said.out
    said = call("verify", slim, "--partial", cwd=slim.parent)
    assert said.code == 5
    assert "model.int8.onnx is missing; 'rprune unpack' restores it from the packed file" in said.out


@pytest.mark.parametrize("name", EVIDENCE)
def test_no_claim_stands_without_its_evidence(whole, name, call):
    (whole / name).unlink()
    said = call("verify", whole, "--partial", cwd=whole.parent)
    assert said.code == 5
    assert f"{name} is missing" in said.out


@pytest.mark.parametrize("name", [PACKED, "model.int8.onnx", "model.compact.onnx", "model.c"])
def test_a_file_that_is_here_must_be_the_one(whole, name, call):
    content = bytearray((whole / name).read_bytes())
    content[len(content) // 2] ^= 1
    (whole / name).write_bytes(content)
    said = call("verify", whole, "--partial", cwd=whole.parent)
    assert said.code == 5
    assert f"{name} differs from its sha256" in said.out


def test_a_link_to_nowhere_is_no_missing_file(whole, call):
    (whole / "model.onnx").symlink_to(whole / "nowhere")
    assert "does not name nowhere" in call("verify", whole, "--partial", cwd=whole.parent).out
    (whole / "model.onnx").unlink()
    (whole / "model.onnx").symlink_to(whole.parent / "outside")
    assert "outside itself" in call("verify", whole, "--partial", cwd=whole.parent).refused(5)


def test_sizes_of_what_is_missing_still_agree_with_each_other(whole, call):
    table = json.loads((whole / "report.json").read_text())
    table["size"]["model.onnx"] -= 1
    (whole / "report.json").write_text(json.dumps(table | {"id": digest_of(table | {"id": ""})}))
    said = call("verify", whole, "--partial", cwd=whole.parent)
    assert said.code == 1
    assert "✗ sizes" in said.out


def test_another_packed_file_is_not_restored_from(slim, call, bundle):
    table = json.loads((slim / "report.json").read_text())
    for subject in table["subjects"]:
        if subject["name"] == "model.int8.onnx":
            subject["sha256"] = "0" * 64
    (slim / "report.json").write_text(json.dumps(table))
    error = call("unpack", "slim", "-o", "whole", cwd=slim.parent).refused(5)
    assert "model.int8.onnx differs from the sha256 in the report" in error
    assert names(slim.parent) == {f"slim/{name}" for name in names(slim)}

    shutil.copy(bundle / "report.json", slim)
    content = bytearray((slim / PACKED).read_bytes())
    content[-1] ^= 1
    (slim / PACKED).write_bytes(content)
    assert call("unpack", "slim", "-o", "whole", cwd=slim.parent).code in (3, 5)
    assert not (slim.parent / "whole").exists()


def test_what_cannot_be_restored_is_refused(slim, call):
    folder = slim.parent
    (folder / "there").mkdir()
    assert "there exists" in call("unpack", "slim", "-o", "there", cwd=folder).refused(2)
    assert "for a packed file" in call("unpack", "slim", "-o", "x", "--format", "c", cwd=folder).refused(2)
    (slim / PACKED).unlink()
    assert "no packed file in slim" in call("unpack", "slim", "-o", "x", cwd=folder).refused(3)
    assert call("unpack", folder, "-o", "x", cwd=folder).code == 3


def test_a_whole_bundle_is_copied(bundle, call, tmp_path):
    said = call("unpack", bundle, "-o", "copy", "--json", cwd=tmp_path)
    assert said.json == {"files": [], "absent": []}
    assert names(tmp_path / "copy") == names(bundle)
