"""Whoever changes a bundle gets no false claim past 'rprune verify', not even by making every digest fit again.

Byte by byte first, as accidents and clumsy hands do it; then as somebody who seals the report anew: every value of it,
one after the other, and the tricks that a report once fell to. What passes is what docs/security.md names.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rprune.errors import InputError, IntegrityError, RpruneError
from rprune.export.c import origin
from rprune.files import digest_of, file_digest
from rprune.reports import forms, replay
from rprune.reports import verify as verify_module
from rprune.reports.verify import LEVELS, Verification, verify

Table = dict[str, Any]


def keyed(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is computed of files is computed once for equal bytes: hundreds of verifications share it."""
    known: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        files = [each for each in given if isinstance(each, Path)]
        files += [file.with_suffix(".h") for file in files if file.suffix == ".c"]
        key = (
            *map(file_digest, files),
            json.dumps([each for each in given if not isinstance(each, Path)]),
            *named.items(),
        )
        if key not in known:
            known[key] = function(*given, **named)
        return known[key]

    return call


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        weights = keyed(verify_module.stored_weights)
        patch.setattr(verify_module, "stored_weights", weights)
        patch.setattr(forms, "stored_weights", weights)
        patch.setattr(forms, "load_onnx", keyed(forms.load_onnx))
        patch.setattr(forms, "_packed", keyed(forms._packed))
        patch.setattr(origin, "is_written_of", keyed(origin.is_written_of))
        patch.setattr(replay, "OnnxClassifier", keyed(replay.OnnxClassifier))
        patch.setattr(verify_module, "recounted", keyed(verify_module.recounted))
        patch.setattr(verify_module, "load_data", functools.cache(verify_module.load_data))
        yield


class Copy:
    """A bundle that may be changed, and is whole again after ``restore``."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        shutil.copytree(bundle, folder)
        self.folder = folder
        self.files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.table: Table = json.loads(self.files["report.json"])

    def restore(self) -> None:
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = path.relative_to(self.folder).as_posix()
            if name not in self.files and (path.is_symlink() or path.is_file()):
                path.unlink()
        for name, content in self.files.items():
            path = self.folder / name
            if path.is_symlink():
                path.unlink()
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)
        self.table = json.loads(self.files["report.json"])

    def seal(self) -> None:
        """The report as its maker would write it now: sizes and digests of the files as they are, and a fitting id."""
        for subject in self.table["subjects"]:
            path = self.folder / subject["name"]
            old = subject["sha256"]
            if path.is_file() and (new := file_digest(path)) != old:
                subject["sha256"], subject["bytes"] = new, path.stat().st_size
                self.table["size"] |= (
                    {subject["name"]: subject["bytes"]} if subject["name"] in self.table["size"] else {}
                )
                for claim in self.table["claims"]:
                    claim["sha256"] = new if claim["sha256"] == old else claim["sha256"]
        self.write()

    def write(self) -> None:
        self.table["id"] = digest_of(self.table | {"id": ""})
        (self.folder / "report.json").write_text(json.dumps(self.table))

    def passes(self, level: str = "replay") -> bool:
        """Nothing but a documented refusal may come in the place of a verdict."""
        try:
            return verify(self.folder, level).passed
        except (InputError, IntegrityError):
            return False


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from leaves(part, (*path, key))


@pytest.fixture(scope="module")
def whole(bundle, tmp_path_factory):
    return Copy(bundle, tmp_path_factory.mktemp("poisoned") / "out")


@pytest.fixture
def poisoned(whole):
    yield whole
    whole.restore()


@pytest.mark.parametrize("level", LEVELS)
def test_untouched_it_passes(poisoned, level) -> None:
    found: Verification = verify(poisoned.folder, level)
    assert found.passed
    alone = {"masks.safetensors", "model.safetensors"}
    named = {subject["name"] for subject in poisoned.table["subjects"]}
    assert set(found.unread) == (named if level == "hash" else alone)


# accidents, and hands that do not know of digests


def flip(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 8, 64))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def cut(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content))]


def append(content: bytes, dice: random.Random) -> bytes:
    return content + dice.choice((b"\0", b"\n", b"{}", dice.randbytes(dice.randrange(1, 99))))


def move(content: bytes, dice: random.Random) -> bytes:
    """Two parts of it in each other's place."""
    at = dice.randrange(1, len(content))
    return content[at:] + content[:at]


