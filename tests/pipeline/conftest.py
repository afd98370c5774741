from __future__ import annotations

import pytest

from rprune.pipeline.bench import Bench, architecture
from rprune.pipeline.quantizing import quantize
from rprune.pipeline.recipe import DataSection, ModelSection, PruneStage, QuantizeStage, TrainStage
from rprune.pipeline.stages import prune, train
from rprune.threat import ThreatModel


@pytest.fixture(scope="session")
def bench():
    return Bench.open(DataSection(source="digits"), ThreatModel.of("linf", "0.03"), 0, "cpu")


@pytest.fixture(scope="session")
def trained(bench):
    arch = architecture(ModelSection(arch="cnn-small"), bench.data)
    return train(bench, arch, TrainStage(objective="benign", epochs=2, batch_size=16, lr=0.05))


@pytest.fixture(scope="session")
def quantized(bench, trained):
    """Pruned by half and quantized."""
    return quantize(bench, prune(bench, trained, PruneStage(method="lwm", sparsity=0.5)), QuantizeStage())
