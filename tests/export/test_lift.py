"""Networks read back from ONNX files: the bits of ONNX Runtime for integers, its floats for floats; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rprune.certification.ibp import bounds, margins
from rprune.errors import InputError
from rprune.export.compact_onnx import expanding
from rprune.export.lift import lifted
from rprune.export.onnx import plain_model
from rprune.export.qdq import qdq_model
from rprune.export.session import OnnxClassifier
from rprune.models.graph import trace
from rprune.quantization.ptq import Settings, quantize, simulated

CASES = ["cnn-small", "cifar-resnet18 normalised", "wrn-28-2", "vgg4", "lenet"]


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


def written(model: Any, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("case", CASES)
def test_floats_are_those_of_onnx_runtime(nets, tmp_path: Path, case: str) -> None:
    network = trace(nets.make(case, 0.3), nets.SHAPE)
    path, x = written(plain_model(network, nets.SHAPE, 10), tmp_path), torch.cat([nets.noise(8), nets.digits(4)[0]])
    found = lifted(path)
    wanted = OnnxClassifier(path).logits(x.numpy())
    assert np.abs(found(x).numpy() - wanted).max() <= 1e-4 * max(1, np.abs(wanted).max())
    assert torch.allclose(found.double()(x.double()), network.double()(x.double()), rtol=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", CASES)
def test_integers_are_those_of_onnx_runtime(nets, tmp_path: Path, case: str, bits: int) -> None:
    network = trace(nets.make(case, 0.3), nets.SHAPE)
    twin = simulated(network, quantize(network, [nets.digits(64)[0]], Settings(bits=bits, observer="mse")))
    x = torch.cat([nets.noise(24), nets.digits(8)[0]])
    path = written(qdq_model(twin, nets.SHAPE, 10), tmp_path)
    found = lifted(path)
    with torch.no_grad():
        assert torch.equal(found(x), twin(x))
    assert np.array_equal(found(x).numpy(), OnnxClassifier(path).logits(x.numpy()))
    answers = at_both_levels(path, x)
    if case == "cnn-small":  # unfused, sums are float32: a tie may fall the other way
        assert all(np.abs(found(x).numpy() - answer).max() < 1e-5 for answer in answers)
    layers = [type(module).__name__ for module in found.children()]
    assert sorted(layers) == sorted(
        type(module).__name__ for module in twin.modules() if type(module).__name__[0] == "Q"
    )


def at_both_levels(path: Path, x: torch.Tensor) -> list[Any]:
    """ONNX Runtime's logits with all of its optimisations, and with none."""
    found = []
    for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        found.append(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    return found


def test_compact_files_are_read_as_what_they_expand_to(nets, tmp_path: Path) -> None:
    _, _, twin = nets.quantised(nets.make("cnn-small", 0.02))
    dense = qdq_model(twin, nets.SHAPE, 10)
    x = nets.noise(16)
    with torch.no_grad():
        assert torch.equal(lifted(written(expanding(dense), tmp_path))(x), twin(x))


SHAPE = (2, 6, 6)


def graph(*nodes: Any, **constants: Any) -> Any:
    """A classifier from x (batch, 2, 6, 6) to y."""
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", None])
    model = helper.make_model(
        helper.make_graph(list(nodes), "g", [given], [made], stored), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    return model


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    """Inputs are names with one space between them; two leave one out."""
    return helper.make_node(kind, inputs.split(" "), [output], name=f"the_{kind.lower()}_{output}", **attributes)


R = np.random.RandomState(0)
CONV = {"k": R.randn(3, 2, 3, 3).astype("f"), "kb": R.randn(3).astype("f")}
HEAD = {"w": R.randn(48, 4).astype("f"), "b": R.randn(4).astype("f")}
CHANNEL = {name: (R.rand(3) + 0.5).astype("f") for name in ("s", "t", "m", "v")}
FOREIGN = {
    "MatMul and Add": graph(
        node("Conv", "x k kb", "c"), node("Relu", "c", "r"), node("Flatten", "r", "f"), node("MatMul", "f w", "p"),
        node("Add", "p b", "y"), **CONV, **HEAD,
    ),
    "batch norm": graph(
        node("Conv", "x k", "c"), node("BatchNormalization", "c s t m v", "n", epsilon=0.1), node("Relu", "n", "r"),
        node("Reshape", "r shape", "f"), node("Gemm", "f w b", "y"), shape=np.array([-1, 48]), **CONV, **HEAD,
        **CHANNEL,
    ),
    "normalised pixels": graph(
        node("Sub", "x mean", "a"), node("Div", "a std", "d"), node("Conv", "d k kb", "c"), node("Mul", "c s1", "e"),
        node("Add", "t1 e", "h"), node("GlobalAveragePool", "h", "g"), node("Flatten", "g", "f"),
        node("Gemm", "f w3 b", "y"),
        mean=np.float32([[[0.4]], [[0.6]]]), std=np.float32([[[0.2]], [[0.3]]]), s1=CHANNEL["s"].reshape(1, 3, 1, 1),
        t1=CHANNEL["t"].reshape(3, 1, 1), w3=R.randn(3, 4).astype("f"), b=HEAD["b"], **CONV,
    ),
    "leaks and clips": graph(
        node("Conv", "x k kb", "c"), node("LeakyRelu", "c", "l", alpha=0.2), node("Clip", "l low high", "d"),
        node("Clip", "d zero", "e"), node("Clip", "e zero six", "g"), node("Flatten", "g", "f"),
        node("Gemm", "f w b", "y"), low=np.float32(-0.3), high=np.float32(0.9), zero=np.float32(0), six=np.float32(6),
        **CONV, **HEAD,
    ),
    "ends that clip nothing": graph(
        node("Conv", "x k kb", "c"), node("Clip", "c low", "d"), node("Clip", "d  high", "e"),
        node("Clip", "e least most", "g"), node("Clip", "g zero most", "h"), node("Flatten", "h", "f"),
        node("Gemm", "f w b", "y"), low=np.float32(-0.3), high=np.float32(0.9), zero=np.float32(0),
        least=np.float32(-3.4028235e38), most=np.float32(3.4028235e38), **CONV, **HEAD,
    ),
    "one number for all behind Flatten": graph(
        node("Conv", "x k kb", "c"), node("Relu", "c", "r"), node("Flatten", "r", "f"), node("Mul", "f two", "d"),
        node("Add", "d one", "e"), node("Gemm", "e w b", "y"), two=np.float32(2), one=np.float32([1]), **CONV, **HEAD,
    ),
    "residual, pools, mean": graph(
        node("Conv", "x k kb", "c", pads=[1, 1, 1, 1]), node("MaxPool", "c", "p", kernel_shape=[3, 3],
        pads=[1, 1, 1, 1]),
        node("Add", "p c", "a"), node("AveragePool", "a", "q", kernel_shape=[2, 2], strides=[2, 2]),
        node("ReduceMean", "q axes", "m"), node("Identity", "m", "i"), node("Flatten", "i", "f"),
        node("Gemm", "f w3", "y"),
        axes=np.array([-2, -1]), w3=R.randn(3, 4).astype("f"), **CONV,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_files_of_others(tmp_path: Path, case: str) -> None:
    path = written(FOREIGN[case], tmp_path)
    x = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    network, found = lifted(path), OnnxClassifier(path).logits(x.numpy())
    assert np.allclose(network(x).numpy(), found, rtol=1e-4, atol=1e-4)
    low, high = bounds(network.double(), x.double(), x.double())
    assert np.allclose(low.numpy(), found, rtol=1e-4, atol=1e-4)
    assert np.allclose(high.numpy(), found, rtol=1e-4, atol=1e-4)


def test_integers_of_others(tmp_path: Path) -> None:
    """Signed activations, one scale for all outputs, MatMul with a bias behind it, as other tools write them."""
    q = {"xs": np.float32(1 / 255), "xz": np.int8(-128), "ys": np.float32(0.07), "yz": np.int8(-10),
         "ks": np.float32(0.02),
         "ws": np.float32(0.01), "kz": np.int8(0)}  # fmt: skip
    numbers = {
        "k8": R.randint(-127, 128, (3, 2, 3, 3)).astype(np.int8), "w8": R.randint(-127, 128, (48, 4)).astype(np.int8),
        "b32": R.randint(-900, 900, 4).astype(np.int32), "bs": np.float32(0.07) * np.float32(0.01), "bz": np.int32(0),
    }  # fmt: skip
    model = graph(
        node("QuantizeLinear", "x xs xz", "xq"), node("DequantizeLinear", "xq xs xz", "xd"),
        node("DequantizeLinear", "k8 ks kz", "k"), node("Conv", "xd k", "c"), node("Relu", "c", "r"),
        node("QuantizeLinear", "r ys yz", "rq"), node("DequantizeLinear", "rq ys yz", "rd"), node("Flatten", "rd", "f"),
        node("QuantizeLinear", "f ys yz", "fq"), node("DequantizeLinear", "fq ys yz", "fd"),
        node("DequantizeLinear", "w8 ws kz", "w"), node("DequantizeLinear", "b32 bs bz", "b"),
        node("MatMul", "fd w", "p"),
        node("Add", "p b", "y"), **q, **numbers,
    )  # fmt: skip
    path, x = written(model, tmp_path), torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert np.allclose(lifted(path)(x).numpy(), OnnxClassifier(path).logits(x.numpy()), atol=1e-4)


REFUSED = {
    "a leak that is none": (
        graph(node("LeakyRelu", "x", "l", alpha=1.5), node("Flatten", "l", "y")), "the_leakyrelu.*not in \\[0, 1\\]",
    ),
    "a clip far out": (
        graph(node("Clip", "x low high", "l"), node("Flatten", "l", "y"), low=np.float32(0), high=np.float32(1e6)),
        "the_clip.*clips to",
    ),
    "a clip to nothing": (
        graph(node("Clip", "x low", "l"), node("Flatten", "l", "y"), low=np.float32(np.inf)), "the_clip.*clips to",
    ),
    "an operator without a layer": (graph(node("Softmax", "x", "s"),
    node("Flatten", "s", "y")), "the_softmax.*no layer"),
    "uneven padding": (
        graph(node("Conv", "x k", "c", pads=[0, 0, 1, 1]), node("Flatten", "c", "y"), **CONV), "the_conv.*both sides",
    ),
    "dilated pooling": (
        graph(node("MaxPool", "x", "p", kernel_shape=[2, 2], dilations=[2, 2]), node("Flatten", "p", "y")), "dilation",
    ),
    "a weight that depends on the image": (
        graph(node("Flatten", "x", "f"), node("Gemm", "f f", "y", transB=1)), "the_gemm.*no constant",
    ),
    "a scale of pixels": (
        graph(node("Mul", "x big", "m"), node("Flatten", "m", "y"),
        big=np.ones((1, 2, 6, 6), "f")), "one number a channel",
    ),
    "no integers behind a quantiser": (
        graph(node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s2 z", "d"), node("Flatten", "d", "y"),
              s=np.float32(0.1), s2=np.float32(0.2), z=np.uint8(0)), "another scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_node_and_reason(tmp_path: Path, case: str) -> None:
    model, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        lifted(written(model, tmp_path))
    assert onnx.checker.check_model(model) is None


def test_logits_and_bounds_of_another_implementation() -> None:
    """A file with Flatten in front of a quantiser; logits of an integer simulation and of ONNX Runtime at two levels of
    optimisation, and exact interval margins, all recorded elsewhere."""
    folder = Path(__file__).parent.parent / "data"
    recorded = np.load(folder / "certification-int8.npz")
    x, y, eps = torch.from_numpy(recorded["X"]), torch.from_numpy(recorded["y"]), float(recorded["eps"])
    network = lifted(folder / "certification-int8.onnx")
    with torch.no_grad():
        found = network(x).numpy()
    for name in ("int_logits", "ort_all", "ort_none"):
        assert np.abs(found - recorded[name]).max() < 5e-6, name
    lower = margins(network, (x.double() - eps).clamp_min(0), (x.double() + eps).clamp_max(1), y)
    others = lower[torch.ones_like(lower, dtype=torch.bool).scatter(1, y[:, None], False)].view(len(y), -1)
    assert np.abs(others.numpy() - recorded["lb"]).max() < 3e-5
