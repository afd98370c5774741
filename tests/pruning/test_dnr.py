"""DNR: the numeric vector, how the freed weights are shared, and what an epoch changes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rprune.errors import UsageError
from rprune.models.prunable import prunable
from rprune.objectives.benign import Benign
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget
from rprune.pruning.dnr import layer_shares, share_out
from rprune.pruning.masks import count
from rprune.training.loop import Settings, fit


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def bound(tiny, sparsity=0.9, epochs=4, **options):
    model = tiny.net()
    budget = Budget.of({name: w.numel() for name, w in prunable(model).items()}, sparsity)
    return model, METHODS.build({"name": "dnr", **options}).bind(model, budget, Context(epochs, 2))


def test_dnr_layer_share(vectors_others):
    v = vectors_others["dnr_layer_share"]
    momentum = {name: -torch.tensor(values, dtype=torch.float64) for name, values in v["momentum"].items()}
    masks = {name: torch.tensor(values, dtype=torch.bool) for name, values in v["mask"].items()}
    shares = layer_shares(momentum, masks)
    for name, mask in masks.items():
        assert float(momentum[name].abs()[mask].mean()) == pytest.approx(v["mean_abs_active"][name])
        assert shares[name] == pytest.approx(v["share"][name], abs=1e-9)
    counts = share_out(100, shares, dict.fromkeys(shares, 1000))
    assert sum(counts.values()) == 100  # the reference rounds up: 102
    assert all(0 <= v["regrow_of_100"][name] - counts[name] <= 1 for name in counts)
    assert counts == {"l1": 22, "l2": 4, "l3": 74}


@st.composite
def freed(draw):
    room = {f"l{i}": n for i, n in enumerate(draw(st.lists(st.integers(0, 500), min_size=1, max_size=6)))}
    shares = {name: draw(st.one_of(st.just(0.0), st.floats(0, 1))) for name in room}
    return draw(st.integers(0, sum(room.values()))), shares, room


@settings(max_examples=150, deadline=None, derandomize=True)
@given(freed())
def test_share_out_is_exact_proportional_and_within_the_room(case):
    total, shares, room = case
    counts = share_out(total, shares, room)
    assert list(counts) == list(room)
    assert sum(counts.values()) == total
    assert all(0 <= counts[name] <= room[name] for name in room)
    open_layers = [name for name in room if counts[name] < room[name]]
    for a in open_layers:
        for b in open_layers:
            if shares[a] > shares[b]:
                assert counts[a] >= counts[b] - 1


def test_overflow_goes_to_the_others_by_their_shares():
    assert share_out(10, {"a": 0.8, "b": 0.1, "c": 0.1}, {"a": 4, "b": 10, "c": 10}) == {"a": 4, "b": 3, "c": 3}


def slow_rewired(pruner, momentum, rate):
    """The new masks by sorting Python lists."""
    weights = {name: w.detach().flatten().tolist() for name, w in prunable(pruner.model).items()}
    momentum = {name: m.abs().flatten().tolist() for name, m in momentum.items()}
    masks = {name: mask.flatten().tolist() for name, mask in pruner.masks().items()}
    means = {n: sum(a for a, m in zip(momentum[n], masks[n], strict=True) if m) / sum(masks[n]) for n in masks}
    kept = {}
    for name, mask in masks.items():
        alive = sorted((i for i, m in enumerate(mask) if m), key=lambda i: -abs(weights[name][i]))
        kept[name] = set(alive[: max(len(alive) - int(rate * len(alive)), pruner.budget.least[name])])
    freed = pruner.budget.kept - sum(map(len, kept.values()))
    total = sum(means.values())
    wanted = {name: freed * mean / total for name, mean in means.items()}
    assert all(wanted[n] < len(masks[n]) - len(kept[n]) for n in masks), "no overflow in this test"
    grown = {name: int(value) for name, value in wanted.items()}
    for name in sorted(wanted, key=lambda n: grown[n] - wanted[n])[: freed - sum(grown.values())]:
        grown[name] += 1
    for name in masks:
        out = sorted((i for i in range(len(masks[name])) if i not in kept[name]), key=lambda i: -momentum[name][i])
        kept[name] |= set(out[: grown[name]])
    return kept


def test_rewiring_is_the_slow_one(tiny):
    model, pruner = bound(tiny, epochs=4)
    expected, changed, original = {}, [], pruner.before_epoch

    def before_epoch(epoch):
        before = dict(pruner.masks())
        values = copy.deepcopy({n: w.detach() for n, w in prunable(model).items()})
        if epoch:
            momentum = {n: pruner.optimizer.state[w]["momentum_buffer"] for n, w in prunable(model).items()}
            expected.update(slow_rewired(pruner, momentum, 0.5 * (1 - epoch / 4)))
        original(epoch)
        if not epoch:
            return
        for name, mask in pruner.masks().items():
            assert set(mask.flatten().nonzero().flatten().tolist()) == expected[name]
            changed.append(int((mask & ~before[name]).sum()))
            weight = prunable(model)[name].detach()
            # what is new begins at 0, what came back at once keeps its value
            assert torch.equal(weight, torch.where(mask & before[name], values[name], torch.zeros(())))

    pruner.before_epoch = before_epoch
    fit(model, pruner, Benign(), tiny.data(), Settings(epochs=4, batch_size=24))
    assert sum(changed) > 50
    assert len(changed) == 12


def test_the_number_of_weights_never_changes_but_that_of_layers_does(tiny):
    model, pruner = bound(tiny)
    start = {name: int(mask.sum()) for name, mask in pruner.masks().items()}
    seen = []

    def on_epoch(_):
        assert count(pruner.masks()) == pruner.budget.kept
        # what is validated and selected has no weight that was only just grown
        assert sum(int(w.count_nonzero()) for w in prunable(model).values()) == pruner.budget.kept
        seen.append({name: int(mask.sum()) for name, mask in pruner.masks().items()})

    fit(model, pruner, Benign(), tiny.data(), Settings(epochs=4, batch_size=24), on_epoch=on_epoch)
    assert seen[0] == start
    assert seen[-1] != start


def test_momentum_of_weights_that_are_out_is_their_gradients(tiny):
    model, pruner = bound(tiny, rho=0)
    fit(model, pruner, Benign(), tiny.data(), Settings(epochs=1, batch_size=24))
    for name, weight in prunable(model).items():
        momentum = pruner.optimizer.state[weight]["momentum_buffer"]
        assert (momentum[~pruner.masks()[name]] != 0).double().mean() > 0.9


def test_penalty_is_the_distance_from_the_epochs_start(tiny):
    model, pruner = bound(tiny, rho=0.3)
    pruner.before_epoch(0)
    assert float(pruner.penalty().detach()) == 0
    start = {name: w.detach().clone() for name, w in prunable(model).items()}
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.mul_(1.5)
    penalty = pruner.penalty()
    expected = 0.15 * sum(float((0.5 * w).square().sum()) for w in start.values())
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    for name, weight in prunable(model).items():
        torch.testing.assert_close(weight.grad, 0.15 * start[name])
    assert bound(tiny, rho=0)[1].penalty() is None


def test_an_optimizer_without_momentum_is_refused(tiny):
    model, pruner = bound(tiny)
    with pytest.raises(UsageError, match="momentum"):
        fit(model, pruner, Benign(), tiny.data(), Settings(epochs=1, batch_size=24, momentum=0.0))
