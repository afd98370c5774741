"""Fake quantization: equal to the integers to rounding, with LSQ's gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import fx, nn

from rprune.models.graph import trace
from rprune.models.prunable import prunable
from rprune.quantization.guarantees import saturating_pairs
from rprune.quantization.ptq import Settings, quantize, simulated
from rprune.quantization.qat import SLOWER, FakeQuantize, fake_quantized, fake_weight, inputs, trained
from rprune.quantization.simulate import Scale
from rprune.training.qat import QuantizationAware


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


def started(nets, case: str, keep: float = 1.0, portable: bool = False, **said):
    network = trace(nets.make(case, keep), nets.SHAPE)
    start = quantize(network, [nets.digits(64)[0]], Settings(portable=portable, **said))
    model = fake_quantized(network, start)
    masks = {name: weight != 0 for name, weight in prunable(network).items()} if keep < 1 else {}
    scales = {f"{name}.weight": scale for name, scale in start.weight_scales.items()}
    pruner = QuantizationAware(model, masks, scales, inputs(network, model), start.bits, portable)
    return network, start, model, pruner


def integers_of(network, model, pruner):
    state = model.state_dict() | pruner.weights()
    network.load_state_dict({name: state[name].detach() for name in network.state_dict()})
    scales = {name.removesuffix(".weight"): scale for name, scale in pruner.scales().items()}
    return trained(network, model, scales, pruner.bits)


def values(model, x):
    """Node name -> value."""
    found = {}

    class Noting(fx.Interpreter):
        def run_node(self, n):
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Noting(model).run(x)
    return found


def compare(twin, found, fake, x):
    """Each integer layer on the inputs that the fake network has: (node, share of other integers, largest gap)."""
    rows = []

    class Substituting(fx.Interpreter):
        def run_node(self, n):
            value, scale = super().run_node(n), found.activations.get(n.name)
            real = fake.get(f"fake_{n.name}")
            if real is None or scale is None or n.op == "placeholder":
                return value
            wanted = (real / scale.scale).round() + scale.zero_point
            gap = (value - wanted).abs()
            rows.append((n.name, float((gap > 0).float().mean()), float(gap.max())))
            return wanted

    Substituting(twin).run(x)
    return rows


def step(model, pruner, x, y, lr: float = 0.01) -> None:
    learned = list(pruner.parameters())
    for tensor in learned:
        tensor.requires_grad_(True)
    optimizer = torch.optim.SGD(learned, lr, momentum=0.9, weight_decay=5e-4)
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        pruner.before_step()
        optimizer.step()
        pruner.after_step()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("case", ["cnn-small", "vgg4", "cifar-resnet18 normalised", "wrn-28-2"])
def test_integers_equal_the_trained_network_to_rounding(nets, case: str, bits: int) -> None:
    network, start, model, pruner = started(nets, case, bits=bits, observer="mse")
    x, y = nets.digits(64)
    step(model, pruner, x, y)
    found = integers_of(network, model, pruner)
    assert any(not torch.equal(found.weights[name], start.weights[name]) for name in found.weights), "it has trained"
    learned = [module for module in model.modules() if isinstance(module, FakeQuantize) and module.scale.requires_grad]
    assert all(float(module.scale.detach()) != module.start.scale for module in learned), "scales are learned"
    fake, compared = values(model.eval(), x), 0
    with torch.no_grad():
        for name, wrong, worst in compare(simulated(network, found), found, fake, x):
            assert wrong < 0.003, f"{name}: a rounding falls the other way rarely"
            assert worst <= 1
            compared += 1
    assert compared > len(found.weights) - 2


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_in_use_are_the_integers_times_their_scales(nets, bits: int) -> None:
    network, _, model, pruner = started(nets, "cnn-small", 0.2, bits=bits)
    step(model, pruner, *nets.digits(64))
    found = integers_of(network, model, pruner)
    for name, numbers in found.weights.items():
        scale = found.weight_scales[name].view(-1, *(1,) * (numbers.dim() - 1))
        assert torch.equal(model.get_submodule(name).weight.detach(), numbers * scale)
        assert torch.equal(found.weight_scales[name].half().float(), found.weight_scales[name])


@pytest.mark.parametrize("bits", [4, 8])
def test_masks_are_held_and_no_kept_weight_is_lost_in_8_bits(nets, bits: int) -> None:
    network, _, model, pruner = started(nets, "vgg4", 0.1, bits=bits)
    step(model, pruner, *nets.digits(64), lr=0.1)
    weights = pruner.weights()
    for name, mask in pruner.masks().items():
        assert torch.equal(weights[name] != 0, mask)
    found = integers_of(network, model, pruner)
    for name, numbers in found.weights.items():
        assert not numbers[~pruner.masks()[f"{name}.weight"]].any()
        assert bits < 8 or torch.equal(numbers != 0, pruner.masks()[f"{name}.weight"])


def test_training_leaves_what_it_started_from(nets) -> None:
    _, start, model, pruner = started(nets, "cnn-small", bits=4)
    before = {name: tensor.clone() for name, tensor in start.tensors().items()}
    step(model, pruner, *nets.digits(32), lr=0.1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.tensors().items())


def test_portable_holds_in_training(nets) -> None:
    network, _, model, pruner = started(nets, "cnn-small", portable=True)
    step(model, pruner, *nets.digits(64), lr=0.1)
    assert set(saturating_pairs(integers_of(network, model, pruner)).values()) == {0}


def test_state_brings_everything_back(nets) -> None:
    _, _, model, pruner = started(nets, "lenet", 0.5, bits=4)
    step(model, pruner, *nets.digits(32))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    learned = {name: value.clone() for name, value in pruner.state_dict()["learned"].items()}
    _, _, other, fresh = started(nets, "lenet", 0.5, bits=4)
    other.load_state_dict(state)
    fresh.load_state_dict({"learned": learned})
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())
    assert all(torch.equal(value, fresh.state_dict()["learned"][name]) for name, value in learned.items())


def lsq(x: np.ndarray, scale: float, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, derivative by x and by the scale of one entry: equations 1 to 3 and 5 of the paper, by their cases."""
    ratio = x / scale
    value = np.rint(np.clip(ratio, low, high)) * scale
    by_scale = np.where(ratio <= low, low, np.where(ratio >= high, high, np.rint(ratio) - ratio))
    return value, ((low < ratio) & (ratio < high)).astype(float), by_scale


