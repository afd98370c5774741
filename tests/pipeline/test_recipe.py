"""Recipes: defaults, overrides, mistakes, order."""

from __future__ import annotations

import pytest

from rprune.errors import UsageError
from rprune.objectives.base import OBJECTIVES
from rprune.pipeline.recipe import (
    FinetuneStage,
    PruneStage,
    QuantizeStage,
    TrainStage,
    override,
    read_recipe,
    validated,
)
from rprune.pruning.base import METHODS
from rprune.threat import ThreatModel

TEXT = """
rprune = 1
name = "small"
[data]
source = "digits"
[[stage]]
kind = "train"
[[stage]]
kind = "prune"
sparsity = 0.9
"""


@pytest.fixture
def read(tmp_path):
    def parse(text: str = TEXT, *settings: str):
        (tmp_path / "recipe.toml").write_text(text)
        return read_recipe(tmp_path / "recipe.toml", settings)

    return parse


def stages(*kinds: str) -> str:
    head = 'rprune = 1\nname = "x"\n[data]\nsource = "digits"\n'
    return head + "".join(
        f'[[stage]]\nkind = "{kind}"\n{"sparsity = 0.5" if kind == "prune" else ""}\n' for kind in kinds
    )


def test_defaults_are_those_of_the_papers(read):
    recipe = read()
    train, prune = recipe.stage
    assert (recipe.seed, recipe.model.arch, recipe.threat, recipe.policy) == (0, "cnn-small", None, None)
    assert isinstance(train, TrainStage)
    assert (train.epochs, train.lr, train.batch_size, train.momentum, train.weight_decay) == (100, 0.1, 128, 0.9, 5e-4)
    assert isinstance(prune, PruneStage)
    assert (prune.method, prune.objective, prune.epochs, prune.lr) == ("harp", None, None, None)
    harp = METHODS.get("harp")
    assert (harp.epochs, harp.lr) == (20, 0.1)
    assert (FinetuneStage().epochs, FinetuneStage().lr) == (100, 0.01)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("digits", ["train", "prune", "finetune", "quantize", "certify", "export"]),
        ("hidden", ["train", "prune", "certify", "export"]),
    ],
)
def test_shipped_recipes_read(name, kinds):
    from pathlib import Path

    import rprune

    recipe = read_recipe(Path(rprune.__file__).parent / "recipes" / f"{name}.toml")
    assert (recipe.name, [stage.kind for stage in recipe.stage]) == (name, kinds)


def test_override_of_a_number_a_text_and_a_nested_option(read):
    recipe = read(
        TEXT, "seed=7", "name=other", "data.validation=0.2", 'threat={norm = "l2", eps = "1/2"}',
        "stage.train.epochs=3", "stage.prune.sparsity = 0.95", "stage.prune.method.gamma_step=0.2",
        "stage.train.schedule=constant",
    )  # fmt: skip
    assert (recipe.seed, recipe.name, recipe.data.validation) == (7, "other", 0.2)
    assert recipe.threat.model() == ThreatModel("l2", "1/2")
    assert (recipe.stage[0].epochs, recipe.stage[0].schedule) == (3, "constant")
    assert recipe.stage[1].sparsity == 0.95


def test_override_turns_a_named_method_into_a_table(read):
    recipe = read(TEXT.replace("sparsity", 'method = "harp"\nsparsity'), "stage.prune.method.gamma_step=0.2")
    assert recipe.stage[1].method == {"name": "harp", "gamma_step": 0.2}
    assert METHODS.build(recipe.stage[1].method).gamma_step == 0.2


