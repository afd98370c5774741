"""The certificate file and its check: what it says, and that no change of model, data or content passes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from rprune.files import digest_of
from rprune.pipeline.artifact import load_artifact, save_artifact

MODEL = "model-lwm-0.5-finetuned-int8.pt"
FILE = "model-lwm-0.5-finetuned-int8.certificates.json"


@pytest.fixture
def folder(chain, tmp_path):
    for name in (MODEL, FILE):
        shutil.copy(chain / name, tmp_path / name)
    return tmp_path


def refusal(said) -> str:
    """The reason, behind what was in order before."""
    assert said.code == 5, said.err
    assert "HOLDS" not in said.out
    error, hint = said.err.splitlines()
    assert hint == "hint: do not trust this certificate; issue a new one: rprune certify"
    return error


def edit(folder, change, seal: bool = True) -> None:
    found = json.loads((folder / FILE).read_text())
    change(found)
    if seal:
        del found["digest"]
        found["digest"] = digest_of(found)
    (folder / FILE).write_text(json.dumps(found))


def test_content(folder) -> None:
    found = json.loads((folder / FILE).read_text())
    assert found["schema"] == "rprune.certificate/1"
    assert found["file"]["name"] == MODEL
    assert found["threat"]["domain"] == [0, 1]
    assert {"tool", "environment", "data", "config", "seed", "bounds", "smoothing", "caveats"} <= set(found)
    assert found["bounds"]["claim"] == "int-exact"
    assert found["bounds"]["methods"] == ["ibp"]
    assert found["bounds"]["firm"]["claim"] == "any-kernel"
    assert sum(found["bounds"]["counts"].values()) == found["bounds"]["n"] == len(found["bounds"]["samples"])
    assert found["smoothing"]["test"] == "sequential"
    assert any("8-bit graph" in line for line in found["caveats"])
    assert found["digest"] == digest_of({key: value for key, value in found.items() if key != "digest"})


def test_an_untouched_certificate_holds(folder, call) -> None:
    said = call("certify", "--check", FILE, "--samples", 2, cwd=folder)
    assert said.code == 0, said.err
    assert "CERTIFICATE HOLDS" in said.out
    table = call("certify", "--check", FILE, "--samples", 0, "--json", cwd=folder)
    assert table.json["holds"] is True
    names = [row["name"] for row in table.json["checks"]]
    assert names == ["digest", "model", "data", "settings", "bounds", "bounds again", "radii", "noise again"]


def more_certified(found):
    row = next(row for row in found["bounds"]["samples"] if row["status"] != "certified")
    before = row["status"]
    row |= {"status": "certified", "method": "ibp", "margin": 0.5}
    found["bounds"]["counts"][before] -= 1
    found["bounds"]["counts"]["certified"] += 1
    place = found["bounds"]["samples"].index(row)
    for level in found["bounds"]["levels"]:
        level["correct"] += 1 - level["proved"][place]
        level["proved"][place] = 1


def all_proved(levels) -> None:
    for level in levels:
        level["proved"] = [1] * len(level["proved"])
        level["correct"] = len(level["proved"])


TAMPERED = {
    "a byte": (lambda found: found.update(seed=1), False, "its digest differs"),
    "counts of bounds": (lambda f: f["bounds"]["counts"].update(certified=999), True, "not those of its samples"),
    "levels": (lambda f: f["bounds"]["levels"][1].update(correct=0), True, "levels do not add up"),
    "a radius": (lambda f: f["smoothing"]["samples"][0].update(radius=0.9), True, "does not follow from its counts"),
    "draws": (lambda f: f["smoothing"]["samples"][0].update(n=10**7), True, "does not follow from its counts"),
    "another model's digest": (lambda f: f["file"].update(sha256="0" * 64), True, "not the file that was certified"),
    "other data": (lambda f: f["data"].update(sha256="0" * 64), True, "not those certified on"),
    "a file elsewhere": (lambda f: f["file"].update(name="../" + MODEL), True, "names a file elsewhere"),
    "the folder above": (lambda f: f["file"].update(name=".."), True, "names a file elsewhere"),
    "no sense": (lambda f: f.pop("bounds") and f.update(bounds={"n": 3}), True, "makes no sense"),
    "a sample that is not": (more_certified, True, "is certified by ibp"),
    "smaller radii all proved": (lambda f: all_proved(f["bounds"]["levels"][1:]), True, "is said to be proved at"),
    "another radius": (lambda f: f["bounds"]["levels"][1].update(eps="0.5"), True, "at other radii"),
    "a claim of floats": (lambda f: f["bounds"].update(claim="real"), True, "caveats"),
    "no caveats": (lambda f: f.update(caveats=[]), True, "caveats"),
    "another form": (lambda f: f.update(form="onnx"), True, "another form"),
    "other tensors": (lambda f: f.update(artifact="0" * 64), True, "other tensors"),
    "another architecture": (lambda f: f.update(identity="0" * 64), True, "architecture"),
    "a headline": (lambda f: f["threat"].update(eps="0.9"), True, "at other radii"),
    "a headline of settings": (lambda f: f["config"].update(eps="0.9"), True, "threat is not that of its settings"),
    "no attack": (lambda f: f["bounds"].update(falsifier=None), True, "bounds have other settings"),
    "no attack in the settings": (
        lambda f: f["bounds"].update(falsifier=None) or f["config"].update(falsify=False), True, "by no attack",
    ),
    "another attack": (lambda f: f["bounds"].update(falsifier="AutoAttack"), True, "bounds have other settings"),
    "more methods": (lambda f: f["bounds"]["methods"].append("crown"), True, "bounds have other settings"),
    "what HYDRA counts, unasked": (
        lambda f: f["bounds"].update(as_hydra={"eps": "0.007", "correct": 1, "n": 1}), True, "other settings",
    ),
    "a section less": (lambda f: f.pop("smoothing") and f.update(caveats=f["caveats"][:1]), True, "is missing"),
    "another radius of smoothing": (lambda f: f["smoothing"].update(radius=0.01), True, "other settings"),
    "who decided": (
        lambda f: next(r for r in f["bounds"]["samples"] if r["status"] == "misclassified").update(method="crown"),
        True,
        "names what cannot have decided it",
    ),
    "slack": (lambda f: f["smoothing"].update(slack=-0.4), True, "other settings"),
    "another alpha": (lambda f: f["config"].update(alpha=1e-9), True, "other settings"),
    "chosen samples": (lambda f: f["smoothing"]["samples"].pop(), True, "all of its part"),
    "a sample twice": (lambda f: f["bounds"]["samples"][1].update(index=0), True, "each once"),
    "another label": (lambda f: f["bounds"]["samples"][0].update(label=11), True, "contradicts"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_a_changed_certificate_is_refused(folder, call, case: str) -> None:
    change, seal, words = TAMPERED[case]
    edit(folder, change, seal)
    assert words in refusal(call("certify", "--check", FILE, "--samples", 10_000, "-q", cwd=folder))


def test_another_model_is_refused(folder, call) -> None:
    content = bytearray((folder / MODEL).read_bytes())
    content[-1] ^= 1
    (folder / MODEL).write_bytes(content)
    assert "not the file that was certified" in refusal(call("certify", "--check", FILE, "-q", cwd=folder))


def test_other_data_are_refused(folder, call) -> None:
    images = np.random.RandomState(0).randint(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(40) % 10
    np.savez(folder / "d.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    said = call("certify", "--check", FILE, "--data", "npz:d.npz", "-q", cwd=folder)
    assert "not those certified on" in refusal(said)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("certify",), 2, "no model is named"),
        (("certify", MODEL, "--check", FILE), 2, "takes the certificate alone"),
        (("certify", "--check", "none.json"), 3, "none.json"),
        (("certify", "--check", MODEL), 3, MODEL),
        (("certify", MODEL, "--n", 5, "--fixed-n", 5, "-o", "x.json"), 2, "two tests"),
        (("certify", MODEL, "--method", "crown", "-o", "x.json"), 2, "does not bound integers"),
        (("certify", MODEL, "-m", "smoothing", "--radius", 9, "-o", "x.json"), 2, "reach l2"),
        (("certify", MODEL, "--noise", "pink", "-o", "x.json"), 2, "noise"),
        (("certify", MODEL, "--shard", "1/2", "--merge", FILE, "-o", "x.json"), 2, "two commands"),
        (("certify", MODEL, "--shard", "9/9", "--limit", 8, "-o", "x.json"), 2, "of 8 samples has none"),
    ],
)
def test_refusals(folder, call, arguments, code, words) -> None:
    before = sorted(folder.iterdir())
    assert words in call(*arguments, "-q", cwd=folder).refused(code)
    assert sorted(folder.iterdir()) == before


OPTIONS = ("--method", "ibp,smoothing", "--eps", "0.02", "--radius", 0.1, "--n", 200, "--limit", 13, "-q")


def content(path) -> dict:
    """What two certificates of the same samples have in common."""
    found = json.loads(path.read_text())
    return {name: found[name] for name in ("bounds", "smoothing", "data", "threat", "seed", "config")}


@pytest.fixture(scope="module")
def whole(chain, call, tmp_path_factory):
    """A folder with the model and its certificate of 13 samples."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copy(chain / MODEL, folder / MODEL)
    assert call("certify", MODEL, *OPTIONS, "-o", "whole.json", cwd=folder).code == 0
    return folder


