"""WRM against the vector of ATMC's ascent and a slow implementation."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.objectives.wrm import WRM


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def trained_on(objective, net, x, y):
    """The loss and the inputs of every pass through the net."""
    passes = []
    handle = net.register_forward_pre_hook(lambda module, given: passes.append(given[0].detach().clone()))
    (compute,) = objective(net, x, y, 0.0, Stream(torch.Generator()))
    loss = compute()
    handle.remove()
    return loss, passes


def test_wrm(vectors_others):
    v = vectors_others["wrm"]
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False, dtype=torch.float64))
    net[1].weight.data.copy_(torch.tensor(v["W"]))
    x = torch.tensor(v["x0"], dtype=torch.float64).view(1, 3, 1, 1)
    loss, passes = trained_on(WRM(gamma=v["gamma"], steps=len(v["steps"])), net, x, torch.tensor([v["y"]]))
    assert torch.equal(passes[0], x)
    for point, expected in zip(passes[1:], v["steps"], strict=True):
        assert point.flatten().tolist() == pytest.approx(expected, abs=1e-7)
    assert float(loss.value.detach()) == pytest.approx(v["final_ce"], abs=1e-7)


def test_by_hand_sample_by_sample(tiny):
    net, (x, y) = tiny.net(dtype=torch.float64).eval(), tiny.batch(dtype=torch.float64)
    loss, passes = trained_on(WRM(), net, x, y)
    assert len(passes) == 8
    points = []
    for image, label in zip(x, y, strict=True):
        point = image.clone()
        for t in range(1, 8):
            leaf = point[None].clone().requires_grad_()
            height = 1.3 * cross_entropy(net(leaf), label[None]) - (leaf - image).square().sum() / 2
            point = (point + torch.autograd.grad(height, leaf)[0][0] / t**0.5).clamp(0, 1)
        points.append(point)
    torch.testing.assert_close(passes[-1], torch.stack(points), rtol=0, atol=1e-10)
    torch.testing.assert_close(loss.value, cross_entropy(net(torch.stack(points)), y))
    assert not torch.equal(passes[-1], x)


def test_smaller_gamma_stays_nearer(tiny):
    net, (x, y) = tiny.net().eval(), tiny.batch()
    near, far = (trained_on(WRM(gamma=gamma), net, x, y)[1][-1] - x for gamma in (0.01, 1.3))
    assert (near.flatten(1).norm(dim=1) < far.flatten(1).norm(dim=1)).all()


def test_validation_is_pgd_of_ten_steps():
    assert WRM().attack_used == PGD(steps=10)
