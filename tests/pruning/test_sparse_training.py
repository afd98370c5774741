"""What STR, BCS-P, DNR and Twin-Rep must bear: high sparsity, floors, dense layers, averages, perturbations."""

import pytest
import torch

from rprune.errors import UsageError
from rprune.models.prunable import prunable
from rprune.objectives.benign import Benign
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget
from rprune.pruning.masks import count
from rprune.training.loop import Settings, fit

NAMES = ("str", "bcs-p", "dnr", "twin-rep")
pytestmark = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def run(tiny, name, sparsity=0.9, floor=1, dense=(), options=None, **settings):
    """(model, budget, masks, result) of a short stage."""
    model = tiny.net()
    sizes = {layer: w.numel() for layer, w in prunable(model).items()}
    budget = Budget.of(sizes, sparsity, floor, exclude=dense)
    pruner = METHODS.build({"name": name, **(options or {})}).bind(model, budget, Context(4, 2))
    file = settings.pop("state_file", None)
    on_epoch = settings.pop("on_epoch", lambda log: None)
    settings = Settings(**({"epochs": 4, "batch_size": 24, "weight_decay": 5e-3} | settings))
    result = fit(model, pruner, Benign(), tiny.data(), settings, state_file=file, on_epoch=on_epoch)
    return model, budget, pruner.finish(), result


def check(model, budget, masks):
    assert count(masks) == budget.kept
    for layer, weight in prunable(model).items():
        mask, weight = masks[layer], weight.detach()
        assert int(mask.sum()) >= budget.least[layer]
        assert not weight[~mask].any()
        assert not torch.signbit(weight[~mask]).any()
        assert weight[mask].all()


def test_999(tiny, name):
    """Four weights stay, one in each layer."""
    model, budget, masks, result = run(tiny, name, 0.999)
    assert budget.kept == 4
    check(model, budget, masks)
    assert result.selected_epoch == 4
    assert all(torch.isfinite(torch.tensor(list(log.values.values()))).all() for log in result.history)


@pytest.mark.parametrize("floor", [20, 0.05])
def test_floors(tiny, name, floor):
    model, budget, masks, _ = run(tiny, name, 0.94, floor)
    assert budget.kept - sum(budget.least.values()) < 200
    check(model, budget, masks)


def test_dense_layers_are_whole(tiny, name):
    model, budget, masks, _ = run(tiny, name, 0.6, dense=["fc"])
    assert masks["fc.weight"].all()
    check(model, budget, masks)


def test_nothing_is_pruned_at_sparsity_0(tiny, name):
    model, budget, masks, _ = run(tiny, name, 0.0)
    check(model, budget, masks)


@pytest.mark.parametrize("settings", [{"average": "ema"}, {"average": "swa"}, {"awp": 0.01}, {"optimizer": "adam"}])
def test_averages_perturbations_and_adam(tiny, name, settings, tmp_path):
    settings = settings | ({"lr": 0.01} if "optimizer" in settings else {})
    model, budget, masks, result = run(tiny, name, **settings)
    check(model, budget, masks)
    assert result.selected_epoch is not None

    class Stop(Exception):
        pass

    def stop(log):
        if log.epoch == 2:
            raise Stop

    file = tmp_path / "state.pt"
    with pytest.raises(Stop):
        run(tiny, name, state_file=file, on_epoch=stop, **settings)
    resumed, _, same, _ = run(tiny, name, state_file=file, **settings)
    assert tiny.same_bits(resumed.state_dict(), model.state_dict())
    assert tiny.same_bits(same, masks)


def test_the_given_weights_are_forgotten_or_kept(tiny, name):
    given = {layer: w.detach() for layer, w in prunable(tiny.net()).items()}
    for again in (True, False):
        model = tiny.net()
        budget = Budget.of({layer: w.numel() for layer, w in given.items()}, 0.5)
        method = METHODS.build({"name": name, "reinitialize": again})
        method.bind(model, budget, Context(4, 2))
        same = [torch.isclose(w, given[layer]) & (w != 0) for layer, w in prunable(model).items()]
        assert (sum(int(s.sum()) for s in same) >= budget.kept * 0.9) != again


def test_another_seed_another_net(tiny, name):
    nets = []
    for seed in (0, 1, 0):
        model = tiny.net()
        budget = Budget.of({layer: w.numel() for layer, w in prunable(model).items()}, 0.5)
        METHODS.build(name).bind(model, budget, Context(4, 2, seed))
        nets.append(model.state_dict())
    assert tiny.same_bits(nets[0], nets[2])
    assert not tiny.same_bits(nets[0], nets[1])


def test_options_out_of_range_are_refused(name):
    wrong = {"str": {"ramp": 1.5}, "bcs-p": {"noise": -1}, "dnr": {"rate": 1.0}, "twin-rep": {"prune_at": 1.0}}
    with pytest.raises(UsageError):
        METHODS.build({"name": name, **wrong[name]})