def test_most_of_what_integers_prove_any_kernel_has(whole) -> None:
    bounds = content(whole / "whole.json")["bounds"]
    assert 0 < bounds["firm"]["correct"] <= bounds["counts"]["certified"]
    assert all(row["status"] == "certified" for row in bounds["samples"] if row["firm"])


def test_a_sample_that_not_every_kernel_proves_is_found(chain, call, tmp_path, monkeypatch) -> None:
    """More is claimed than bounds for any kernel give."""
    from rprune.evaluation import certificates

    shutil.copy(chain / MODEL, tmp_path / MODEL)
    assert call("certify", MODEL, *OPTIONS, "-o", FILE, cwd=tmp_path).code == 0
    monkeypatch.setattr(certificates, "rounded_margins", lambda *arguments: arguments[-1] - torch.inf)
    assert "hold for more kernels" in refusal(call("certify", "--check", FILE, "-q", cwd=tmp_path))


def test_shards_merge_to_the_whole(whole, call) -> None:
    parts = [FILE.replace(".cert", f".{i}of3.cert") for i in (1, 2, 3)]
    for i, part in enumerate(parts, 1):
        assert call("certify", MODEL, *OPTIONS, "--shard", f"{i}/3", cwd=whole).code == 0
        found = json.loads((whole / part).read_text())
        assert found["shard"] == f"{i}/3"
        assert [row["index"] for row in found["bounds"]["samples"]] == list(range(i - 1, 13, 3))
        assert call("certify", "--check", part, "-q", cwd=whole).code == 0
    every = [word for part in parts for word in ("--merge", part)]
    assert call("certify", MODEL, *OPTIONS, *every, "-o", "merged.json", cwd=whole).code == 0
    assert content(whole / "merged.json") == content(whole / "whole.json")
    (whole / "merged.json").unlink()
    merge = [word for part in parts[:2] for word in ("--merge", part)]
    assert call("certify", MODEL, *OPTIONS, *merge, "-o", "merged.json", cwd=whole).code == 0
    assert content(whole / "merged.json") == content(whole / "whole.json")
    assert "covers shard 1/3 alone" in call(
        "export", MODEL, "-o", "e", "--certificates", parts[0], cwd=whole
    ).refused(3)  # fmt: skip
    assert sorted(path.name for path in whole.iterdir() if "json" in path.name) == sorted(
        ["whole.json", "merged.json", *parts]
    )


