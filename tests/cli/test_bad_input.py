"""What users get wrong: one line what, one line how to fix it, the documented exit code, and nothing written."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rprune.errors import EXIT_CODES
from rprune.pipeline.artifact import load_artifact

ROOT = Path(__file__).resolve().parents[2]


def _cases():
    """The list of mistakes; tests are no package."""
    spec = importlib.util.spec_from_file_location("rprune_test_bad_input", Path(__file__).with_name("bad_input.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bad_input = _cases()


class Touch:
    """A pickle that would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


QUIET = ("train", "prune", "finetune", "quantize", "certify", "export", "evaluate", "run", "attack", "init")


@pytest.fixture(scope="session")
def prepared(chain):
    """``prepared(folder)``: puts the chain's files into it."""

    def fill(folder: Path) -> None:
        for name in ("model.pt", "model-lwm-0.5-finetuned-int8.pt"):
            shutil.copy(chain / name, folder)
        shutil.copytree(chain / "out", folder / "bundle")

    return fill


@pytest.fixture(scope="session")
def refusal(call, contents):
    """``refusal(folder, code, *arguments)`` checks what must hold for every mistake and returns the error text."""

    def check(folder: Path, code: int, *arguments: object) -> str:
        before = contents(folder)
        folders = {p for p in folder.rglob("*") if p.is_dir()}
        quiet = ("-q",) if arguments[0] in QUIET else ()
        said = call(*arguments, *quiet, cwd=folder)
        assert said.code == code, said.err
        assert [line.split(" ")[0] for line in said.err.splitlines()] == ["error:", "hint:"], said.err
        assert said.out == ""
        assert contents(folder) == before
        assert {p for p in folder.rglob("*") if p.is_dir()} == folders
        return said.err

    return check


@pytest.fixture
def bench(prepared, refusal, tmp_path):
    """``bench(code, *arguments)``: a refusal where the chain's files lie."""
    prepared(tmp_path)
    return lambda code, *arguments: refusal(tmp_path, code, *arguments)


@pytest.fixture(scope="session")
def answer(prepared, refusal, tmp_path_factory):
    """``answer(case)``: what the command of a case wrote on stderr; each is run once."""
    known: dict[object, str] = {}

    def ask(case) -> str:
        if case not in known:
            folder = tmp_path_factory.mktemp("case")
            prepared(folder)
            (folder / "folder").mkdir()
            case.prepare(folder)
            known[case] = refusal(folder, case.code, *shlex.split(case.line)).replace(str(folder), "HERE")
            shutil.rmtree(folder)
        return known[case]

    return ask


@pytest.mark.parametrize("case", bad_input.ALL, ids=lambda case: f"{case.line} {case.given}")
def test_every_documented_mistake(answer, case):
    assert case.says in answer(case)


def test_the_page_of_errors_shows_what_the_commands_say(answer, request):
    page, path = bad_input.page({case: answer(case) for case in bad_input.ALL}), ROOT / "docs" / "errors.md"
    if request.config.getoption("--update-docs"):
        path.write_text(page, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == page, "run 'make docs'"
    assert len(bad_input.ALL) >= 60


@pytest.mark.parametrize("eps", ["-0.1", "abc", "8/0", "nan", "inf"])
def test_eps_that_is_no_radius(bench, eps):
    bench(2, "train", "--data", "digits", "-o", "n.pt", f"--eps={eps}")
    bench(2, "prune", "model.pt", "-s", 0.5, f"--eps={eps}")
    bench(2, "certify", "model.pt", f"--eps={eps}")


def test_output_of_unknown_kind(bench):
    for name in ("new.pkl", "new.onnx", "new.pth"):
        assert name[3:] in bench(2, "prune", "model.pt", "-s", 0.5, "-o", name)
        bench(2, "train", "--data", "digits", "-o", name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_device_that_is_not_there(bench):
    bench(2, "train", "--data", "digits", "-o", "n.pt", "--device", "cuda")
    bench(2, "prune", "model.pt", "-s", 0.5, "--device", "cuda:3")


def test_device_that_does_not_exist(bench):
    bench(2, "train", "--data", "digits", "-o", "n.pt", "--device", "gpu")


def test_model_file_that_is_missing(bench):
    for command in (("prune", "-s", 0.5), ("finetune",), ("quantize",), ("certify",), ("evaluate",), ("inspect",)):
        assert "none.pt" in bench(3, command[0], "none.pt", *command[1:])
    bench(3, "export", "none.pt", "-o", "new")


def test_truncated_model(bench, tmp_path):
    data = (tmp_path / "model.pt").read_bytes()
    for share in (0.05, 0.5, 0.99):
        (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * share)])
        assert "cut.pt" in bench(3, "prune", "cut.pt", "-s", 0.5)
        bench(3, "inspect", "cut.pt")


def test_truncated_safetensors(bench, tmp_path, call):
    call("quantize", "model.pt", "-o", "q.safetensors", "-q", cwd=tmp_path)
    data = (tmp_path / "q.safetensors").read_bytes()
    for share in (0.001, 0.3, 0.9):
        (tmp_path / "cut.safetensors").write_bytes(data[: int(len(data) * share)])
        bench(3, "finetune", "cut.safetensors")


