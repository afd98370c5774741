"""Structured pruning: what goes together, how much of it, and what is left of the network."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from rprune.errors import InputError, UsageError, WorkError
from rprune.export.compact import compact
from rprune.models.channels import channel_groups
from rprune.models.cost import flops, layer_costs
from rprune.models.graph import trace
from rprune.models.prunable import prunable
from rprune.models.resnet import ResNet
from rprune.objectives.benign import Benign
from rprune.pruning.admm import StructuredAdmmPruner
from rprune.pruning.allocation import lamp_scores
from rprune.pruning.base import METHODS, Context, Fixed
from rprune.pruning.budget import Budget
from rprune.pruning.masks import count
from rprune.pruning.parts import Channels, Columns
from rprune.pruning.structure import ChannelRates, ChannelScores
from rprune.training.averaging import perturbed
from rprune.training.loop import Settings, fit

SHAPE = (3, 8, 8)
EPOCHS = 3
SETTINGS = Settings(epochs=EPOCHS, batch_size=24, lr=0.5, momentum=0.9, weight_decay=5e-3)
CONTEXT = Context(EPOCHS, 2, input_shape=SHAPE)
OPTIONS = {"harp": {"gamma_step": 0.5}, "harp-r": {"gamma_step": 0.5}}
METHODS_WITH = [
    (name, structure)
    for name in ("lwm", "hydra", "harp", "robust-admm")
    for structure in METHODS.get(name).structures[1:]
] + [("harp-r", "channel")]
every = pytest.mark.parametrize(("name", "structure"), METHODS_WITH)
on_channels = pytest.mark.parametrize(("name", "structure"), [m for m in METHODS_WITH if m[1] != "column"])
resources = pytest.mark.parametrize("resource", ["weights", "flops"])


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def budget_of(model, sparsity, **options):
    return Budget.of({name: w.numel() for name, w in prunable(model).items()}, sparsity, **options)


def method(name, structure, **options):
    return METHODS.build({"name": name, "structure": structure, **OPTIONS.get(name, {}), **options})


def bound(name, structure, model, sparsity=0.8, **options):
    return method(name, structure, **options).bind(model, budget_of(model, sparsity), CONTEXT)


def train(model, pruner, tiny, **options):
    return fit(model, pruner, Benign(), tiny.data(), SETTINGS, **options)


def resnet(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet(5, SHAPE, 4, blocks=(2, 1, 1, 1)).eval()


def spent(model, masks, resource):
    """Weights or FLOPs of what masks keep, layer by layer from the masks alone."""
    costs = layer_costs(trace(model, SHAPE))
    total = 0
    for name, mask in masks.items():
        rows = int(mask.flatten(1).any(1).sum())
        fan_in = int(mask.any(0).sum())
        assert int(mask.sum()) == rows * fan_in, f"{name} is no block"
        total += rows * fan_in if resource == "weights" else rows * costs[name].positions * (2 * fan_in + 1)
    return total


@every
@pytest.mark.parametrize(("resource", "sparsity"), [("weights", 0.3), ("flops", 0.8)])
def test_what_is_kept_does_not_exceed_the_budget(tiny, name, structure, resource, sparsity):
    model = tiny.net()
    pruner = bound(name, structure, model, sparsity, resource=resource)
    assert not pruner.exact
    train(model, pruner, tiny)
    masks = pruner.finish()
    whole = spent(model, {n: torch.ones_like(m) for n, m in masks.items()}, resource)
    limit = whole * budget_of(model, sparsity).kept // budget_of(model, sparsity).total
    found = spent(model, masks, resource)
    assert found <= limit
    assert found > 0.8 * limit
    assert all(mask.any() for mask in masks.values()), "a layer is empty"
    assert list(masks) == list(prunable(model))
    weights = prunable(model)
    assert all(torch.equal(weights[n] != 0, mask) for n, mask in masks.items())
    assert not any(torch.signbit(weights[n][~mask]).any() for n, mask in masks.items())


def slow_counts(parts, scores, allocation):
    """Take parts one at a time, the best first, until the next does not fit."""
    order = []
    for index, (name, score) in enumerate(scores.items()):
        values = score.double().sort(descending=True).values
        if allocation == "lamp":
            values = lamp_scores(values)
        for j in range(len(values)):
            value = -(j + 1) / len(values) if allocation == "uniform" else float(values[j])
            order.append((-math.inf if j < parts.least[name] else -value, index, j, name))
    kept = dict.fromkeys(parts.sizes, 0)
    for _, _, _, name in sorted(order):
        more = kept | {name: kept[name] + 1}
        if all(more.values()) and parts.spent(torch.tensor(list(more.values()))) > parts.limit:
            break
        kept = more
    return kept


@resources
@pytest.mark.parametrize("allocation", ["uniform", "magnitude", "lamp"])
@pytest.mark.parametrize("structure", ["filter", "channel", "column"])
def test_the_longest_list_of_parts_that_fits(structure, allocation, resource):
    for sparsity in (0.0, 0.3, 0.77):
        model = resnet()
        budget = budget_of(model, sparsity)
        make = Columns if structure == "column" else lambda *a: Channels(*a, structure)
        parts = make(model, budget, CONTEXT, resource)
        scores = parts.scores(parts.weights)
        counts = parts.allocate(allocation, scores)
        assert counts == slow_counts(parts, scores, allocation)
        assert parts.cost(counts) <= parts.limit
        if not sparsity:
            assert counts == parts.sizes


def test_spent_is_the_cost_of_the_smaller_network():
    model = resnet()
    parts = Channels(model, budget_of(model, 0.6), CONTEXT, "flops", "filter")
    counts = parts.allocate("uniform", parts.scores(parts.weights))
    pruner = bound("lwm", "filter", model, 0.6, resource="flops")
    small = compact(model, SHAPE)
    assert flops(trace(resnet(), SHAPE)) == parts.total
    assert flops(small) == parts.cost(counts) <= parts.limit
    parts.resource = "weights"
    assert count(pruner.masks()) == parts.cost(counts)


@pytest.mark.parametrize("structure", ["filter", "channel"])
def test_scores_are_means_over_rows_or_slices(structure):
    model = resnet()
    parts = Channels(model, budget_of(model, 0.5), CONTEXT, "weights", structure)
    weights = prunable(model)
    for power in (1, 2):
        scores = parts.scores(weights, power)
        for group in channel_groups(trace(model, SHAPE)):
            for c in range(group.size):
                rows = [weights[n][c] for n in group.producers]
                slices = [weights[n][:, c * block : (c + 1) * block] for n, block in group.consumers]
                values = torch.cat([v.flatten() for v in (rows if structure == "filter" else slices)])
                wanted = values.abs().pow(power).mean() ** (1 / power)
                torch.testing.assert_close(scores[group.name][c], wanted)


def test_channel_score_of_harp():
    """The released code reshapes without transposing, and gets 10, 26, 42 (fact sheet A, 2.2)."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, (2, 1)), nn.Flatten(), nn.Linear(14, 2))
    model[1].weight.data = torch.arange(1.0, 13.0).view(2, 3, 2, 1)
    context = Context(input_shape=(2, 2, 7))
    parts = Channels(model, budget_of(model, 0.1), context, "weights", "channel")
    assert (parts.scores(parts.weights)["0.weight"] * 4).tolist() == [18, 26, 34]