def test_an_interrupted_run_goes_on(whole, call, monkeypatch) -> None:
    from rprune.pipeline import certifying

    asked: list[int] = []

    def counted(*args, **options):
        if "falsified" in options:
            asked.extend(options["ids"].tolist())
            if len(asked) == 8:
                raise KeyboardInterrupt
        return certify_bounds(*args, **options)

    certify_bounds = certifying.certify_bounds
    monkeypatch.setattr(certifying, "CHEAP_BLOCK", 4)
    monkeypatch.setattr(certifying, "certify_bounds", counted)
    assert call("certify", MODEL, *OPTIONS, "-o", "broken.json", cwd=whole).code == 130
    assert not (whole / "broken.json").exists()
    with (whole / "broken.json.verdicts.jsonl").open("a") as file:
        file.write('{"section": "bou')
    assert call("certify", MODEL, *OPTIONS, "--alpha", 0.01, "-o", "broken.json", cwd=whole).code == 2
    assert call("certify", MODEL, *OPTIONS, "-o", "broken.json", cwd=whole).code == 0
    assert asked == [*range(8), *range(4, 13)]
    assert content(whole / "broken.json") == content(whole / "whole.json")
    (whole / "broken.json").unlink()
    assert not (whole / "broken.json.verdicts.jsonl").exists()


