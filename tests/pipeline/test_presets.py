"""Presets: the papers' settings fit the stages, and what the user says wins."""

from __future__ import annotations

import json

import pytest

from rprune.cli.app import main
from rprune.errors import UsageError
from rprune.objectives.base import OBJECTIVES
from rprune.pipeline.artifact import save_artifact
from rprune.pipeline.presets import preset, pruned_by
from rprune.pipeline.recipe import FinetuneStage, PruneStage, ThreatSection, TrainStage, read_recipe, validated
from rprune.pipeline.stages import check_stage, prune
from rprune.pruning.base import METHODS

STAGES = {"train": TrainStage, "prune": PruneStage, "finetune": FinetuneStage}


@pytest.mark.parametrize("name", METHODS.all())
def test_every_paper_preset_is_valid(bench, trained, name):
    settings = METHODS.get(name).paper_settings
    assert set(settings) <= {*STAGES, "threat"}
    assert settings, "every built-in method says what its paper ran"
    threat = ThreatSection(**settings.get("threat", {"eps": "8/255"})).model()
    for kind, section in STAGES.items():
        table = json.loads(json.dumps(settings.get(kind, {})))
        if kind == "prune":
            table["method"] = {"name": name, **table.get("method", {})}
            table["sparsity"] = 0.5
        stage = validated(section, table, f"{name} {kind}")
        check_stage(stage, bench, trained.metadata.arch)
        if stage.objective is not None:
            OBJECTIVES.build(stage.objective, threat=threat)


def test_papers_figures():
    """A few figures of the fact sheets, where paper and code differ the code's."""
    hydra, harp = preset("paper", "hydra"), preset("paper", "harp")
    assert (hydra["threat"]["eps"], hydra["prune"]["weight_decay"], hydra["finetune"]["lr"]) == ("0.031", 1e-4, 0.01)
    assert hydra["train"]["objective"]["name"] == "trades"
    assert (harp["prune"]["weight_decay"], harp["prune"]["schedule"]) == (5e-4, "cosine-by-epoch")
    admm = preset("paper", "robust-admm")
    assert (admm["prune"]["lr"], admm["prune"]["method"]) == (0.01, {"rho": 0.001, "every": 20})
    assert preset("harp:rprune", None) == {}


def test_presets_that_do_not_exist():
    with pytest.raises(UsageError, match="unknown preset 'papr'"):
        preset("papr", "harp")
    with pytest.raises(UsageError, match="of which method"):
        preset("paper", None)
    with pytest.raises(UsageError, match="unknown method 'harpp'"):
        preset("harpp:paper", None)


RECIPE = """
rprune = 1
name = "p"
preset = "paper"
[data]
source = "digits"
[[stage]]
kind = "train"
epochs = 3
[[stage]]
kind = "prune"
method = { name = "robust-admm", every = 5 }
sparsity = 0.9
[[stage]]
kind = "finetune"
lr = 0.5
"""


def test_a_recipe_takes_what_it_does_not_say(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(RECIPE)
    train, pruning, tune = read_recipe(path).stage
    assert (train.epochs, train.weight_decay) == (3, 1e-4)
    assert pruning.method == {"name": "robust-admm", "rho": 0.001, "every": 5}
    assert (pruning.lr, pruning.schedule) == (0.01, "thirds:20")
    assert (tune.lr, tune.epochs) == (0.5, 200)
    assert read_recipe(path).threat.eps == "8/255"
    path.write_text(RECIPE.replace("[data]", '[threat]\neps = "0.1"\n[data]'))
    assert read_recipe(path).threat.eps == "0.1"
    path.write_text(RECIPE.replace('"paper"', '"rprune"'))
    assert read_recipe(path).stage[1].schedule == "cosine"


def plan(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments), "--dry-run", "--json"])
    assert done.value.code == 0
    return json.loads(capsys.readouterr().out)["plan"]


def test_commands_take_presets(trained, bench, tmp_path, capsys):
    model, pruned = tmp_path / "m.pt", tmp_path / "p.pt"
    save_artifact(trained, model)
    found = plan(capsys, "prune", model, "-s", 0.9, "-m", "harp", "--preset", "paper", "--lr", 0.02, "-o", pruned)
    assert (found["lr"], found["schedule"], found["threat"]) == (0.02, "cosine-by-epoch", "linf 0.031")
    save_artifact(prune(bench, trained, PruneStage(method="hydra", sparsity=0.5, epochs=0)), pruned)
    found = plan(capsys, "finetune", pruned, "--preset", "paper", "-o", tmp_path / "f.pt")
    assert (found["weight_decay"], found["select"]) == (1e-4, "last")
    found = plan(capsys, "train", "--data", "digits", "--preset", "twin-rep:paper", "-o", tmp_path / "t.pt")
    assert found["threat"] == "linf 0.031"


def test_the_method_of_a_lineage(bench, trained):
    assert pruned_by(trained.metadata) is None
    assert pruned_by(prune(bench, trained, PruneStage(method="lwm", sparsity=0.5)).metadata) == "lwm"
