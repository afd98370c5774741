"""The commands one after the other, in every form of their files."""

from __future__ import annotations

import shutil

import pytest
import torch

from rprune.pipeline.artifact import load_artifact

TRAIN = ("--data", "digits", "--objective", "benign", "--epochs", 2, "--batch-size", 16, "--lr", 0.05, "--eps", "0.03")
INT8 = "model-lwm-0.5-finetuned-int8.pt"


@pytest.fixture(scope="module")
def json_chain(call, tmp_path_factory):
    """The same chain with --json, into .safetensors files."""
    folder = tmp_path_factory.mktemp("json")
    commands = [
        ("train", *TRAIN, "-o", "m.safetensors"),
        ("prune", "m.safetensors", "-s", 0.5, "-m", "lwm"),
        ("finetune", "m-lwm-0.5.safetensors", "--epochs", 2, "--batch-size", 32),
        ("quantize", "m-lwm-0.5-finetuned.safetensors"),
        ("certify", "m-lwm-0.5-finetuned-int8.safetensors", "--n", 100, "--limit", 10),
        ("evaluate", "m-lwm-0.5-finetuned-int8.safetensors", "--limit", 20, "--suite", "fgsm"),
        (
            "export",
            "m-lwm-0.5-finetuned-int8.safetensors",
            "-o",
            "out",
            "--suite",
            "fgsm",
            "--limit",
            20,
            "--no-health",
        ),
        ("verify", "out"),
        ("gate", "out", "--min", "sparsity=0.5"),
        ("report", "out"),
        ("inspect", "m.safetensors"),
        ("list", "methods"),
    ]
    return {command[0]: call(*command, "--json", cwd=folder) for command in commands}


def test_chain_writes_default_names(chain):
    names = {p.name for p in chain.folder.iterdir()}
    assert names == {
        "model.pt", "model-lwm-0.5.pt", "model-lwm-0.5-finetuned.pt", INT8,
        "model-lwm-0.5-finetuned-int8.certificates.json", "out",
    }  # fmt: skip
    assert {p.name for p in (chain / "out").rglob("*") if p.is_file()} == {
        "model.safetensors", "masks.safetensors", "model.onnx", "model.int8.onnx", "model.compact.onnx",
            "model.packed.safetensors", "samples.csv",
        "adversarial.safetensors", "report.json", "report.html", "key.json",
    }  # fmt: skip


def test_chain_shows_plan_result_and_next_command(chain):
    for name in ("train", "prune", "finetune", "quantize"):
        said = chain.said[name]
        assert said.err.startswith("Plan ")
        assert "data digits" in said.err
        assert "threat linf 0.03" in said.err
        assert "clean accuracy (validation)" in said.out
        assert "sha256 of the tensors" in said.out
        assert "Next: rprune" in said.err
    assert "11,124" in chain.said["prune"].out
    assert "certified accuracy of the onnx-int8 form" in chain.said["certify"].out
    assert "robust accuracy" in chain.said["export"].out
    assert "VERIFIED level=replay" in chain.said["verify"].out
    assert "GATE PASSED" in chain.said["gate"].out


def test_threat_and_data_travel_with_the_file(chain):
    first, last = load_artifact(chain / "model.pt").metadata, load_artifact(chain / INT8).metadata
    assert (last.norm, last.eps, last.data, last.objective) == ("linf", "0.03", first.data, first.objective)
    stages = [entry.stage for entry in last.lineage if entry.stage != "shrink"]  # where pruning left dead channels
    assert stages == ["train", "prune", "finetune", "quantize"]


def test_next_command_named_by_train_names_its_output(chain):
    assert "rprune prune model.pt" in chain.said["train"].err


def test_every_command_prints_one_json_document(json_chain):
    for name, said in json_chain.items():
        assert said.code == 0, (name, said.err)
        assert said.json, name
        assert said.err == "", name


def test_json_of_a_stage(json_chain):
    said = json_chain["prune"].json
    assert said["output"] == "m-lwm-0.5.safetensors"
    assert said["stage"]["stage"] == "prune"
    assert said["stage"]["metrics"]["kept"] == 11124
    assert said["threat"] == "linf 0.03"