def test_admm_struct(vectors):
    v = vectors["admm_struct"]
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    model[1].weight.data = torch.tensor(v["W"], dtype=torch.float64)
    context = Context(input_shape=(3, 1, 1))
    columns = Columns(model, Budget.of({"1.weight": 6, "2.weight": 2}, 0.5, exclude=["2"]), context, "weights")
    norms = columns.scores(columns.weights, 2)["1.weight"] * 2**0.5
    assert norms.tolist() == pytest.approx(v["col_norms"])
    pruner = StructuredAdmmPruner(model, columns, "uniform", 0.001, 1.3, 1, 3)
    assert pruner.masks()["1.weight"].int().tolist() == [v["col_keep"]] * 2
    assert pruner.sparse["1.weight"].tolist() == [[3, 0, 0], [4, 0, 0]]
    filters = Channels(model, Budget.of({"1.weight": 6, "2.weight": 2}, 0.5), context, "weights", "filter")
    norms = filters.scores(filters.weights, 2)["1.weight"] * 3**0.5
    assert norms.tolist() == pytest.approx(v["row_norms"])
    pruner = StructuredAdmmPruner(model, filters, "uniform", 0.001, 1.3, 1, 3)
    assert pruner.masks()["1.weight"].int().tolist() == [[keep] * 3 for keep in v["row_keep"]]
    assert pruner.masks()["2.weight"].int().tolist() == [v["row_keep"]]
    assert pruner.sparse["1.weight"].tolist() == [[0, 0, 0], [4, 0, 1]]
    assert pruner.sparse["2.weight"].count_nonzero() == 2  # Z is cut where the parts are scored
    slices = Channels(model, Budget.of({"1.weight": 6, "2.weight": 2}, 0.5), context, "weights", "channel")
    pruner = StructuredAdmmPruner(model, slices, "uniform", 0.001, 1.3, 1, 3)
    assert torch.equal(pruner.sparse["1.weight"], model[1].weight)
    assert pruner.sparse["2.weight"].count_nonzero() == 1