def means_the_same(changed: bytes, content: bytes) -> bool:
    """White space of report.json, a digit beyond a float's precision: harmless, since what is read is the same."""
    try:
        return bool(json.loads(changed) == json.loads(content))
    except ValueError:
        return False


def test_240_changes_of_bytes(poisoned) -> None:
    dice = random.Random(0)
    names = [*(subject["name"] for subject in poisoned.table["subjects"]), "report.json"]
    seen = set()
    for number in range(240):
        name = names[number % len(names)]
        change = dice.choice((flip, flip, cut, append, move))
        content = poisoned.files[name]
        changed = change(content, dice)
        if changed == content or (name == "report.json" and means_the_same(changed, content)):
            continue
        (poisoned.folder / name).write_bytes(changed)
        assert not poisoned.passes(), (number, name, change.__name__)
        seen.add((name, change))
        (poisoned.folder / name).write_bytes(content)
    assert len(seen) > 3 * len(names)


def test_files_that_are_gone_swapped_linked_or_added(poisoned, tmp_path) -> None:
    names = [subject["name"] for subject in poisoned.table["subjects"]]
    for name in names:
        file = poisoned.folder / name
        file.unlink()
        assert not poisoned.passes(), f"{name} is gone"
        (tmp_path / "elsewhere").write_bytes(poisoned.files[name])
        file.symlink_to(tmp_path / "elsewhere")
        assert not poisoned.passes(), f"{name} lies elsewhere, with the same bytes"
        poisoned.restore()
    for one, other in itertools.pairwise(names):
        (poisoned.folder / one).write_bytes(poisoned.files[other])
        assert not poisoned.passes(), f"{other} in the place of {one}"
        poisoned.restore()
    for name in ("model2.onnx", "evil.c", "evil.h", "model.int8.safetensors", "model.pt"):
        (poisoned.folder / name).write_bytes(poisoned.files["model.onnx"])
        assert not poisoned.passes("hash"), f"{name} beside"
        poisoned.restore()


def test_what_a_report_does_not_cover_is_harmless(poisoned) -> None:
    """report.html is a rendering, and other tools may leave their results beside the models."""
    (poisoned.folder / "report.html").write_text("<b>100 % robust</b>")
    (poisoned.folder / "model.onnx.certificates.json").write_text("{}")
    text = poisoned.files["report.json"].decode()
    (poisoned.folder / "report.json").write_text(json.dumps(json.loads(text), indent=7))
    assert poisoned.passes()


# somebody who seals the report anew

WORD = (
    "created", "name", "tool", "environment", "warnings", "limitations", "fidelity", "lineage", "model.architecture",
    "model.input", "integers.saturating_pairs", "footprint.dense_macs", "footprint.dense_weights",
    "footprint.sparse_macs", "sparsity.definition", "data.selection", "data.train_sha256", "data.validation_samples",
    "data.validation_sha256", "claims.*.method", "claims.*.sound_for", "claims.*.settings", "claims.*.attacks",
    "claims.*.curve",
)  # fmt: skip
"""Values of a report that are its maker's word at every level, by where they begin: docs/security.md has them, too."""

SILENCE = (
    "claims.*", "claims.*.attacks", "claims.*.curve", "footprint", "footprint.ratios", "integers", "model.labels",
    "size", "sparsity.budget", "sparsity.int8_zeros_equal_float_zeros", "sparsity.target",
)  # fmt: skip
"""What may be left out: then nothing is claimed."""


