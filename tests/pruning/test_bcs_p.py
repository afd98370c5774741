"""BCS-P: the numeric vectors, gradients, and how connections die and are born."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from rprune.models.prunable import prunable
from rprune.models.registry import Architecture, build
from rprune.objectives.benign import Benign
from rprune.pruning.base import METHODS, Context
from rprune.pruning.bcs_p import BORN, ConnectivityPruner, first_occurrence, paper_counts
from rprune.pruning.budget import Budget
from rprune.pruning.masks import count
from rprune.training.loop import Settings, fit


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def bound(tiny, sparsity=0.9, dtype=torch.float32, seed=0, **options):
    model = tiny.net(dtype=dtype)
    budget = Budget.of({name: w.numel() for name, w in prunable(model).items()}, sparsity)
    return model, METHODS.build({"name": "bcs-p", **options}).bind(model, budget, Context(3, 2, seed))


@pytest.mark.parametrize("reset", [True, False])
def test_bcsp_step(vectors_others, reset):
    v = vectors_others["bcsp_step"]
    net = nn.Linear(5, 1, bias=False).double()
    sign = torch.tensor([v["sign"]], dtype=torch.float64)
    net.weight.data = sign * 1e-3
    everything = {"weight": torch.ones(1, 5, dtype=torch.bool)}
    pruner = ConnectivityPruner(net, Budget({"weight": 5}, v["target"]), everything, {"weight": 5}, 0.0, reset, 0)
    theta = pruner.learned["weight"]
    theta.data = torch.tensor([v["theta"]], dtype=torch.float64)
    pruner.refresh()
    assert net.weight.detach().flatten().tolist() == v["W"]
    optimizer = torch.optim.SGD(pruner.parameters(), 0.1, momentum=0.9)
    pruner.attach(optimizer)
    net.weight.grad = torch.tensor([v["dL_dW"]], dtype=torch.float64)
    pruner.before_epoch(0)
    pruner.before_step()
    assert theta.grad.flatten().tolist() == v["dL_dtheta"]
    alive = theta.detach() > 0
    optimizer.step()
    stepped = theta.detach().clone()
    assert stepped.flatten().tolist() == pytest.approx(v["theta_after_sgd"], abs=1e-12)
    assert (alive & (stepped <= 0)).int().flatten().tolist() == v["died"]
    assert int((stepped > 0).sum()) == v["connected_after"]
    pruner.after_step()
    born = theta.detach() != stepped
    assert int(born.sum()) == v["n_reconnect"]
    assert not born[stepped > 0].any()
    assert float(theta.detach()[born]) == v["reconnect_value"] == BORN
    assert count(pruner.masks()) == v["target"]
    momentum = optimizer.state[theta]["momentum_buffer"]
    assert (momentum[0, 1] == 0) == reset  # the dead one
    assert momentum[0, 0] != 0


@pytest.mark.parametrize(
    ("key", "arch"),
    [("bcsp_vgg16_initial_connections", "vgg16"), ("bcsp_resnet18_initial_connections", "cifar-resnet18")],
)
def test_bcsp_initial_connections(vectors_others, key, arch):
    with torch.device("meta"):
        sizes = {name: w.numel() for name, w in prunable(build(Architecture(arch, 10, (3, 32, 32)))).items()}
    for density, v in vectors_others[key].items():
        counts = paper_counts(sizes, float(density))
        budget = Budget.of(sizes, round(1 - float(density), 6))
        assert budget.kept == v["target_total"]
        assert sum(counts.values()) == v["init_total"]
        assert sum(counts.values()) / budget.kept == pytest.approx(v["init_over_target"], abs=1e-3)
        if "first_layer_init" in v:
            first = next(iter(sizes))
            share = sizes[first] / budget.total
            assert counts[first] == v["first_layer_init"]
            assert share == pytest.approx(v["first_layer_share_of_reconnects"], abs=1e-8)
            assert share * budget.kept == pytest.approx(v["expected_first_layer_at_equilibrium"], rel=1e-3)


def test_gradients_are_those_of_the_reparameterised_net(tiny):
    model, pruner = bound(tiny, dtype=torch.float64)
    x, y = tiny.batch(dtype=torch.float64)
    model.eval()
    theta = {name: t.detach().clone().requires_grad_() for name, t in pruner.learned.items()}
    effective = {name: pruner.signs[name] * t.clamp_min(0) for name, t in theta.items()}
    torch.nn.functional.cross_entropy(functional_call(model, effective, (x,)), y).backward()
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    pruner.before_step()
    for name, t in theta.items():
        torch.testing.assert_close(prunable(model)[name].detach(), effective[name].detach())
        connected = t.detach() > 0  # at 0 itself clamp passes gradients on, the method does not
        torch.testing.assert_close(pruner.learned[name].grad, t.grad * connected)


def test_start_is_he_normal_with_random_signs(tiny):
    model, pruner = bound(tiny, 0.0)
    for name, weight in prunable(model).items():
        assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / weight[0].numel()), rel=0.2)
        assert 0.3 < float((pruner.signs[name] > 0).double().mean()) < 0.7


def test_the_number_of_connections_never_changes(tiny):
    model, pruner = bound(tiny)
    kept = pruner.budget.kept
    before = pruner.current_masks()
    died, original = [], pruner.after_step

    def after_step():
        died.append(sum(int((before[n] & (t.detach() <= 0)).sum()) for n, t in pruner.learned.items()))
        original()
        assert count(pruner.current_masks()) == kept
        assert sum(int(w.count_nonzero()) for w in prunable(model).values()) == kept
        before.update(pruner.current_masks())

    pruner.after_step = after_step
    result = fit(model, pruner, Benign(), tiny.data(), Settings(epochs=3, batch_size=24, lr=0.5))
    assert min(died) > 0
    assert all(log.values["kept_share"] == kept / pruner.budget.total for log in result.history)


def test_signs_never_change(tiny):
    model, pruner = bound(tiny)
    fit(model, pruner, Benign(), tiny.data(), Settings(epochs=3, batch_size=24, lr=0.5))
    masks = pruner.finish()
    for name, weight in prunable(model).items():
        assert torch.equal(weight.detach().sign()[masks[name]], pruner.signs[name][masks[name]])


@pytest.mark.parametrize("refill", ["allocation", "size"])
def test_refill_follows_its_option(tiny, refill):
    model, pruner = bound(tiny, 0.9, refill=refill)
    nothing = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in prunable(model).items()}
    pruner.before_epoch(0)
    born = pruner._born(nothing)
    assert count(born) == pruner.budget.kept
    start = {name: int(mask.sum()) for name, mask in pruner.current_masks().items()}
    wanted = start if refill == "allocation" else pruner.budget.sizes
    total = sum(wanted.values())
    for name, mask in born.items():
        if int(mask.sum()) < 0.5 * mask.numel():  # places are found at random where there is room
            assert int(mask.sum()) / pruner.budget.kept == pytest.approx(wanted[name] / total, rel=0.35)


def test_a_surplus_is_off_the_budget_until_finished(tiny):
    model, pruner = bound(tiny, 0.99, start="paper")
    surplus = count(pruner.current_masks())
    assert surplus > 10 * pruner.budget.kept
    assert not pruner.within_budget()
    masks = pruner.finish()
    assert count(masks) == pruner.budget.kept
    assert sum(int(w.count_nonzero()) for w in prunable(model).values()) == pruner.budget.kept


def test_noise_reaches_connected_weights_alone(tiny):
    _, pruner = bound(tiny, noise=1e-3)
    pruner.attach(torch.optim.SGD(pruner.parameters(), 0.1))
    before = {name: t.detach().clone() for name, t in pruner.learned.items()}
    connected = pruner.current_masks()
    pruner.before_epoch(0)
    pruner.after_step()
    moved = torch.cat([(t.detach() - before[n])[connected[n]] for n, t in pruner.learned.items()])
    assert float(moved.std()) == pytest.approx(1e-4, rel=0.1)
    assert all(float((t.detach() - before[n])[~connected[n]].abs().max()) <= BORN for n, t in pruner.learned.items())


def test_given_weights_are_connected_by_magnitude(tiny):
    largest = tiny.net()
    _, pruner = bound(tiny, reinitialize=False, allocation="magnitude")
    expected = METHODS.build({"name": "lwm", "allocation": "magnitude"}).bind(largest, pruner.budget, Context()).masks()
    assert tiny.same_bits(pruner.masks(), expected)
    assert all(torch.equal(w, prunable(largest)[name]) for name, w in prunable(pruner.model).items())


def test_first_occurrence():
    values = torch.tensor([5, 3, 5, 1, 3, 3, 0])
    assert first_occurrence(values).tolist() == [True, True, False, True, False, False, True]
