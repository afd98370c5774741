"""A bundle that was passed on without some of its files: the packed file gives the forms back, and verify --partial
checks all that is here, names what is not, and accepts no other file in its place."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rprune.evaluation.statistics import clopper_pearson
from rprune.files import file_digest, write_json
from rprune.reports.schema import Report

EVIDENCE = ["evidence/samples.csv", "evidence/adversarial.safetensors"]
FORMS = ["model.int8.onnx", "model.compact.onnx", "model.c", "model.h"]
ELSEWHERE = ["model.safetensors", "masks.safetensors", "model.onnx"]
PACKED = "model.packed.safetensors"
UNCHECKED = [*(f"size of {name}" for name in ELSEWHERE), "zeros", "clean_accuracy@onnx", "robust_accuracy@onnx"]


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
    assert said.out.splitlines()[-2:] == [
        "not here: model.safetensors, masks.safetensors, model.onnx",
        f"unchecked without: {', '.join(UNCHECKED)}",
    ]


def test_a_whole_bundle_has_nothing_left_out(bundle, call, tmp_path):
    said = [call("verify", bundle, *flag, "--json", cwd=tmp_path).json for flag in ([], ["--partial"])]
    assert said[0] == said[1]


def test_reattack_goes_on_without_the_float_file(whole, call):
    said = call("verify", whole, "--partial", "--level", "reattack", "-n", 2, "-q", cwd=whole.parent)
    assert said.code == 0, said.out + said.err
    assert "attacked anew" in said.out
    assert said.out.splitlines()[-1].endswith(", transfers from the float file")


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
    assert "names no model nowhere" in call("verify", whole, "--partial", cwd=whole.parent).out
    (whole / "model.onnx").unlink()
    (whole / "model.onnx").symlink_to(whole.parent / "outside")
    assert "outside itself" in call("verify", whole, "--partial", cwd=whole.parent).refused(5)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a report as its maker could."""
    table = json.loads((folder / "report.json").read_text())
    change(table)
    write_json(folder / "report.json", Report.model_validate(table).sealed().to_json())


def test_sizes_of_what_is_missing_still_agree_with_each_other(whole, call):
    reseal(whole, lambda table: table["size"].update({"model.onnx": 1}))
    said = call("verify", whole, "--partial", cwd=whole.parent)
    assert said.code == 1
    assert "✗ sizes" in said.out


def test_a_false_word_about_a_missing_file_is_named_as_unchecked(whole, call):
    """The packed file is gone, and the report says that it has 12 bytes, and that the float file is never fooled."""

    def lie(table: dict[str, Any]) -> None:
        subject = next(subject for subject in table["subjects"] if subject["role"] == "packed")
        subject["bytes"] = table["size"][PACKED] = 12
        table["footprint"]["ratios"][PACKED] = table["footprint"]["dense_bytes"] / 12
        claims = [claim for claim in table["claims"] if claim["artifact"] == "onnx"]
        for claim in claims:
            claim.update(correct=claim["n"], value=1.0, attacks=[], curve=[], distances=[])
            claim["interval"].update(zip(("lower", "upper"), clopper_pearson(claim["n"], claim["n"]), strict=True))

    reseal(whole, lie)
    (whole / PACKED).unlink()
    said = call("verify", whole, "--partial", "--json", cwd=whole.parent)
    named = {f"size of {PACKED}", "packed", "clean_accuracy@onnx", "robust_accuracy@onnx"}
    assert said.code == 0
    assert named < set(said.json["unchecked"])
    static = call("verify", whole, "--partial", "--level", "static", "--json", cwd=whole.parent)
    assert static.json["unchecked"] == said.json["unchecked"]
    assert call("verify", whole, cwd=whole.parent).code == 5


def test_a_rule_about_a_missing_file_is_named(whole, call):
    from rprune.reports.gate import judge, policy_of

    policy = policy_of({"gate": [{"metric": "bytes", "artifact": "onnx", "op": "<=", "value": 1 << 30}]}, "x")

    def judged(table: dict[str, Any]) -> None:
        table["policy_sha256"] = policy.sha256
        table["gate"] = judge(Report.model_validate(table), policy).model_dump(mode="json", exclude_none=True)

    reseal(whole, judged)
    found = call("verify", whole, "--partial", "--json", cwd=whole.parent).json
    assert found["passed"]
    assert "rule bytes@onnx" in found["unchecked"]


@pytest.mark.parametrize("options", [[], ["--partial"]])
def test_a_float_file_that_no_report_names_is_no_missing_one(bundle, options, call, tmp_path):
    """Without a subject the zeros cannot be checked, and nothing excuses that."""
    shutil.copytree(bundle, tmp_path / "b")

    def forget(table: dict[str, Any]) -> None:
        table["subjects"] = [subject for subject in table["subjects"] if subject["role"] != "onnx"]
        table["claims"] = [claim for claim in table["claims"] if claim["artifact"] != "onnx"]
        table["fidelity"] = []
        del table["size"]["model.onnx"]
        table["footprint"]["ratios"].pop("model.onnx", None)

    reseal(tmp_path / "b", forget)
    (tmp_path / "b" / "model.onnx").unlink()
    said = call("verify", "b", *options, cwd=tmp_path)
    assert said.code == 1
    assert "✗ zeros" in said.out


