"""Defects of HARP's released code in how stages hand over (fact sheet A, 2.1, 2.5) that must not come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rprune.errors import InputError
from rprune.export.session import stored_weights
from rprune.pipeline.artifact import load_any
from rprune.pipeline.forms import Deployed, write_models
from rprune.pipeline.recipe import FinetuneStage, PruneStage
from rprune.pipeline.stages import finetune, prune


@pytest.fixture(scope="module")
def searched(bench, trained):
    return prune(bench, trained, PruneStage(method={"name": "harp", "gamma_step": 2.0}, sparsity=0.9, epochs=3))


def test_exported_weights_are_the_evaluated_ones(bench, searched, tmp_path):
    """HARP's dense export masks every layer at the global rate instead of the learned ones."""
    write_models(Deployed.of(searched), (), bench, tmp_path)
    weights = stored_weights(tmp_path / "model.onnx")
    for name, mask in searched.masks.items():
        assert np.array_equal(weights[name], searched.state[name].numpy())
        assert np.array_equal(weights[name] != 0, mask.numpy())
    densities = [float(mask.float().mean()) for mask in searched.masks.values()]
    assert max(densities) > 1.5 * min(densities)  # else the global rate would pass, too


def test_fine_tuning_never_starts_from_noise(bench, searched, tmp_path):
    """There a search that misses its target leaves no file, and fine-tuning goes on from random weights."""
    tuned = finetune(bench, searched, FinetuneStage(epochs=1, lr=1e-12, weight_decay=0.0))
    for name in searched.masks:
        torch.testing.assert_close(tuned.state[name], searched.state[name], rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="gone"):
        load_any(tmp_path / "gone.pt")
