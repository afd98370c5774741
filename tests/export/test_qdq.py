from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn

from rprune.errors import WorkError
from rprune.export.qdq import qdq_model
from rprune.export.session import OnnxClassifier, load_onnx, weight_counts
from rprune.models.prunable import prunable
from rprune.quantization.simulate import QMatmul

CASES = [
    ("cnn-small", 1.0),
    ("cnn-small", 0.01),
    ("lenet", 1.0),
    ("lenet normalised", 0.05),
    ("vgg4", 1.0),
    ("vgg4", 0.01),
    ("cifar-resnet18", 1.0),
    ("cifar-resnet18 normalised", 0.01),
    ("wrn-28-2", 1.0),
    ("wrn-28-2", 0.01),
]


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


@pytest.fixture(scope="module")
def shipped(nets, tmp_path_factory):
    """(model, twin, file) by case."""
    done = {}

    def ship(case: str, keep: float):
        if (case, keep) not in done:
            model = nets.make(case, keep)
            _, found, twin = nets.quantised(model)
            path = tmp_path_factory.mktemp("int8") / "model.int8.onnx"
            onnx.save(qdq_model(twin, nets.SHAPE, 10), path)
            done[case, keep] = (model, found, twin, path)
        return done[case, keep]

    return ship


def torch_logits(twin: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return twin(x).numpy()


def write(twin: fx.GraphModule, shape: tuple[int, int, int], classes: int, path: Path) -> OnnxClassifier:
    onnx.save(qdq_model(twin, shape, classes), path)
    return OnnxClassifier(path, threads=1)


def fused_operators(path: Path, tmp_path: Path) -> Counter[str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize(("case", "keep"), CASES)
def test_torch_equals_onnx_runtime_bit_for_bit(nets, shipped, case: str, keep: float) -> None:
    _, _, twin, path = shipped(case, keep)
    session = OnnxClassifier(path, threads=1)
    for x in (nets.noise(64), nets.noise(32).round(), nets.digits(128)[0]):
        wanted = torch_logits(twin, x)
        assert wanted.dtype == np.float32
        assert np.array_equal(session.logits(x.numpy()), wanted)
    assert wanted.std() > 0


@pytest.mark.parametrize(("case", "keep"), CASES)
def test_every_product_runs_on_integers(shipped, tmp_path: Path, case: str, keep: float) -> None:
    _, _, twin, path = shipped(case, keep)
    products = [module for module in twin.modules() if isinstance(module, QMatmul)]
    convolutions = sum(module.conv is not None for module in products)
    found = fused_operators(path, tmp_path)
    assert found["QLinearConv"] == convolutions
    assert found["QGemm"] == len(products) - convolutions
    assert not found.keys() & {"Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "ConvInteger"}


@pytest.mark.parametrize("case", ["cnn-small", "cifar-resnet18 normalised", "wrn-28-2"])
def test_file_is_checked_and_its_batch_is_dynamic(nets, shipped, case: str) -> None:
    _, _, _, path = shipped(case, 0.01)
    model = load_onnx(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    x = nets.noise(17).numpy()
    whole = OnnxClassifier(path, threads=1)
    assert whole.input_shape == nets.SHAPE
    rows = whole.logits(x)
    for size in (1, 3, 17):
        assert np.array_equal(OnnxClassifier(path, batch_size=size, threads=1).logits(x), rows)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_logits(nets, shipped, threads: int) -> None:
    _, _, twin, path = shipped("cifar-resnet18", 1.0)
    x = nets.noise(32)
    assert np.array_equal(OnnxClassifier(path, threads=threads).logits(x.numpy()), torch_logits(twin, x))


@pytest.mark.parametrize(("case", "keep"), [("cnn-small", 0.01), ("cifar-resnet18", 1.0), ("wrn-28-2", 0.01)])
def test_weights_in_the_file_are_the_integers(shipped, case: str, keep: float) -> None:
    model, found, _, path = shipped(case, keep)
    counts = weight_counts(path)
    assert counts == {f"{n}.weight": (tuple(w.shape), int(w.count_nonzero())) for n, w in found.weights.items()}
    assert counts == {n: (tuple(w.shape), int(w.count_nonzero())) for n, w in prunable(model).items()}
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in load_onnx(path).graph.initializer}
    for name, integers in found.weights.items():
        assert stored[f"{name}.weight"].dtype == np.int8
        assert np.array_equal(stored[f"{name}.weight"], integers.numpy())


def test_file_is_reproducible(nets) -> None:
    files = [qdq_model(nets.quantised(nets.make("lenet"))[2], nets.SHAPE, 10).SerializeToString() for _ in range(2)]
    assert files[0] == files[1]


class Body(nn.Module):
    """A stem, the layer under test, and a head."""

    def __init__(self, body: nn.Module, channels: int = 6, side: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.body = body
        self.head = nn.Linear(channels * side * side, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(1))


class Twice(nn.Module):
    """A ReLU that is not alone behind its layer, and a sum without one."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(x)


LAYER_CASES = {
    "depthwise": (nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6)), 6, 8),
    "grouped": (nn.Sequential(nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), nn.ReLU()), 8, 4),
    "dilated without relu": (nn.Conv2d(6, 4, 3, padding=2, dilation=2), 4, 8),
    "one by one": (nn.Sequential(nn.Conv2d(6, 12, 1, bias=False), nn.ReLU()), 12, 8),
    "padded max pool of signed values": (nn.MaxPool2d(3, 2, 1), 6, 4),
    "overlapping average pool": (nn.AvgPool2d(4, 2), 6, 3),
    "global average": (nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1)), 6, 1),
    "relu beside its input": (Twice(), 6, 8),
    "relu after pooling": (nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), 6, 4),
    "two relus": (nn.Sequential(nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU()), 6, 4),
    "batch norm alone": (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.ReLU()), 6, 8),
    "batch norm of signed values": (nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(6)), 6, 4),
}


@pytest.mark.parametrize("case", LAYER_CASES)
def test_single_layers_equal_onnx_runtime(nets, tmp_path: Path, case: str) -> None:
    torch.manual_seed(1)
    body, channels, side = LAYER_CASES[case]
    model = nets.enliven(Body(body, channels, side))
    _, _, twin = nets.quantised(model, nets.noise(32))
    session = write(twin, nets.SHAPE, 5, tmp_path / "m.onnx")
    x = nets.noise(64, seed=4)
    assert np.array_equal(session.logits(x.numpy()), torch_logits(twin, x))


def test_dead_channels_equal_onnx_runtime(nets, tmp_path: Path) -> None:
    model = nets.make("cnn-small", 0.05)
    model.features[2].weight.data[:20] = 0
    model.features[2].bias.data[:20] = torch.linspace(-100, 100, 20)
    model.classifier[0].weight.data[:90] = 0
    _, _, twin = nets.quantised(model)
    session = write(twin, nets.SHAPE, 10, tmp_path / "m.onnx")
    x = nets.noise(64)
    assert np.array_equal(session.logits(x.numpy()), torch_logits(twin, x))


def test_accumulators_beyond_float32_equal_onnx_runtime(nets, tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(2048, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.hidden(x.flatten(1))))

    torch.manual_seed(0)
    model = Wide().eval()
    model.hidden.weight.data.uniform_(0.9, 1.0)
    shape = (2, 32, 32)
    _, _, twin = nets.quantised(model, nets.noise(8, shape), shape)
    assert not twin.hidden.exact_float32
    session = write(twin, shape, 4, tmp_path / "m.onnx")
    x = nets.noise(32, shape, seed=2)
    assert np.array_equal(session.logits(x.numpy()), torch_logits(twin, x))


class AllConvolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))).mean((2, 3))


class EndsInRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x.flatten(1)))


@pytest.mark.parametrize("kind", [AllConvolutional, EndsInRelu])
def test_network_that_does_not_end_in_a_product_is_right_or_refused(nets, tmp_path: Path, kind: type) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    x = nets.noise(16)
    try:
        _, _, twin = nets.quantised(model, x)
    except WorkError:
        return
    got = torch_logits(twin, x)
    with torch.no_grad():
        wanted = model(x).numpy()
    assert np.abs(got - wanted).max() < 0.1 * np.ptp(wanted)
    session = write(twin, nets.SHAPE, 5, tmp_path / "m.onnx")
    assert np.array_equal(session.logits(x.numpy()), got)