def test_an_interruption_of_smoothing_loses_a_block(whole, call, monkeypatch) -> None:
    from rprune.pipeline import certifying

    asked: list[int] = []

    def counted(*args, **options):
        asked.extend(options["ids"].tolist())
        if len(asked) == 8:
            raise KeyboardInterrupt
        return certify_smoothing(*args, **options)

    certify_smoothing = certifying.certify_smoothing
    monkeypatch.setattr(certifying, "BLOCK", 4)
    monkeypatch.setattr(certifying, "certify_smoothing", counted)
    assert call("certify", MODEL, *OPTIONS, "-o", "broken.json", cwd=whole).code == 130
    monkeypatch.setattr(certifying, "certify_bounds", None)  # bounds are known
    assert call("certify", MODEL, *OPTIONS, "-o", "broken.json", cwd=whole).code == 0
    assert asked == [*range(8), *range(4, 13)]
    assert content(whole / "broken.json") == content(whole / "whole.json")
    (whole / "broken.json").unlink()


def test_fewer_samples_of_what_is_known(whole, call, monkeypatch) -> None:
    """A smaller limit takes from an earlier certificate what it asks for, and computes nothing."""
    from rprune.pipeline import certifying

    for name in ("certify_bounds", "certify_smoothing"):
        monkeypatch.setattr(certifying, name, None)
    options = (*OPTIONS, "--limit", 5, "--merge", "whole.json")
    assert call("certify", MODEL, *options, "-o", "less.json", cwd=whole).code == 0
    less, more = content(whole / "less.json"), content(whole / "whole.json")
    for section in ("bounds", "smoothing"):
        assert less[section]["samples"] == more[section]["samples"][:5]
    assert [level["proved"] for level in less["bounds"]["levels"]] == [
        level["proved"][:5] for level in more["bounds"]["levels"]
    ]
    (whole / "less.json").unlink()


def test_a_shard_may_have_bounds_alone(whole, call) -> None:
    options = (*OPTIONS[:-1], "--set", "smoothing_limit=2", "--shard", "3/3")
    said = call("certify", MODEL, *options, "-o", "last.json", cwd=whole)
    assert said.code == 0, said.err
    assert "0/0" in said.out
    assert content(whole / "last.json")["smoothing"]["samples"] == []
    shutil.move(whole / "last.json", whole / FILE)
    assert call("certify", "--check", FILE, "-q", cwd=whole).code == 0
    (whole / FILE).unlink()


def test_equal_tensors_of_another_network_do_not_mix(chain, call, tmp_path) -> None:
    """Normalisation is no tensor, and changes every answer."""
    artifact = load_artifact(chain / "model-lwm-0.5-finetuned.pt")
    arch = artifact.metadata.architecture | {"mean": [0.1], "std": [0.9]}
    save_artifact(artifact, tmp_path / "one.pt")
    save_artifact(artifact.with_metadata(architecture=arch), tmp_path / "other.pt")
    options = ("-m", "ibp", "--limit", 2, "-q")
    assert call("certify", "one.pt", *options, "-o", "c.json", cwd=tmp_path).code == 0
    said = call("certify", "other.pt", *options, "--merge", "c.json", "-o", "x.json", cwd=tmp_path)
    assert "model differ" in said.refused(2)
    exported = call("export", "other.pt", "-o", "e", "--certificates", "c.json", cwd=tmp_path)
    assert "certifies another model" in exported.refused(3)


@pytest.mark.parametrize("option", ["--resume", "--no-resume"])
def test_a_file_of_others_in_the_journals_place_stays(whole, call, option) -> None:
    place = whole / "mine.json.verdicts.jsonl"
    place.write_text("my notes\n")
    said = call("certify", MODEL, *OPTIONS, option, "-o", "mine.json", cwd=whole)
    assert "is not a list of verdicts" in said.refused(3)
    assert place.read_text() == "my notes\n"
    place.unlink()


