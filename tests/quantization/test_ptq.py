from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from rprune.errors import WorkError
from rprune.models.graph import trace
from rprune.quantization.ptq import Quantization, quantize, simulated
from rprune.quantization.simulate import QAdd, QAvgPool, QInput, QMatmul, Scale

CASES = ("cnn-small", "lenet", "vgg4", "cifar-resnet18", "wrn-28-2", "cifar-resnet18 normalised")
INPUT = Scale(float(np.float32(1 / 255)), 0)


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


@pytest.mark.parametrize("keep", [1.0, 0.01])
@pytest.mark.parametrize("case", CASES)
def test_integers_are_in_range_and_have_the_zeros_of_the_weights(nets, case: str, keep: float) -> None:
    network, found, _ = nets.quantised(nets.make(case, keep))
    assert found.weights
    for name, integers in found.weights.items():
        module, bias = network.get_submodule(name), found.biases[name]
        assert integers.dtype == torch.int8
        assert int(integers.min()) >= -127
        assert torch.equal(integers == 0, module.weight == 0)
        assert bias.dtype == torch.int32
        assert int(bias.abs().max()) <= 1 << 23
    for scale in found.weight_scales.values():
        assert scale.dtype == torch.float32
        assert bool((torch.isfinite(scale) & (scale > 0)).all())
    for scale in found.activations.values():
        assert np.isfinite(scale.scale)
        assert scale.scale > 0
        assert scale.scale == np.float32(scale.scale)
        assert 0 <= scale.zero_point <= 255


@pytest.mark.parametrize("case", CASES)
def test_8_bit_network_stays_close_to_the_float_one(nets, case: str) -> None:
    network, _, twin = nets.quantised(nets.make(case))
    x = nets.digits(64)[0]
    with torch.no_grad():
        wanted, got = network(x), twin(x)
    assert float((got - wanted).abs().max()) < 0.25 * float(wanted.max() - wanted.min())


@pytest.mark.parametrize("bias", [5.0, -5.0, 1e4, 0.0])
def test_dead_channel_does_not_overflow_its_bias(nets, bias: float) -> None:
    model = nets.make("cnn-small")
    convolution = model.features[2]
    convolution.weight.data[3] = 0
    convolution.bias.data[3] = bias
    convolution.weight.data[4] *= 1e-12
    convolution.bias.data[4] = bias
    network, found, twin = nets.quantised(model)
    integers = found.biases["features.2"]
    assert int(integers.abs().max()) <= 1 << 23
    given = next(m.given for n, m in twin.named_modules() if n == "features.2")
    step = found.weight_scales["features.2"].double() * given.scale
    assert bool(((integers.double() * step)[3:5] - bias).abs().le(step[3:5] / 2).all())
    x = nets.digits(16)[0]
    with torch.no_grad():
        assert torch.isfinite(twin(x)).all()
        wanted, got = network(x), twin(x)
    assert float((got - wanted).abs().max()) < 0.25 * float(wanted.abs().max()) + 0.1


def test_layer_without_any_weight_or_bias_is_finite(nets) -> None:
    model = nets.make("lenet")
    model.conv2.weight.data.zero_()
    model.conv2.bias.data.zero_()
    _, found, twin = nets.quantised(model)
    assert bool((found.weight_scales["conv2"] > 0).all())
    assert torch.isfinite(twin(nets.digits(4)[0])).all()


def test_tensors_round_trip(nets) -> None:
    network, found, twin = nets.quantised(nets.make("cifar-resnet18", 0.01))
    table = found.tensors()
    again = Quantization.from_tensors(table)
    assert again.activations == found.activations
    for part in ("weights", "biases", "weight_scales"):
        mine, other = getattr(found, part), getattr(again, part)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype for name in mine)
    x = nets.noise(5)
    with torch.no_grad():
        assert torch.equal(simulated(network, again)(x), twin(x))


def test_simulated_does_not_touch_the_traced_network(nets) -> None:
    network = trace(nets.make("lenet"), nets.SHAPE)
    x = nets.noise(4)
    before = network(x)
    simulated(network, quantize(network, [x]))
    assert torch.equal(network(x), before)


def test_8_bit_pixels_are_represented_exactly() -> None:
    k = torch.arange(256)
    integers = QInput(INPUT)((k.float() / 255).view(1, 1, 16, 16))
    assert torch.equal(integers.flatten().long(), k)