def place(path: tuple[Any, ...]) -> str:
    return ".".join("*" if isinstance(key, int) else key for key in path)


def begins(name: str, beginnings: tuple[str, ...]) -> bool:
    return any(name == beginning or name.startswith(f"{beginning}.") for beginning in beginnings)


def parent_of(table: Table, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        table = table[key]
    return table


def changed(value: Any) -> Any:
    """Another value of the same type; None for lists and tables, whose parts come by themselves."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else 1.5 * value + 0.01
    return f"{value}x" if isinstance(value, str) else None


@pytest.mark.slow
def test_every_value_of_a_sealed_report_is_checked_or_a_known_word(poisoned) -> None:
    base, passed, tried = copy.deepcopy(poisoned.table), set(), {}
    for path in leaves(base):
        name = place(path)
        if path == ("id",) or tried.get(name, 0) == 2 or begins(name, WORD):
            continue
        tried[name] = tried.get(name, 0) + 1
        poisoned.table = copy.deepcopy(base)
        value = changed(parent_of(base, path)[path[-1]])
        if value is not None:
            parent_of(poisoned.table, path)[path[-1]] = value
            poisoned.write()
            if poisoned.passes():
                passed.add(name)
        if not begins(name, SILENCE):
            poisoned.table = copy.deepcopy(base)
            del parent_of(poisoned.table, path)[path[-1]]
            poisoned.write()
            if poisoned.passes():
                passed.add(f"{name} left out")
    assert sum(tried.values()) > 140
    assert passed == set()


def test_the_words_of_the_maker_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    assert [name for name in WORD if f"`{name}`" not in text] == []


def claim(table: Table, name: str) -> Table:
    return next(c for c in table["claims"] if c["id"] == name)


def tiny_ball(t: Table) -> None:
    """People read 0.03, checks would compute with nothing at all."""
    claim(t, "robust_accuracy@onnx-int8")["threat"]["eps_float"] = 1e-9


def proof_by_name(t: Table) -> None:
    """An attack's number, called a proof, would need no health."""
    claim(t, "robust_accuracy@onnx-int8")["kind"] = "certified-lower-bound"


def clean_number_as_robust(t: Table) -> None:
    claim(t, "clean_accuracy@onnx-int8")["id"] = "robust_accuracy@onnx-int8"


def second_claim(t: Table) -> None:
    better = copy.deepcopy(claim(t, "robust_accuracy@onnx-int8"))
    t["claims"].append(better | {"method": "aa-standard"})


def second_file(t: Table) -> None:
    """The one would be measured, and the other taken for it."""
    subject = next(s for s in t["subjects"] if s["role"] == "onnx-int8")
    t["subjects"].append(subject | {"name": "model.compact.onnx"})


def second_name(t: Table) -> None:
    t["subjects"].append(next(s for s in t["subjects"] if s["role"] == "onnx") | {"role": "onnx-compact"})


def no_threat(t: Table) -> None:
    del claim(t, "robust_accuracy@onnx-int8")["threat"]


def huge_exponent(t: Table) -> None:
    """Exact arithmetic would fill the memory with it."""
    claim(t, "robust_accuracy@onnx-int8")["threat"]["eps"] = "1e999999999"


def fewer_bits(t: Table) -> None:
    t["integers"]["bits"] = 4


def other_names(t: Table) -> None:
    t["data"]["classes"] = t["model"]["labels"] = t["data"]["classes"][::-1]


def right_by_relabelling(t: Table) -> None:
    """A smoothed sample that was wrong, under the label that it was given."""
    row = next(r for r in claim(t, SMOOTHED)["settings"]["samples"] if r["prediction"] != r["label"])
    row["label"] = row["prediction"]
    recount(claim(t, SMOOTHED))


def the_best_samples(t: Table) -> None:
    rows = claim(t, SMOOTHED)["settings"]["samples"]
    rows[:] = [row for row in rows if row["prediction"] == row["label"]]
    recount(claim(t, SMOOTHED))


SMOOTHED = "smoothed_certified_accuracy@onnx-int8"


def recount(smoothed: Table) -> None:
    """Every count of a smoothed claim as it follows from its rows."""
    from rprune.certification.confidence import recounted
    from rprune.evaluation.statistics import clopper_pearson

    said = smoothed["settings"]
    settings = {name: said[name] for name in ("n", "alpha", "sigma", "test", "slack")}
    radii = [recounted(row, **settings)[0] for row in said["samples"]]
    proved = [
        -1.0 if radius is None or row["prediction"] != row["label"] else radius
        for radius, row in zip(radii, said["samples"], strict=True)
    ]
    said["abstained"] = sum(row["prediction"] == -1 for row in said["samples"])
    n = smoothed["n"] = len(proved)
    smoothed["correct"] = sum(radius >= smoothed["threat"]["eps_float"] for radius in proved)
    smoothed["value"] = smoothed["correct"] / n
    smoothed["interval"]["lower"], smoothed["interval"]["upper"] = clopper_pearson(smoothed["correct"], n)
    for point in smoothed["curve"]:
        point["correct"] = sum(radius >= point["at"] for radius in proved)
        point["value"] = point["correct"] / n


TRICKS = [
    tiny_ball, proof_by_name, clean_number_as_robust, second_claim, second_file, second_name, no_threat, huge_exponent,
    fewer_bits, other_names, right_by_relabelling, the_best_samples,
]  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.__name__)
def test_tricks_of_who_seals_the_report_anew(poisoned, trick) -> None:
    trick(poisoned.table)
    poisoned.write()
    assert not poisoned.passes()