@on_channels
def test_network_becomes_smaller_by_exactly_the_removed_channels(name, structure):
    model = resnet()
    pruner = bound(name, structure, model, 0.7)
    masks = pruner.finish()
    model.eval()
    small = compact(model, SHAPE)
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = model(x), small(x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    whole = {group.name: group for group in channel_groups(trace(model, SHAPE))}
    left = {group.name: group.size for group in channel_groups(small)}
    kept = {name: int(masks[name].flatten(1).any(1).sum()) for name in whole}
    assert left == kept
    assert sum(kept.values()) < sum(group.size for group in whole.values())
    for group in whole.values():  # a channel is in all its weights or in none
        for weight in group.producers:
            assert torch.equal(masks[weight].flatten(1).any(1), masks[group.name].flatten(1).any(1))
        for weight, block in group.consumers:
            columns = masks[weight].transpose(0, 1).flatten(1).any(1).view(-1, block)
            assert torch.equal(columns.all(1), columns.any(1))
            assert torch.equal(columns.all(1), masks[group.name].flatten(1).any(1))
    assert sum(small.get_parameter(n).numel() for n in masks) == count(masks)


def test_equal_scores_keep_the_first():
    model = resnet()
    for weight in prunable(model).values():
        nn.init.ones_(weight)
    masks = bound("lwm", "filter", model, 0.5).masks()
    for group in channel_groups(trace(model, SHAPE)):
        kept = masks[group.name].flatten(1).any(1)
        assert kept.tolist() == sorted(kept.tolist(), reverse=True)


@resources
def test_sparsity_that_leaves_a_group_empty_is_refused_with_one_that_does_not(tiny, resource):
    model = tiny.net()
    with pytest.raises(UsageError, match="leaves a layer empty") as caught:
        bound("lwm", "filter", model, 0.999, resource=resource)
    largest = float(caught.value.hint.split()[-1])
    masks = bound("lwm", "filter", model, largest, resource=resource).masks()
    assert all(mask.any() for mask in masks.values())
    costs = [int(m.flatten(1).any(1).sum()) for n, m in masks.items() if n != "fc.weight"]
    assert max(costs) <= 2
    with pytest.raises(UsageError):
        bound("lwm", "filter", tiny.net(), largest + 0.002, resource=resource)


@on_channels
def test_dense_layers_stay_dense(name, structure):
    model = resnet()
    budget = budget_of(model, 0.3, exclude=["layer2.0.conv1"])
    masks = method(name, structure).bind(model, budget, CONTEXT).finish()
    assert masks["layer2.0.conv1.weight"].all()
    assert masks["layer2.0.conv2.weight"].flatten(1).any(0).all()  # it reads what that layer makes
    assert count(masks) <= budget.kept
    groups = Channels(model, budget, CONTEXT, "weights", structure).sizes
    assert "layer1.0.conv1.weight" in groups
    assert "layer2.0.conv1.weight" not in groups  # so that no rate is learned for it


def test_floor_is_kept():
    model = resnet()
    budget = budget_of(model, 0.6, floor=0.3)
    masks = method("lwm", "channel", allocation="magnitude").bind(model, budget, CONTEXT).masks()
    assert all(int(mask.sum()) >= budget.least[name] for name, mask in masks.items())


@every
def test_same_seed_same_masks_and_plain_state(tiny, name, structure):
    found = []
    for _ in range(2):
        model = tiny.net()
        torch.manual_seed(len(found))
        pruner = bound(name, structure, model)
        train(model, pruner, tiny)
        found.append((pruner.finish(), model))
    assert tiny.same_bits(found[0][0], found[1][0])
    assert tiny.same_bits(found[0][1].state_dict(), found[1][1].state_dict())
    assert list(found[0][1].state_dict()) == list(tiny.net().state_dict())


class Stop(Exception):
    pass


@every
def test_interrupted_and_resumed_is_uninterrupted(tiny, tmp_path, name, structure):
    def run(state_file, on_epoch=lambda log: None):
        model = tiny.net()
        pruner = bound(name, structure, model)
        found = train(model, pruner, tiny, state_file=state_file, on_epoch=on_epoch)
        return model, pruner.finish(), found

    def stop(log):
        if log.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "state.pt", stop)
    model, masks, found = run(tmp_path / "state.pt")
    expected_model, expected_masks, expected = run(None)
    assert tiny.same_bits(model.state_dict(), expected_model.state_dict())
    assert tiny.same_bits(masks, expected_masks)
    assert found == expected