def test_first_activation_is_the_pixel_grid(nets) -> None:
    network, found, _ = nets.quantised(nets.make("lenet"))
    (first,) = (node for node in network.graph.nodes if node.op == "placeholder")
    assert found.activations[first.name] == INPUT


@pytest.mark.parametrize("case", ["cnn-small", "cifar-resnet18 normalised", "wrn-28-2"])
def test_straight_through_gradient_is_finite_and_not_zero(nets, case: str) -> None:
    _, _, twin = nets.quantised(nets.make(case))
    x = nets.digits(8)[0].requires_grad_()
    logits = twin(x)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum() - logits[:, 1].sum(), x)
    assert torch.isfinite(gradient).all()
    assert bool((gradient.flatten(1).abs().sum(1) > 0).all())


@pytest.mark.parametrize("images", ["digits", "noise"])
def test_straight_through_gradient_points_where_the_float_gradient_does(nets, images: str) -> None:
    network, _, twin = nets.quantised(nets.make("cnn-small"))
    points = nets.digits(8)[0] if images == "digits" else nets.noise(8)
    gradients = []
    for net in (network, twin):
        x = points.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(x)[:, 0].sum(), x)
        gradients.append(gradient.flatten())
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.9


def test_gradient_passes_at_black_and_white_pixels() -> None:
    x = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(QInput(INPUT)(x).sum(), x)
    assert (gradient > 0).all()


def reference_convolution(q, weight, bias, zero, stride: int, padding: int, dilation: int, groups: int):
    """int64 accumulators of a convolution, one product at a time."""
    count, _, height, width = q.shape
    out, part, kernel, _ = weight.shape
    sides = [(side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for side in (height, width)]
    result = np.zeros((count, out, *sides), np.int64)
    for n, o, i, j in np.ndindex(result.shape):
        total = int(bias[o])
        first = (o // (out // groups)) * part
        for c, u, v in itertools.product(range(part), range(kernel), range(kernel)):
            row, column = i * stride - padding + u * dilation, j * stride - padding + v * dilation
            if 0 <= row < height and 0 <= column < width:
                total += (int(q[n, first + c, row, column]) - zero) * int(weight[o, c, u, v])
        result[n, o, i, j] = total
    return result


def requantised(accumulator, weight_scale, given: Scale, out: Scale, relu: bool):
    """rint(float32(acc) * float32(sx * sw / sy)) + zero point, every operation rounded to float32."""
    shape = (1, -1) + (1,) * (accumulator.ndim - 2)
    factor = (weight_scale * np.float32(given.scale) / np.float32(out.scale)).astype(np.float32).reshape(shape)
    scaled = accumulator.astype(np.float32) * factor
    return np.clip(np.rint(scaled).astype(np.int64) + out.zero_point, out.zero_point if relu else 0, 255)


def integer_layer(source: nn.Module, given: Scale, out: Scale | None, relu: bool, seed: int) -> QMatmul:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, source.weight.shape, generator=generator, dtype=torch.int8)
    bias = torch.randint(-3000, 3000, (len(weight),), generator=generator, dtype=torch.int32)
    scale = torch.rand(len(weight), generator=generator) * 0.01 + 1e-4
    return QMatmul(source, weight, bias, scale, given, out, relu)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((3, 4), {"kernel_size": 3, "padding": 1}),
        ((2, 3), {"kernel_size": 3, "stride": 2}),
        ((4, 4), {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4}),
        ((4, 6), {"kernel_size": 2, "stride": 2, "padding": 1, "groups": 2}),
    ],
)
def test_convolution_equals_an_integer_reference(channels: tuple[int, int], options: dict, relu: bool) -> None:
    given, out = Scale(float(np.float32(0.013)), 37), Scale(float(np.float32(0.11)), 91)
    layer = integer_layer(nn.Conv2d(*channels, **options), given, out, relu, seed=len(options) + relu)
    q = torch.randint(0, 256, (2, channels[0], 5, 6), generator=torch.Generator().manual_seed(5))
    weight, bias = layer.weight.numpy().astype(np.int64), layer.bias.numpy().astype(np.int64)
    geometry = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | options
    geometry.pop("kernel_size")
    wanted = reference_convolution(q.numpy(), weight, bias, given.zero_point, **geometry)
    got = layer(q.float())
    assert np.array_equal(got.numpy(), requantised(wanted, layer.weight_scale.numpy(), given, out, relu))
    assert len(np.unique(got.numpy())) > 5


