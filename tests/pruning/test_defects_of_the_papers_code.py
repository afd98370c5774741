"""Defects of the released code of HYDRA and HARP (fact sheet A, 1.3, 2.3 to 2.5) that must not come back."""

import json

import pytest
import torch

from rprune.errors import InputError
from rprune.models.prunable import prunable
from rprune.objectives.benign import Benign
from rprune.pruning.allocation import allocate
from rprune.pruning.base import METHODS, Context, Fixed
from rprune.pruning.budget import Budget
from rprune.training.loop import Settings, fit

SCORED = ["hydra", "harp", "harp-r", "edge-popup"]


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def bound(name, model, sparsity=0.9, **options):
    budget = Budget.of({n: w.numel() for n, w in prunable(model).items()}, sparsity)
    return METHODS.build({"name": name, **options}).bind(model, budget, Context(2, 2))


@pytest.mark.parametrize("name", SCORED)
def test_masks_in_channels_last_layout_are_masks(tiny, name):
    """The released fill goes through a flattened view, which is a copy there: the "mask" stays |s|."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = tiny.net(dtype=torch.float64).to(memory_format=layout)
        pruner = bound(name, model)
        assert all(s.dim() < 4 or s.is_contiguous(memory_format=layout) for s in pruner.scores.values())
        fit(model, pruner, Benign(), Doubled(tiny.data()), Settings(epochs=2, batch_size=24, lr=0.5))
        masks = pruner.finish()
        for layer, weight in prunable(model).items():
            assert torch.equal(weight, pruner.weights[layer].where(masks[layer], torch.zeros((), dtype=torch.float64)))
        found.append({layer: mask.contiguous() for layer, mask in masks.items()})
    assert tiny.same_bits(*found)


class Doubled:
    """A loader in double precision, so that layouts do not differ in rounding that moves a mask."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def sizes(self, batch_size):
        return self.data.sizes(batch_size)

    def shuffled(self, *arguments):
        for batch in self.data.shuffled(*arguments):
            yield batch._replace(x=batch.x.double())

    def ordered(self, *arguments):
        for batch in self.data.ordered(*arguments):
            yield batch._replace(x=batch.x.double())

    def take(self, ids):
        batch = self.data.take(ids)
        return batch._replace(x=batch.x.double())


@pytest.mark.parametrize("name", ["hydra", "harp"])
def test_a_layer_of_zeros_has_scores(tiny, name):
    """The released scale divides by max|w| = 0."""
    model = tiny.net()
    model.conv2.weight.data.zero_()
    pruner = bound(name, model)
    assert all(torch.isfinite(score).all() for score in pruner.scores.values())
    assert sum(int(mask.sum()) for mask in pruner.masks().values()) == 427


def strategy(tmp_path, table):
    (tmp_path / "strategy.json").write_text(json.dumps(table))
    return f"file:{tmp_path / 'strategy.json'}"


def test_a_strategy_belongs_to_names_whatever_their_order(tiny, tmp_path):
    """The released lists go by position, and two orders of ResNet-18 are about: 3.3 times the weights were kept."""
    weights = prunable(tiny.net())
    budget = Budget.of({n: w.numel() for n, w in weights.items()}, 0.9)
    shares = {name: (index + 1) / 40 for index, name in enumerate(weights)}
    turned = dict(reversed(shares.items()))
    counts = [allocate(strategy(tmp_path, table), weights, budget) for table in (shares, turned)]
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) == budget.kept


@pytest.mark.parametrize("name", ["hydra", "harp"])
@pytest.mark.parametrize("change", ["list", "missing", "misnamed", "extra"])
def test_a_strategy_that_does_not_name_every_layer_is_refused(tiny, tmp_path, name, change):
    table = dict.fromkeys(prunable(tiny.net()), 0.1)
    if change == "list":
        table = list(table.values())
    elif change == "missing":
        del table["shortcut.weight"]
    elif change == "misnamed":
        table["shortcut.0.weight"] = table.pop("shortcut.weight")
    else:
        table["unused.weight"] = 0.1
    with pytest.raises(InputError):
        bound(name, tiny.net(), allocation=strategy(tmp_path, table))


@pytest.mark.parametrize(("size", "sparsity", "kept"), [(10, 0.9, 1), (10, 0.1, 9), (5120, 0.999, 5), (1000, 0.7, 300)])
def test_counts_are_integers_from_the_start(size, sparsity, kept):
    """int((1 - 0.9) * 10) is 0."""
    model = torch.nn.Linear(size, 1, bias=False)
    assert int(bound("hydra", model, sparsity).masks()["weight"].sum()) == kept


@pytest.mark.parametrize("sparsity", [0.89, 0.9, 0.95, 0.99])
def test_harps_rates_start_finite(tiny, sparsity):
    """The released clip of r leaves -inf and nan where a starts at or below its minimum."""
    for initial in (0.001, 0.011, 0.1, 1.0):
        pruner = bound("harp", tiny.net(), sparsity, initial_density=initial)
        assert torch.isfinite(pruner.r).all()


def test_final_masks_are_of_the_learned_rates(tiny):
    """The released dense export masks every layer at the global rate instead."""
    model = tiny.net()
    pruner = bound("harp", model)
    pruner.r.data = torch.tensor([2.0, -3.0, -1.0, -3.0])
    counts = {name: int(mask.sum()) for name, mask in pruner.finish().items()}
    shares = {name: count / pruner.budget.sizes[name] for name, count in counts.items()}
    assert sum(counts.values()) == pruner.budget.kept
    assert shares["conv1.weight"] > shares["shortcut.weight"] > shares["conv2.weight"]
    for name, weight in prunable(model).items():
        assert int(weight.count_nonzero()) == counts[name]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_momentum_revives_nothing(tiny, optimizer):
    """Robust-ADMM's code zeroes gradients alone: a buffer that is carried over moves masked weights again."""
    model = tiny.net()
    pruner = Fixed(model, {n: w > 0 for n, w in prunable(model).items()})
    steps = []

    class Carried(Benign):
        def __call__(self, net, x, y, progress, noise):
            for state in pruner.optimizer.state.values():
                for value in state.values():
                    if value.dim():
                        value.fill_(1.0)
            steps.append(1)
            yield from super().__call__(net, x, y, progress, noise)

    fit(model, pruner, Carried(), tiny.data(), Settings(epochs=2, batch_size=16, lr=0.05, optimizer=optimizer))
    assert len(steps) == 6
    for name, mask in pruner.masks().items():
        assert not prunable(model)[name].detach()[~mask].any()
