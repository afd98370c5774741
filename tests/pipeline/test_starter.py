"""First recipes: they read, they fit what they are for, and nobody's bars are guessed."""

from __future__ import annotations

import tomllib

import numpy as np
import pytest
import torch

from rprune.data.sources import TORCHVISION
from rprune.errors import InputError
from rprune.models.registry import Architecture, build
from rprune.pipeline.artifact import save_artifact
from rprune.pipeline.recipe import PruneStage, read_recipe
from rprune.pipeline.stages import prune
from rprune.pipeline.starter import architecture_for, look, starter
from rprune.pipeline.starter_text import FAMILIAR, Facts, recipe_text
from rprune.reports.gate import read_policy
from rprune.threat import ThreatModel

WHOLE = ["train", "prune", "finetune", "quantize", "certify", "export"]
LINF = ThreatModel("linf", "8/255")


@pytest.fixture
def read(tmp_path):
    """``read(starter)``: both files, as a run reads them."""

    def parse(made):
        (tmp_path / "recipe.toml").write_text(made.recipe)
        (tmp_path / "gate.toml").write_text(made.policy)
        return read_recipe(tmp_path / "recipe.toml"), read_policy(tmp_path / "gate.toml")

    return parse


@pytest.fixture
def npz(tmp_path):
    def write(count: int, *shape: int, classes: int = 3) -> str:
        images, labels = np.zeros((count, *shape), np.uint8), np.arange(count) % classes
        np.savez(
            tmp_path / "data.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels
        )
        return f"npz:{tmp_path / 'data.npz'}"

    return write


@pytest.mark.parametrize("source", ["digits", *TORCHVISION, "npz:none.npz", "imagefolder:none", "webdataset:none"])
@pytest.mark.parametrize("arch", [None, "cnn-small", "vgg4", "cifar-resnet18", "torchvision:resnet18"])
def test_both_files_read_for_every_source_and_architecture(read, source, arch, monkeypatch, tmp_path):
    monkeypatch.setenv("RPRUNE_DATA", str(tmp_path))
    made = starter(source, arch)
    recipe, policy = read(made)
    assert [stage.kind for stage in recipe.stage] == WHOLE
    assert (recipe.data.source, recipe.policy) == (source, "gate.toml")
    assert recipe.model.arch == made.arch == (arch or made.arch)
    assert (recipe.stage[1].method, recipe.stage[1].sparsity) == ("harp", 0.99)
    assert [(rule.metric, rule.value) for rule in policy.gate] == [("sparsity", 0.99)]
    assert recipe.threat.model() == made.facts.threat
    build(Architecture(made.arch, made.facts.classes, made.facts.shape))


def test_what_is_known_of_familiar_sets_has_no_gap():
    assert set(FAMILIAR) == set(TORCHVISION)


@pytest.mark.parametrize(
    ("shape", "train", "wanted"),
    [
        ((1, 8, 8), 1_300, "vgg4"),
        ((1, 28, 28), 54_000, "vgg4"),
        ((3, 32, 32), 45_000, "cifar-resnet18"),
        ((3, 32, 32), 500, "vgg4"),
        ((3, 64, 64), 90_000, "cifar-resnet18"),
        ((3, 64, 64), 500, "vgg4"),
        ((3, 224, 224), 1_200_000, "torchvision:resnet18"),
        ((3, 2, 2), 100, "cifar-resnet18"),
    ],
)
def test_the_architecture_takes_the_images_and_leaves_a_network_at_99_per_cent(shape, train, wanted):
    facts = Facts("npz:x.npz", 10, shape, train, 1_000, LINF)
    assert architecture_for(facts) == wanted
    with torch.device("meta"):
        assert sum(p.numel() for p in build(Architecture(wanted, 10, shape)).parameters()) > 300_000


