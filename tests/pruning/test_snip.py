"""SNIP against its vector, masks as variables, and larger batches."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from rprune.data.loaders import Batch
from rprune.errors import UsageError
from rprune.models.prunable import prunable
from rprune.pruning.allocation import global_top
from rprune.pruning.base import Context
from rprune.pruning.budget import Budget
from rprune.pruning.snip import SNIP, benign_loss, sensitivity


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def batch(tiny, n, seed=0, **options):
    x, y = tiny.batch(n, seed, **options)
    return Batch(x, y, torch.arange(n))


def budget_of(model, sparsity=0.9):
    return Budget.of({n: w.numel() for n, w in prunable(model).items()}, sparsity)


def test_snip_linear2(vectors_others):
    v = vectors_others["snip_linear2"]
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    for layer, key in zip(net, ("W1", "W2"), strict=True):
        layer.weight.data = torch.tensor(v[key], dtype=torch.float64)
    x, target = (torch.tensor(v[key], dtype=torch.float64) for key in "XT")
    data = Batch(x, torch.zeros(2, dtype=torch.int64), torch.arange(2))

    def loss(model, batch):
        return (model(batch.x) - target).square().mean() / 2

    assert float(loss(net, data).detach()) == v["loss"]
    scores = sensitivity(net, [data], loss)
    for score, key in zip(scores.values(), ("dL_dm1", "dL_dm2"), strict=True):
        torch.testing.assert_close(score, 2 * torch.tensor(v[key], dtype=torch.float64).abs())  # of two samples
    flat = torch.cat([score.flatten() for score in scores.values()])
    assert (flat / flat.sum()).tolist() == pytest.approx(v["saliency_normalised"], abs=1e-9)
    context = Context(loss=loss, batches=lambda: iter([data]))
    masks = SNIP(reinitialize=False).bind(net, Budget({"0.weight": 4, "1.weight": 2}, v["keep"]), context).masks()
    assert masks["0.weight"].int().tolist() == v["mask1"]
    assert masks["1.weight"].int().tolist() == v["mask2"]


def test_sensitivity_is_the_gradient_of_a_mask(tiny):
    """|dL/dm| at m = 1, with the mask written out."""
    model = tiny.net(dtype=torch.float64)
    data = batch(tiny, 8, dtype=torch.float64)
    found = sensitivity(model, [data], benign_loss)
    masks = {name: torch.ones_like(w, requires_grad=True) for name, w in prunable(model).items()}
    model.eval()
    masked = {name: w.detach() * masks[name] for name, w in prunable(model).items()}
    value = nn.functional.cross_entropy(functional_call(model, masked, data.x), data.y, reduction="sum")
    for score, gradient in zip(found.values(), torch.autograd.grad(value, list(masks.values())), strict=True):
        torch.testing.assert_close(score, gradient.abs(), rtol=1e-9, atol=1e-12)


def test_several_batches_are_one_large_one(tiny):
    model = tiny.net(dtype=torch.float64)
    parts = [batch(tiny, n, n, dtype=torch.float64) for n in (3, 5, 7)]
    whole = Batch(*(torch.cat(values) for values in zip(*parts, strict=True)))
    some, one = sensitivity(model, parts, benign_loss), sensitivity(model, [whole], benign_loss)
    for name, score in some.items():
        torch.testing.assert_close(score, one[name], rtol=1e-9, atol=1e-12)


def test_batch_norm_does_not_move_and_modes_are_as_before(tiny):
    model = tiny.net().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sensitivity(model, [batch(tiny, 8)], benign_loss)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def bound(model, tiny, count=2, **options):
    context = Context(batches=lambda: (batch(tiny, 8, seed) for seed in range(count)), loss=benign_loss)
    return SNIP(**options).bind(model, budget_of(model), context)


def test_only_so_many_batches_are_read(tiny):
    read = []

    def batches():
        for seed in range(9):
            read.append(seed)
            yield batch(tiny, 8, seed)

    model = tiny.net()
    SNIP(batches=3, adversarial=False).bind(model, budget_of(model), Context(batches=batches))
    assert read == [0, 1, 2]


def test_loss_is_the_objectives_or_benign(tiny):
    asked = []

    def loss(net, data):
        asked.append(len(data.y))
        return net(data.x * 0).logsumexp(1).mean()

    masks = []
    for adversarial in (True, False):
        model = tiny.net()
        context = Context(batches=lambda: iter([batch(tiny, 8)]), loss=loss)
        pruner = SNIP(adversarial=adversarial, reinitialize=False).bind(model, budget_of(model), context)
        masks.append(pruner.masks())
    assert asked == [8]
    assert not tiny.same_bits(*masks)


def test_weights_are_fresh_and_drawn_again_after_scoring(tiny):
    first, second, kept = tiny.net(0), tiny.net(1), tiny.net()
    seen = []

    def loss(net, data):
        seen.append(net.fc.weight.detach().clone())
        return benign_loss(net, data)

    context = Context(batches=lambda: iter([batch(tiny, 8)]), loss=loss)
    for model in (first, second):
        SNIP().bind(model, budget_of(model), context)
    assert tiny.same_bits(first.state_dict(), second.state_dict())
    assert torch.equal(seen[0], seen[1])
    alive = first.fc.weight != 0
    assert not torch.equal(first.fc.weight[alive], seen[0][alive])
    masks = bound(kept, tiny, reinitialize=False).masks()
    assert torch.equal(kept.fc.weight[masks["fc.weight"]], tiny.net().fc.weight[masks["fc.weight"]])


def test_the_pool_is_global_and_a_layer_keeps_its_floor(tiny):
    model = tiny.net()
    budget = Budget.of({n: w.numel() for n, w in prunable(model).items()}, 0.99, floor=5)
    data = batch(tiny, 8)
    scores = sensitivity(model, [data], benign_loss)
    context = Context(batches=lambda: iter([data]), loss=benign_loss)
    masks = SNIP(reinitialize=False).bind(model, budget, context).masks()
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    assert counts == global_top(scores, budget)
    assert min(counts.values()) >= 5
    assert sum(counts.values()) == budget.kept


def test_a_resumed_stage_holds_the_mask_it_began_with(tiny):
    first, second = tiny.net(), tiny.net()
    a, b = bound(first, tiny), bound(second, tiny, count=1, adversarial=False, reinitialize=False)
    assert not tiny.same_bits(a.masks(), b.masks())
    b.load_state_dict(a.state_dict())
    assert tiny.same_bits(a.masks(), b.masks())
    assert not any(w[~b.masks()[name]].any() for name, w in prunable(second).items())


@pytest.mark.parametrize("context", [Context(loss=benign_loss), Context(batches=lambda: iter(()))])
def test_without_data_or_loss_it_says_what_is_missing(tiny, context):
    model = tiny.net()
    with pytest.raises(UsageError, match="scores weights"):
        SNIP().bind(model, budget_of(model), context)