@pytest.mark.parametrize("rest", ["", '{"form', '{"format":"rprune.verdicts/1","key":{"co'])
@pytest.mark.parametrize("option", ["--resume", "--no-resume"])
def test_a_journal_cut_in_its_first_line_is_begun_again(whole, call, rest: str, option: str) -> None:
    (whole / "cut.json.verdicts.jsonl").write_text(rest)
    options = (*OPTIONS, "--limit", 2, "-m", "ibp", option)
    assert call("certify", MODEL, *options, "-o", "cut.json", cwd=whole).code == 0
    assert not (whole / "cut.json.verdicts.jsonl").exists()
    (whole / "cut.json").unlink()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda found: found.update(seed=5), 2, "seed differ"),
        (lambda found: found["config"].update(alpha=0.5), 2, "settings differ"),
        (lambda found: found.pop("bounds"), 3, "was changed"),
        (lambda found: found.update(schema="x"), 3, "no certificate"),
    ],
)
def test_what_is_merged_is_of_the_same_kind(whole, call, tmp_path, change, code, words) -> None:
    found = json.loads((whole / "whole.json").read_text())
    change(found)
    if code == 2:
        del found["digest"]
        found["digest"] = digest_of(found)
    (tmp_path / "part.json").write_text(json.dumps(found))
    said = call("certify", MODEL, *OPTIONS, "--merge", tmp_path / "part.json", "-o", "x.json", cwd=whole)
    assert words in said.refused(code)


def test_what_hydra_would_count(whole, call) -> None:
    said = call(
        "certify", MODEL, "-m", "ibp", "--eps", "2/255", "-n", 40, "--compat", "hydra", "-o", "h.json", cwd=whole
    )
    assert said.code == 0, said.err
    found = json.loads((whole / "h.json").read_text())["bounds"]
    assert found["as_hydra"]["eps"] == "0.007"
    assert found["counts"]["certified"] <= found["as_hydra"]["correct"] <= found["as_hydra"]["n"] == 40
    assert f"HYDRA's code would count {found['as_hydra']['correct']}/40" in said.err
    assert "no guarantee" in said.err
    shutil.copy(whole / "h.json", whole / FILE)
    assert call("certify", "--check", FILE, "-q", cwd=whole).code == 0
    edit(whole, lambda f: f["bounds"]["as_hydra"].update(correct=39))
    assert "HYDRA's code would count otherwise" in refusal(call("certify", "--check", FILE, "-q", cwd=whole))
    (whole / FILE).unlink()


def test_a_moved_model_is_missed(folder, call) -> None:
    (folder / MODEL).rename(folder / "moved.pt")
    said = call("certify", "--check", FILE, "-q", cwd=folder)
    assert said.code == 3
    assert f"there is no {MODEL}" in said.err


def test_floats_have_the_whole_cascade(chain, call, tmp_path) -> None:
    source = "model-lwm-0.5-finetuned.pt"
    shutil.copy(chain / source, tmp_path / source)
    said = call("certify", source, "--eps", "0.02", "-n", 20, "-m", "auto", cwd=tmp_path)
    assert said.code == 0, said.err
    assert "real arithmetic" in said.err
    found = json.loads((tmp_path / "model-lwm-0.5-finetuned.certificates.json").read_text())["bounds"]
    assert found["methods"] == ["ibp", "crown-ibp", "crown", "alpha-crown"]
    assert {row["method"] for row in found["samples"]} & {"crown-ibp", "crown", "alpha-crown"}
    assert found["firm"] == {"claim": "fp-any-order", "correct": found["counts"]["certified"]}
    assert found["counts"]["certified"] > 0
    assert call("certify", "--check", "model-lwm-0.5-finetuned.certificates.json", "-q", cwd=tmp_path).code == 0