@pytest.mark.parametrize(
    ("train", "epochs", "batch", "objective"),
    [(1_000, (60, 20, 60), 64, "pgd-at"), (50_000, (100, 20, 100), 128, "pgd-at"),
     (1_200_000, (23, 23, 23), 256, "free-at")],
)  # fmt: skip
def test_epochs_batch_and_objective_follow_the_number_of_images(tmp_path, train, epochs, batch, objective):
    facts = Facts("npz:x.npz", 10, (3, 32, 32), train, 20_000, LINF)
    (tmp_path / "r.toml").write_text(recipe_text(facts, "cifar-resnet18", None, False, 100, 10_000, "gate.toml"))
    recipe = read_recipe(tmp_path / "r.toml")
    assert tuple(stage.epochs for stage in recipe.stage[:3]) == epochs
    assert {stage.batch_size for stage in recipe.stage[:3]} == {batch}
    assert recipe.stage[0].objective == objective
    assert (recipe.stage[4].limit, recipe.stage[5].limit) == (1000, 1000)


def test_large_images_are_certified_by_smoothing_alone(tmp_path):
    facts = Facts("imagefolder:x", 10, (3, 224, 224), 10_000, 500, LINF)
    (tmp_path / "r.toml").write_text(recipe_text(facts, "vgg4", None, True, 100, 10_000, "gate.toml"))
    recipe = read_recipe(tmp_path / "r.toml")
    assert (recipe.stage[4].methods, recipe.stage[4].smoothing_limit) == (("smoothing",), 100)
    assert recipe.stage[5].limit is None


def test_the_data_is_looked_at(npz):
    facts = look(npz(60, 16, 12, 3))
    assert (facts.classes, facts.shape, facts.train, facts.test, facts.seen) == (3, (3, 16, 12), 54, 60, True)


def test_data_that_is_there_and_broken_is_an_error(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot read"):
        look(f"npz:{tmp_path / 'bad.npz'}")


def test_names_with_quotes_stay_toml(npz, tmp_path, read):
    source = npz(20, 8, 8)
    odd = tmp_path / 'a "b" \\ c.npz'
    (tmp_path / "data.npz").rename(odd)
    recipe, _ = read(starter(source.replace("data.npz", odd.name)))
    assert recipe.data.source == f"npz:{odd}"
    assert recipe.name == "a-b-c-vgg4-harp"


def test_a_model_of_rprune_takes_the_place_of_training(trained, tmp_path, read):
    (tmp_path / "models").mkdir()
    save_artifact(trained, tmp_path / "models" / "model.pt")
    made = starter(None, None, tmp_path / "models" / "model.pt", tmp_path)
    recipe, _ = read(made)
    assert recipe.checkpoint == "models/model.pt"
    assert [stage.kind for stage in recipe.stage] == WHOLE[1:]
    assert recipe.threat.model() == trained.metadata.threat
    assert recipe.data.source == "digits"
    assert "arch" not in tomllib.loads(made.recipe).get("model", {})


def test_a_pruned_model_is_only_finetuned(bench, trained, tmp_path, read):
    save_artifact(prune(bench, trained, PruneStage(method="lwm", sparsity=0.5)), tmp_path / "model.pt")
    recipe, policy = read(starter("digits", None, tmp_path / "model.pt", tmp_path))
    assert [stage.kind for stage in recipe.stage] == WHOLE[2:]
    assert policy.gate[0].value == 0.5


def test_a_quantized_model_needs_no_recipe(quantized, tmp_path):
    save_artifact(quantized, tmp_path / "model.pt")
    with pytest.raises(InputError, match="quantized already"):
        starter(None, None, tmp_path / "model.pt", tmp_path)


def test_the_architecture_of_a_plain_state_dict_is_told_by_the_weights_or_the_user(trained, tmp_path, read):
    torch.save(trained.state, tmp_path / "plain.pt")
    made = starter("digits", None, tmp_path / "plain.pt", tmp_path)
    recipe, _ = read(made)
    assert (made.arch, recipe.checkpoint) == ("cnn-small", "plain.pt")
    assert "arch" not in recipe.model.model_fields_set  # the run asks the weights again
    recipe, _ = read(starter("digits", "cnn-small", tmp_path / "plain.pt", tmp_path))
    assert (recipe.checkpoint, recipe.model.arch) == ("plain.pt", "cnn-small")
    with pytest.raises(InputError, match="do not fit"):
        starter("digits", "vgg4", tmp_path / "plain.pt", tmp_path)