def test_changed_file_of_a_stage_folder(bench, tmp_path, call):
    call("quantize", "model.pt", "-o", "q", "-q", cwd=tmp_path)
    with (tmp_path / "q" / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "model.safetensors" in bench(5, "certify", "q")


@pytest.mark.parametrize("record", [None, "[]", "no json", "{}", '{"files": {}, "metadata": {}}', '{"files": []}'])
def test_folder_that_is_no_stage(bench, tmp_path, record):
    (tmp_path / "odd").mkdir()
    if record is not None:
        (tmp_path / "odd" / "stage.json").write_text(record)
    bench(3, "finetune", "odd")


def test_pickled_code_is_named_and_never_run(bench, tmp_path):
    trap = tmp_path / "trap"
    torch.save({"state_dict": Touch(str(trap))}, tmp_path / "evil.pt")
    for command in (("prune", "evil.pt", "-s", 0.5), ("evaluate", "evil.pt"), ("export", "evil.pt", "-o", "new")):
        assert "mkdir" in bench(3, *command, "--arch", "cnn-small", "--data", "digits")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Touch(str(trap))))
    assert "never run" in bench(3, "prune", "bare.pt", "-s", 0.5, "--arch", "cnn-small", "--data", "digits")
    torch.save(Touch(str(trap)), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    bench(3, "prune", "old.pt", "-s", 0.5, "--arch", "cnn-small", "--data", "digits")
    assert not trap.exists()


def test_pickled_module_names_its_class(bench, tmp_path):
    torch.save(Net(), tmp_path / "whole.pt")
    found = bench(3, "prune", "whole.pt", "-s", 0.5, "--arch", "cnn-small", "--data", "digits")
    assert "Net" in found
    assert "state_dict()" in found


def test_files_that_are_no_model(bench, tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"script/{name}", b"x")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a.txt", b"x")
    with zipfile.ZipFile(tmp_path / "hollow.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"not a pickle")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "random.pt").write_bytes(np.random.default_rng(0).bytes(4096))
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "tiny.pt").write_bytes(b"\x80")
    for name in ("script", "zip", "hollow", "empty", "random", "text", "tiny"):
        assert f"{name}.pt" in bench(3, "prune", f"{name}.pt", "-s", 0.5, "--arch", "cnn-small", "--data", "digits")
    assert "TorchScript" in bench(3, "evaluate", "script.pt")
    bench(3, "prune", "bundle/model.onnx", "-s", 0.5)


@pytest.mark.parametrize(
    "damage",
    [
        {"rprune": "not json"}, {"rprune": 3}, {"rprune": "{}"}, {"state_dict": None}, {"masks": [1]},
        {"state_dict": {"a": 1}}, {"quantization": {"x": torch.zeros(1)}}, {"masks": ...}, {"state_dict": ...},
    ],
    ids=str,
)  # fmt: skip
def test_rprune_file_with_damaged_content(bench, tmp_path, damage):
    content = torch.load(tmp_path / "model.pt", weights_only=True) | damage
    torch.save({key: value for key, value in content.items() if value is not ...}, tmp_path / "odd.pt")
    bench(3, "evaluate", "odd.pt", "--limit", 5)


def test_state_dict_that_does_not_fit(bench, tmp_path):
    state = load_artifact(tmp_path / "model.pt").state
    torch.save(state, tmp_path / "plain.pt")
    for arch in ("cnn-large", "vgg4"):
        assert arch in bench(3, "prune", "plain.pt", "-s", 0.5, "--arch", arch, "--data", "digits")
    fewer = dict(state)
    for name in ("classifier.2.weight", "classifier.2.bias"):
        fewer[name] = state[name][:7]
    torch.save(fewer, tmp_path / "seven.pt")
    found = bench(3, "prune", "seven.pt", "-s", 0.5, "--arch", "cnn-small", "--data", "digits")
    assert "classifier.2" in found
    assert "classes" in found
    torch.save({"a": 1}, tmp_path / "none.pt")
    assert "state_dict" in bench(3, "prune", "none.pt", "-s", 0.5, "--arch", "cnn-small", "--data", "digits")


def test_data_that_does_not_fit_the_model(bench, tmp_path):
    images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 3
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "three.npz", **arrays)
    assert "3" in bench(3, "finetune", "model.pt", "--data", "npz:three.npz")


