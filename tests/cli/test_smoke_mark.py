"""The mark of a smoke run is on all that is said of it or of its files, once."""

import json

import pytest

SMOKE = "SMOKE RUN: it shows that the chain works; its numbers mean nothing"
RECIPE = """
rprune = 1
name = "tried"
[data]
source = "digits"
[[stage]]
kind = "train"
objective = "benign"
[[stage]]
kind = "quantize"
[[stage]]
kind = "export"
suite = "pgd10"
"""


@pytest.fixture(scope="module")
def tried(call, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "recipe.toml").write_text(RECIPE)
    said = call("run", "recipe.toml", "--smoke", "-o", "out", cwd=folder)
    assert said.code == 0, said.err
    return folder, said


def test_a_run_says_so_once_and_last(tried, call, tmp_path):
    assert tried[1].out.count("SMOKE RUN") == 1
    assert tried[1].out.splitlines()[-1] == SMOKE
    assert "train smoke  1/1" in tried[1].err  # the name under which TensorBoard has it
    (tmp_path / "recipe.toml").write_text(RECIPE[: RECIPE.index('[[stage]]\nkind = "quantize"')])
    assert call("run", "recipe.toml", "--smoke", cwd=tmp_path).out.splitlines()[-1] == SMOKE


@pytest.mark.parametrize(
    "command",
    [
        ("attack", "out/export/model.onnx", "--suite", "pgd10", "--no-health", "-o", "attacked"),
        ("attack", "out/02-quantize", "--suite", "pgd10", "--no-health", "-o", "attacked-too"),
        ("evaluate", "out/01-train"),
        ("prune", "out/01-train", "-s", 0.5, "-m", "lwm", "-o", "pruned.pt"),
        ("certify", "out/02-quantize", "-m", "ibp", "-n", 2),
        ("report", "out/export"),
        ("verify", "out/export"),
    ],
    ids=lambda command: " ".join(map(str, command[:2])),
)
def test_a_command_on_its_files_says_so(tried, call, command):
    said = call(*command, cwd=tried[0])
    assert said.code == 0, said.err
    assert said.out.splitlines().count(SMOKE) == 1


def test_files_written_of_it_say_so(tried, call):
    folder, _ = tried
    attack = "attack", "out/export/model.onnx", "--suite", "pgd10", "--no-health", "-o", "again"
    assert call(*attack, "--json", cwd=folder).json["smoke"]
    assert json.loads((folder / "again" / "attack.json").read_text())["smoke"]
    certify = "certify", "out/export/model.int8.onnx", "-m", "ibp", "-n", 2, "-o", "c.json", "--json"
    assert call(*certify, cwd=folder).json["smoke"]
    assert call("evaluate", "out/01-train", "--json", cwd=folder).json["smoke"]
    assert call("report", "out/export", "--plots", "plots", cwd=folder).code == 0
    plots = list((folder / "plots").iterdir())
    assert plots
    assert all(">SMOKE RUN<" in path.read_text() for path in plots)
