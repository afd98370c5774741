"""Stage options beyond the basics: dense layers, a share of the data, teachers, pseudo-labels, what plots need."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rprune.errors import InputError, UsageError
from rprune.models.prunable import prunable
from rprune.pipeline.artifact import save_artifact
from rprune.pipeline.bench import Bench, Silent
from rprune.pipeline.cost import cost
from rprune.pipeline.recipe import DataSection, FinetuneStage, PruneStage, read_recipe
from rprune.pipeline.run import Runner
from rprune.pipeline.single import run_single
from rprune.pipeline.stages import check_stage, finetune, prune
from rprune.threat import ThreatModel
from rprune.training import loop

THREAT = ThreatModel.of("linf", "0.03")


def test_excluded_layers_stay_dense_and_count(bench, trained):
    names = list(prunable(trained.model()))
    first = names[0].removesuffix(".weight")
    pruned = prune(bench, trained, PruneStage(method="lwm", sparsity=0.9, exclude=(first,)))
    total = sum(mask.numel() for mask in pruned.masks.values())
    assert sum(int(mask.sum()) for mask in pruned.masks.values()) == pruned.metadata.budget == total // 10
    assert bool(pruned.masks[names[0]].all())
    only_last = prune(bench, trained, PruneStage(method="hydra", sparsity=0.05, include=(names[1],), epochs=1))
    assert all(bool(mask.all()) for name, mask in only_last.masks.items() if name != names[1])


@pytest.mark.parametrize("method", ["harp", "hydra"])
def test_methods_that_learn_respect_dense_layers(bench, trained, method):
    name = next(iter(prunable(trained.model())))
    pruned = prune(bench, trained, PruneStage(method=method, sparsity=0.8, exclude=(name,), epochs=1))
    assert bool(pruned.masks[name].all())
    assert sum(int(mask.sum()) for mask in pruned.masks.values()) == pruned.metadata.budget


def test_a_glob_that_fits_nothing_and_a_budget_below_the_dense_layers(bench, trained):
    arch = trained.metadata.arch
    with pytest.raises(UsageError, match="unknown layer 'conv9'"):
        check_stage(PruneStage(method="lwm", sparsity=0.5, exclude=("conv9",)), bench, arch)
    with pytest.raises(UsageError, match="below its floor"):
        check_stage(PruneStage(method="lwm", sparsity=0.5, exclude=("*",)), bench, arch)


def test_pruning_with_a_share_of_the_data(bench, trained, monkeypatch):
    steps = []
    original = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: (steps.append(1), original(self, *a))[1])
    prune(bench, trained, PruneStage(method="hydra", sparsity=0.5, epochs=1, batch_size=32))
    whole = len(steps)
    prune(bench, trained, PruneStage(method="hydra", sparsity=0.5, epochs=1, batch_size=32, data_fraction=0.25))
    assert len(steps) - whole == pytest.approx(whole / 4, abs=1)


def test_lineage_holds_what_the_plots_show(bench, trained):
    pruned = prune(bench, trained, PruneStage(method="lwm", sparsity=0.9))
    metrics = json.loads(pruned.metadata.model_dump_json())["lineage"][-1]["metrics"]
    weights = prunable(trained.model())
    assert metrics["kept_by_layer"] == {name: int(mask.sum()) for name, mask in pruned.masks.items()}
    for counts in metrics["allocations"].values():
        assert list(counts) == list(weights)
        assert sum(counts.values()) == pruned.metadata.budget
    histogram = metrics["histogram"]
    assert len(histogram["edges"]) == len(histogram["kept"]) + 1
    assert sum(histogram["kept"]) == pruned.metadata.budget
    assert sum(histogram["kept"]) + sum(histogram["pruned"]) == sum(w.numel() for w in weights.values())
    middle = len(histogram["kept"]) // 2
    assert histogram["kept"][middle] == 0  # magnitude pruning leaves nothing near zero
    assert histogram["pruned"][middle] > 0


def test_a_teacher_changes_fine_tuning(bench, trained, tmp_path):
    pruned = prune(bench, trained, PruneStage(method="lwm", sparsity=0.9))
    stage = FinetuneStage(epochs=1, batch_size=32)
    alone = finetune(bench, pruned, stage)
    taught = finetune(bench, pruned, stage, teacher=trained)
    assert alone.digest != taught.digest
    assert "distillation" in taught.metadata.lineage[-1].history[0]
    path = tmp_path / "dense.pt"
    save_artifact(trained, path)
    named = run_single(bench, stage.model_copy(update={"teacher": str(path)}), pruned, tmp_path / "out.pt")
    assert named.digest == taught.digest
    with pytest.raises(UsageError, match="recipes"):
        run_single(bench, stage.model_copy(update={"teacher": "dense"}), pruned, tmp_path / "other.pt")


RECIPE = """
rprune = 1
name = "taught"
[data]
source = "digits"
[[stage]]
kind = "train"
objective = "benign"
epochs = 1
[[stage]]
kind = "prune"
method = "lwm"
sparsity = 0.9
[[stage]]
kind = "finetune"
epochs = 1
teacher = "TEACHER"
"""


def test_a_recipe_may_name_the_dense_model_as_teacher(tmp_path):
    path = tmp_path / "taught.toml"
    path.write_text(RECIPE.replace("TEACHER", "dense"))
    outcome = Runner(read_recipe(path), tmp_path, tmp_path / "out", Silent(), "cpu").run()[-1]
    assert "distillation" in outcome.artifact.metadata.lineage[-1].history[0]
    dense = tmp_path / "out" / "01-train"
    path.write_text(RECIPE.replace("TEACHER", str(dense)))
    named = Runner(read_recipe(path), tmp_path, tmp_path / "other", Silent(), "cpu").run()[-1]
    assert named.artifact.digest == outcome.artifact.digest
    path.write_text(RECIPE.replace("TEACHER", "gone.pt"))
    with pytest.raises(InputError, match="gone"):
        Runner(read_recipe(path), tmp_path, tmp_path / "third", Silent(), "cpu")


def npz(path, labels, shape=(8, 8)):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    np.savez(path, train_images=images, train_labels=labels, test_images=images[:2], test_labels=labels[:2])
    return f"npz:{path}"


def test_pseudo_labelled_samples_join_every_batch(tmp_path, trained, monkeypatch):
    source = npz(tmp_path / "more.npz", np.arange(50) % 10)
    bench = Bench.open(DataSection(source="digits", pseudo=source), THREAT, 0, "cpu")
    sizes = []
    original = loop._Meter.add
    monkeypatch.setattr(loop._Meter, "add", lambda self, *a: (sizes.append(len(a[-1])), original(self, *a))[1])
    tuned = finetune(bench, trained, FinetuneStage(epochs=1, batch_size=32))
    labelled = len(bench.data.train)
    assert sum(sizes) == 2 * labelled
    assert sizes[0] == 64
    record = tuned.metadata.data
    assert record.pseudo == source
    assert record.sha256["pseudo"] == bench.pseudo.digest


def test_a_model_may_label_the_samples(tmp_path, trained):
    source = npz(tmp_path / "more.npz", np.zeros(50, dtype=np.int64))
    save_artifact(trained, tmp_path / "teacher.pt")
    section = DataSection(source="digits", pseudo=source, pseudo_model=str(tmp_path / "teacher.pt"))
    bench = Bench.open(section, THREAT, 0, "cpu")
    images = torch.from_numpy(bench.pseudo.images).float() / 255
    with torch.no_grad():
        expected = trained.model()(images).argmax(1)
    assert torch.from_numpy(bench.pseudo.labels).tolist() == expected.tolist()


def test_pseudo_samples_must_fit(tmp_path):
    with pytest.raises(InputError, match="1, 9, 9"):
        Bench.open(
            DataSection(source="digits", pseudo=npz(tmp_path / "a.npz", np.arange(20) % 10, (9, 9))), THREAT, 0, "cpu"
        )
    with pytest.raises(UsageError, match="labels nothing"):
        Bench.open(DataSection(source="digits", pseudo_model="x.pt"), THREAT, 0, "cpu")


@pytest.fixture(scope="module")
def soup(bench, trained):
    """(pruned, stage, the soup of two fine-tunings)"""
    pruned = prune(bench, trained, PruneStage(method="lwm", sparsity=0.9))
    stage = FinetuneStage(epochs=2, batch_size=32, soup=2)
    return pruned, stage, finetune(bench, pruned, stage)


def test_a_soup_is_no_worse_than_its_parts_and_keeps_the_mask(bench, soup):
    pruned, stage, made = soup
    entry = made.metadata.lineage[-1]
    scores, taken = entry.metrics["soup"]["scores"], entry.metrics["soup"]["taken"]
    assert len(scores) == 2
    assert taken[0] == 1 + scores.index(max(scores))
    assert entry.metrics["validation"]["score"] >= max(scores)
    for name, mask in pruned.masks.items():
        assert torch.equal(made.masks[name], mask)
        assert not made.state[name][~mask].any()
    alone = finetune(bench, pruned, stage.model_copy(update={"soup": 1}))
    assert alone.metadata.lineage[-1].metrics["validation"]["score"] == scores[0]
    assert (taken == [1]) == (alone.digest == made.digest)


def test_a_soup_that_is_interrupted_goes_on(bench, soup, tmp_path, monkeypatch):
    pruned, stage, made = soup
    seen = []

    def interrupt(stage, log):
        seen.append((stage, log.epoch))
        if seen[-1] == ("finetune 2", 1):
            raise KeyboardInterrupt

    reporter = Silent()
    monkeypatch.setattr(reporter, "epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(replace(bench, reporter=reporter), pruned, stage, tmp_path / "resume.pt")
    assert finetune(replace(bench, reporter=reporter), pruned, stage, tmp_path / "resume.pt").digest == made.digest
    assert seen == [("finetune", 1), ("finetune", 2), ("finetune 2", 1), ("finetune 2", 2)]
    assert {path.name for path in tmp_path.iterdir()} == {"resume.pt", "2.resume.pt"}


def test_a_soup_costs_its_parts(bench, soup):
    pruned, stage, _ = soup
    steps = [cost(bench, stage.model_copy(update={"soup": n}), pruned)[0].steps for n in (1, 3)]
    assert steps[1] == 3 * steps[0] > 0
