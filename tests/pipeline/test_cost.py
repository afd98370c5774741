"""What a stage will cost: steps and operations by hand, and nothing written."""

from __future__ import annotations

import json

import pytest
import torch

from rprune.attacks.pgd import PGD
from rprune.attacks.square import Square
from rprune.errors import UsageError
from rprune.models.cost import layer_costs
from rprune.models.graph import trace
from rprune.models.registry import Architecture
from rprune.pipeline.bench import Bench, Silent
from rprune.pipeline.cost import cost
from rprune.pipeline.profiling import profiled
from rprune.pipeline.recipe import (
    RECIPES,
    CertifyStage,
    DataSection,
    ExportStage,
    FinetuneStage,
    PruneStage,
    QuantizeStage,
    TrainStage,
    read_recipe,
)
from rprune.pipeline.run import Runner
from rprune.pipeline.trial import trial

ARCH = Architecture("cnn-small", 10, (1, 8, 8))


@pytest.fixture(scope="module")
def bench():
    return Bench.open(DataSection(source="digits"), None, 0, "cpu")


@pytest.fixture(scope="module")
def layers():
    from rprune.models.registry import build

    return list(layer_costs(trace(build(ARCH), (1, 8, 8))).values())


def step(layers, batch: int) -> tuple[int, int, int]:
    """Operations of a forward, of the gradient of the image, and of those of weights and hidden values."""
    every = 2 * batch * sum(layer.macs for layer in layers)
    first = 2 * batch * layers[0].macs
    return every, every, 2 * every - first


@pytest.mark.parametrize(("objective", "attack"), [("benign", 0), ({"name": "pgd-at", "attack": {"steps": 3}}, 3)])
def test_operations_of_a_step(bench, layers, objective, attack) -> None:
    found, _ = cost(bench, TrainStage(objective=objective, epochs=7, batch_size=100), None, ARCH)
    forward, image, training = step(layers, 100)
    assert found.steps == 7 * -(-len(bench.data.train) // 100)
    assert found.flops == found.steps * (attack * (forward + image) + forward + training)
    assert found.seconds > 0
    assert found.memory > 2**20


def test_stages_follow_each_other(bench) -> None:
    objective = {"name": "n-fgsm"}
    _, dense = cost(bench, TrainStage(objective=objective, epochs=1), None, ARCH)
    pruning = PruneStage(sparsity=0.5, method="harp", objective=objective, data_fraction=0.5)
    found, pruned = cost(bench, pruning, dense)
    assert found.steps == 20 * -(-round(0.5 * len(bench.data.train)) // 128)
    assert pruned.masks
    found, tuned = cost(bench, FinetuneStage(objective=objective, epochs=3, teacher="dense"), pruned, None, dense)
    assert found.steps == 3 * -(-len(bench.data.train) // 128)
    found, made = cost(bench, QuantizeStage(), tuned)
    assert (found.steps, found.flops) == (0, 0)
    assert made.quantization
    found, _ = cost(bench, QuantizeStage(mode="qat", objective=objective), tuned)
    assert found.steps == 20 * -(-len(bench.data.train) // 128)


def test_scoring_methods_without_training(bench) -> None:
    _, dense = cost(bench, TrainStage(objective="benign", epochs=1), None, ARCH)
    found, _ = cost(bench, PruneStage(sparsity=0.5, method="lwm"), dense)
    assert found.steps == 0
    assert torch.isfinite(torch.tensor(found.seconds))


def test_attacks_cost_at_most_their_passes(bench, layers) -> None:
    """As many passes as the attack has, with gradients where it needs them; batches and linear layers are filled up."""
    _, dense = cost(bench, TrainStage(objective="benign", epochs=1), None, ARCH)
    found, left = cost(bench, ExportStage(suite="pgd10", limit=50, compact=False), dense)
    assert left is dense
    assert found.at_most
    forward, image, _ = step(layers, 1)
    assert 1 <= found.flops / (50 * PGD(steps=10).queries() * (forward + image)) < 1.6
    assert found.seconds == found.once > 0
    black, _ = cost(bench, ExportStage(suite="square", limit=10_000, compact=False), dense)
    assert 1 <= black.flops / (len(bench.data.test) * Square().queries() * forward) < 1.6


def test_certificates_cost_at_most_all_draws_and_bounds(bench, layers) -> None:
    _, dense = cost(bench, TrainStage(objective="benign", epochs=1), None, ARCH)
    forward, *_ = step(layers, 1)
    found, _ = cost(bench, CertifyStage(methods=("smoothing",), n=1000, n0=10, smoothing_limit=7), dense)
    assert found.flops == pytest.approx(7 * 1010 * forward, rel=1e-9)
    few, many = (
        cost(bench, CertifyStage(methods=("ibp", "crown"), limit=limit, falsify=False), dense)[0] for limit in (2, 8)
    )
    assert many.flops == pytest.approx(4 * few.flops, rel=1e-9)
    assert few.flops > 2 * 4 * forward  # intervals take two passes, at eps and below
    _, made = cost(bench, QuantizeStage(), dense)
    assert cost(bench, CertifyStage(limit=2, smoothing_limit=2, n=10), made)[0].at_most


def test_a_profile_names_the_phases(bench, tmp_path) -> None:
    _, dense = cost(bench, TrainStage(objective="benign", epochs=1), None, ARCH)
    stage = PruneStage(sparsity=0.5, method="harp", objective={"name": "pgd-at", "attack": {"steps": 2}})
    phases, _ = profiled(bench, stage, dense, None, None, tmp_path / "p")
    names = {phase.name for phase in phases}
    assert names >= {"attack", "loss", "backward", "optimizer", "gradients of what is learned", "folding"}
    assert all(phase.calls == 1 and phase.seconds > 0 for phase in phases)
    assert [phase.seconds for phase in phases] == sorted((phase.seconds for phase in phases), reverse=True)
    events = json.loads((tmp_path / "p" / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "rprune: attack" for event in events)
    assert "aten::convolution_backward" in (tmp_path / "p" / "table.txt").read_text()
    with pytest.raises(UsageError, match="does not train"):
        profiled(bench, QuantizeStage(), dense, None, None, tmp_path / "q")


def test_profiles_of_a_recipe_try_every_stage_once(tmp_path, monkeypatch) -> None:
    tried = []

    def counted(bench, stage, *others):
        tried.append(stage.kind)
        return trial(bench, stage, *others)

    monkeypatch.setattr("rprune.pipeline.run.trial", counted)
    monkeypatch.setattr("rprune.pipeline.profiling.trial", counted)
    runner = Runner(read_recipe(RECIPES / "digits.toml", ["smoke=true"]), RECIPES, tmp_path / "out", Silent(), "cpu")
    found = dict(runner.profiles(tmp_path / "p"))
    assert [folder.name for folder in found] == ["01-train", "02-prune", "03-finetune"]
    assert all(phases and (folder / "trace.json").is_file() for folder, phases in found.items())
    assert tried == ["train", "prune", "finetune", "quantize"]