def test_a_model_by_another_role_is_not_named(bundle, call, tmp_path):
    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "b" / "Model.ONNX").write_bytes(b"what somebody deploys")

    def name(table: dict[str, Any]) -> None:
        path = tmp_path / "b" / "Model.ONNX"
        entry = {"name": path.name, "role": "evidence", "sha256": file_digest(path), "bytes": path.stat().st_size}
        table["subjects"].append(entry)

    reseal(tmp_path / "b", name)
    said = call("verify", "b", cwd=tmp_path)
    assert said.code == 5
    assert "names no model Model.ONNX" in said.out


def test_a_slim_bundle_is_signed_and_checked_before_it_is_unpacked(slim, call, load_helper):
    assert call("verify", "slim", "--level", "hash", cwd=slim.parent).code == 5
    said = call("verify", "slim", "--partial", "--level", "hash", cwd=slim.parent)
    assert said.code == 0
    pytest.importorskip("model_signing")
    private, public = load_helper("reports/keys.py").pair(slim.parent, "mine")
    assert call("sign", "slim", "--key", private, cwd=slim.parent).code == 0
    options = ("--partial", "--level", "hash", "--key", public)
    assert call("verify", "slim", *options, cwd=slim.parent).code == 0
    (slim / "evidence" / "samples.csv").write_text("x")
    assert call("verify", "slim", *options, cwd=slim.parent).code == 5


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


@pytest.mark.parametrize(
    ("out", "code", "words"),
    [
        ("slim/sub/whole", 2, "lies in slim"),
        ("slim", 2, "slim exists"),
        ("new/..", 2, "exists"),
        ("file/whole", 2, "cannot write file/whole"),
        ("x" * 300, 2, "cannot write"),
    ],
)
def test_places_that_cannot_be_written(slim, call, out, code, words):
    (slim.parent / "file").write_text("")
    before = names(slim.parent)
    assert words in call("unpack", "slim", "-o", out, cwd=slim.parent).refused(code)
    assert names(slim.parent) == before
    assert not (slim / "sub").exists()


def test_the_folder_itself_is_no_place_for_its_copy(slim, call):
    assert "lies in ." in call("unpack", ".", "-o", "whole", cwd=slim).refused(2)


@pytest.mark.parametrize("name", ["other.onnx", "sub/model.int8.onnx", f"{PACKED}/x"])
def test_a_form_by_another_name_is_refused(slim, call, name):
    def rename(table: dict[str, Any]) -> None:
        next(subject for subject in table["subjects"] if subject["role"] == "onnx-int8")["name"] = name

    reseal(slim, rename)
    assert f"no packed file holds {name}" in call("unpack", "slim", "-o", "whole", cwd=slim.parent).refused(5)


def test_a_form_that_its_kind_does_not_have_is_refused(slim, call):
    reseal(slim, lambda table: table["subjects"].remove(next(s for s in table["subjects"] if s["role"] == "onnx-int8")))
    assert "no form onnx" in call("unpack", "slim", "-o", "whole", cwd=slim.parent).refused(5)


@pytest.mark.parametrize("name", EVIDENCE)
def test_missing_evidence_is_in_no_packed_file(slim, call, name):
    (slim / name).unlink()
    assert f"no packed file holds {name}" in call("unpack", "slim", "-o", "whole", cwd=slim.parent).refused(5)


def test_only_what_the_report_names_is_copied(slim, call):
    with Path(slim / "huge").open("wb") as file:
        file.truncate(1 << 36)  # a hole, which takes no disk
    os.mkfifo(slim / "pipe")
    (slim / "report.html").symlink_to("nowhere")
    slim.chmod(0o555)
    assert call("unpack", "slim", "-o", "whole", cwd=slim.parent).code == 0
    assert names(slim.parent / "whole") == {"report.json", PACKED, *EVIDENCE, *FORMS}


def test_a_full_disk_leaves_nothing(slim, call, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rprune.pipeline.unpacking.shutil.copyfile", full)
    assert "No space left" in call("unpack", "slim", "-o", "whole", cwd=slim.parent).refused(4)
    assert [path.name for path in slim.parent.iterdir()] == ["slim"]


def test_a_whole_bundle_is_copied(bundle, call, tmp_path):
    said = call("unpack", bundle, "-o", "copy", "--json", cwd=tmp_path)
    assert said.json == {"files": [], "absent": []}
    assert names(tmp_path / "copy") == names(bundle) - {"key.json", "report.html"}
