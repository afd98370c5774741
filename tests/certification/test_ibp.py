from __future__ import annotations

import itertools
import math
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rprune.attacks.noise import Keyed
from rprune.attacks.pgd import PGD
from rprune.certification.bounds import METHODS, lower_margins
from rprune.certification.ibp import OUTWARD, bounds, box, certified, margins, proved
from rprune.export.qdq import qdq_model
from rprune.export.session import OnnxClassifier
from rprune.models.graph import Affine, trace
from rprune.quantization.ptq import Settings, quantize, simulated
from rprune.quantization.simulate import QAdd, QAffine, QAvgPool, QInput, QKeep, QMatmul, Scale
from rprune.threat import ThreatModel

SHAPE = (2, 6, 6)
PROPERTY = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
WORST = PGD(steps=40, loss="margin", overshoot=math.inf)


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


BLOCKS = {
    "conv": lambda: nn.Conv2d(2, 2, 3, padding=1),
    "grouped": lambda: nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False),
    "relu": nn.ReLU,
    "residual": lambda: Residual(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 1))),
    "affine": lambda: Affine(torch.randn(1, 2, 1, 1), torch.randn(1, 2, 1, 1)),
    "max": lambda: nn.MaxPool2d(2, 1),
    "average": lambda: nn.AvgPool2d(2, 1),
}


