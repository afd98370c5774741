"""Bit widths, observers, float16 scales, bias correction, and what the integers guarantee."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from rprune.errors import InputError, WorkError
from rprune.export.qdq import qdq_model
from rprune.export.session import OnnxClassifier
from rprune.models.graph import trace
from rprune.quantization.guarantees import exactness, saturating_pairs
from rprune.quantization.observers import Observed, scale_of
from rprune.quantization.ptq import Quantization, Settings, corrected, quantize, simulated
from rprune.quantization.simulate import QAdd, QAvgPool, QMatmul, Scale
from rprune.quantization.weights import full_scale, half_up, integers, pairs_above, portable_scale

CASES = ("cnn-small", "vgg4", "cifar-resnet18 normalised", "wrn-28-2")


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


def made(nets, case: str, keep: float = 1.0, **said):
    network = trace(nets.make(case, keep), nets.SHAPE)
    found = quantize(network, [nets.digits(64)[0]], Settings(**said))
    return network, found, simulated(network, found)


@pytest.mark.parametrize("bits", [2, 4, 6, 7])
@pytest.mark.parametrize("case", CASES)
def test_fewer_bits_equal_onnx_runtime(nets, tmp_path, case: str, bits: int) -> None:
    _, found, twin = made(nets, case, bits=bits, observer="mse", bias_correction=True)
    onnx.save(qdq_model(twin, nets.SHAPE, 10), tmp_path / "m.onnx")
    session = OnnxClassifier(tmp_path / "m.onnx", threads=1)
    for x in (nets.noise(64), nets.digits(64)[0], nets.noise(16).round()):
        with torch.no_grad():
            assert np.array_equal(session.logits(x.numpy()), twin(x).numpy())
    limit = 2 ** (bits - 1) - 1
    assert max(int(weight.abs().max()) for weight in found.weights.values()) == limit


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_activations_stay_within_their_levels(nets, bits: int) -> None:
    network, found, twin = made(nets, "cifar-resnet18 normalised", bits=bits, observer="percentile", percentile=90.0)
    seen = []

    def watch(module, _, output):
        seen.append((module.out.top, int(output.min()), int(output.max())))

    for module in twin.modules():
        if isinstance(module, QMatmul | QAdd) and module.out is not None:
            module.register_forward_hook(watch)
    with torch.no_grad():
        twin(nets.noise(32))
    assert {top for top, _, _ in seen} == {2**bits - 1}
    assert min(low for _, low, _ in seen) >= 0
    assert max(high for _, _, high in seen) == 2**bits - 1, "a range that is cut is reached"
    (image,) = (node.name for node in network.graph.nodes if node.op == "placeholder")
    assert found.activations[image] == Scale(float(np.float32(1 / 255)), 0)


@pytest.mark.parametrize("case", CASES)
def test_more_bits_are_closer_to_the_float_network(nets, case: str) -> None:
    x, errors = nets.digits(64)[0], []
    for bits in (4, 6, 8, 10, 12):
        network, _, twin = made(nets, case, bits=bits)
        with torch.no_grad():
            errors.append(float((twin(x) - network(x)).norm() / network(x).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_twelve_bits_equal_a_reference_in_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    source, given_, out = nn.Conv2d(3, 4, 3), Scale(0.001953125, 5, 4095), Scale(0.25, 100, 4095)
    weight = torch.randint(-2047, 2048, source.weight.shape, generator=generator, dtype=torch.int16)
    bias = torch.randint(-9999, 9999, (4,), generator=generator, dtype=torch.int32)
    scale = torch.tensor([0.0078125, 0.015625, 0.001953125, 0.0625])
    layer = QMatmul(source, weight, bias, scale, given_, out, relu=False)
    assert not layer.exact_float32
    q = torch.randint(0, 4096, (2, 3, 5, 5), generator=generator)
    total = np.zeros((2, 4, 3, 3), np.int64)
    for n, o, i, j in np.ndindex(total.shape):
        total[n, o, i, j] = int(((q[n, :, i : i + 3, j : j + 3] - 5) * weight[o].long()).sum()) + int(bias[o])
    factor = (scale.numpy() * np.float32(given_.scale) / np.float32(out.scale)).reshape(1, 4, 1, 1)
    wanted = np.clip(np.rint(total.astype(np.float32) * factor) + 100, 0, 4095)
    assert np.array_equal(layer(q.float()).numpy(), wanted)


def test_wide_average_pool_is_exact() -> None:
    q = torch.full((1, 1, 80, 80), 4095.0)
    q[0, 0, 0, 0] = 4094
    scale = Scale(1.0, 0, 4095)
    total = 4095 * 6400 - 1
    wanted = np.rint(np.float32(total) * (np.float32(1) / np.float32(6400)))
    assert total > 1 << 24
    assert float(QAvgPool(None, scale, scale)(q)) == wanted


def test_more_than_8_bits_have_no_file(nets) -> None:
    _, found, twin = made(nets, "lenet", bits=9)
    assert all(weight.dtype == torch.int16 for weight in found.weights.values())
    with pytest.raises(InputError, match="more than 8 bits have no int8 file") as caught:
        qdq_model(twin, nets.SHAPE, 10)
    assert caught.value.hint


@pytest.mark.parametrize("bits", [3, 8, 11])
def test_tensors_round_trip(nets, bits: int) -> None:
    _, found, twin = made(nets, "cifar-resnet18", 0.1, bits=bits)
    again = Quantization.from_tensors(found.tensors())
    assert (again.bits, again.activations) == (bits, found.activations)
    network = trace(nets.make("cifar-resnet18", 0.1), nets.SHAPE)
    x = nets.noise(4)
    with torch.no_grad():
        assert torch.equal(simulated(network, again)(x), twin(x))


def test_tables_of_earlier_versions_have_8_bits(nets) -> None:
    _, found, _ = made(nets, "lenet")
    old = {key: value for key, value in found.tensors().items() if not key.endswith(("/top", "/bits"))}
    assert Quantization.from_tensors(old).activations == found.activations
    assert Quantization.from_tensors(old).bits == 8


@pytest.mark.parametrize("bits", [2, 4, 6, 7])
def test_zero_stays_zero_and_small_weights_may_join_it(nets, bits: int) -> None:
    network, found, _ = made(nets, "vgg4", 0.3, bits=bits)
    lost = 0
    for name, numbers in found.weights.items():
        zero = network.get_submodule(name).weight == 0
        assert bool((numbers[zero] == 0).all())
        lost += int((numbers[~zero] == 0).sum())
    assert lost > 0 or bits > 2


@given(st.floats(1e-12, 60000.0))
@settings(deadline=None)
def test_half_up_is_the_next_float16(value: float) -> None:
    single = np.float32(value)
    found = half_up(torch.tensor([float(single)]))
    table = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    assert float(found) == table[np.searchsorted(table, single)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("portable", [False, True])
def test_every_scale_but_the_pixels_is_a_float16(nets, bits: int, portable: bool) -> None:
    network, found, _ = made(nets, "cifar-resnet18 normalised", bits=bits, portable=portable)
    scales = [scale for name, scale in found.activations.items() if name != "x"]
    assert len(scales) == len(found.activations) - 1
    for scale in scales:
        assert 0 < scale.scale == float(np.float16(scale.scale))
    for name, values in found.weight_scales.items():
        assert torch.equal(values.half().float(), values)
        assert bool((values > 0).all())
        exact = values.double() * scales[0].scale
        assert torch.equal((values * torch.tensor(scales[0].scale)).double(), exact)
        largest = network.get_submodule(name).weight.flatten(1).abs().amax(1)
        assert bool((largest <= values * (2 ** (bits - 1) - 1)).all()), "the range is covered"


def observed(values: np.ndarray, bins: int = 8192) -> Observed:
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    counts, _ = np.histogram(values, bins, (low, high))
    return Observed(low, high, torch.from_numpy(counts).double())


def squared_error(values: np.ndarray, scale: Scale) -> float:
    numbers = np.clip(np.rint(values / scale.scale) + scale.zero_point, 0, scale.top)
    return float((((numbers - scale.zero_point) * scale.scale - values) ** 2).mean())


@pytest.mark.parametrize("one_sided", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_observer_has_the_least_error_of_a_brute_force_search(one_sided: bool, bits: int) -> None:
    values = np.random.default_rng(0).standard_t(3, 20000)
    values = np.abs(values) if one_sided else values
    seen = observed(values)
    best = min(
        squared_error(values, scale_of(Observed(part * seen.low, part * seen.high, seen.counts), bits, "minmax", 100))
        for part in np.linspace(0.2, 1, 200)
    )
    found = squared_error(values, scale_of(seen, bits, "mse", 100))
    assert found <= 1.05 * best
    assert found < squared_error(values, scale_of(seen, bits, "minmax", 100))


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_observer_keeps_that_share(percentile: float) -> None:
    values = np.random.default_rng(1).normal(0.5, 1, 50000)
    scale = scale_of(observed(values), 12, "percentile", percentile)
    low, high = -scale.zero_point * scale.scale, (scale.top - scale.zero_point) * scale.scale
    cut = (1 - percentile / 100) / 2
    assert [(values < low).mean(), (values > high).mean()] == pytest.approx([cut, cut], abs=0.03 * cut + 4e-5)
    whole = scale_of(observed(values), 12, "percentile", 100.0)
    assert whole == scale_of(observed(values), 12, "minmax", 100.0)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_order_and_split_of_the_batches_do_not_matter(nets, observer: str) -> None:
    network = trace(nets.make("lenet"), nets.SHAPE)
    x = nets.noise(12)
    whole = quantize(network, [x], Settings(bits=4, observer=observer))
    parts = quantize(network, [x[8:], x[:8]], Settings(bits=4, observer=observer))
    for name, scale in whole.activations.items():
        assert parts.activations[name].scale == pytest.approx(scale.scale, rel=2e-3)


def test_constant_and_dead_activations_have_a_scale() -> None:
    for low, high in ((0.0, 0.0), (0.0, 1e-9), (-1e-9, 0.0)):
        counts = torch.zeros(8192, dtype=torch.float64).index_fill_(0, torch.tensor(0), 5.0)
        for observer in ("minmax", "percentile", "mse"):
            scale = scale_of(Observed(low, high, counts), 8, observer, 99.99)
            assert scale.scale > 0
            assert 0 <= scale.zero_point <= 255


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_clips_weights_where_that_is_better(bits: int) -> None:
    weight = torch.randn(6, 400, generator=torch.Generator().manual_seed(0)).pow(3)
    bias = torch.zeros(6)

    def error(scale):
        steps = scale[:, None]
        return (integers(weight, steps, bits) * steps - weight).square().sum(1)

    full, best = (full_scale(weight, bias, 0.01, bits, observer) for observer in ("minmax", "mse"))
    assert bool((error(best) < error(full)).all())
    parts = torch.stack([error(half_up(full * part)) for part in torch.linspace(0.2, 1, 150)])
    assert bool((error(best) <= 1.1 * parts.amin(0)).all())


@pytest.mark.parametrize("case", ["cnn-small", "cifar-resnet18"])
def test_bias_correction_removes_the_mean_error_of_a_layer(nets, case: str) -> None:
    network, found, _ = made(nets, case, bits=4)
    x = nets.digits(64)[0]
    right = corrected(network, found, [x[:40], x[40:]])
    again = simulated(network, right)
    assert all(torch.equal(right.weights[name], found.weights[name]) for name in found.weights)
    inputs = {}
    for name in found.weights:
        again.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: inputs.__setitem__(name, module.given.dequantize(args[0]))
        )
    with torch.no_grad():
        again(x)
    for name in found.weights:
        source, module = network.get_submodule(name), again.get_submodule(name)
        step = (module.weight_scale * module.given.scale).view(-1, *(1,) * (source.weight.dim() - 1))
        integer, plain = nn.utils.skip_init(type(source), **shape_of(source)), source
        integer.weight.data = module.weight.float() * module.weight_scale.view_as(step)
        integer.bias.data = module.bias.float() * step.flatten()
        with torch.no_grad():
            gap = integer(inputs[name]) - plain(inputs[name])
        mean = gap.mean((0, 2, 3)) if gap.dim() == 4 else gap.mean(0)
        assert bool((mean.abs() <= 0.51 * step.flatten() + 1e-5).all())


def shape_of(module: nn.Module) -> dict:
    if isinstance(module, nn.Linear):
        return {"in_features": module.in_features, "out_features": module.out_features}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(module, name) for name in names}


def test_bias_correction_brings_mean_logits_closer(nets) -> None:
    x = nets.digits(128)[0]
    network, found, twin = made(nets, "cifar-resnet18", bits=3)
    after = simulated(network, corrected(network, found, [x]))
    with torch.no_grad():
        wanted, plain, right = (net(x).mean(0) for net in (network, twin, after))
    assert float((right - wanted).norm()) < 0.8 * float((plain - wanted).norm())


def reference_pairs(weight: np.ndarray) -> int:
    """Neighbours in the order height, width, channel, one by one."""
    count = 0
    for row in weight:
        packed = [row[c, i, j] for i, j, c in itertools.product(*map(range, (*row.shape[1:], row.shape[0])))]
        count += sum(abs(int(a) + int(b)) > 128 for a, b in itertools.pairwise(packed))
    return count


@given(arrays(np.int8, (2, 3, 2, 2), elements=st.integers(-127, 127)))
@settings(deadline=None)
def test_pairs_are_counted_as_they_are_packed(weight: np.ndarray) -> None:
    assert int(pairs_above(torch.from_numpy(weight)).sum()) == reference_pairs(weight)
    flat = weight.reshape(2, 12)
    assert int(pairs_above(torch.from_numpy(flat)).sum()) == reference_pairs(flat[:, :, None, None])


@given(
    arrays(np.float32, (3, 7), elements=st.floats(-1, 1, width=32)),
    st.sampled_from([1e-3, 1.0, 40.0]),
    st.floats(0.2, 1.0),
)
@settings(deadline=None, max_examples=300)
def test_portable_scales_leave_no_two_weights_that_saturate(values: np.ndarray, size: float, clipped: float) -> None:
    weight = torch.from_numpy(values) * size
    scale = half_up(full_scale(weight, torch.zeros(3), 0.01, 8) * clipped)
    wide = portable_scale(weight, scale, 8)
    before, after = (integers(weight, s[:, None], 8).int() for s in (scale, wide))
    for row in range(3):
        worst = [max(abs(int(a) + int(b)) for a, b in itertools.combinations(r[row], 2)) for r in (before, after)]
        assert worst[1] <= 128
        assert (wide[row] == scale[row]) == (worst[0] <= 128), "other filters keep their levels"
    assert torch.equal(after == 0, weight == 0)


@pytest.mark.parametrize("keep", [1.0, 0.05])
def test_portable_networks_have_no_pair_that_saturates(nets, keep: float) -> None:
    _, plain, _ = made(nets, "vgg4", keep)
    _, found, _ = made(nets, "vgg4", keep, portable=True)
    assert sum(saturating_pairs(plain).values()) > 0
    assert set(saturating_pairs(found).values()) == {0}
    assert set(saturating_pairs(found)) == set(found.weights)


def test_exactness_bounds_every_partial_sum(nets) -> None:
    _, found, twin = made(nets, "cnn-small", 0.05)
    bound = exactness(found)
    for name, weight in found.weights.items():
        worst = max(
            255 * sum(abs(int(w)) for w in row.flatten()) + abs(int(b))
            for row, b in zip(weight, found.biases[name], strict=True)
        )
        assert bound.largest[name] == worst
        assert twin.get_submodule(name).exact_float32 == (worst < 1 << 24)
    assert bound.proved
    _, dense, _ = made(nets, "cifar-resnet18", bits=12)
    assert not exactness(dense).proved


def test_scales_beyond_float16_are_powers_of_two() -> None:
    values = torch.tensor([65504.0, 65505.0, 65536.0, 1.6481e9])
    assert half_up(values).tolist() == [65504.0, 65536.0, 65536.0, 2.0**31]
    with pytest.raises(WorkError, match="not finite"):
        half_up(torch.tensor([1.0, torch.inf]))