@pytest.mark.parametrize("zero_point", [0, 5])
def test_activation_gradients_are_lsqs(zero_point: int) -> None:
    module = FakeQuantize(Scale(0.25, zero_point, 15), learned=True).double()
    x = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(2).requires_grad_()
    out = module(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights).sum().backward()
    value, by_x, by_scale = lsq(x.detach().numpy(), 0.25, -zero_point, 15 - zero_point)
    assert np.array_equal(out.detach().numpy(), value)
    steps = x.detach().numpy() / 0.25
    clear = (np.abs(steps + zero_point) > 0.5) & (np.abs(steps + zero_point - 15) > 0.5)  # half a step at the ends:
    assert np.allclose(x.grad.numpy()[clear], (weights.numpy() * by_x)[clear])  # rounding still reaches them
    inside = (np.rint(steps) >= -zero_point) & (np.rint(steps) <= 15 - zero_point)
    by_scale = np.where(inside, np.rint(steps) - steps, by_scale)
    assert float(module.scale.grad) == pytest.approx(SLOWER * (weights.numpy() * by_scale).sum() / math.sqrt(12 * 15))


@pytest.mark.parametrize("bits", [4, 8])
def test_weight_gradients_are_lsqs(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    weight = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = torch.tensor([0.125, 0.5]).mul(8 / 2**bits).requires_grad_()
    back = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    (fake_weight(weight, scale, bits, portable=False) * back).sum().backward()
    for row in range(2):
        x, s = weight[row].detach().numpy().astype(np.float64), float(scale[row].detach())
        steps = x / s
        inside = np.abs(np.rint(steps)) <= top
        numbers = np.clip(np.rint(steps), -top, top)
        if bits == 8:
            numbers = np.where(np.abs(steps) < 1, np.sign(steps), numbers)
        wanted = (back[row].numpy() * (numbers - np.where(inside, steps, 0))).sum() * SLOWER / math.sqrt(30 * top)
        assert float(scale.grad[row]) == pytest.approx(wanted, rel=1e-4)
        assert np.allclose(weight.grad[row].numpy(), back[row].numpy() * inside)


def test_attacks_see_black_and_white_pixels(nets) -> None:
    _, _, model, _ = started(nets, "cnn-small", bits=4)
    x = nets.noise(4).round().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    assert float((gradient != 0).float().mean()) > 0.9