def test_json_of_the_trust_commands(json_chain):
    assert json_chain["verify"].json["passed"] is True
    assert json_chain["gate"].json["result"] == "passed"
    assert json_chain["gate"].json["report"] == json_chain["report"].json["id"] == json_chain["export"].json["id"]


def test_the_form_of_the_files_does_not_change_the_tensors(chain, json_chain):
    for name, file in {
        "train": "model.pt", "prune": "model-lwm-0.5.pt",
        "finetune": "model-lwm-0.5-finetuned.pt", "quantize": INT8,
    }.items():  # fmt: skip
        assert json_chain[name].json["digest"] == load_artifact(chain / file).digest


def test_folder_outputs_are_inputs(call, chain, tmp_path):
    shutil.copy(chain / "model.pt", tmp_path)
    assert call("prune", "model.pt", "-s", 0.5, "-m", "lwm", "-o", "pruned", "-q", cwd=tmp_path).code == 0
    assert (tmp_path / "pruned" / "stage.json").is_file()
    assert load_artifact(tmp_path / "pruned").digest == load_artifact(chain / "model-lwm-0.5.pt").digest
    tuned = call("finetune", "pruned", "--epochs", 2, "--batch-size", 32, "--json", cwd=tmp_path)
    assert tuned.json["output"] == "pruned-finetuned.pt"
    assert tuned.json["digest"] == load_artifact(chain / "model-lwm-0.5-finetuned.pt").digest


def test_dry_run_writes_nothing(call, chain, tmp_path, contents):
    shutil.copy(chain / "model.pt", tmp_path)
    before = contents(tmp_path)
    for command in (
        ("train", "--data", "digits", "-o", "other.pt"),
        ("prune", "model.pt", "-s", 0.9),
        ("finetune", "model.pt"),
        ("quantize", "model.pt"),
    ):
        said = call(*command, "--dry-run", cwd=tmp_path)
        assert said.code == 0
        assert said.err.startswith("Plan ")
        assert "cost on this machine" in said.out
        told = call(*command, "--dry-run", "--json", cwd=tmp_path).json
        assert "plan" in told
        assert set(told["cost"]) == {"steps", "flops", "seconds", "memory", "once", "at_most"}
    assert contents(tmp_path) == before


