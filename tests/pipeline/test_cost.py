"""What a stage will cost: steps and operations by hand, and nothing written."""

from __future__ import annotations

import pytest
import torch

from rprune.models.cost import layer_costs
from rprune.models.graph import trace
from rprune.models.registry import Architecture
from rprune.pipeline.bench import Bench
from rprune.pipeline.cost import cost
from rprune.pipeline.recipe import DataSection, FinetuneStage, PruneStage, QuantizeStage, TrainStage

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
