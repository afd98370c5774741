"""rprune init: files that run as they are, and nothing overwritten."""

from __future__ import annotations

import pytest

from rprune.pipeline.recipe import read_recipe, shipped_recipes
from rprune.reports.gate import read_policy


def test_what_init_writes_runs(call, tmp_path):
    said = call("init", "-d", "digits", "--arch", "cnn-small", "-o", "new/recipe.toml", cwd=tmp_path)
    assert said.code == 0, said.err
    assert said.out.split() == ["new/recipe.toml", "new/gate.toml"]
    assert "Next: rprune run new/recipe.toml --smoke" in said.err
    dry = call("run", "new/recipe.toml", "--dry-run", "--smoke", "--json", cwd=tmp_path)
    assert dry.code == 0, dry.err
    assert dry.json["recipe"]["name"] == "digits-cnn-small-harp-smoke"
    assert [row[0] for row in dry.json["plan"]] == ["train", "prune", "finetune", "quantize", "certify", "export"]


@pytest.mark.slow
def test_what_init_writes_for_a_model_runs(call, chain, tmp_path):
    said = call("init", "--model", chain / "model.pt", "--json", cwd=tmp_path)
    assert said.json == {"recipe": "recipe.toml", "policy": "gate.toml"}
    assert call("run", "recipe.toml", "--dry-run", "--smoke", cwd=tmp_path).code == 0


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_is_copied_with_its_policy(call, tmp_path, name):
    assert call("init", "--from", name, cwd=tmp_path).code == 0
    assert (tmp_path / "recipe.toml").read_text() == shipped_recipes()[name].read_text()
    recipe = read_recipe(tmp_path / "recipe.toml")
    if recipe.policy is not None:
        assert read_policy(tmp_path / recipe.policy).gate


def test_nothing_is_overwritten_unless_asked(call, tmp_path):
    (tmp_path / "gate.toml").write_text("mine")
    assert "gate.toml exists" in call("init", "-d", "digits", cwd=tmp_path).refused(2)
    assert [path.name for path in tmp_path.iterdir()] == ["gate.toml"]
    assert call("init", "-d", "digits", "--force", "-q", cwd=tmp_path).code == 0
    assert read_policy(tmp_path / "gate.toml").gate


def test_data_that_is_not_here_is_said(call, tmp_path):
    said = call("init", "-d", "cifar10:none", cwd=tmp_path)
    assert said.code == 0
    assert "cifar10:none is not here yet" in said.err
    assert "was not here when this was written" in (tmp_path / "recipe.toml").read_text()
