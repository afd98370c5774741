"""rprune run --show-config: every value of a run, and where it comes from."""

from __future__ import annotations

import pytest

RECIPE = """
rprune = 1
name = "shown"
[data]
source = "cifar10"
[[stage]]
kind = "train"
epochs = 5
objective = { name = "trades", attack = { steps = 3 } }
[[stage]]
kind = "prune"
method = "hydra"
sparsity = 0.5
"""


@pytest.fixture
def show(call, tmp_path, monkeypatch):
    monkeypatch.delenv("RPRUNE_DATA", raising=False)
    monkeypatch.delenv("RPRUNE_DEVICE", raising=False)
    (tmp_path / "recipe.toml").write_text(RECIPE)

    def run(*options):
        said = call("run", "recipe.toml", "--show-config", "--json", *options, cwd=tmp_path)
        assert said.code == 0, said.err
        return {row["key"]: (row["value"], row["origin"]) for row in said.json}

    return run


def test_file_and_defaults_those_of_classes_included(show, tmp_path):
    found = show()
    assert found["name"] == ("shown", "file")
    assert found["seed"] == (0, "default")
    assert found["stage.train.epochs"] == (5, "file")
    assert found["stage.train.lr"] == (0.1, "default")
    assert found["stage.train.objective.name"] == ("trades", "file")
    assert found["stage.train.objective.attack.steps"] == (3, "file")
    assert found["stage.train.objective.attack.start"] == ("near", "default")
    assert found["stage.prune.method.name"] == ("hydra", "file")
    assert found["stage.prune.epochs"] == (20, "default")
    assert found["device"] == ("auto", "default")
    assert found["data folder"] == ("~/.cache/rprune", "default")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_set_reaches_into_tables(show):
    found = show("--set", "seed=3", "--set", "stage.prune.method.allocation=lamp", "--set", 'threat={eps = "0.1"}')
    assert found["seed"] == (3, "--set")
    assert found["stage.prune.method.allocation"] == ("lamp", "--set")
    assert found["stage.prune.method.name"] == ("hydra", "file")
    assert found["threat.eps"] == ("0.1", "--set")


def test_environment_options_and_preset(show, monkeypatch):
    monkeypatch.setenv("RPRUNE_DEVICE", "cpu")
    monkeypatch.setenv("RPRUNE_DATA", "sets")
    found = show("-o", "here", "--set", "preset=paper")
    assert found["device"] == ("cpu", "environment")
    assert found["data folder"] == ("sets", "environment")
    assert found["output"] == ("here", "option")
    assert found["stage.prune.weight_decay"][1] == "preset paper"
    assert found["stage.train.epochs"] == (5, "file")
    assert show("--device", "cpu")["device"] == ("cpu", "option")


def test_what_smoke_changes_is_said(show):
    found = show("--smoke", "--set", "seed=3")
    assert found["name"] == ("shown-smoke", "--smoke")
    assert found["stage.train.objective.attack.steps"] == (1, "--smoke")
    assert found["stage.train.objective.beta"][1] == "default"
    assert found["seed"] == (3, "--set")
    assert found["output"] == ("runs/shown-smoke", "default")


def test_table(call, tmp_path):
    said = call("run", "digits", "--show-config", cwd=tmp_path)
    assert said.code == 0
    assert any(line.split() == ["stage.prune.sparsity", "0.9", "file"] for line in said.out.splitlines())
