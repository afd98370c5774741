"""Anybody's model files on the command line: taken, refused, and told about."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from torch import nn

from rprune.pipeline.artifact import load_artifact


@pytest.fixture(scope="session")
def files(chain, tmp_path_factory):
    """The chain's dense model in files as others write them."""
    folder = tmp_path_factory.mktemp("files")
    model = load_artifact(chain / "model.pt").model()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "ck.pt")
    torch.save(model, folder / "whole.pt")
    torch.export.save(torch.export.export(model, (torch.rand(64, 1, 8, 8),)), folder / "net.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, torch.rand(1, 1, 8, 8)).save(folder / "script.pt")
    return folder


def counts(said):
    assert said.code == 0, said.err
    return [(row["metric"], row["correct"], row["n"]) for row in said.json["results"]]


DIGITS = ("--data", "digits", "--eps", "0.03")


def test_every_form_of_a_net_is_evaluated_alike(files, chain, call, tmp_path):
    wanted = counts(call("evaluate", chain / "model.pt", "--json", cwd=tmp_path))
    for name in ("ck.pt", "whole.pt", "net.pt2", "script.pt"):
        said = call("evaluate", files / name, *DIGITS, "--trust-pickle", "--json", cwd=tmp_path)
        assert counts(said) == wanted
        assert ("WARNING" in said.err) == (name in ("whole.pt", "script.pt"))


def test_a_note_tells_what_was_taken_and_guessed(files, call, tmp_path):
    said = call("prune", files / "ck.pt", *DIGITS, "-s", 0.5, "-m", "lwm", "-o", "p.pt", cwd=tmp_path)
    assert said.code == 0, said.err
    note = said.err.splitlines()[0]
    assert note.startswith(
        "Import ck.pt (checkpoint: 'state_dict' of it, without the prefix module.) as cnn-small with"
    )
    entry = load_artifact(tmp_path / "p.pt").metadata.lineage[0]
    assert (entry.stage, entry.config["part"], entry.config["guessed"]) == ("import", "state_dict", "cnn-small")
    assert len(entry.config["sha256"]) == 64


@pytest.mark.parametrize("command", [("evaluate",), ("prune", "-s", 0.5), ("attack",), ("certify",), ("quantize",)])
@pytest.mark.parametrize("name", ["whole.pt", "script.pt"])
def test_programs_that_may_do_anything_are_refused_without_trust(files, call, tmp_path, command, name):
    said = call(command[0], files / name, *command[1:], *DIGITS, cwd=tmp_path)
    said.refused(3)
    if command[0] != "quantize" and (name, command[0]) != ("script.pt", "prune"):
        assert "--trust-pickle" in said.err
    assert list(tmp_path.iterdir()) == []


class Evil(nn.Linear):
    """Weights with a command beside them."""

    def __reduce__(self):
        return os.system, (f"touch {self.trap}",)


def test_a_command_in_a_model_file_is_never_run(call, tmp_path):
    trap = tmp_path / "trap"
    evil = Evil(2, 2)
    evil.trap = trap
    torch.save({"state_dict": evil}, tmp_path / "evil.pt")
    torch.save({"state_dict": evil}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("evil.pt", "old.pt"):
        assert "system" in call("evaluate", name, *DIGITS, cwd=tmp_path).refused(3)
        assert call("inspect", name, "--unsafe-globals", cwd=tmp_path).out.splitlines() == [
            f"{os.system.__module__}.system"
        ]
    assert not trap.exists()


def test_the_warning_cannot_be_silenced_and_the_report_repeats_it(files, call, tmp_path):
    said = call(
        "prune", files / "whole.pt", *DIGITS, "-s", 0.5, "-m", "lwm", "-o", "p.pt", "-q", "--trust-pickle", cwd=tmp_path
    )
    assert said.code == 0, said.err
    (warning,) = said.err.splitlines()
    entry = load_artifact(tmp_path / "p.pt").metadata.lineage[0]
    assert warning.startswith("WARNING: ")
    assert entry.config["sha256"] in warning
    assert all(name in warning for name in entry.config["globals"])
    assert "rprune.models.cnn.CNNSmall" in warning
    assert entry.config["loaded_unsafely"] is True
    assert call("inspect", "p.pt", "--json", cwd=tmp_path).json["loaded_unsafely"] is True
    said = call("export", "p.pt", "-o", "out", "--suite", "fgsm", "-n", 20, "--no-health", "-q", cwd=tmp_path)
    assert said.code == 0, said.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["lineage"][0]["config"]["loaded_unsafely"] is True
    assert any("--trust-pickle" in line for line in report["warnings"])
    assert "--trust-pickle" in (tmp_path / "out" / "report.html").read_text()
    assert call("verify", "out", cwd=tmp_path).code == 0


def test_attack_and_smoothing_of_a_program(files, call, tmp_path):
    options = (*DIGITS, "-n", 20)
    said = call(
        "attack", files / "net.pt2", *options, "--suite", "pgd10", "--no-health", "-o", "a", "--json", cwd=tmp_path
    )
    assert said.code == 0, said.err
    dense = call(
        "attack", files / "ck.pt", *options, "--suite", "pgd10", "--no-health", "-o", "b", "--json", cwd=tmp_path
    )
    robust = [result.json["columns"][0]["claims"][1]["correct"] for result in (said, dense)]
    assert abs(robust[0] - robust[1]) <= 1
    assert said.json["model"]["role"] == "program"
    assert "loaded_unsafely" not in said.json["model"]
    trusted = call("attack", files / "script.pt", *options, "--suite", "fgsm", "--no-health", "-o", "c", "--json",
                   "--trust-pickle", cwd=tmp_path)  # fmt: skip
    assert trusted.json["model"]["loaded_unsafely"] is True
    (tmp_path / "net.pt2").write_bytes((files / "net.pt2").read_bytes())
    made = call("certify", "net.pt2", *DIGITS, "-n", 5, "--n", 100, "-o", "c.json", cwd=tmp_path)
    assert made.code == 0, made.err
    assert call("certify", "--check", "c.json", cwd=tmp_path).code == 0
    assert "smoothing alone" in call("certify", "net.pt2", *DIGITS, "-m", "ibp", "-o", "d.json", cwd=tmp_path).refused(
        2
    )


def test_a_program_takes_normalised_images_where_the_user_says_so(files, call, tmp_path):
    plain = call("evaluate", files / "net.pt2", *DIGITS, "--json", cwd=tmp_path)
    same = call("evaluate", files / "net.pt2", *DIGITS, "--mean", "0", "--std", "1", "--json", cwd=tmp_path)
    other = call("evaluate", files / "net.pt2", *DIGITS, "--mean", "5", "--std", "0.01", "--json", cwd=tmp_path)
    assert counts(same) == counts(plain) != counts(other)


def test_a_program_that_does_not_go_with_the_data_is_refused(call, tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    torch.export.save(torch.export.export(net, (torch.rand(2, 3, 4, 4),)), tmp_path / "net.pt2")
    assert "net.pt2" in call("evaluate", "net.pt2", *DIGITS, cwd=tmp_path).refused(3)


RECIPE = """
rprune = 1
name = "own"
checkpoint = "{file}"
[data]
source = "digits"
[threat]
eps = "0.03"
[[stage]]
kind = "prune"
method = "lwm"
sparsity = 0.5
"""


def test_a_recipe_starts_from_anybodys_checkpoint(files, call, tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.format(file=files / "ck.pt"))
    assert call("run", "r.toml", "-o", "out", "-q", cwd=tmp_path).code == 0
    assert load_artifact(tmp_path / "out" / "01-prune").metadata.lineage[0].config["guessed"] == "cnn-small"
    (tmp_path / "r.toml").write_text(RECIPE.format(file=files / "whole.pt"))
    call("run", "r.toml", "-o", "out", "-q", cwd=tmp_path).refused(3)
    said = call("run", "r.toml", "-o", "out", "-q", "--trust-pickle", cwd=tmp_path)
    assert said.code == 0
    assert "WARNING" in said.err
    # the same weights, but the stage that did not know where they come from is not reused
    assert load_artifact(tmp_path / "out" / "01-prune").loaded_unsafely


@pytest.mark.parametrize("name", ["ck.pt", "net.pt2", "script.pt", "out/model.safetensors"])
def test_inspect_without_torch_tells_whose_names_they_are(files, chain, python, tmp_path, name):
    file = chain / name if "/" in name else files / name
    code = (
        "import sys; sys.modules['torch'] = None; from rprune.cli.app import main; "
        f"main(['inspect', {str(file)!r}, '--json', '--layers'])"
    )
    said = python("-c", code, cwd=tmp_path)
    assert said.code == 0, said.err
    assert said.json["architecture"] == "cnn-small by names; shapes were not compared"
    (tensor,) = (row for row in said.json["tensors"] if row["name"] == "features.0.weight")
    assert tensor["shape"][1:] == [1, 4, 4]
    assert 0 < tensor["nonzero"] <= 256


def test_inspect_shows_tables(files, chain, call, tmp_path):
    said = call("inspect", files / "ck.pt", "--layers", cwd=tmp_path).out
    for text in ("state_dict", "module.", "cnn-small", "unsafe globals", "none", "not zero", "features.0.weight"):
        assert text in said
    (tmp_path / "\x1b[2J.pt").write_bytes((files / "ck.pt").read_bytes())
    assert "\x1b" not in call("inspect", "\x1b[2J.pt", cwd=tmp_path).out
    assert call("quantize", chain / "model.pt", "-o", "q", "-q", cwd=tmp_path).code == 0
    assert call("inspect", "q", "--json", cwd=tmp_path).json["stage"] == "quantize"