@pytest.mark.parametrize(("inputs", "exact"), [(518, True), (519, False), (4000, False)])
def test_float32_is_used_only_where_it_is_exact(inputs: int, exact: bool) -> None:
    # 255 * 127 * 518 = 16,775,430 and 2^24 = 16,777,216
    given, out = Scale(float(np.float32(0.01)), 3), Scale(float(np.float32(0.5)), 128)
    full = torch.full((2, inputs), 127, dtype=torch.int8)
    full[1] = torch.randint(-127, 128, (inputs,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scale = torch.tensor([1e-3, 1e-2])
    layer = QMatmul(nn.Linear(inputs, 2), full, torch.tensor([17, -5], dtype=torch.int32), scale, given, out, False)
    assert layer.exact_float32 is exact
    assert layer.weight.dtype == (torch.float32 if exact else torch.float64)
    q = torch.randint(0, 256, (20, inputs), generator=torch.Generator().manual_seed(1))
    accumulator = (q.numpy() - 3) @ full.numpy().astype(np.int64).T + np.array([17, -5])
    assert np.array_equal(layer(q.float()).numpy(), requantised(accumulator, scale.numpy(), given, out, False))


def test_bias_counts_against_float32() -> None:
    weight, scale = torch.full((1, 518), 127, dtype=torch.int8), torch.ones(1)
    layers = [
        QMatmul(nn.Linear(518, 1), weight, torch.tensor([b], dtype=torch.int32), scale, INPUT, None, False)
        for b in (1785, 1786, -1786)
    ]
    assert [layer.exact_float32 for layer in layers] == [True, False, False]


def test_float32_and_float64_compute_the_same() -> None:
    given, out = Scale(float(np.float32(0.02)), 11), Scale(float(np.float32(0.3)), 100)
    layer = integer_layer(nn.Conv2d(3, 5, 3, padding=1), given, out, True, seed=2)
    q = torch.randint(0, 256, (4, 3, 9, 9), generator=torch.Generator().manual_seed(1)).float()
    assert layer.exact_float32
    single = layer(q)
    layer.weight, layer.bias = layer.weight.double(), layer.bias.double()
    assert torch.equal(layer(q), single)


def test_average_pool_rounds_the_integer_sum_once() -> None:
    given, out = Scale(float(np.float32(0.02)), 7), Scale(float(np.float32(0.015)), 20)
    q = torch.randint(0, 256, (3, 2, 6, 6), generator=torch.Generator().manual_seed(1))
    total = (q.numpy() - 7).reshape(3, 2, 3, 2, 3, 2).sum((3, 5))
    scale = np.float32(given.scale) / (np.float32(4) * np.float32(out.scale))
    wanted = np.clip(np.rint(total.astype(np.float32) * scale) + 20, 0, 255)
    assert np.array_equal(QAvgPool(nn.AvgPool2d(2), given, out)(q.float()).numpy(), wanted)
    whole = (q.numpy() - 7).sum((2, 3), keepdims=True)
    scale = np.float32(given.scale) / (np.float32(36) * np.float32(out.scale))
    wanted = np.clip(np.rint(whole.astype(np.float32) * scale) + 20, 0, 255)
    assert np.array_equal(QAvgPool(None, given, out)(q.float()).numpy(), wanted)


def test_residual_sum_is_within_one_level_of_the_real_sum() -> None:
    a, b = Scale(float(np.float32(0.02)), 100), Scale(float(np.float32(0.05)), 30)
    out = Scale(float(np.float32(0.06)), 90)
    qa, qb = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    real = a.dequantize(qa.double()) + b.dequantize(qb.double())
    wanted = real / out.scale + out.zero_point
    got = QAdd(a, b, out, relu=False)(qa, qb).double()
    assert float((got - wanted.clamp(0, 255)).abs().max()) <= 0.5 + 1e-4
    assert float(QAdd(a, b, out, relu=True)(qa, qb).min()) == out.zero_point


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_network_that_diverged_is_refused(nets, value: float) -> None:
    model = nets.make("lenet")
    model.conv2.bias.data[0] = value
    with pytest.raises(WorkError, match="not finite"):
        nets.quantised(model)


def test_order_and_split_of_the_calibration_batches_do_not_matter(nets) -> None:
    network = trace(nets.make("lenet"), nets.SHAPE)
    x = nets.noise(12)
    whole = quantize(network, [x])
    parts = quantize(network, [x[8:], x[:8]])
    for name, scale in whole.activations.items():
        assert parts.activations[name].scale == pytest.approx(scale.scale, rel=1e-5)