def test_data_that_cannot_be_read(bench, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    bench(3, "train", "--data", "npz:bad.npz", "-o", "n.pt")
    np.savez(tmp_path / "few.npz", train_images=np.zeros((4, 8, 8), np.uint8))
    assert "train_labels" in bench(3, "train", "--data", "npz:few.npz", "-o", "n.pt")


@pytest.mark.parametrize(
    "case", [case for case in bad_input.CASES["Recipes"] if case.given], ids=lambda case: case.given
)
def test_dry_run_finds_mistakes_of_a_recipe_too(bench, tmp_path, case):
    case.prepare(tmp_path)
    assert case.says in bench(2, *shlex.split(case.line), "--dry-run")


def test_recipe_that_is_not_toml(bench, tmp_path):
    (tmp_path / "recipe.toml").write_text("rprune = =")
    assert "TOML" in bench(2, "run", "recipe.toml", "-o", "new")


@pytest.mark.parametrize("setting", ["epochs", "epochs=0", "epochs=many", "epoch=3", "epochs.x=1", "=3"])
def test_bad_override_of_a_command(bench, setting):
    bench(2, "train", "--data", "digits", "-o", "n.pt", "--set", setting)


@pytest.mark.parametrize("rule", ["sparsity", "sparsity=", "sparsity=many", "sparsity=nan", "=0.5"])
def test_gate_rule_that_cannot_be_read(bench, rule):
    bench(2, "gate", "bundle", "--min", rule)


@pytest.mark.parametrize("text", ["{}", "[]", "3", "null", '{"schema": "rprune.report/9"}', "no json", '"report"'])
def test_file_that_is_no_report(bench, tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    bench(3, "gate", "other.json", "--min", "sparsity=0.5")
    bench(3, "report", "other.json")


def test_report_of_an_unknown_schema(bench, tmp_path):
    table = json.loads((tmp_path / "bundle" / "report.json").read_text())
    (tmp_path / "new.json").write_text(json.dumps(table | {"schema": "rprune.report/2"}))
    assert "rprune.report/2" in bench(3, "gate", "new.json", "--min", "sparsity=0.5")
    (tmp_path / "new.json").write_text(json.dumps(table | {"claims": 3}))
    assert "claims" in bench(3, "gate", "new.json", "--min", "sparsity=0.5")


def test_verify_of_a_folder_without_a_report(bench, tmp_path):
    (tmp_path / "empty").mkdir()
    bench(3, "verify", "empty")
    bench(3, "verify", "none")


def test_export_with_certificates_of_another_model(bench, tmp_path, chain):
    shutil.copy(chain / "model-lwm-0.5-finetuned-int8.certificates.json", tmp_path / "c.json")
    assert "another model" in bench(3, "export", "model.pt", "-o", "new", "--certificates", "c.json")


def test_architecture_of_a_file_is_never_imported(bench, tmp_path):
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('trap').mkdir()\ndef factory(): ...\n")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    for name in ("evil:factory", "evil.py:factory", str(tmp_path / "evil.py:factory")):
        torch.save(content | {"rprune": content["rprune"].replace('"cnn-small"', json.dumps(name))}, tmp_path / "e.pt")
        assert "evil" in bench(3, "prune", "e.pt", "-s", 0.5)
    assert not (tmp_path / "trap").exists()


def _raise(error: BaseException):
    def work(*_arguments: object, **_options: object) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "wanted"),
    [
        (ZeroDivisionError("boom"), 70, "internal error: ZeroDivisionError: boom"),
        (KeyboardInterrupt(), 130, "continues"),
        (MemoryError(), 4, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 4, "--batch-size"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to "
                "allocate 8 bytes. Error code 12 (Cannot allocate memory)"
            ),
            4,
            "accumulate",
        ),
        (OSError(28, "No space left on device", "x"), 4, "cannot write x: No space left on device"),
        (OSError(30, "Read-only file system", "x"), 2, "cannot write x: Read-only file system"),
        (RuntimeError("shapes"), 70, "internal error"),
    ],
)
def test_failures_have_their_own_codes(call, tmp_path, monkeypatch, error, code, wanted):
    monkeypatch.setattr("rprune.pipeline.single.run_stage", _raise(error))
    said = call("train", "--data", "digits", "-o", "n.pt", "-q", cwd=tmp_path)
    assert said.code == code
    assert wanted in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "n.pt").exists()


def test_debug_shows_the_traceback(call, tmp_path, monkeypatch):
    monkeypatch.setattr("rprune.pipeline.single.run_stage", _raise(ZeroDivisionError("boom")))
    monkeypatch.setenv("RPRUNE_DEBUG", "1")
    said = call("train", "--data", "digits", "-o", "n.pt", "-q", cwd=tmp_path)
    assert said.code == 70
    assert "Traceback" in said.err


def test_interrupted_training_continues(call, chain, tmp_path, monkeypatch):
    """Ctrl-C after the first epoch; the same command ends with the same weights as one that was left alone."""
    from rprune.cli.console import ProgressLines

    epochs = []

    def stop(_self, _stage, log):
        epochs.append(log.epoch)
        if epochs == [1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLines, "epoch", stop)
    command = ("finetune", chain / "model-lwm-0.5.pt", "--epochs", 2, "--batch-size", 32, "-o", "n.pt", "-q")
    assert call(*command, cwd=tmp_path).code == 130
    assert [p.name for p in tmp_path.iterdir()] == ["n.pt.partial"]
    assert call(*command, cwd=tmp_path).code == 0
    assert epochs == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["n.pt"]
    assert load_artifact(tmp_path / "n.pt").digest == load_artifact(chain / "model-lwm-0.5-finetuned.pt").digest


def test_codes_of_the_tests_are_the_documented_ones():
    assert set(EXIT_CODES) == {0, 1, 2, 3, 4, 5, 70, 130}
