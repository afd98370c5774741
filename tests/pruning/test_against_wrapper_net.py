"""HYDRA and HARP step by step against the slow wrapper net."""

import copy

import pytest
import torch

from rprune.models.prunable import prunable
from rprune.models.registry import Architecture, build
from rprune.pruning.base import Context
from rprune.pruning.budget import Budget
from rprune.pruning.harp import Harp
from rprune.pruning.hydra import Hydra

LR, MOMENTUM, DECAY, GAMMA = 0.1, 0.9, 5e-3, 0.3


@pytest.fixture(scope="module")
def oracle(load_helper):
    return load_helper("oracles/wrapper_net.py")


@pytest.fixture(params=["residual", "cnn-small"])
def case(request, load_helper):
    """A float64 net in eval mode and batches for it: batch norm is a fixed affine map on both sides."""
    if request.param == "residual":
        model = load_helper("pruning/tiny_net.py").net(dtype=torch.float64)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = build(Architecture("cnn-small", 5, (3, 8, 8))).double()
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.rand(6, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(5, (6,), generator=generator),
        )
        for _ in range(10)
    ]
    return model.eval(), batches


def budget_of(model, sparsity):
    return Budget.of({name: w.numel() for name, w in prunable(model).items()}, sparsity)


def module(name):
    return name.removesuffix(".weight")


def bound_hydra(model, sparsity=0.9):
    budget = budget_of(model, sparsity)
    pruner = Hydra().bind(model, budget, Context())
    return pruner, {module(n): budget.sizes[n] - kept for n, kept in pruner.counts().items()}


def bound_harp(model, sparsity=0.9):
    """In float64 throughout, r included, so that it can be compared to the last digits."""
    pruner = Harp().bind(model, budget_of(model, sparsity), Context())
    pruner.r = pruner.r.detach().double().requires_grad_()
    pruner._sizes = pruner._sizes.double()
    pruner.gamma = GAMMA
    pruner.write(pruner.current_masks())
    names = [module(name) for name in pruner.budget.sizes]
    return pruner, dict(zip(names, pruner.r.tolist(), strict=True))


def descend(model, pruner, batches, *, steps=True):
    trained = [t for t in pruner.parameters() if not any(t is p for p in model.parameters())]
    optimizer = torch.optim.SGD(trained, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    for x, y in batches:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        penalty = pruner.penalty()
        model.zero_grad()
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        pruner.before_step()
        if steps:
            optimizer.step()
            pruner.after_step()


def close(found, expected, tolerance):
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hydra_has_the_oracles_logits_when_bound(oracle, case, dtype):
    model, batches = case
    model, x = model.to(dtype), batches[0][0].to(dtype)
    dense = copy.deepcopy(model)
    _, pruned = bound_hydra(model)
    assert torch.equal(model(x), oracle.to_subnet(dense, pruned=pruned)(x))


def test_harp_has_the_oracles_logits_when_bound(oracle, case):
    model, batches = case
    dense = copy.deepcopy(model)
    pruner, r = bound_harp(model)
    subnet = oracle.to_subnet(dense, a_t=pruner.budget.density, r=r)
    assert torch.equal(model(batches[0][0]), subnet(batches[0][0]))


def test_hydra_gradients(oracle, case):
    model, batches = case
    dense = copy.deepcopy(model)
    pruner, pruned = bound_hydra(model)
    descend(model, pruner, batches[:1], steps=False)
    subnet = oracle.to_subnet(dense, pruned=pruned)
    torch.nn.functional.cross_entropy(subnet(batches[0][0]), batches[0][1]).backward()
    for name, layer in oracle.subnet_layers(subnet).items():
        assert layer.scores.grad.abs().max() > 0
        close(pruner.scores[f"{name}.weight"].grad, layer.scores.grad, 1e-12)


def test_harp_gradients(oracle, case):
    model, batches = case
    dense = copy.deepcopy(model)
    pruner, r = bound_harp(model)
    descend(model, pruner, batches[:1], steps=False)
    subnet = oracle.to_subnet(dense, a_t=pruner.budget.density, r=r)
    layers = oracle.subnet_layers(subnet)
    rates = [layer.layer_rate() for layer in layers.values()]
    hardware = oracle.hardware_loss(rates, list(pruner.budget.sizes.values()), pruner.budget.density)
    close(pruner.hardware_loss(), hardware, 1e-12)
    loss = torch.nn.functional.cross_entropy(subnet(batches[0][0]), batches[0][1])
    (loss + GAMMA * hardware).backward()
    for index, (name, layer) in enumerate(layers.items()):
        close(pruner.scores[f"{name}.weight"].grad, layer.scores.grad, 1e-12)
        close(pruner.r.grad[index], layer.r.grad, 1e-12)


def test_harp_penalty_is_the_oracles_above_the_target(oracle, case):
    model, _ = case
    pruner, _ = bound_harp(model, 0.95)
    rates = [oracle.rate(r, pruner.budget.density) for r in pruner.r.detach()]
    expected = oracle.hardware_loss(rates, list(pruner.budget.sizes.values()), pruner.budget.density)
    assert expected > 0.5
    close(pruner.penalty(), GAMMA * expected, 1e-12)


def test_hydra_after_ten_steps(oracle, case):
    model, batches = case
    dense = copy.deepcopy(model)
    pruner, pruned = bound_hydra(model)
    start = {name: mask.clone() for name, mask in pruner.masks().items()}
    descend(model, pruner, batches)
    expected = oracle.sgd_steps_hydra(dense, pruned, batches, LR, MOMENTUM, DECAY)
    assert set(expected) == {f"{module(name)}.scores" for name in pruner.scores}
    for name, scores in pruner.scores.items():
        close(scores, expected[f"{module(name)}.scores"], 1e-9)
    assert any(not torch.equal(mask, start[name]) for name, mask in pruner.masks().items()), "no mask has moved"


@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_harp_after_ten_steps(oracle, case, sparsity):
    model, batches = case
    dense = copy.deepcopy(model)
    pruner, r = bound_harp(model, sparsity)
    descend(model, pruner, batches)
    expected = oracle.sgd_steps_harp(dense, pruner.budget.density, GAMMA, r, batches, LR, MOMENTUM, DECAY)
    for index, name in enumerate(pruner.scores):
        close(pruner.scores[name], expected[f"{module(name)}.scores"], 1e-9)
        close(pruner.r[index], expected[f"{module(name)}.r"], 1e-9)
        assert abs(float(pruner.r[index].detach()) - r[module(name)]) > 1e-4


def test_top_mask_and_the_oracles_sort_agree(oracle):
    from rprune.pruning.masks import top_mask

    scores = torch.rand(7, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kept in (1, 31, 157, scores.numel()):
        assert torch.equal(top_mask(scores, kept).double(), oracle.mask_of(scores, scores.numel() - kept))


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
def test_erk_is_the_oracles(oracle, density):
    from rprune.pruning.budget import fill

    shapes = [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 1, 1), (64, 64, 3, 3), (10, 256), (100, 100)]
    weights = {str(i): torch.empty(shape, device="meta") for i, shape in enumerate(shapes)}
    sizes = {name: 1000 * w.numel() for name, w in weights.items()}
    counts = fill(
        {n: float(sum(w.shape)) for n, w in weights.items()}, Budget(sizes, int(density * sum(sizes.values())))
    )
    assert [counts[n] / sizes[n] for n in sizes] == pytest.approx(oracle.erk(shapes, density), abs=1e-6)