def test_a_stage_folder_is_bound_to_all_its_files(chain, call, tmp_path) -> None:
    source = chain / "model-lwm-0.5-finetuned.pt"
    assert call("quantize", source, "-o", "q", "-q", cwd=tmp_path).code == 0
    assert call("certify", "q", "-m", "smoothing", "--radius", 0.1, "-n", 2, "-q", cwd=tmp_path).code == 0
    assert call("certify", "--check", "q.certificates.json", "-q", cwd=tmp_path).code == 0
    (tmp_path / "q" / "quantization.safetensors").write_bytes(b"x")
    assert call("certify", "--check", "q.certificates.json", "-q", cwd=tmp_path).code == 5
    with (tmp_path / "q" / "stage.json").open("a") as file:
        file.write(" ")
    assert "not the file that was certified" in refusal(call("certify", "--check", "q.certificates.json", cwd=tmp_path))


def test_fixed_counts_and_the_grid(chain, call, tmp_path) -> None:
    shutil.copy(chain / MODEL, tmp_path / MODEL)
    options = ("-m", "smoothing", "--fixed-n", 200, "--n0", 20, "--noise", "grid", "--radius", 0.1, "-n", 4, "--json")
    said = call("certify", MODEL, *options, cwd=tmp_path)
    assert said.code == 0, said.err
    found = said.json["smoothing"]
    assert (found["test"], found["noise"], found["n"], found["n0"], found["radius"]) == ("fixed", "grid", 200, 20, 0.1)
    assert {row["n"] for row in found["samples"]} == {200}
    assert found["slack"] > 0
    assert not any("floating point" in line for line in said.json["caveats"])
    assert call("certify", "--check", FILE, "-q", cwd=tmp_path).code == 0


def test_properties_for_other_verifiers(chain, call, tmp_path) -> None:
    shutil.copy(chain / MODEL, tmp_path / MODEL)
    options = (
        "-m",
        "ibp",
        "--eps",
        "0.02",
        "-n",
        3,
        "--set",
        "falsify=false",
        "--vnnlib",
        "specs",
        "-o",
        "c.json",
        "-q",
    )
    assert call("certify", MODEL, *options, cwd=tmp_path).code == 0
    names = sorted(path.name for path in (tmp_path / "specs").iterdir())
    assert names == sorted(
        ["instances.csv", "key.json", "model.onnx", *(f"sample-{i}.{v}.vnnlib" for i in range(3) for v in (1, 2))]
    )
    assert (tmp_path / "specs" / "instances.csv").read_text().splitlines()[1] == "model.onnx,sample-1.1.vnnlib,300"
    text = (tmp_path / "specs" / "sample-0.1.vnnlib").read_text()
    assert text.startswith("; test sample 0 of digits, label ")
    assert "linf 0.02" in text
    assert json.loads((tmp_path / "c.json").read_text())["bounds"]["falsifier"] is None
    l2 = call(
        "certify",
        MODEL,
        "--norm",
        "l2",
        "--eps",
        "0.1",
        "--vnnlib",
        "more",
        "-n",
        2,
        "-q",
        "-o",
        "d.json",
        cwd=tmp_path,
    )
    assert "hold boxes" in l2.refused(2)
    assert not list(tmp_path.glob("more*"))
    assert not list(tmp_path.glob("d.json*"))  # it was found before anything was proved
    assert "specs exists" in call("certify", MODEL, *options[:-3], "-o", "e.json", cwd=tmp_path).refused(2)


def test_properties_replace_those_of_before_alone(chain, call, tmp_path) -> None:
    shutil.copy(chain / MODEL, tmp_path / MODEL)
    options = ("-m", "ibp", "--set", "falsify=false", "--vnnlib", "specs", "-q", "--force")
    for count, eps in ((3, "0.02"), (2, "0.01")):
        said = call("certify", MODEL, *options, "-n", count, "--eps", eps, cwd=tmp_path)
        assert said.code == 0, said.err
    assert len((tmp_path / "specs" / "instances.csv").read_text().splitlines()) == 2
    assert "linf 0.01" in (tmp_path / "specs" / "sample-0.1.vnnlib").read_text()
    assert not (tmp_path / "specs" / "sample-2.1.vnnlib").exists()
    assert sorted(path.name for path in tmp_path.glob("specs*")) == ["specs"]
    (tmp_path / "specs" / "key.json").unlink()
    said = call("certify", MODEL, *options, "-n", 2, "--eps", "0.01", cwd=tmp_path)
    assert "did not write" in said.refused(2)
