"""Robust-ADMM: the numeric vectors, the two defects of the released code, and what selection may look at."""

import pytest
import torch
from torch import nn

from rprune.objectives.benign import Benign
from rprune.pruning.admm import AdmmPruner
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget
from rprune.training.loop import Settings, fit


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def layer(values):
    net = nn.Linear(len(values), 1, bias=False).double()
    net.weight.data = torch.tensor([values], dtype=torch.float64)
    return net


def close(tensor, values):
    torch.testing.assert_close(tensor.flatten(), torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-12)


def test_admm(vectors):
    v = vectors["admm"]
    net = layer(v["W0"])
    pruner = AdmmPruner(net, {"weight": 2}, rho=0.001, rho_growth=1.3, every=1, epochs=3)
    close(pruner.sparse["weight"], v["Z0"])
    assert pruner.masks()["weight"].flatten().int().tolist() == v["mask0"]
    assert float(pruner.penalty().detach()) == pytest.approx(v["penalty_init"], abs=1e-15)
    net.weight.data = torch.tensor([v["W1"]], dtype=torch.float64)
    pruner.update()
    close(pruner.sparse["weight"], v["Z1"])
    close(pruner.dual["weight"], v["U1"])
    assert pruner.rho == pytest.approx(v["rho1"])
    penalty = pruner.penalty()
    assert float(penalty.detach()) == pytest.approx(v["penalty_after_update1"], abs=1e-15)
    penalty.backward()
    close(net.weight.grad, v["grad_correct_after_update1"])  # the released code gives twice this
    net.weight.data = torch.tensor([v["W2"]], dtype=torch.float64)
    pruner.update()
    close(pruner.sparse["weight"], v["Z2"])
    close(pruner.dual["weight"], v["U2"])
    assert pruner.rho == pytest.approx(v["rho2"])


def test_projection_leaves_the_weights_alone(tiny):
    """The released code's projection shares memory with the weights on a CPU, and zeroes them."""
    net = tiny.net()
    before = {name: w.detach().clone() for name, w in net.named_parameters()}
    sizes = {n: w.numel() for n, w in net.named_parameters() if w.dim() > 1}
    pruner = METHODS.build("robust-admm").bind(net, Budget.of(sizes, 0.9), Context(3, 2))
    pruner.update()
    assert tiny.same_bits(dict(net.named_parameters()), before)


def test_only_the_last_epoch_may_be_selected(tiny):
    net = tiny.net()
    sizes = {n: w.numel() for n, w in net.named_parameters() if w.dim() > 1}
    pruner = METHODS.build({"name": "robust-admm", "every": 2}).bind(net, Budget.of(sizes, 0.9), Context(5, 2))
    seen = []
    update = pruner.update
    pruner.update = lambda: (seen.append(pruner.epoch), update())
    scores = iter([0.9, 0.8, 0.7, 0.6, 0.1])
    found = fit(
        net, pruner, Benign(), tiny.data(), Settings(epochs=5, batch_size=24, lr=0.01),
        validate=lambda model: {"score": next(scores)},
    )  # fmt: skip
    assert found.selected_epoch == 5
    assert seen == [2, 4]


def test_weights_outside_the_mask_shrink_towards_zero(tiny):
    net = tiny.net()
    sizes = {n: w.numel() for n, w in net.named_parameters() if w.dim() > 1}
    method = METHODS.build({"name": "robust-admm", "rho": 1.0, "rho_growth": 1.0, "every": 4})
    pruner = method.bind(net, Budget.of(sizes, 0.9), Context(24, 2))
    before = pruner.log()["energy_outside"]
    fit(net, pruner, Benign(), tiny.data(), Settings(epochs=24, batch_size=24, lr=0.05))
    assert pruner.log()["energy_outside"] < before / 2