def test_existing_output_is_kept_without_force(call, chain, tmp_path, contents):
    shutil.copy(chain / "model.pt", tmp_path)
    shutil.copy(chain / INT8, tmp_path)
    for name in ("a.pt", "a.json"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("precious")
    before = contents(tmp_path)
    for command in (
        ("train", *TRAIN),
        ("prune", "model.pt", "-s", 0.5, "-m", "lwm", "-o", "a.pt"),
        ("finetune", "model.pt", "--epochs", 1, "-o", "a.pt"),
        ("quantize", "model.pt", "-o", "full"),
        ("certify", INT8, "--n", 100, "--limit", 2, "-o", "a.json"),
        ("export", INT8, "-o", "full", "--suite", "fgsm", "--limit", 5, "--no-health"),
    ):
        said = call(*command, "-q", cwd=tmp_path)
        assert said.code == 2, command
        assert "--force" in said.err
        assert contents(tmp_path) == before
    assert call("quantize", "model.pt", "-o", "a.pt", "--force", "-q", cwd=tmp_path).code == 0
    assert load_artifact(tmp_path / "a.pt").metadata.stage == "quantize"


@pytest.mark.parametrize("wrapped", [False, True])
def test_foreign_state_dict_is_pruned(call, chain, tmp_path, wrapped):
    state = load_artifact(chain / "model.pt").state
    if wrapped:
        state = {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    torch.save(state, tmp_path / "foreign.pt")
    said = call(
        "prune", "foreign.pt", "-s", 0.5, "-m", "lwm", "--arch", "cnn-small", "--data", "digits", "--json", cwd=tmp_path
    )
    assert said.code == 0, said.err
    found = load_artifact(tmp_path / "foreign-lwm-0.5.pt")
    assert found.digest == load_artifact(chain / "model-lwm-0.5.pt").digest
    assert [entry.stage for entry in found.metadata.lineage] == ["import", "prune"]


def test_foreign_state_dict_needs_data(call, chain, tmp_path):
    """Its architecture is told by its names and shapes."""
    torch.save(load_artifact(chain / "model.pt").state, tmp_path / "foreign.pt")
    said = call("prune", "foreign.pt", "-s", 0.5, cwd=tmp_path)
    assert said.code == 2
    assert "--data" in said.err


@pytest.mark.parametrize("method", ["harp", "hydra"])
def test_pruning_needs_no_further_option_and_leaves_the_budget(call, chain, tmp_path, method):
    shutil.copy(chain / "model.pt", tmp_path)
    said = call("prune", "model.pt", "-s", 0.5, "-m", method, "--epochs", 2, "--json", cwd=tmp_path)
    assert said.code == 0, said.err
    entry = said.json["stage"]
    assert entry["config"]["objective"]["name"] == "benign"
    assert said.json["threat"] == "linf 0.03"
    found = load_artifact(tmp_path / f"model-{method}-0.5.pt")
    assert found.metadata.architecture["name"] == "cnn-small"
    assert sum(int(found.state[name].count_nonzero()) for name in found.masks) == 11124


def test_harp_reaches_the_export(call, chain, tmp_path):
    shutil.copy(chain / "model.pt", tmp_path)
    assert call("prune", "model.pt", "-s", 0.9, "--epochs", 2, "-o", "p.pt", "-q", cwd=tmp_path).code == 0
    assert call("finetune", "p.pt", "--epochs", 1, "-o", "f.pt", "-q", cwd=tmp_path).code == 0
    assert call("quantize", "f.pt", "-o", "q.pt", "-q", cwd=tmp_path).code == 0
    said = call("export", "q.pt", "-o", "out", "--suite", "fgsm", "--limit", 20, "--no-health", "--json", cwd=tmp_path)
    assert said.code == 0, said.err
    sparsity = said.json["sparsity"]
    assert sparsity["kept"] == sparsity["budget"] <= 2224  # weights of dead channels are gone as well
    assert sparsity["overall"] == 1 - sparsity["kept"] / 22248


def test_flipped_byte_is_an_integrity_failure(call, chain, tmp_path):
    shutil.copytree(chain / "out", tmp_path / "out")
    file = tmp_path / "out" / "model.int8.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    said = call("verify", "out", cwd=tmp_path)
    assert said.code == 5
    assert "NOT VERIFIED" in said.out
    assert "model.int8.onnx differs" in said.out
    assert call("verify", "out", "--json", cwd=tmp_path).json["integrity"] is False


def test_gate_that_cannot_be_met(call, chain):
    said = call("gate", "out", "--min", "clean_accuracy=1", "--min", "sparsity=0.5", cwd=chain.folder)
    assert said.code == 1
    assert "GATE FAILED  1 of 2 rules" in said.out
    said = call("gate", "out", "--min", "clean_accuracy=1", "--exit-zero", cwd=chain.folder)
    assert said.code == 0
    assert "GATE FAILED" in said.out
    assert call("gate", "out/report.json", "--max", "sparsity=0.1", cwd=chain.folder).code == 1


def test_false_claim_under_another_policy(call, chain, tmp_path):
    (tmp_path / "gate.toml").write_text('[[gate]]\nmetric = "sparsity"\nvalue = 0.5\n')
    said = call("verify", chain / "out", "--policy", "gate.toml", "--level", "static", cwd=tmp_path)
    assert said.code == 1
    assert "policy" in said.out


def test_evaluate_both_forms(call, chain):
    said = call("evaluate", INT8, "--suite", "fgsm", "--limit", 30, "--json", cwd=chain.folder)
    found = {(row["metric"], row["form"]): row for row in said.json["results"]}
    for form in ("float", "8-bit"):
        assert found["robust_accuracy", form]["correct"] <= found["clean_accuracy", form]["correct"]
        assert found["clean_accuracy", form]["n"] == 30


def test_report_is_rendered_again(call, chain, tmp_path):
    said = call("report", chain / "out", "-o", "page.html", cwd=tmp_path)
    assert said.code == 0
    assert (tmp_path / "page.html").read_bytes() == (chain / "out" / "report.html").read_bytes()
