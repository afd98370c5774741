"""RigL and Flying Bird: the numeric vectors, and how a mask may move."""

import copy

import pytest
import torch
from torch import nn

from rprune.objectives.benign import Benign
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget
from rprune.pruning.masks import count
from rprune.pruning.rigl import Rewiring, Schedule, cosine_share, rewire
from rprune.training.loop import Settings, fit


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def test_rigl_cosine_alpha(vectors_others):
    v = vectors_others["rigl_cosine_alpha"]
    for step, alpha in v["values"].items():
        assert cosine_share(v["alpha0"], int(step), v["T_end"]) == pytest.approx(alpha, abs=1e-9)
    schedule = Schedule(100, v["alpha0"], v["T_end"])
    assert [schedule.at(t) > 0 for t in (0, 1, 99, 100, 150, 74_900, 75_000, 75_100)] == [
        False, False, False, True, False, True, False, False,
    ]  # fmt: skip


def test_rigl_step(vectors_others):
    v = vectors_others["rigl_step"]
    w, mask = torch.tensor(v["w"]), torch.tensor(v["mask"], dtype=torch.bool)
    new = rewire(w, mask, torch.tensor(v["dense_grad"]), 5, v["drop_fraction"])
    assert new.int().tolist() == v["new_mask"]
    net = nn.Linear(8, 1, bias=False)
    net.weight.data = w[None].clone()
    pruner = Rewiring(net, {"weight": mask[None]}, Schedule(1, v["drop_fraction"], 10**9), "gradient", True, 0)
    optimizer = torch.optim.SGD(pruner.parameters(), 0.1, momentum=0.9)
    pruner.attach(optimizer)
    net.weight.grad = torch.zeros_like(net.weight)
    pruner.before_step()
    optimizer.step()
    pruner.after_step()  # step 0 never rewires
    optimizer.state[net.weight]["momentum_buffer"] = torch.ones(1, 8)
    net.weight.grad = torch.tensor([v["dense_grad"]])
    pruner.before_step()
    assert net.weight.grad is None  # the update replaces the gradient step
    optimizer.step()
    pruner.after_step()
    assert pruner.masks()["weight"].flatten().int().tolist() == v["new_mask"]
    assert net.weight.detach().flatten().tolist() == pytest.approx(v["w_new"])
    momentum = optimizer.state[net.weight]["momentum_buffer"].flatten()
    # the newborn and the dropped start over, the one that came back at once keeps its momentum
    assert momentum.tolist() == [1, 1, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("name", ["rigl", "flying-bird"])
@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_masks_move_and_counts_do_not(tiny, name, growth):
    net = tiny.net()
    sizes = {n: w.numel() for n, w in net.named_parameters() if w.dim() > 1}
    budget = Budget.of(sizes, 0.9)
    options = {"growth": growth} if name == "flying-bird" else {}
    pruner = METHODS.build({"name": name, "every": 1, **options}).bind(net, budget, Context(4, 2, 3))
    start = copy.deepcopy(pruner.masks())
    counts = {n: int(m.sum()) for n, m in start.items()}
    fit(net, pruner, Benign(), tiny.data(), Settings(epochs=4, batch_size=24, lr=0.05))
    masks = pruner.finish()
    assert count(masks) == budget.kept
    assert {n: int(m.sum()) for n, m in masks.items()} == counts
    assert any(bool((masks[n] != start[n]).any()) for n in masks)


def test_growth_takes_the_largest_dense_gradients(tiny):
    """After one update everything new has a gradient at least as large as anything left out."""
    net = tiny.net()
    sizes = {n: w.numel() for n, w in net.named_parameters() if w.dim() > 1}
    pruner = METHODS.build("rigl").bind(net, Budget.of(sizes, 0.8), Context(100, 100))
    pruner.step = 100
    old = copy.deepcopy(pruner.masks())
    x, y = tiny.batch()
    nn.functional.cross_entropy(net(x), y).backward()
    gradients = {n: dict(net.named_parameters())[n].grad.clone().abs() for n in old}
    pruner.before_step()
    pruner.after_step()
    for name, new in pruner.masks().items():
        grown = new & ~old[name]
        assert bool(grown.any())
        assert float(gradients[name][grown].min()) >= float(gradients[name][~new & ~old[name]].max())