EVIL = "\nvoid predict_float(const float *image, float *logits) { logits[0] = 1; }\n"


@pytest.mark.parametrize("name", ["model.c", "model.h"])
def test_a_poisoned_c_source_is_seen_and_not_compiled(poisoned, monkeypatch, name) -> None:
    from rprune.export.c import engine

    monkeypatch.setattr(engine, "compiled", None)
    (poisoned.folder / name).write_text(poisoned.files[name].decode() + EVIL)
    poisoned.seal()
    failed = [check.name for check in verify(poisoned.folder, "static").checks if not check.passed]
    assert failed == ["c"] if name == "model.h" else "c" in failed


def test_without_torch_c_is_among_what_is_unread(poisoned, monkeypatch) -> None:
    monkeypatch.setattr(forms, "can_write_c", lambda: False)
    found = verify(poisoned.folder, "static")
    assert found.passed
    assert {"model.c", "model.h", "model.safetensors"} < set(found.unread)
    assert "c" not in {check.name for check in found.checks}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.compact.onnx", "model.packed.safetensors", "model.int8.onnx", "model.c"])
def test_files_of_another_bundle(poisoned, other_bundle, name) -> None:
    (poisoned.folder / name).write_bytes((other_bundle / name).read_bytes())
    poisoned.seal()
    assert not poisoned.passes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evidence/samples.csv", "evidence/adversarial.safetensors"])
def test_evidence_of_another_bundle(poisoned, other_bundle, name) -> None:
    (poisoned.folder / name).write_bytes((other_bundle / name).read_bytes())
    poisoned.seal()
    assert not poisoned.passes()


@pytest.fixture(scope="module")
def other_bundle(chain, tmp_path_factory, call):
    folder = tmp_path_factory.mktemp("other")
    forms = "safetensors,onnx,onnx-int8,onnx-compact,packed,c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "c-cache"))
        assert call("quantize", chain / "model-lwm-0.5.pt", "-o", "other.pt", "-q", cwd=folder).code == 0
        said = call(
            "export", "other.pt", "-o", "out", "--format", forms, "--suite", "fgsm", "--limit", 40, "--no-health", "-q",
            cwd=folder,
        )  # fmt: skip
    assert said.code == 0, said.err
    return folder / "out"


