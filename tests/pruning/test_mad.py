"""MAD against its vectors and K-FAC's factors written out."""

from functools import partial

import pytest
import torch
from torch import nn

from rprune.data.loaders import Batch
from rprune.errors import UsageError
from rprune.models.prunable import prunable
from rprune.pruning.base import Context
from rprune.pruning.budget import Budget
from rprune.pruning.curvature import damage
from rprune.pruning.mad import HIGHEST, LOWEST, MAD, batch_damage, choose, ranked, removed, soft_mask
from rprune.threat import ThreatModel


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_mad_saliency_linear(vectors_others):
    v = vectors_others["mad_saliency_linear"]
    weight, mask, a, g = (f64(v[key]) for key in ("W", "mask", "a", "grad_out(batch-mean loss)"))
    delta = weight - weight * mask
    torch.testing.assert_close(delta, f64(v["delta"]))
    found = damage(nn.Linear(3, 2).double(), delta, a, g)
    torch.testing.assert_close(found, f64(v["saliency"]), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.sum(1), f64(v["sum_equals_half_dTHd_per_row"]), rtol=0, atol=1e-9)


def test_mad_softplus_mask_bounds(vectors_others):
    v = vectors_others["mad_softplus_mask_bounds"]
    assert pytest.approx(v["f_inv(1)"], abs=1e-11) == HIGHEST
    assert pytest.approx(v["f_inv(0)->uses 1e-4"], abs=1e-8) == LOWEST
    assert removed(torch.tensor([HIGHEST, LOWEST])).tolist() == pytest.approx([0, 0.9999], abs=1e-7)
    assert removed(torch.tensor([HIGHEST])).item() == 0


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
def test_damage_of_a_convolution_is_that_of_its_patches(groups, stride, padding):
    """As K-FAC's code forms it: A from im2col patches, G from output gradients, both with the places divided out."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, stride, padding, groups=groups).double()
    a = torch.randn(5, 4, 7, 7, generator=generator, dtype=torch.float64)
    g = torch.randn(layer(a).shape, generator=generator, dtype=torch.float64)
    delta = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
    places = g[0, 0].numel()
    expected = torch.zeros_like(delta)
    for i in range(6):
        group = i * groups // 6
        part = a[:, group * 4 // groups : (group + 1) * 4 // groups]
        patches = nn.functional.unfold(part, 3, padding=padding, stride=stride).transpose(1, 2).flatten(0, 1)
        A = (patches / places).T @ (patches / places) / 5
        G = (g[:, i].flatten() * 5 * places).square().sum() / (5 * places)
        row = delta[i].flatten()
        expected[i] = (0.5 * G * row * (row @ A)).view_as(expected[i])
    torch.testing.assert_close(damage(layer, delta, a, g), expected, rtol=1e-9, atol=1e-9)


def test_soft_masks_lower_the_loss_and_stay_in_bounds(tiny):
    model = tiny.net().eval().requires_grad_(False)
    x, y = tiny.batch(16)
    shares = soft_mask(model, x, y, 20, 0.1)
    weights = prunable(model)
    assert all(share.min() >= 0 and share.max() <= 0.9999 + 1e-6 for share in shares.values())
    assert any((share == 0).any() for share in shares.values())
    masked = {name: weight * (1 - shares[name]) for name, weight in weights.items()}
    before = nn.functional.cross_entropy(model(x), y)
    after = nn.functional.cross_entropy(torch.func.functional_call(model, masked, x), y)
    assert after < before


def test_damage_of_a_batch_is_taken_at_the_masked_net(tiny):
    """Inputs and output gradients of the masked net, found here by changing the weights themselves."""
    model = tiny.net(dtype=torch.float64)
    x, y = tiny.batch(6, dtype=torch.float64)
    found = batch_damage(model, x, y, 5, 0.1)
    slow = tiny.net(dtype=torch.float64).eval()
    shares = soft_mask(tiny.net(dtype=torch.float64).eval().requires_grad_(False), x, y, 5, 0.1)
    delta = {name: weight.detach() * shares[name] for name, weight in prunable(slow).items()}
    for name, weight in prunable(slow).items():
        weight.data -= delta[name]
    kept = {}

    def keep(name, module, inputs, output):  # noqa: ARG001
        output.retain_grad()
        kept[name] = inputs[0], output

    for name, module in slow.named_modules():
        if f"{name}.weight" in delta:
            module.register_forward_hook(partial(keep, name))
    nn.functional.cross_entropy(slow(x), y).backward()
    for name, scores in found.items():
        a, output = kept[name.removesuffix(".weight")]
        layer = slow.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(scores, damage(layer, delta[name], a.detach(), output.grad), rtol=1e-7, atol=1e-12)


def test_layers_that_work_in_place_afterwards():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    in_place = nn.Sequential(plain[0], nn.ReLU(inplace=True), nn.Flatten(), plain[3])
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    found = [batch_damage(net, x, y, 3, 0.1) for net in (plain, in_place)]
    for name, scores in found[0].items():
        assert scores.any()
        torch.testing.assert_close(scores, found[1][name])


def test_the_model_is_left_as_it_was(tiny):
    model = tiny.net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch_damage(model, *tiny.batch(), 3, 0.1)
    assert tiny.same_bits(model.state_dict(), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_ties_go_by_magnitude():
    scores = {"a": torch.tensor([[0.0, 0.0], [0.0, -1.0]]), "b": torch.tensor([[0.0, 2.0]])}
    weights = {"a": torch.tensor([[0.1, -0.5], [0.3, 9.0]]), "b": torch.tensor([[0.4, 0.0]])}
    places = ranked(scores, weights)
    assert places["a"].tolist() == [[1, 4], [2, 0]]
    assert places["b"].tolist() == [[3, 5]]


def test_convolutions_share_one_pool_and_rows_of_linear_layers_keep_equal_shares(tiny):
    generator = torch.Generator().manual_seed(0)
    weights = prunable(tiny.net())
    scores = {name: torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    budget = Budget.of({name: w.numel() for name, w in weights.items()}, 0.9)
    masks = choose(scores, weights, budget)
    assert list(masks) == list(weights)
    assert sum(int(m.sum()) for m in masks.values()) == budget.kept
    fc = masks["fc.weight"]
    assert abs(int(fc.sum()) - budget.density * fc.numel()) <= 1
    rows = fc.sum(1)
    assert rows.max() - rows.min() <= 1
    for row, mask in zip(scores["fc.weight"], fc, strict=True):
        assert row[mask].min() >= row[~mask].max()
    convs = [name for name in weights if name != "fc.weight"]
    kept = torch.cat([scores[name][masks[name]] for name in convs])
    dropped = torch.cat([scores[name][~masks[name]] for name in convs])
    assert kept.min() >= dropped.max()


@pytest.mark.parametrize("floor", [1, 0.005])
@pytest.mark.parametrize("exclude", [(), ("fc",), ("conv1", "conv2", "shortcut")])
def test_floors_and_dense_layers(tiny, floor, exclude):
    weights = prunable(tiny.net())
    scores = {name: torch.zeros_like(w) + (name == "conv2.weight") for name, w in weights.items()}
    budget = Budget.of({name: w.numel() for name, w in weights.items()}, 0.2 if exclude else 0.99, floor, (), exclude)
    masks = choose(scores, weights, budget)
    assert sum(int(m.sum()) for m in masks.values()) == budget.kept
    assert all(int(masks[name].sum()) >= budget.least[name] for name in weights)


def context(tiny, count, read=None, **options):
    def batches():
        for seed in range(count):
            if read is not None:
                read.append(seed)
            x, y = tiny.batch(8, seed)
            yield Batch(x, y, torch.arange(8))

    return Context(batches=batches, threat=ThreatModel.of("linf", "8/255"), **options)


def bound(model, context, **options):
    budget = Budget.of({n: w.numel() for n, w in prunable(model).items()}, 0.9)
    return MAD(**options).bind(model, budget, context)


def test_batches_limit_the_pass_and_none_reads_all(tiny):
    for limit, expected in ((2, [0, 1]), (None, [0, 1, 2])):
        read = []
        bound(tiny.net(), context(tiny, 3, read), batches=limit, mask_steps=1)
        assert read == expected


def test_only_the_points_depend_on_the_seed(tiny):
    masks = [bound(tiny.net(), context(tiny, 1, seed=seed), mask_steps=2).masks() for seed in (0, 0, 1)]
    assert tiny.same_bits(masks[0], masks[1])
    assert not tiny.same_bits(masks[0], masks[2])


def test_weights_that_stay_are_the_given_ones(tiny):
    model, given = tiny.net(), tiny.net()
    masks = bound(model, context(tiny, 1), mask_steps=2).finish()
    for name, mask in masks.items():
        assert torch.equal(prunable(model)[name], prunable(given)[name].where(mask, torch.zeros(())))


def test_without_a_threat_or_data_it_says_so(tiny):
    with pytest.raises(UsageError, match="attacks the model"):
        bound(tiny.net(), Context(batches=lambda: iter(())))
    with pytest.raises(UsageError, match="training data"):
        bound(tiny.net(), Context(threat=ThreatModel.of("linf", "8/255")))
