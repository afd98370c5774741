"""rprune evaluate, attack and certify on the files that ship: ONNX in three forms, and C."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

from rprune.attacks import suites
from rprune.attacks.fgsm import FGSM
from rprune.attacks.square import Square
from rprune.data.sources import load_data
from rprune.export.c.writer import c_source
from rprune.export.onnx import plain_model
from rprune.export.session import OnnxClassifier
from rprune.models.flat import canonical
from rprune.models.graph import trace

ONNX = ("model.onnx", "model.int8.onnx", "model.compact.onnx")
SHIPPED = (*ONNX, "model.c")
INTEGERS = ("model.int8.onnx", "model.compact.onnx", "model.c")
N = 40
DATA = ("--data", "digits", "--eps", "0.03")
ALONE = (*DATA, "--trust-c")

pytestmark = pytest.mark.usefixtures("c_cache")


@pytest.fixture
def folder(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "out")
    return tmp_path


@pytest.fixture
def alone(bundle, tmp_path):
    """model.c with nothing but its header."""
    for name in ("model.c", "model.h"):
        shutil.copy(bundle / name, tmp_path)
    return tmp_path


@pytest.fixture
def few(monkeypatch):
    """A suite of one attack with and one without gradients."""
    monkeypatch.setitem(suites.SUITES, "few", (FGSM(), Square(budget=40)))


# evaluate


def test_evaluate_counts_what_the_files_answer(bundle, call):
    test = load_data("digits").test
    x, y = test.pixels(0, N).astype(np.float32) / np.float32(255), test.labels[:N]
    found = {}
    for name in SHIPPED:
        said = call("evaluate", name, "--suite", "fgsm", "-n", N, "--json", cwd=bundle)
        assert (said.code, said.err) == (0, ""), said.err
        clean, robust = said.json["results"]
        assert {row["metric"] for row in (clean, robust)} == {"clean_accuracy", "robust_accuracy"}
        assert clean["form"] == robust["form"] == name.rpartition(".")[2]
        assert clean["n"] == robust["n"] == N
        assert (robust["suite"], robust["complete"], said.json["threat"]) == ("fgsm", True, "linf 0.03")
        found[name] = clean["correct"], robust["correct"]
        source = "model.int8.onnx" if name in INTEGERS else name
        assert clean["correct"] == int((OnnxClassifier(bundle / source).predict(x) == y).sum())
        assert robust["correct"] < clean["correct"]
    assert len({found[name] for name in INTEGERS}) == 1, found


def test_evaluate_in_words(bundle, call):
    said = call("evaluate", "model.c", "--split", "validation", "-n", 20, cwd=bundle)
    assert said.code == 0, said.err
    assert "model.c on digits/validation, linf 0.03" in said.out
    assert said.out.splitlines()[-1].split()[:2] == ["clean_accuracy", "c"]
    assert "robust" not in said.out


@pytest.mark.usefixtures("few")
def test_a_robust_accuracy_of_a_part_of_the_suite_says_so(alone, call):
    said = call("evaluate", "model.c", *ALONE, "--suite", "few", "-n", 20, cwd=alone)
    assert said.code == 0, said.err
    assert "INCOMPLETE" in said.out.splitlines()[-1]
    assert "INCOMPLETE" not in said.out.splitlines()[-2]
    assert "no gradients: no ONNX file of the same model lies beside model.c" in said.err
    found = call("evaluate", "model.c", *ALONE, "--suite", "few", "-n", 20, "--json", "-q", cwd=alone)
    assert found.err == ""
    assert found.json["results"][1]["complete"] is False
    plain = call("evaluate", "model.c", *ALONE, "-n", 20, cwd=alone)
    assert "no gradients" not in plain.err


# attack


@pytest.mark.slow
def test_the_forms_of_the_integers_fall_to_the_same_points(folder, call):
    files, settings, roles = {}, {}, {}
    for name in SHIPPED:
        said = call("attack", f"out/{name}", "--suite", "fgsm", "-n", 20, "--no-health", "--json", cwd=folder)
        assert said.code == 0, said.err
        assert "no gradients" not in said.err
        robust = said.json["columns"][0]["claims"][1]
        assert robust["settings"]["broken"] > 0
        settings[name], roles[name] = robust["settings"], said.json["model"]["role"]
        stem = {"model.onnx": "model", "model.c": "model.c"}.get(name, name.removesuffix(".onnx"))
        evidence = folder / "out" / f"{stem}-fgsm.attack"
        files[name] = [(evidence / part).read_bytes() for part in ("samples.csv", "adversarial.safetensors")]
    assert files["model.int8.onnx"] == files["model.compact.onnx"] == files["model.c"]
    assert roles == dict.fromkeys(ONNX, "onnx-int8") | {"model.onnx": "onnx", "model.c": "c"}
    assert {name: row["gradient"] for name, row in settings.items()} == {
        "model.onnx": "the file's own graph in torch",
        "model.int8.onnx": "the file's own graph in torch, straight-through, and model.onnx",
        "model.compact.onnx": "the file's own graph in torch, straight-through, and model.onnx",
        "model.c": "the graph of model.int8.onnx in torch, straight-through, and model.onnx",
    }
    assert settings["model.c"]["verdict"] == "compiled C on model.c"
    assert settings["model.compact.onnx"]["verdict"] == "ONNX Runtime on model.compact.onnx"


@pytest.mark.usefixtures("few")
def test_without_files_beside_c_is_attacked_without_gradients(alone, call):
    said = call("attack", "model.c", *ALONE, "--suite", "few", "-n", 20, "--no-health", cwd=alone)
    assert said.code == 0, said.err
    note = "no gradients: no ONNX file of the same model lies beside model.c; only attacks without gradients"
    assert note in said.err
    assert "INCOMPLETE" in said.out
    found = json.loads((alone / "model.c-few.attack" / "attack.json").read_text())
    robust = found["columns"][0]["claims"][1]
    assert robust["settings"]["gradient"] == "none"
    assert {row["name"]: row["tried"] for row in robust["attacks"]} == {"fgsm": 0, "square": robust_tried(found)}
    assert robust["complete"] is False
    quiet = call("attack", "model.c", *ALONE, "--suite", "few", "-n", 20, "--no-health", "-q", cwd=alone)
    assert (quiet.code, quiet.err) == (0, "")


def robust_tried(found) -> int:
    """Square comes to all samples that are right, for nothing came before."""
    return found["columns"][0]["claims"][0]["correct"]


def test_where_every_attack_needs_gradients_nothing_runs(alone, call, contents):
    before = contents(alone)
    for command in (("attack", "model.c", "--no-health"), ("evaluate", "model.c")):
        error = call(*command, *ALONE, "--suite", "fgsm", "-n", 20, cwd=alone).refused(2)
        assert "fgsm cannot run: there is no net to search on" in error
    assert contents(alone) == before


def test_a_parent_may_be_named_instead(alone, call, bundle):
    parent = ("--parent", bundle / "model.onnx")
    said = call("attack", "model.c", *ALONE, *parent, "--suite", "fgsm", "-n", N, "--no-health", "--json", cwd=alone)
    assert said.code == 0, said.err
    rows = {row["name"]: row for row in said.json["columns"][0]["claims"][1]["attacks"]}
    assert rows["fgsm"]["tried"] == 0
    assert rows["transfer fgsm"]["broken"] > 0


@pytest.mark.usefixtures("few")
def test_gradients_of_another_model_are_not_taken(alone, call, bundle, load_helper):
    """What lies beside under the usual name is believed only when it answers alike."""
    nets = load_helper("quantization/nets.py")
    other = plain_model(trace(nets.make("lenet"), nets.SHAPE), nets.SHAPE, 10).SerializeToString()
    larger = plain_model(trace(nets.make("vgg4"), (1, 16, 16)), (1, 16, 16), 10).SerializeToString()
    floats = (bundle / "model.onnx").read_bytes()  # of this network, before it was rounded
    command = ("attack", "model.c", *ALONE, "--suite", "few", "-n", 5, "--no-health", "--json")
    for int8, float32 in ((b"junk", other), (larger, floats), (floats, b"")):
        (alone / "model.int8.onnx").write_bytes(int8)
        (alone / "model.onnx").write_bytes(float32)
        said = call(*command, "--force", cwd=alone)
        assert said.code == 0, said.err
        assert "no ONNX file of the same model lies beside model.c" in said.err
    (alone / "model.onnx").write_bytes((bundle / "model.int8.onnx").read_bytes())
    said = call(*command, "--force", cwd=alone)
    gradient = said.json["columns"][0]["claims"][1]["settings"]["gradient"]
    assert gradient == "the graph of model.onnx in torch, straight-through"


def test_c_of_floats_has_its_gradients_in_the_float_file(tmp_path, call, load_helper):
    nets = load_helper("quantization/nets.py")
    network = canonical(trace(nets.make("cnn-small", 0.5), nets.SHAPE))
    found = c_source(network, nets.SHAPE)
    (tmp_path / "net.h").write_text(found.header.replace("model.h", "net.h"))
    (tmp_path / "net.c").write_text(found.source.replace("model.h", "net.h"))
    (tmp_path / "model.onnx").write_bytes(plain_model(network, nets.SHAPE, 10).SerializeToString())
    said = call("attack", "net.c", *DATA, "--suite", "fgsm", "-n", 20, "--no-health", "--json", cwd=tmp_path)
    assert said.code == 0, said.err
    robust = said.json["columns"][0]["claims"][1]
    assert robust["settings"]["gradient"] == "the graph of model.onnx in torch"
    assert [row["name"] for row in robust["attacks"]] == ["fgsm"]


# certify


def test_certificates_of_integers_are_the_same_in_every_form(folder, call, chain):
    found = {}
    for name in SHIPPED:
        said = call(
            "certify",
            f"out/{name}",
            "--n",
            100,
            "-n",
            3,
            *((), ("-m", "auto,smoothing"))[name != "model.c"],
            cwd=folder,
        )
        assert said.code == 0, said.err
        written = folder / "out" / f"{name}.certificates.json"
        found[name] = json.loads(written.read_text())
        content = (folder / "out" / name).read_bytes()
        assert found[name]["file"] == {"name": name, "sha256": hashlib.sha256(content).hexdigest()}
        assert str(written.relative_to(folder)) in said.out
        assert "Next:" not in said.err
    samples = {name: table["smoothing"]["samples"] for name, table in found.items()}
    simulated = json.loads((chain / "model-lwm-0.5-finetuned-int8.certificates.json").read_text())
    for name in INTEGERS:
        assert samples[name] == simulated["smoothing"]["samples"][:3], name
    assert len(samples["model.onnx"]) == 3
    assert [found[name]["form"] for name in SHIPPED] == ["onnx", "onnx-int8", "onnx-int8", "c"]
    bounds = {name: table.get("bounds") for name, table in found.items()}
    assert bounds["model.c"] is None
    assert bounds["model.onnx"]["claim"] == "real"
    for name in ("model.int8.onnx", "model.compact.onnx"):
        assert bounds[name]["claim"] == "int-exact"
        assert bounds[name]["samples"] == simulated["bounds"]["samples"][:3]
    for name in SHIPPED:
        assert call("certify", "--check", f"{name}.certificates.json", "-q", cwd=folder / "out").code == 0


def test_certificates_as_json_and_by_name(folder, call):
    options = ("--method", "smoothing", "--sigma", 0.1, "--n", 50, "-n", 2, "--json")
    said = call("certify", "out/model.c", *options, "-o", "proof.json", cwd=folder)
    assert (said.code, said.err) == (0, "")
    assert json.loads((folder / "proof.json").read_text()) == said.json
    assert said.json["smoothing"]["sigma"] == 0.1
    assert len(said.json["smoothing"]["samples"]) == 2
    again = call("certify", "out/model.c", *options, "-o", "proof.json", cwd=folder)
    assert "proof.json exists" in again.refused(2)
    assert call("certify", "out/model.c", *options, "-o", "proof.json", "--force", cwd=folder).code == 0


def test_certificates_of_a_file_are_not_taken_for_those_of_the_model(tmp_path):
    """'rprune export model.pt' looks for certificates beside model.pt; model.onnx may lie there, too."""
    from rprune.pipeline.single import certificates_beside

    names = [certificates_beside(tmp_path / name) for name in ("model.pt", *SHIPPED)]
    assert len(set(names)) == len(names)


# errors


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("certify", "out/model.c", "--method", "ibp"), 2, "by smoothing alone"),
        (("certify", "out/model.c", "--method", "auto,smoothing"), 2, "by smoothing alone"),
        (("certify", "out/model.int8.onnx", "--method", "crown"), 2, "does not bound integers"),
        (("certify", "out/model.onnx", "--method", "ipb"), 2, "unknown methods in options 'ipb'"),
        (("certify", "out/model.c", "--arch", "cnn-small"), 2, "--arch"),
        (("evaluate", "out/model.onnx", "--arch", "cnn-small"), 2, "--arch"),
        (("evaluate", "out/model.c", "--suite", "fgms"), 2, "fgms"),
        (("evaluate", "out/model.c", "--split", "train"), 2, "train"),
        (("evaluate", "out/model.c", "--data", "npz:large.npz"), 3, "does not take images of (3, 16, 16)"),
        (("evaluate", "out/model.compact.onnx", "--data", "npz:large.npz"), 3, "does not take images of (3, 16, 16)"),
        (("attack", "out/model.c", "--suite", "fgsm", "--data", "npz:two.npz"), 3, "10 classes, npz:two.npz has 2"),
        (("evaluate", "model.c", "--trust-c"), 2, "no data is named"),
        (("certify", "model.c", "--trust-c"), 2, "no data is named"),
        (("attack", "model.c", "--trust-c"), 2, "no data is named"),
        (("attack", "none.c", *DATA), 3, "none.h"),
        (("certify", "none.onnx", *DATA), 3, "none.onnx"),
        (("evaluate", "headless.c", *DATA), 3, "headless.h"),
        (("evaluate", "foreign.c", *DATA), 3, "no header of rprune's"),
        (("attack", "broken.c", *DATA), 3, "broken.c is code"),
        (("attack", "broken.c", *ALONE), 3, "broken.c does not compile"),
        (("certify", "model.c", *DATA), 3, "model.c is code"),
        (("certify", "broken.onnx", *DATA), 3, "not a valid ONNX file"),
        (("attack", "out/model.c", "--suite", "fgsm", "--parent", "none.onnx"), 3, "none.onnx is not there"),
    ],
)
def test_errors_are_one_line_and_write_nothing(folder, call, contents, arguments, code, words):
    for name in ("model.c", "model.h"):
        shutil.copy(folder / "out" / name, folder)
    shutil.copy(folder / "model.c", folder / "headless.c")
    (folder / "foreign.c").write_text("int main(void) { return 0; }\n")
    (folder / "foreign.h").write_text("#define MODEL_CLASSES 10\n")
    broken = (folder / "model.c").read_text().replace("model.h", "broken.h") + "\nint broken( {\n"
    (folder / "broken.c").write_text(broken)
    shutil.copy(folder / "model.h", folder / "broken.h")
    (folder / "broken.onnx").write_bytes((folder / "out" / "model.onnx").read_bytes()[:5000])
    write_data(folder / "large.npz", (3, 16, 16), 10)
    write_data(folder / "two.npz", (1, 8, 8), 2)
    before = contents(folder)
    assert words in call(*arguments, cwd=folder).refused(code)
    assert contents(folder) == before


def write_data(path, shape: tuple[int, int, int], classes: int) -> None:
    images = np.random.RandomState(0).randint(0, 256, (4 * classes, *shape)).astype(np.uint8)
    labels = np.arange(4 * classes) % classes
    images = images.transpose(0, 2, 3, 1)
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)


def test_a_compiler_that_is_not_there(folder, call, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert "cannot run the C compiler no-such-compiler" in call("evaluate", "out/model.c", cwd=folder).refused(4)