@every
def test_masks_hold_while_fine_tuning(tiny, name, structure):
    model = tiny.net()
    masks = bound(name, structure, model).finish()
    train(model, Fixed(model, masks), tiny)
    assert all(torch.equal(w != 0, masks[n]) for n, w in prunable(model).items())


@every
def test_description_gives_the_method_back(name, structure):
    made = method(name, structure, resource="flops")
    table = json.loads(json.dumps(METHODS.describe(made)))
    assert table["structure"] == structure
    assert METHODS.build(table) == made


@pytest.mark.parametrize("name", ["lwm", "hydra", "harp", "robust-admm"])
def test_options_that_do_not_go_together_are_refused(tiny, name):
    for options in (
        {"resource": "flops"},
        {"structure": "filter", "allocation": "erk"},
        {"structure": "layer"},
        {"structure": "filter", "resource": "time"},
    ):
        with pytest.raises(UsageError):
            METHODS.build({"name": name, **options})
    model = tiny.net()
    with pytest.raises(UsageError, match="forward pass"):
        method(name, "filter").bind(model, budget_of(model, 0.5), Context(EPOCHS, 2))


def test_models_without_channels_or_with_shared_weights_are_refused():
    shared = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Flatten(), nn.Linear(192, 2)
    )
    shared[1].weight = shared[0].weight
    with pytest.raises(InputError, match="shared"):
        bound("lwm", "filter", shared, 0.5)
    alone = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(UsageError, match="nothing of this structure"):
        bound("lwm", "filter", alone, 0.5)


# the gradients of what is learned


def channels_of(model, sparsity=0.5, resource="weights", structure="channel"):
    return Channels(model, budget_of(model, sparsity), CONTEXT, resource, structure)


def gated_loss(model, weights, gates, groups, x, y):
    """The loss with every slice that reads a channel times the channel's gate."""
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for group in groups:
        for name, block in group.consumers:
            shape = [1, -1] + [1] * (weights[name].dim() - 2)
            values[name] = weights[name] * gates[group.name].repeat_interleave(block).view(shape)
    return nn.functional.cross_entropy(torch.func.functional_call(model, values, (x,)), y)