class Pieces(nn.Module):
    def __init__(self, names: list[str], hidden: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        side = 6 - sum(name in ("max", "average") for name in names)
        self.body = nn.Sequential(*(BLOCKS[name]() for name in names), nn.Flatten())
        width = 2 * side * side
        head = [nn.Linear(width, hidden), nn.ReLU()] if hidden else []
        self.head = nn.Sequential(*head, nn.Linear(hidden or width, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Exact(nn.Module):
    """A traced network in float64: sampled values then have no rounding that the bounds do not know."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.double())


def random_net(names: list[str], hidden: int, seed: int):
    """(network as the bounds take it, the same for float64 points, four images and their classes)."""
    network = trace(Pieces(names, hidden, seed), SHAPE).double()
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(seed))
    x[0, :, :2] = 0
    x[1, :, :2] = 1
    return network, Exact(network), x, network(x.double()).argmax(1)


def real_margins(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], torch.inf)


def points(x: Tensor, eps: float, count: int, seed: int) -> Tensor:
    """Random points and corners of the ball around each image: (count, b, c, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    unit = 2 * torch.rand(count, *x.shape, generator=generator, dtype=torch.float64) - 1
    unit[: count // 2] = unit[: count // 2].sign()
    return (x.double() + eps * unit).clamp(0, 1)


NETS = st.tuples(
    st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4), st.sampled_from([0, 5]), st.integers(0, 10_000)
)
EPS = st.sampled_from(["1/255", "0.03", "0.2"])


@PROPERTY
@given(net=NETS, eps=EPS)
def test_no_sampled_point_leaves_the_bounds(net, eps: str) -> None:
    network, exact, x, y = random_net(*net)
    threat = ThreatModel("linf", eps)
    lo, hi = bounds(network, *box(x, threat))
    lower = margins(network, *box(x, threat), y)
    for sample in points(x, threat.eps, 60, net[2]):
        logits = exact(sample)
        assert bool((lo - 1e-9 <= logits).all())
        assert bool((logits <= hi + 1e-9).all())
        assert bool((lower <= real_margins(logits, y) + 1e-9).all())


@PROPERTY
@given(net=NETS, eps=EPS, norm=st.sampled_from(["linf", "l2"]))
def test_no_attack_finds_a_margin_below_a_bound(net, eps: str, norm: str) -> None:
    network, exact, x, y = random_net(*net)
    threat = ThreatModel(norm, eps)
    found = WORST.evaluate(exact, x.double(), y, threat, Keyed(0, torch.arange(len(x))))
    worst = real_margins(exact(found.x), y)
    for method in METHODS:
        lower = lower_margins(network, x, y, threat, method)
        assert bool((lower <= worst + 1e-9).all()), method
        assert not bool((proved(lower, y) & found.broken).any()), method
    lo, hi = bounds(network, *box(x, threat))
    assert bool(((lo - 1e-9 <= exact(found.x)) & (exact(found.x) <= hi + 1e-9)).all())


@PROPERTY
@given(net=NETS, eps=EPS)
def test_merged_margins_are_no_looser_than_subtracted_bounds(net, eps: str) -> None:
    network, _, x, y = random_net(*net)
    region = box(x, ThreatModel("linf", eps))
    lo, hi = bounds(network, *region)
    subtracted = (lo.gather(1, y[:, None]) - hi).scatter(1, y[:, None], torch.inf)
    assert bool((margins(network, *region, y) >= subtracted - 1e-9).all())


@PROPERTY
@given(net=NETS)
def test_margins_without_a_threat_are_the_real_margins(net) -> None:
    network, exact, x, y = random_net(*net)
    region = box(x, ThreatModel("linf", "0"))
    assert torch.equal(region[0], x.double())
    assert torch.equal(region[1], x.double())
    torch.testing.assert_close(margins(network, *region, y), real_margins(exact(x), y), rtol=1e-9, atol=1e-9)
    for end in bounds(network, *region):
        torch.testing.assert_close(end, exact(x), rtol=1e-9, atol=1e-9)


@PROPERTY
@given(net=NETS)
def test_margins_fall_as_eps_grows(net) -> None:
    network, _, x, y = random_net(*net)
    found = [margins(network, *box(x, ThreatModel.of("linf", e)), y) for e in (0, 0.01, 0.02, 0.1, 0.5, 1)]
    for smaller, larger in itertools.pairwise(found):
        assert bool((larger <= smaller + 1e-9).all())


def test_box_stays_in_the_image_range_and_contains_the_ball() -> None:
    x = torch.tensor([0.0, 0.004, 0.5, 1.0]).view(1, 1, 2, 2)
    threat = ThreatModel("linf", "8/255")
    lo, hi = box(x, threat)
    assert lo.dtype == torch.float64
    assert float(lo.min()) == 0
    assert float(hi.max()) == 1
    assert bool((lo <= (x.double() - threat.eps).clamp(0, 1)).all())
    assert bool((hi >= (x.double() + threat.eps).clamp(0, 1)).all())
    assert float((hi - lo).max()) <= 2 * (threat.eps + OUTWARD) + 1e-12


def two_pixels(*layers: nn.Module):
    return trace(nn.Sequential(nn.Flatten(), *layers), (1, 1, 2)).double()


def grid(lo: Tensor, hi: Tensor, steps: int = 101) -> Tensor:
    ends = torch.stack([lo.flatten(), hi.flatten()], 1).tolist()
    axes = [torch.linspace(*pair, steps, dtype=torch.float64) for pair in ends]
    return torch.cartesian_prod(*axes).view(-1, 1, 1, 2)


def test_bounds_of_a_linear_net_are_exact() -> None:
    torch.manual_seed(0)
    network = two_pixels(nn.Linear(2, 3))
    x, y = torch.tensor([0.3, 0.9]).view(1, 1, 1, 2), torch.tensor([1])
    lo, hi = box(x, ThreatModel("linf", "0.2"))
    logits = network(grid(lo, hi, 2))
    found = bounds(network, lo, hi)
    torch.testing.assert_close(found[0][0], logits.amin(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1][0], logits.amax(0), rtol=0, atol=1e-12)
    wanted = (logits[:, 1:2] - logits).amin(0)
    wanted[1] = torch.inf
    torch.testing.assert_close(margins(network, lo, hi, y)[0], wanted, rtol=0, atol=1e-12)


def test_margins_of_one_hidden_neuron_each_are_exact() -> None:
    # every hidden neuron sees one pixel, so interval bounds lose nothing up to the last layer
    network = two_pixels(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    network.get_submodule("1").weight.data = torch.diag(torch.tensor([2.0, -3.0])).double()
    network.get_submodule("1").bias.data = torch.tensor([-0.5, 1.0]).double()
    x, y = torch.tensor([0.3, 0.4]).view(1, 1, 1, 2), torch.tensor([0])
    lo, hi = box(x, ThreatModel("linf", "0.15"))
    logits = network(grid(lo, hi))
    assert float(margins(network, lo, hi, y)[0, 1]) == pytest.approx(
        float((logits[:, 0] - logits[:, 1]).min()), abs=1e-9
    )


@pytest.mark.parametrize("seed", range(10))
def test_bounds_enclose_the_range_of_a_two_pixel_net(seed: int) -> None:
    torch.manual_seed(seed)
    network = two_pixels(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.rand(1, 1, 1, 2)
    lo, hi = box(x, ThreatModel("linf", "0.2"))
    logits = network(grid(lo, hi))
    low, high = bounds(network, lo, hi)
    assert bool((low[0] <= logits.amin(0) + 1e-12).all())
    assert bool((high[0] >= logits.amax(0) - 1e-12).all())
    y = torch.tensor([int(logits[0].argmax())])
    exact = (logits[:, y] - logits).amin(0)
    assert bool((margins(network, lo, hi, y)[0] <= exact.scatter(0, y, torch.inf) + 1e-12).all())


@pytest.mark.parametrize("where", ["head bias", "head weight", "first weight", "first bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_certify_nothing(where: str, value: float) -> None:
    model = Pieces(["conv", "relu"], 5, 0)
    if (where, value) == ("first bias", -torch.inf):
        return  # a ReLU after it gives plain zeros
    place, _, kind = where.partition(" ")
    module = model.head[-1] if place == "head" else model.body[0]
    tensor = getattr(module, kind)
    x = torch.rand(3, *SHAPE)
    for y in range(4):
        with torch.no_grad():
            kept = tensor[y % len(tensor)].clone()
            tensor[y % len(tensor)] = value
            network = trace(model, SHAPE)
            tensor[y % len(tensor)] = kept
        for eps in ("0", "1/255"):
            labels = torch.full((3,), y)
            assert not certified(network, x, labels, ThreatModel("linf", eps)).any(), (y, eps)


def test_infinite_lower_bounds_for_other_classes_prove_nothing() -> None:
    model = Pieces(["conv"], 0, 0)
    with torch.no_grad():
        model.head[-1].bias[1:] = -torch.inf
    x = torch.rand(2, *SHAPE)
    assert not certified(trace(model, SHAPE), x, torch.zeros(2, dtype=torch.int64), ThreatModel("linf", "0.01")).any()


@pytest.mark.parametrize("case", ["cifar-resnet18 normalised", "wrn-28-2", "vgg4", "lenet normalised"])
def test_real_architectures_respect_their_bounds(nets, case: str) -> None:
    model = nets.make(case, 0.2)
    network = trace(model, nets.SHAPE)
    x, _ = nets.digits(6)
    exact = Exact(trace(model, nets.SHAPE).double())
    y = exact(x).argmax(1)
    for eps in ("0.0001", "2/255"):
        threat = ThreatModel("linf", eps)
        region = box(x, threat)
        low, high = bounds(network, *region)
        lower = margins(network, *region, y)
        tolerance = 1e-9 * float(high.abs().max()) + 1e-9
        found = WORST.evaluate(exact, x.double(), y, threat, Keyed(1, torch.arange(len(x)))) if eps == "2/255" else None
        for sample in [*points(x, threat.eps, 20, 0), *([] if found is None else [found.x.double()])]:
            logits = exact(sample)
            assert bool(((low - tolerance <= logits) & (logits <= high + tolerance)).all())
            assert bool((lower <= real_margins(logits, y) + tolerance).all())


def test_l2_threat_is_contained_in_the_box(nets) -> None:
    x, _ = nets.digits(2)
    assert torch.equal(box(x, ThreatModel("l2", "0.3"))[0], box(x, ThreatModel("linf", "0.3"))[0])


# -- 8 bit ----------------------------------------------------------------------------------------------------------


class Trained:
    """cnn-small after a few epochs on digits, as float network, 8-bit network and file."""

    def __init__(self, nets, path) -> None:
        torch.manual_seed(0)
        model = nets.make("cnn-small").train()
        x, y = nets.digits(1200)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(6):
            for part in torch.randperm(1200).split(64):
                noisy = (x[part] + 0.05 * torch.randn_like(x[part])).clamp(0, 1)
                loss = F.cross_entropy(model(noisy), y[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.model = model.eval()
        self.network, _, self.twin = nets.quantised(self.model, x[:256])
        onnx.save(qdq_model(self.twin, nets.SHAPE, 10), path)
        self.session = OnnxClassifier(path, threads=1)
        self.x, self.y = nets.digits(200, start=1200)


@pytest.fixture(scope="module")
def trained(nets, tmp_path_factory) -> Trained:
    return Trained(nets, tmp_path_factory.mktemp("trained") / "m.onnx")


@pytest.mark.parametrize("eps", ["1/255", "0.01", "4/255"])
def test_bounds_hold_for_what_onnx_runtime_computes(trained: Trained, eps: str) -> None:
    threat = ThreatModel("linf", eps)
    x, y = trained.x[:8], trained.y[:8]
    low, high = bounds(trained.twin, *box(x, threat))
    lower = margins(trained.twin, *box(x, threat), y)
    samples = points(x, threat.eps, 2000 // 8, 1).float()
    found = PGD(steps=30, overshoot=math.inf).evaluate(trained.twin, x, y, threat, Keyed(0, torch.arange(8)))
    for sample in [*samples, found.x]:
        logits = torch.from_numpy(trained.session.logits(sample.numpy())).double()
        assert bool(((low <= logits) & (logits <= high)).all())
        assert bool((lower <= real_margins(logits, y)).all())


def test_eight_bit_margins_without_a_threat_are_the_real_ones(trained: Trained) -> None:
    x, y = trained.x[:50], trained.y[:50]
    lower = margins(trained.twin, *box(x, ThreatModel("linf", "0")), y)
    wanted = real_margins(torch.from_numpy(trained.session.logits(x.numpy())).double(), y)
    torch.testing.assert_close(lower, wanted, rtol=1e-5, atol=1e-4)
    assert bool((lower <= wanted).all())


@pytest.mark.parametrize("case", ["cnn-small", "cifar-resnet18 normalised", "wrn-28-2", "vgg4", "lenet"])
@pytest.mark.parametrize("bits", [4, 8])
def test_loose_bounds_hold_for_any_kernel(nets, tmp_path: Path, case: str, bits: int) -> None:
    """ONNX Runtime multiplies integers, or float32 where it may not fuse; both lie within, exact bounds as well."""
    network = trace(nets.make(case, 0.3), nets.SHAPE)
    twin = simulated(network, quantize(network, [nets.digits(64)[0]], Settings(bits=bits)))
    path = tmp_path / "m.onnx"
    path.write_bytes(qdq_model(twin, nets.SHAPE, 10).SerializeToString())
    x, y = nets.digits(4)
    threat = ThreatModel("linf", "0.03")
    tight, loose = (bounds(twin, *box(x, threat), loose=flag) for flag in (False, True))
    assert bool((loose[0] <= tight[0]).all() and (tight[1] <= loose[1]).all())
    assert bool((margins(twin, *box(x, threat), y, loose=True) <= margins(twin, *box(x, threat), y)).all())
    lower = margins(twin, *box(x, threat), y, loose=True)
    for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        for sample in points(x, threat.eps, 20, 0):
            logits = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: sample.float().numpy()})[0])
            assert bool(((loose[0] <= logits) & (logits <= loose[1])).all())
            assert bool((lower <= real_margins(logits.double(), y)).all())


def test_a_tie_is_met_on_both_sides() -> None:
    """1.5 + 1 is 2.5 steps: integers round it to 2, a sum that errs upwards to 3."""
    scale = Scale(1.0, 0)
    layer = QMatmul(
        nn.Linear(2, 1), torch.tensor([[3, 2]], dtype=torch.int8), torch.tensor([0], dtype=torch.int32),
        torch.tensor([0.5]), scale, scale, False,
    )  # fmt: skip
    one = torch.ones(1, 2)
    assert [float(end) for end in layer.interval(one, one)] == [2.0, 2.0]
    assert [float(end) for end in layer.loose(one, one)] == [2.0, 3.0]


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_certified_samples_survive_the_attack(trained: Trained, kind: str) -> None:
    net = trained.twin if kind == "int8" else trained.network
    x, y = trained.x, trained.y
    shares = []
    for eps in ("1/255", "2/255"):
        threat = ThreatModel("linf", eps)
        with torch.no_grad():
            right = net(x).argmax(1) == y
        sure = certified(net, x, y, threat)
        shares.append(float(sure.float().mean()))
        assert bool((right | ~sure).all())
        keyed = Keyed(0, torch.nonzero(sure).flatten())
        found = PGD(steps=50, restarts=3, overshoot=math.inf).evaluate(net, x[sure], y[sure], threat, keyed)
        with torch.no_grad():
            classes = (
                torch.from_numpy(trained.session.predict(found.x.numpy())) if kind == "int8" else net(found.x).argmax(1)
            )
        assert torch.equal(classes, y[sure])
    assert 0.3 < shares[0] <= 1  # the test says something
    assert shares[1] < shares[0]


Q = {"a": Scale(0.02, 100), "b": Scale(0.0371, 30), "out": Scale(0.06, 90)}


def eight_bit_layers() -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(0)

    def product(source: nn.Module, relu: bool, out: Scale | None, low: int = -127) -> QMatmul:
        weight = torch.randint(low, 128, source.weight.shape, generator=generator, dtype=torch.int8)
        bias = torch.randint(-900, 900, (len(weight),), generator=generator, dtype=torch.int32)
        scale = torch.rand(len(weight), generator=generator) * 0.01 + 1e-4
        return QMatmul(source, weight, bias, scale, Q["a"], out, relu)

    scale, shift = torch.tensor([1.3, -0.7]).view(1, 2, 1, 1), torch.tensor([-0.2, 0.5]).view(1, 2, 1, 1)
    return {
        "conv": product(nn.Conv2d(2, 3, 3, padding=1), True, Q["out"]),
        "strided grouped conv": product(nn.Conv2d(2, 4, 2, 2, groups=2), False, Q["out"]),
        "conv to logits": product(nn.Conv2d(2, 3, 4), False, None),
        "float64 conv": product(nn.Conv2d(2, 3, 4, padding=30), False, Scale(2.0, 100), 127),
        "add": QAdd(Q["a"], Q["b"], Q["out"], False),
        "add relu": QAdd(Q["a"], Q["b"], Q["out"], True),
        "average": QAvgPool(nn.AvgPool2d(2), Q["a"], Q["b"]),
        "global average": QAvgPool(None, Q["a"], Q["b"]),
        "affine": QAffine(scale, shift, Q["a"], Q["out"], False),
        "affine relu": QAffine(scale, shift, Q["a"], Q["out"], True),
        "keep max": QKeep(nn.MaxPool2d(2), Q["a"]),
        "keep relu": QKeep(nn.ReLU(), Q["a"]),
    }


@pytest.mark.parametrize("name", eight_bit_layers())
def test_intervals_of_eight_bit_layers_hold_and_are_attained_at_points(name: str) -> None:
    module = eight_bit_layers()[name]
    generator = torch.Generator().manual_seed(7)
    inputs = 2 if isinstance(module, QAdd) else 1
    ends = torch.randint(0, 256, (inputs, 2, 3, 2, 4, 4), generator=generator).sort(1).values.double()
    flat = [end for pair in ends for end in pair]
    low, high = module.interval(*flat)
    for step in range(200):
        unit = torch.rand(ends[:, 0].shape, generator=generator)
        if step % 2:
            unit = unit.round()
        q = (ends[:, 0] + (unit * (ends[:, 1] - ends[:, 0] + 1)).floor()).minimum(ends[:, 1])
        got = module(*q.float()).double()
        assert bool(((low <= got) & (got <= high)).all())
    same = module.interval(*(end for q in ends[:, 0] for end in (q, q)))
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], module(*ends[:, 0].float()).double())


def test_interval_of_a_single_product_is_exact() -> None:
    weight = torch.tensor([[3, -5], [-7, -2], [0, 4]], dtype=torch.int8)
    out = Scale(0.05, 128)
    layer = QMatmul(nn.Linear(2, 3), weight, torch.tensor([9, -4, 0], dtype=torch.int32), torch.full((3,), 0.01),
                    Scale(0.1, 12), out, False)  # fmt: skip
    lo, hi = torch.tensor([[5.0, 100.0]]).double(), torch.tensor([[25.0, 117.0]]).double()
    corners = torch.cartesian_prod(torch.arange(5.0, 26), torch.arange(100.0, 118))
    low, high = layer.interval(lo, hi)
    assert torch.equal(low[0], layer(corners).double().amin(0))
    assert torch.equal(high[0], layer(corners).double().amax(0))


def test_interval_of_the_input_contains_every_quantised_pixel() -> None:
    quantiser = QInput(Scale(float(torch.tensor(1 / 255)), 0))
    x = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    lo, hi = box(x, ThreatModel("linf", "2/255"))
    low, high = quantiser.interval(lo, hi)
    for sample in points(x, 2 / 255, 50, 0):
        q = quantiser(sample.float())
        assert bool(((low <= q) & (q <= high)).all())
    grid_x = torch.arange(256).view(1, 1, 16, 16) / 255
    low, high = quantiser.interval(*box(grid_x, ThreatModel("linf", "2/255")))
    k = torch.arange(256).view(1, 1, 16, 16)
    assert torch.equal(low.long(), (k - 2).clamp(0, 255))
    assert torch.equal(high.long(), (k + 2).clamp(0, 255))
