"""The architecture that writes a network down layer by layer."""

from __future__ import annotations

import json

import pytest
import torch

from rprune.errors import InputError
from rprune.models.flat import describe
from rprune.models.graph import trace
from rprune.models.prunable import prunable
from rprune.models.registry import Architecture, build

NETS = {
    "lenet": (1, 28, 28),
    "cnn-small": (3, 16, 16),
    "vgg4": (3, 16, 16),
    "cifar-resnet18": (3, 16, 16),
}


@pytest.mark.parametrize("name", NETS)
def test_a_network_built_from_its_description_is_the_same(name):
    shape = NETS[name]
    mean = (0.4,) * shape[0] if name == "cnn-small" else ()
    model = build(Architecture(name, 10, shape, {}, mean, (0.2,) * len(mean))).eval()
    network = trace(model, shape)
    layers = json.loads(json.dumps(describe(network)))
    again = build(Architecture("flat", 10, shape, {"layers": layers}))
    again.load_state_dict(network.state_dict())
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.eval()(x), network(x))
    assert [(n, w.shape) for n, w in prunable(again).items()] == [(n, w.shape) for n, w in prunable(network).items()]
    assert describe(trace(again, shape)) == layers


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [{"name": "a", "kind": "lambda", "inputs": ["image"]}],
        [{"name": "a", "kind": "relu", "inputs": ["gone"]}],
        [{"name": "a", "kind": "flatten", "inputs": ["image"]}],
        [{"name": "a", "kind": "linear", "inputs": ["image"], "in_features": 9, "out_features": 10, "bias": True}],
        "nonsense",
    ],
)
def test_a_damaged_description_is_refused(layers):
    with pytest.raises(InputError, match="flat network"):
        build(Architecture("flat", 10, (1, 4, 4), {"layers": layers}))