@pytest.mark.parametrize("kind", [ChannelScores, ChannelRates])
def test_gradients_are_those_of_finite_differences(tiny, kind):
    model = tiny.net(dtype=torch.float64).eval()
    channels = channels_of(model)
    pruner = kind(model, channels, "uniform") if kind is ChannelScores else kind(model, channels, 0.7, 0.1)
    for score in pruner.scores.values():
        score.data[::2] *= -1
    pruner.refresh()
    x, y = tiny.batch(dtype=torch.float64)
    nn.functional.cross_entropy(model(x), y).backward()
    pruner.before_step()
    keep = pruner.best(pruner.kept())
    gates = {name: mask.double() for name, mask in keep.items()}
    groups = list(channels.groups.values())
    assert any(not mask.all() for mask in keep.values())
    step, moved = 1e-6, 0
    for index, group in enumerate(groups):
        slopes = []
        for c in range(group.size):
            ends = []
            for sign in (1, -1):
                nearby = gates | {group.name: gates[group.name].clone()}
                nearby[group.name][c] += sign * step
                ends.append(float(gated_loss(model, pruner.weights, nearby, groups, x, y)))
            slopes.append((ends[0] - ends[1]) / (2 * step))
        wanted = torch.tensor(slopes, dtype=torch.float64)
        score = pruner.scores[group.name]
        torch.testing.assert_close(score.grad.flatten(), wanted * score.detach().sign().flatten(), rtol=1e-5, atol=1e-9)
        moved += int((wanted[~keep[group.name]].abs() > 1e-6).sum())
        if kind is ChannelRates:
            r = pruner.r.detach()[index]
            a_min = 0.1 * channels.even_share()
            slope = (1 - a_min) * torch.sigmoid(r) * (1 - torch.sigmoid(r))
            torch.testing.assert_close(pruner.r.grad[index], (wanted.sum() * slope).float(), rtol=1e-4, atol=1e-8)
    assert moved, "removed channels must be able to come back"


@resources
def test_hardware_loss_is_that_of_finite_differences(resource):
    model = resnet()
    pruner = ChannelRates(model, channels_of(model, 0.6, resource), 0.8, 0.1)
    pruner.r.data.add_(torch.linspace(-1, 1, len(pruner.r)))
    pruner.r.data = pruner.r.data.double()
    loss = pruner.hardware_loss()
    assert float(loss.detach()) > 0
    (gradient,) = torch.autograd.grad(loss, pruner.r.requires_grad_())
    for index in range(len(pruner.r)):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                pruner.r[index] += sign * 1e-6
                ends.append(float(pruner.hardware_loss()))
                pruner.r[index] -= sign * 1e-6
        assert float(gradient[index]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-8)
    shares = pruner.rates().detach()
    costs, cost = layer_costs(trace(model, SHAPE)), 0.0
    groups = channel_groups(trace(model, SHAPE))
    made = {n: float(shares[i]) for i, g in enumerate(groups) for n in g.producers}
    read = {n: float(shares[i]) for i, g in enumerate(groups) for n, _ in g.consumers}
    for name, c in costs.items():
        rows, fan_in = c.outputs * made.get(name, 1.0), c.inputs * c.area * read.get(name, 1.0)
        cost += rows * fan_in if resource == "weights" else rows * c.positions * (2 * fan_in + 1)
    assert float(loss.detach()) == pytest.approx(cost / pruner.channels.limit - 1)


@pytest.mark.parametrize("name", ["hydra", "harp"])
def test_diverged_training_is_a_work_error(tiny, name):
    model = tiny.net()
    pruner = bound(name, "channel", model)
    model.bn1.weight.data.fill_(torch.nan)
    with pytest.raises(WorkError, match="nan"):
        train(model, pruner, tiny)


@resources
def test_harp_finds_rates_that_meet_the_target(tiny, resource):
    model = tiny.net()
    method = METHODS.build({"name": "harp", "structure": "channel", "resource": resource, "gamma_step": 22.0})
    pruner = method.bind(model, budget_of(model, 0.6), Context(8, 2, input_shape=SHAPE))
    assert pruner.log()["hardware_loss"] > 0
    assert pruner.log()["kept_share"] == 1
    assert not pruner.within_budget()
    fit(model, pruner, Benign(), tiny.data(), Settings(epochs=8, batch_size=24, lr=0.1, weight_decay=0.0))
    assert pruner.within_budget()
    assert pruner.frozen
    assert pruner.channels.limit * 0.8 < pruner.channels.cost(pruner.kept()) <= pruner.channels.limit
    assert pruner.kept() == pruner.final()


