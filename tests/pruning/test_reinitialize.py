"""Fresh weights from a seed."""

import copy

import pytest
import torch
from torch import nn

from rprune.models.registry import Architecture, build
from rprune.pruning.reinitialize import reinitialize


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_everything_is_drawn_again_from_the_seed_alone(load_helper):
    tiny = load_helper("pruning/tiny_net.py")
    first, second = tiny.net(0), tiny.net(1)
    given = state(first)
    torch.manual_seed(11)
    held = torch.get_rng_state()
    reinitialize(first, 5)
    assert torch.equal(torch.get_rng_state(), held)
    torch.manual_seed(12)
    reinitialize(second, 5)
    assert tiny.same_bits(state(first), state(second))
    drawn = [name for name in given if "bn" not in name]
    assert all(not torch.equal(given[name], state(first)[name]) for name in drawn)
    reinitialize(second, 6)
    assert all(not torch.equal(state(first)[name], state(second)[name]) for name in drawn)


def test_batch_norm_is_as_new(load_helper):
    model = load_helper("pruning/tiny_net.py").net()
    model.bn1.num_batches_tracked += 3
    reinitialize(model, 0)
    for name, value in nn.BatchNorm2d(16).state_dict().items():
        assert torch.equal(model.bn1.state_dict()[name], value), name


def test_parameters_stay_the_same_objects(load_helper):
    model = load_helper("pruning/tiny_net.py").net()
    model.eval()
    before = {name: id(p) for name, p in model.named_parameters()}
    reinitialize(model, 0)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_layers_of_equal_shape_differ():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    reinitialize(model, 0)
    assert not torch.equal(model[0].weight, model[1].weight)


@pytest.mark.parametrize("arch", ["vgg4", "wrn-28-2", "cifar-resnet18"])
def test_an_architecture_keeps_its_own_initialisation(arch):
    model = build(Architecture(arch, 10, (3, 32, 32)))
    built = copy.deepcopy(model)
    reinitialize(model, 0)
    for (name, found), expected in zip(model.state_dict().items(), built.state_dict().values(), strict=True):
        if found.numel() > 2000:
            assert float(found.std()) == pytest.approx(float(expected.std()), rel=0.1), name
        elif "bias" not in name and expected.is_floating_point():
            assert float(found.mean()) == pytest.approx(float(expected.mean()), abs=0.05), name
    if arch.startswith("wrn"):
        assert not model.fc.bias.any()
