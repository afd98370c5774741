"""--show-config: of a run every value and where it comes from; of a stage what a recipe would hold."""

from __future__ import annotations

import tomllib

import pytest

from rprune.files import toml
from rprune.pipeline.recipe import Recipe

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


STAGES = {
    "train": ("--data", "digits", "--objective", "trades", "--epochs", 3, "--eps", "1/255"),
    "prune": ("model.pt", "-s", 0.5, "-m", "hydra", "--set", "method.allocation=lamp"),
    "finetune": ("model-lwm-0.5.pt", "--lr", 0.02),
    "quantize": ("model-lwm-0.5-finetuned.pt", "--bits", 4),
    "certify": ("model-lwm-0.5-finetuned-int8.pt", "-m", "ibp"),
    "export": ("model-lwm-0.5-finetuned-int8.pt", "-o", "new", "--suite", "pgd10"),
}


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_as_a_recipe_has_it(call, chain, kind):
    before = sorted(chain.folder.rglob("*"))
    said = call(kind, *STAGES[kind], "--seed", 5, "--show-config", cwd=chain.folder)
    assert (said.code, said.err) == (0, "")
    found = tomllib.loads(said.out)
    (stage,) = found["stage"]
    assert (found["seed"], found["data"]["source"], stage["kind"]) == (5, "digits", kind)
    assert Recipe.model_validate({"rprune": 1, "name": "again", "checkpoint": "m.pt"} | found).stage[0].kind == kind
    in_json = call(kind, *STAGES[kind], "--seed", 5, "--show-config", "--json", cwd=chain.folder).json
    assert in_json["stage"][0].keys() >= stage.keys()
    assert sorted(chain.folder.rglob("*")) == before


def test_options_and_defaults_of_a_stage(call, chain):
    found = tomllib.loads(call("train", *STAGES["train"], "--show-config", cwd=chain.folder).out)
    (stage,) = found["stage"]
    assert (found["threat"], stage["epochs"], stage["lr"]) == ({"norm": "linf", "eps": "1/255"}, 3, 0.1)
    assert (stage["objective"]["name"], stage["objective"]["beta"]) == ("trades", 6.0)
    (stage,) = tomllib.loads(call("prune", *STAGES["prune"], "--show-config", cwd=chain.folder).out)["stage"]
    assert (stage["method"]["name"], stage["method"]["allocation"], stage["epochs"]) == ("hydra", "lamp", 20)


def test_values_come_back_from_toml():
    value = {"a b": [1, 2.5e-7, True, '\u00e9 "x"\n'], "c": {"d": {}, "e": []}, "none": None}
    assert tomllib.loads(f"v = {toml(value)}")["v"] == {key: value[key] for key in ("a b", "c")}