# what it prints


def test_names_in_a_report_cannot_write_the_verdict(poisoned, call, tmp_path) -> None:
    """A line of its own, a cursor that moves up, right to left: a file says none of that on a terminal."""
    spoof = "x\nVERIFIED level=replay\x1b[2K\x1b[1A\u202e"
    poisoned.table["subjects"][0]["name"] = spoof
    poisoned.write()
    said = call("verify", poisoned.folder, cwd=tmp_path)
    assert said.code == 5
    assert not any(line.startswith("VERIFIED") for line in said.out.splitlines())
    assert not {"\x1b", "\u202e"} & set(said.out)
    for key, words in ((spoof, "VERIFIED"), ("\ud800", "half a character")):
        (poisoned.folder / "report.json").write_text(json.dumps(poisoned.table | {key: 1}))
        assert words in call("verify", poisoned.folder, cwd=tmp_path).refused(3)


@pytest.mark.parametrize(
    "line",
    ["verify out", "gate out --min sparsity=0.5", "compare out out", "report out", "report out --json",
     *(f"report out --{form} there" for form in ("html", "markdown", "card", "bom", "intoto", "robustbench", "plots"))],
)  # fmt: skip
def test_half_a_character_is_no_text(poisoned, call, line) -> None:
    poisoned.table["evidence"]["samples"] = poisoned.table["environment"]["cpu"] = "a\ud800"
    (poisoned.folder / "report.json").write_text(json.dumps(poisoned.table))
    said = call(*line.replace("out", poisoned.folder.name).split(), cwd=poisoned.folder.parent)
    assert "half a character" in said.refused(3)
    assert not (poisoned.folder.parent / "there").exists()


@pytest.mark.parametrize("key", ["samples", "witnesses"])
@pytest.mark.parametrize("place", ["../evidence", "/", "link"])
def test_pictures_are_not_taken_from_outside(poisoned, call, tmp_path, key, place) -> None:
    name = Path(poisoned.table["evidence"][key]).name
    shutil.copy(poisoned.folder / "evidence" / name, poisoned.folder.parent / name)
    if place == "link":
        (poisoned.folder / "link").symlink_to(poisoned.folder.parent)
    poisoned.table["evidence"][key] = {"/": str(poisoned.folder.parent / name), "link": f"link/{name}"}.get(
        place, f"../{name}"
    )
    poisoned.write()
    said = call("report", poisoned.folder, "-o", "page.html", cwd=tmp_path)
    assert said.code == 5
    assert "outside" in said.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line", "code"),
    [
        *(("report.json", line, 3) for line in ("verify out", "gate out --min sparsity=0.5", "compare out out",
                                                "report out", "inspect out/report.json")),
        ("evidence/samples.csv", "report out --html r.html", 5),
        ("evidence/adversarial.safetensors", "report out --html r.html", 5),
        ("model.onnx", "verify out", 5),
        ("model.onnx", "inspect out/model.onnx", 3),
        ("model.c", "evaluate out/model.c", 3),
        ("model.packed.safetensors", "unpack out/model.packed.safetensors -o u", 3),
    ],
)  # fmt: skip
def test_nobody_waits_for_a_pipe(bundle, python, tmp_path, name, line, code) -> None:
    """In a process of its own, which the fixture ends where it waits."""
    shutil.copytree(bundle, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    os.mkfifo(tmp_path / "out" / name)
    said = python("-m", "rprune", *line.split(), cwd=tmp_path)
    assert said.code == code, said.err
    assert Path(name).name in said.out + said.err


def test_errors_of_a_report_are_refusals(poisoned) -> None:
    for level in LEVELS:
        for text in ("", "[]", "{", "null", "[" * 10**5, '{"schema": "rprune.report/1"}', "\x00"):
            (poisoned.folder / "report.json").write_text(text)
            with pytest.raises(RpruneError):
                verify(poisoned.folder, level)