def test_later_override_wins(read):
    assert read(TEXT, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("setting", ["seed", "=1", "stage.export.suite=pgd10", "stage=1", "stage.prune=1"])
def test_override_that_names_nothing(read, setting):
    with pytest.raises(UsageError):
        read(TEXT, setting)


def test_override_of_one_stage_table():
    table = {"method": "harp", "sparsity": 0.9}
    override(table, "method.gamma_step=0.2")
    override(table, "lr=0.5")
    assert table == {"method": {"name": "harp", "gamma_step": 0.2}, "sparsity": 0.9, "lr": 0.5}


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("sed=1", "seed"),
        ("data.sorce=1", "data.source"),
        ("model.arhc=1", "model.arch"),
        ('threat={eps = "0.1", nrom = "l2"}', "threat.norm"),
        ("stage.prune.sparsty=0.5", "stage.prune.sparsity"),
        ("stage.train.epoch=5", "stage.train.epochs"),
    ],
)
def test_unknown_key_offers_the_nearest(read, setting, nearest):
    with pytest.raises(UsageError) as error:
        read(TEXT, setting)
    assert f"did you mean '{nearest}'?" in error.value.hint


def test_misspelt_required_key_offers_the_nearest(read):
    with pytest.raises(UsageError) as error:
        read(TEXT.replace("name =", "nam ="))
    assert "did you mean 'name'?" in error.value.hint


@pytest.mark.parametrize(
    ("table", "nearest"),
    [({"name": "harp", "gama_step": 1}, "gamma_step"), ({"name": "harpp"}, "harp"), ("hidra", "hydra")],
)
def test_unknown_option_of_a_method(table, nearest):
    with pytest.raises(UsageError) as error:
        METHODS.build(table)
    assert f"did you mean '{nearest}'?" in error.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [("sparsity", 1.0), ("sparsity", -0.1), ("batch_size", 0), ("lr", 0), ("momentum", 1), ("epochs", -1)],
)
def test_values_out_of_range(key, value):
    with pytest.raises(UsageError, match=key):
        validated(PruneStage, {"sparsity": 0.5} | {key: value}, "options")


@pytest.mark.parametrize("bits", [1, 13, 4.5])
def test_bits_have_a_range(bits):
    with pytest.raises(UsageError, match="bits"):
        validated(QuantizeStage, {"bits": bits}, "options")


@pytest.mark.parametrize(
    "kinds",
    [
        (), ("prune",), ("train", "train"), ("train", "finetune", "prune"), ("train", "quantize", "quantize"),
        ("train", "export", "certify"), ("train", "prune", "train"),
    ],
)  # fmt: skip
def test_order_that_cannot_work(read, kinds):
    with pytest.raises(UsageError):
        read(stages(*kinds))


@pytest.mark.parametrize("kinds", [("train",), ("train", "quantize"), ("train", "prune", "finetune", "export")])
def test_stages_may_be_left_out(read, kinds):
    assert tuple(stage.kind for stage in read(stages(*kinds)).stage) == kinds


def test_checkpoint_takes_the_place_of_training(read):
    text = 'checkpoint = "model.pt"\n' + stages("prune", "export")
    assert read(text).checkpoint == "model.pt"
    with pytest.raises(UsageError):
        read('checkpoint = "model.pt"\n' + stages("train", "prune"))


@pytest.mark.parametrize("text", ["", "rprune = ", "rprune = 2\nname='x'", "[[stage]]\nkind = 3"])
def test_not_a_recipe(read, text):
    with pytest.raises(UsageError) as error:
        read(text)
    assert "\n" not in error.value.message
    assert error.value.hint


def test_recipes_cannot_be_changed(read):
    with pytest.raises(Exception, match="frozen"):
        read().seed = 3


@pytest.mark.parametrize("name", sorted(METHODS.all()))
def test_every_method_can_be_written_in_a_recipe(read, name):
    method = METHODS.build(name)
    described = METHODS.describe(method)
    assert METHODS.build(described) == method
    assert read(TEXT, f'stage.prune.method="{name}"').stage[1].method == name


@pytest.mark.parametrize("name", sorted(OBJECTIVES.all()))
def test_every_objective_can_be_written_in_a_recipe(name):
    threat = ThreatModel("linf", "8/255")
    objective = OBJECTIVES.build(name, threat=threat)
    assert OBJECTIVES.build(OBJECTIVES.describe(objective), threat=threat) == objective