def test_even_share_costs_what_may_be_spent():
    channels = channels_of(resnet(), 0.75, "flops")
    sizes = torch.tensor(list(channels.sizes.values()), dtype=torch.float64)
    assert float(channels.spent(sizes * channels.even_share())) == pytest.approx(channels.limit, rel=1e-9)
    assert channels_of(resnet(), 0.0).even_share() == pytest.approx(1)


@pytest.mark.parametrize("name", ["hydra", "harp"])
def test_search_computes_what_the_net_without_the_channels_computes(name):
    model = resnet()
    pruner = bound(name, "filter", model, 0.6, **({"initial_density": 0.5} if name == "harp" else {}))
    pruner.kept = pruner.final
    pruner.refresh()
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        searched = model(x)
        first = copy.deepcopy(prunable(model)["conv1.weight"])
        pruner.finish()
        torch.testing.assert_close(model(x), searched)
    assert prunable(model)["conv1.weight"].count_nonzero() < first.count_nonzero()


def test_scores_move_and_so_do_masks(tiny):
    model = tiny.net()
    pruner = bound("hydra", "channel", model)
    start = pruner.masks()
    train(model, pruner, tiny)
    assert any(not torch.equal(mask, start[name]) for name, mask in pruner.masks().items())
    pruner = bound("harp-r", "channel", tiny.net())
    assert not any(score.requires_grad for score in pruner.scores.values())


@pytest.mark.parametrize("initial", ["scaled", "xavier-normal", "kaiming-uniform"])
def test_initial_scores(tiny, initial):
    model = tiny.net()
    pruner = bound("hydra", "channel", model, initial_scores=initial)
    for name, score in pruner.scores.items():
        assert score.shape == (pruner.channels.sizes[name], 1)
        if initial == "scaled":
            fan_in = {"conv1.weight": 16 * 9, "conv2.weight": 256}[name]
            assert float(score.detach().max()) == pytest.approx((6 / fan_in) ** 0.5)


def test_s2ap_perturbs_the_scores_of_channels(tiny):
    model = tiny.net()
    host = {"name": "hydra", "structure": "channel"}
    pruner = METHODS.build({"name": "s2ap", "host": host}).bind(model, budget_of(model, 0.8), CONTEXT)
    trained = list(pruner.parameters())
    before = [score.detach().clone() for score in pruner.scores.values()]
    for score in pruner.scores.values():
        score.grad = torch.ones_like(score)
    with perturbed(pruner, trained, 0.1):
        assert all(not torch.equal(s, b) for s, b in zip(pruner.scores.values(), before, strict=True))
    assert all(torch.equal(s, b) for s, b in zip(pruner.scores.values(), before, strict=True))


def test_admm_draws_the_net_to_its_structure(tiny):
    model = tiny.net()
    pruner = method("robust-admm", "filter", rho=1.0, rho_growth=1.0, every=4).bind(
        model, budget_of(model, 0.8), Context(24, 2, input_shape=SHAPE)
    )
    before = pruner.log()["energy_outside"]
    own = {n: m.clone() for n, m in pruner.select(prunable(model)).items()}
    rest = {n: float((w.detach() * ~own[n]).square().sum()) for n, w in prunable(model).items()}
    fit(model, pruner, Benign(), tiny.data(), Settings(epochs=24, batch_size=24, lr=0.05))
    assert pruner.log()["energy_outside"] < before
    after = {
        n: float((w.detach() * ~m).square().sum())
        for (n, w), m in zip(prunable(model).items(), pruner.select(prunable(model)).values(), strict=True)
    }
    assert after["conv1.weight"] < rest["conv1.weight"] / 2
    assert after["conv2.weight"] < rest["conv2.weight"] / 2
