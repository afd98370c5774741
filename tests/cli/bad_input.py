"""Mistakes of users, each as a command with what it must say: the tests run them, and docs/errors.md lists them.

Only messages of rprune's own stand here, not those that quote torch, the system or Python, which change with them.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Content = str | bytes | Callable[[Path], bytes]


@dataclass(frozen=True, eq=False)
class Case:
    """``line``: behind ``rprune``, run where the chain's files lie. ``says``: part of what it must say. ``given``: what
    is special about its ``files``, in words."""

    line: str
    code: int
    says: str
    given: str = ""
    files: Mapping[str, Content] = field(default_factory=dict)

    def prepare(self, folder: Path) -> None:
        for name, content in self.files.items():
            made = content(folder) if callable(content) else content
            (folder / name).write_bytes(made.encode() if isinstance(made, str) else made)


RECIPE = """
rprune = 1
name = "bad"
[data]
source = "digits"
[[stage]]
kind = "train"
epochs = 1
[[stage]]
kind = "prune"
sparsity = 0.5
"""


def recipe(old: str, new: str, says: str) -> Case:
    """A recipe with one mistake."""
    assert old in RECIPE
    shown = new.replace("\n", "; ")
    return Case("run recipe.toml -o new", 2, says, f"`{shown}`", {"recipe.toml": RECIPE.replace(old, new)})


DROP = '[[gate]]\nmetric = "clean_accuracy"\nmax_drop = 0.02\n'


def drop(baseline: str, code: int, says: str, given: str, files: Mapping[str, Content]) -> Case:
    """A baseline that nothing can be compared with."""
    return Case(f"gate bundle --max-drop clean_accuracy=0.02 --baseline {baseline}", code, says, given, files)


def other_data(folder: Path) -> bytes:
    table = json.loads((folder / "bundle" / "report.json").read_text())
    return json.dumps(table | {"data": table["data"] | {"sha256": "0" * 64}}).encode()


def setting(text: str, says: str) -> Case:
    return Case(f"run recipe.toml -o new --set '{text}'", 2, says, "", {"recipe.toml": RECIPE})


def policy(text: str, says: str) -> Case:
    shown = text.replace("\n", "; ")
    return Case(
        "gate bundle --policy gate.toml", 2, says, f"`{shown}`" if text else "an empty file", {"gate.toml": text}
    )


def report(given: str, says: str, **changes: object) -> Case:
    def write(folder: Path) -> bytes:
        return json.dumps(json.loads((folder / "bundle" / "report.json").read_text()) | changes).encode()

    return Case("gate other.json --min sparsity=0.5", 3, says, given, {"other.json": write})


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


ONWARD = """
rprune = 1
name = "onward"
checkpoint = "model-lwm-0.5-finetuned-int8.pt"
[data]
source = "digits"
[[stage]]
kind = "finetune"
"""


def images(count: int = 6, kind: type = np.uint8) -> dict[str, object]:
    pixels, labels = np.zeros((count, 8, 8), kind), np.arange(count) % 3
    return {"train_images": pixels, "train_labels": labels, "test_images": pixels, "test_labels": labels}


def archive(*members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for member in members:
            file.writestr(member, b"x")
    return buffer.getvalue()


PLAIN = "--arch cnn-small --data digits"
CASES: dict[str, list[Case]] = {
    "Names": [
        Case("prune model.pt -s 0.5 -m harpp", 2, "did you mean 'harp'?"),
        Case("prune model.pt -s 0.5 --objective trade", 2, "did you mean 'trades'?"),
        Case("train -d digits -o n.pt --objective pdg-at", 2, "did you mean 'pgd-at'?"),
        Case("train -d digits -o n.pt --arch cnn-smal", 2, "did you mean 'cnn-small'?"),
        Case("train -d digits -o n.pt --arch net.py", 2, "net.py:FACTORY"),
        Case("train -d digits -o n.pt --arch-arg wdth=3", 2, "none is known"),
        Case("train -d digit -o n.pt", 2, "did you mean 'digits'?"),
        Case("prune model.pt -s 0.5 -d digit", 2, "did you mean 'digits'?"),
        Case("train -d digits -o n.pt --norm linff --eps 0.1", 2, "did you mean 'linf'?"),
        Case("train -d digits -o n.pt --preset harp:papr", 2, "did you mean 'paper'?"),
        Case("train -d digits -o n.pt --preset paper", 2, "METHOD:paper"),
        Case("train -d digits -o n.pt --set schedule=cosin", 2, "did you mean 'cosine'?"),
        Case("train -d digits -o n.pt --set optimizer=sdg", 2, "did you mean 'sgd'?"),
        Case("train -d digits -o n.pt --set average=emma", 2, "did you mean 'ema'?"),
        Case("train -d digits -o n.pt --set objective.attack.stepps=3", 2, "has no name"),
        Case("prune model.pt -s 0.5 --set sparsty=0.5", 2, "did you mean 'sparsity'?"),
        Case("prune model.pt -s 0.5 --set method.gama_step=0.5", 2, "did you mean 'gamma_step'?"),
        Case("prune model.pt -s 0.5 --set method.structure=chanel", 2, "did you mean 'channel'?"),
        Case("prune model.pt -s 0.5 --set method.allocation=unifrm", 2, "did you mean 'uniform'?"),
        Case("quantize model.pt --mode qta", 2, "did you mean 'qat'?"),
        Case("quantize model.pt --observer minmx", 2, "did you mean 'minmax'?"),
        Case("certify model.pt -m ipb", 2, "did you mean 'ibp'?"),
        Case("export model.pt -o new --suite pgd11", 2, "did you mean 'pgd10'?"),
        Case("export model.pt -o new --format onx", 2, "did you mean 'onnx'?"),
        Case("evaluate model.pt --suite pgd11", 2, "did you mean 'pgd10'?"),
        Case("evaluate model.pt --split tets", 2, "did you mean 'test'?"),
        Case("verify bundle --level replays", 2, "did you mean 'replay'?"),
        Case("gate bundle --min robust_acuracy=0.1", 2, "did you mean 'robust_accuracy'?"),
        Case("gate bundle --min sparsity@onx=0.1", 2, "did you mean 'onnx'?"),
        Case("gate bundle --min sparsity=0.1 --bound lowr", 2, "did you mean 'lower'?"),
        Case("list method", 2, "did you mean 'methods'?"),
        Case("schema recipes", 2, "did you mean 'recipe'?"),
        Case("init -d digts", 2, "did you mean 'digits'?"),
        Case("init --from digit", 2, "did you mean 'digits'?"),
        Case("run digit", 2, "did you mean 'digits'?"),
    ],
    "Numbers and options": [
        Case("prune model.pt -s 1.5", 2, "sparsity"),
        Case("prune model.pt -s 1", 2, "sparsity"),
        Case("prune model.pt -s -0.1", 2, "sparsity"),
        Case("prune model.pt", 2, "one of sparsity and macs"),
        Case("prune model.pt -s 0.5 --macs 0.1", 2, "not both"),
        Case("prune model.pt -s 0.99999 -m lwm", 2, "at most"),
        Case("train -d digits -o n.pt --eps abc", 2, "8/255"),
        Case("train -d digits -o n.pt --eps 8/0", 2, "8/255"),
        Case("train -d digits -o n.pt --eps -0.1", 2, "negative"),
        Case("train -d digits -o n.pt --eps inf", 2, "not a number"),
        Case("train -d digits -o n.pt --norm l2", 2, "--eps"),
        Case("train -d digits -o n.pt --epochs 0", 2, "epochs"),
        Case("train -d digits -o n.pt --lr 0", 2, "lr"),
        Case("train -d digits -o n.pt --mean 0.5", 3, "both mean and std"),
        Case("train -d digits -o n.pt --mean a,b", 2, "with commas"),
        Case("train -d digits -o n.pt --set epochs", 2, "KEY=VALUE"),
        Case("train -d digits -o n.pt --set epochs=many", 2, "epochs"),
        Case("train -o n.pt", 2, "--data digits"),
        Case("train -d digits -o n.pkl", 2, ".safetensors"),
        Case("quantize model.pt --bits 13", 2, "bits"),
        Case("quantize model.pt --mode codebook --calibration 3", 2, "no effect"),
        Case("certify model.pt --shard 3/2", 2, "i/n"),
        Case("run recipe.toml -o new --budget 2x", 2, "10m", "", {"recipe.toml": RECIPE}),
        Case("attack model.pt --budget soon", 2, "10m"),
        Case("prune model.pt -s 0.5 -o model.pt", 2, "--force"),
        Case("init --from digits --data digits", 2, "edit the copy"),
        Case("init", 2, "--data digits"),
    ],
    "Model files": [
        Case("prune none.pt -s 0.5", 3, "not there"),
        Case("inspect none.onnx", 3, "not there"),
        Case("prune cut.pt -s 0.5", 3, "cut short", "the first half of a model",
             {"cut.pt": lambda folder: (folder / "model.pt").read_bytes()[:20_000]}),
        Case("prune empty.pt -s 0.5", 3, "empty", "no byte", {"empty.pt": b""}),
        Case("prune text.pt -s 0.5", 3, "no model file", "a text", {"text.pt": "hello"}),
        Case(f"prune old.pt -s 0.5 {PLAIN}", 3, "without weights", "a bare pickle", {"old.pt": b"\x80\x04N."}),
        Case("prune evil.pt -s 0.5", 3, "never run", "a pickle that names code",
             {"evil.pt": b"\x80\x02cos\nsystem\n."}),
        Case("inspect up.pt", 3, "leads out of it", "a ZIP that would write elsewhere",
             {"up.pt": archive("s/data.pkl", "../up")}),
        Case("evaluate script.pt", 3, "TorchScript", "a TorchScript archive",
             {"script.pt": archive("s/data.pkl", "s/constants.pkl", "s/code/__torch__.py")}),
        Case("prune bundle/model.onnx -s 0.5", 3, "not weights"),
        Case("prune bundle/model.safetensors -s 0.5", 2, "--data SOURCE"),
        Case("prune model.pt -s 0.5 --arch vgg4", 2, "leave out --arch"),
        Case("prune bundle/model.safetensors -s 0.5 --arch vgg4 -d digits", 3, "do not fit vgg4"),
        Case("init --model model-lwm-0.5-finetuned-int8.pt", 3, "quantized already"),
        Case("prune model-lwm-0.5-finetuned-int8.pt -s 0.9", 3, "quantized already"),
        Case("finetune model-lwm-0.5-finetuned-int8.pt", 3, "quantized already"),
        Case("shrink model-lwm-0.5-finetuned-int8.pt", 3, "quantized already"),
        Case("run onward.toml -o new", 3, "quantized already", "a checkpoint with integers before a finetune stage",
             {"onward.toml": ONWARD}),
        Case("finetune folder", 3, "not there", "a folder of other things"),
        Case("attack bundle/model.onnx --arch cnn-small", 2, "the file holds its network"),
    ],
    "Data": [
        Case("train -d npz:none.npz -o n.pt", 3, "not there"),
        Case("train -d imagefolder:none -o n.pt", 3, "one sub-folder a class"),
        Case("train -d webdataset:none -o n.pt", 3, "train-*.tar"),
        Case("train -d cifar10:none -o n.pt", 3, "--download"),
        Case("train -d digits:x -o n.pt", 2, "takes no place"),
        Case("train -d npz:few.npz -o n.pt", 3, "train_labels", "train_images alone",
             {"few.npz": npz(train_images=np.zeros((4, 8, 8), np.uint8))}),
        Case("train -d npz:float.npz -o n.pt", 3, "uint8", "images in float64", {"float.npz": npz(**images(6, float))}),
        Case("train -d npz:words.npz -o n.pt", 3, "integers", "labels as words",
             {"words.npz": npz(**images() | {"train_labels": np.array(["a"] * 6)})}),
        Case("train -d npz:short.npz -o n.pt", 3, "one label each", "five labels for six images",
             {"short.npz": npz(**images() | {"train_labels": np.arange(5) % 3})}),
        Case("finetune model.pt -d npz:three.npz", 3, "3", "three classes", {"three.npz": npz(**images())}),
    ],
    "Recipes": [
        Case("run none.toml -o new", 2, "cannot read recipe"),
        recipe("name =", "nam =", "did you mean 'name'?"),
        recipe("epochs =", "epochss =", "did you mean 'stage.train.epochs'?"),
        recipe('kind = "prune"', 'kind = "prun"', "did you mean 'prune'?"),
        recipe('kind = "train"', 'kind = "finetune"', "begin with a train stage"),
        recipe('source = "digits"', 'source = "digits"\nsorce = 1', "did you mean 'data.source'?"),
        recipe('source = "digits"', 'source = "digits"\naugment = "crop-flp"', "did you mean 'crop-flip'?"),
        recipe("sparsity = 0.5", "sparsity = 1.5", "sparsity"),
        recipe("rprune = 1", "rprune = 2", "rprune"),
        recipe("sparsity = 0.5", 'sparsity = 0.5\nmethod = "harpp"', "did you mean 'harp'?"),
        recipe("epochs = 1", 'epochs = 1\nschedule = "cosin"', "did you mean 'cosine'?"),
        recipe("epochs = 1", 'objective = { name = "mart", attack = { stepps = 3 } }', "did you mean 'attack.steps'?"),
        recipe("= 0.5", '= 0.5\n[[stage]]\nkind = "export"\nsuite = "pgd11"', "did you mean 'pgd10'?"),
        recipe("rprune = 1", 'rprune = 1\npolicy = "none.toml"', "none.toml"),
        recipe("rprune = 1", 'rprune = 1\ncheckpoint = "none.pt"', "a train stage stands after"),
        setting("sed=1", "did you mean 'seed'?"),
        setting("stage.prune.sparsty=0.5", "did you mean 'stage.prune.sparsity'?"),
        setting("stage.quantise.bits=8", "did you mean 'quantize'?"),
        setting("stage.quantize.bits=8", "no quantize stage"),
        setting("stage=1", "stage"),
        setting("name.x.y=1", "name"),
        setting("seed", "KEY=VALUE"),
    ],
    "Gates and bundles": [
        Case("gate bundle", 2, "--min"),
        Case("gate bundle --policy none.toml", 2, "cannot read policy"),
        Case("gate bundle --min sparsity", 2, "metric=value"),
        Case("gate bundle --min sparsity=many", 2, "metric=value"),
        Case("gate bundle --allow-unreliable", 2, "allow_unreliable = true"),
        Case("gate bundle --max-drop clean_accuracy=0.02", 2, "--baseline"),
        Case("gate bundle --min sparsity=0.1 --baseline bundle", 2, "--max-drop"),
        Case("gate bundle --max-drop sparsity=0.02 --baseline bundle", 2, "max_drop is for"),
        Case("gate bundle --min attack_health=ok", 2, "--equal attack_health=ok"),
        Case("gate bundle --equal clean_accuracy=0.9", 2, "cannot be =="),
        Case("gate bundle --min clean_accuracy:1/255=0.9", 2, "is under no threat"),
        Case("gate bundle --min sparsity=0.1 --json --format github", 2, "leave out one"),
        Case("gate bundle --min sparsity=0.1 --junit gate.xml", 2, "--force", "a file that exists", {"gate.xml": ""}),
        drop("other.json", 3, "the same --data", "other test data", {"other.json": other_data}),
        drop("bundle", 5, "take both from one bundle", "changed samples.csv", {"bundle/evidence/samples.csv": "index"}),
        Case("export model.pt -o new --policy gate.toml", 2, "--baseline", "with `max_drop`", {"gate.toml": DROP}),
        Case("run recipe.toml -o new --baseline bundle", 2, "max_drop", "", {"recipe.toml": RECIPE}),
        Case("compare bundle bundle --alpha 2", 2, "0.05"),
        policy("", "gate"),
        policy("gate = []", "at least one"),
        policy('[[gate]]\nmetrik = "sparsity"\nvalue = 1', "did you mean 'metric'?"),
        policy('[[gates]]\nmetric = "sparsity"\nvalue = 1', "did you mean 'gate'?"),
        policy('[[gate]]\nmetric = "sparsity"\nvalue = 1\nbound = "lowr"', "did you mean 'lower'?"),
        report("a schema of the future", "rprune.report/2", schema="rprune.report/2"),
        report("claims = 3", "claims", claims=3),
        Case("report other.json", 3, "schema", "an empty table", {"other.json": "{}"}),
        Case("verify none", 3, "not there"),
        Case("verify folder", 3, "not there", "a folder without a report"),
        Case("export model.pt -o new --certificates none.json", 3, "not there"),
        Case("export model.pt -o new --certificates other.json", 3, "no certificates", "an empty table",
             {"other.json": "{}"}),
        Case("certify --check other.json", 3, "no certificate", "an empty table", {"other.json": "{}"}),
    ],
}  # fmt: skip
ALL = [case for cases in CASES.values() for case in cases]
HEAD = """# Errors

What rprune says to mistakes, from the commands themselves: `make docs` runs each of these and writes this page, and the
tests check it. `model.pt` is a small model trained on digits, `bundle` its export. An error is one line of what and why
and one of how to mend it, on stderr; nothing is written. [Exit codes](../README.md#use): 2, the request is wrong and
nothing was run; 3, the input cannot be used; 5, bytes are not the ones that were promised.
"""


def page(said: Mapping[Case, str]) -> str:
    """docs/errors.md from what each case wrote on stderr."""
    lines = [HEAD]
    for title, cases in CASES.items():
        lines += [f"## {title}", "", "| command | error | hint | exit |", "|---|---|---|---|"]
        for case in cases:
            told = dict(line.split(": ", 1) for line in said[case].splitlines())
            command = f"`rprune {case.line}`" + (f", {case.given}" if case.given else "")
            cells = [command, told["error"], told["hint"], str(case.code)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
