from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from rprune.errors import InputError, WorkError
from rprune.export.compact_onnx import expanding
from rprune.export.onnx import float_model, stamp
from rprune.export.qdq import qdq_model
from rprune.export.session import OnnxClassifier, load_onnx, stored_weights, weight_counts
from rprune.export.twin import onnx_twin
from rprune.models.prunable import prunable

LEVELS = {
    "optimised": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "as written": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
INT8_CASES = [("cnn-small", 0.02), ("lenet normalised", 0.05), ("vgg4", 0.01), ("cifar-resnet18 normalised", 0.02)]
INT8_CASES += [("wrn-28-2", 0.01), ("cnn-small", 1.0)]
FLOAT_CASES = ["cnn-small", "lenet normalised", "cifar-resnet18"]


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


@pytest.fixture(scope="module")
def pairs(nets, tmp_path_factory):
    """Dense and compact file of an int8 or a float case; a third part rounds float weights to few values."""
    done = {}

    def make(kind: str, case: str, keep: float) -> tuple[Path, Path]:
        if (kind, case, keep) not in done:
            model = nets.make(case, keep)
            if kind == "codes":
                for weight in prunable(model).values():
                    weight.data = (weight.data * 50).round().clamp(-100, 100) / 64
            dense = qdq_model(nets.quantised(model)[2], nets.SHAPE, 10) if kind == "int8" else None
            dense = float_model(model, nets.SHAPE) if dense is None else dense
            stamp(dense, {"rprune.labels": "a\nb", "other": "kept"})
            folder = tmp_path_factory.mktemp("pair")
            onnx.save(dense, folder / "dense.onnx")
            onnx.save(expanding(dense), folder / "compact.onnx")
            done[kind, case, keep] = (folder / "dense.onnx", folder / "compact.onnx")
        return done[kind, case, keep]

    return make


CASES = [("int8", *case) for case in INT8_CASES] + [("float", case, 0.02) for case in FLOAT_CASES]
CASES += [("codes", "cnn-small", 0.1), ("codes", "lenet normalised", 0.1)]
every_pair = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")


def session(path: Path, level: str, threads: int, optimised: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", "1")
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@every_pair
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", LEVELS)
def test_logits_are_those_of_the_dense_file(nets, pairs, case, level: str, threads: int) -> None:
    dense, compact = pairs(*case)
    x = np.concatenate([nets.noise(24).numpy(), nets.digits(24)[0].numpy()])
    wanted, got = (session(path, level, threads).run(None, {"input": x})[0] for path in (dense, compact))
    assert wanted.std() > 0
    if case[0] == "int8" or level == "optimised":
        assert np.array_equal(got, wanted)
    else:  # ONNX Runtime packs the weights of Gemm only where they are constants: other sums, to the last bit
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


@every_pair
def test_the_kernels_are_those_of_the_dense_file(pairs, tmp_path: Path, case) -> None:
    found = []
    for path in pairs(*case):
        session(path, "optimised", 1, tmp_path / "optimised.onnx")
        found.append(Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node))
    assert found[0] == found[1]
    assert not found[1].keys() & {"ScatterElements", "CumSum", "ConstantOfShape"}


@every_pair
def test_weights_are_read_under_their_names(pairs, case) -> None:
    dense, compact = (stored_weights(path) for path in pairs(*case))
    assert dense.keys() == compact.keys()
    for name, weight in dense.items():
        assert compact[name].dtype == weight.dtype
        assert np.array_equal(compact[name], weight)
    assert weight_counts(pairs(*case)[0]) == weight_counts(pairs(*case)[1])


@every_pair
def test_the_twin_is_that_of_the_dense_file(nets, pairs, case) -> None:
    dense, compact = (onnx_twin(path) for path in pairs(*case))
    x = nets.noise(8).requires_grad_()
    assert torch.equal(compact(x), dense(x))
    found, wanted = (torch.autograd.grad(net(x).square().sum(), x)[0] for net in (compact, dense))
    assert torch.equal(found, wanted)


@every_pair
def test_the_file_is_valid_smaller_and_says_the_same(pairs, case) -> None:
    dense, compact = pairs(*case)
    assert compact.stat().st_size < dense.stat().st_size * (1 if case[2] == 1 else 0.8)
    old, new = onnx.load(dense), load_onnx(compact)
    onnx.checker.check_model(new, full_check=True)
    assert new.metadata_props == old.metadata_props
    assert [new.graph.input[0].name, new.graph.output[0].name] == ["input", "logits"]
    assert new.graph.input[0].type == old.graph.input[0].type
    assert new.opset_import == old.opset_import
    assert {node.domain for node in new.graph.node} == {""}
    assert not new.graph.sparse_initializer
    assert not new.functions
    assert not any(node.name or node.doc_string for node in new.graph.node)
    expands = any(node.op_type == "ScatterElements" for node in new.graph.node)
    assert expands == (case[2] < 1)
    assert any(node.op_type == "Gather" for node in new.graph.node) == (case[0] == "codes")


@pytest.mark.parametrize("kind", ["float", "codes"])
def test_onnx_itself_runs_it(nets, pairs, kind: str) -> None:
    x = nets.noise(3).numpy()
    dense, compact = (
        ReferenceEvaluator(str(path)).run(None, {"input": x})[0] for path in pairs(kind, "cnn-small", 0.1)
    )
    assert np.array_equal(dense, compact)


def test_same_model_same_bytes_and_the_model_stays(nets) -> None:
    dense = qdq_model(nets.quantised(nets.make("lenet", 0.05))[2], nets.SHAPE, 10)
    before = dense.SerializeToString()
    assert expanding(dense).SerializeToString() == expanding(dense).SerializeToString()
    assert dense.SerializeToString() == before


def linear(
    weight: np.ndarray, scale: np.ndarray | None = None, bias_scale: np.ndarray | None = None
) -> onnx.ModelProto:
    """Logits of one linear layer, float or (with scales) int8 between quantisers of scale 1/4."""
    outputs, inputs = weight.shape
    constants = {"fc.weight": weight, "step": np.float32(0.25), "zero": np.uint8(7)}
    nodes = [helper.make_node("Flatten", ["x"], ["flat"], axis=1)]
    if scale is None:
        nodes.append(helper.make_node("Gemm", ["flat", "fc.weight"], ["logits"], transB=1))
    else:
        constants |= {"fc.weight_scale": scale, "fc.bias": np.arange(outputs, dtype=np.int32)}
        constants |= {"fc.bias_scale": bias_scale, "zeros": np.zeros(outputs, np.int8)}
        constants |= {"zeros32": np.zeros(outputs, np.int32)}
        nodes += [
            helper.make_node("QuantizeLinear", ["flat", "step", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["dq"]),
            helper.make_node("DequantizeLinear", ["fc.weight", "fc.weight_scale", "zeros"], ["w"], axis=0),
            helper.make_node("DequantizeLinear", ["fc.bias", "fc.bias_scale", "zeros32"], ["b"], axis=0),
            helper.make_node("Gemm", ["dq", "w", "b"], ["logits"], transB=1),
        ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", inputs, 1, 1])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", outputs])
    used = {name for node in nodes for name in node.input}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used]
    graph = helper.make_graph(nodes, "g", [given], [out], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(3, 400), (40, 40), (2, 70_000), (1, 1000), (5, 1)]),
    keep=st.sampled_from([0.0, 0.0005, 0.004, 0.03, 0.6]),
    dtype=st.sampled_from([np.int8, np.float32]),
    values=st.sampled_from([2, 300]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_sparse_weight_comes_back(
    tmp_path_factory, shape, keep: float, dtype: type, values: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    size = int(np.prod(shape))
    weight = np.zeros(size, dtype)
    places = random.random(size) < keep
    weight[places] = random.integers(1, values, places.sum()).astype(dtype)  # int8 wraps, to zero now and then
    weight = weight.reshape(shape)
    scales = (np.ones(shape[0], np.float32), np.full(shape[0], 0.25, np.float32)) if dtype == np.int8 else ()
    path = tmp_path_factory.mktemp("any") / "m.onnx"
    dense = linear(weight, *scales)
    compact = expanding(dense)
    onnx.save(compact, path)
    assert compact.ByteSize() <= dense.ByteSize()
    stored = stored_weights(path)["fc.weight"]
    assert stored.dtype == dtype
    assert np.array_equal(stored, weight)
    # the runtime's own expansion: outputs of single pixels
    x = np.zeros((shape[1], shape[1], 1, 1), np.float32)
    if shape[1] <= 1000 and dtype == np.float32:
        x[np.arange(shape[1]), np.arange(shape[1])] = 1
        assert np.array_equal(OnnxClassifier(path, threads=1).logits(x), weight.T)


def test_room_for_expansion(tmp_path: Path, monkeypatch) -> None:
    """Zeros and the written weight count for what the twin may make of constants, the reshaped weight does not."""
    weight = np.zeros((8, 1000), np.float32)
    weight[3, 5] = 1
    onnx.save(expanding(linear(weight)), tmp_path / "m.onnx")
    monkeypatch.setattr("rprune.export.twin.LARGEST", 2 * weight.size + 100)
    onnx_twin(tmp_path / "m.onnx")
    monkeypatch.setattr("rprune.export.twin.LARGEST", 2 * weight.size - 1)
    with pytest.raises(InputError, match="constants of the file"):
        onnx_twin(tmp_path / "m.onnx")


def test_negative_zeros_are_zeros(tmp_path: Path) -> None:
    weight = np.full((4, 500), -0.0, np.float32)
    weight[1, 3] = 2
    onnx.save(expanding(linear(weight)), tmp_path / "m.onnx")
    stored = stored_weights(tmp_path / "m.onnx")["fc.weight"]
    assert np.array_equal(stored, weight)
    assert not np.signbit(stored).any()


STEP = np.float32(0.25)
ODD = np.float32(np.linspace(0.1, 0.9, 64))  # not float16
EVEN = ODD.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize(
    ("scale", "bias_scale", "casts", "products"),
    [
        pytest.param(ODD, ODD * STEP, 0, 1, id="float32 scales, product"),
        pytest.param(EVEN, EVEN * STEP, 1, 1, id="float16 scales, product"),
        pytest.param(ODD, np.nextafter(ODD * STEP, np.float32(9)), 0, 0, id="one bit beside the product"),
        pytest.param(EVEN * np.float32(2**18), EVEN * np.float32(2**16), 0, 1, id="above float16"),
    ],
)
def test_scales_are_shortened_only_where_their_bits_stay(tmp_path: Path, scale, bias_scale, casts, products) -> None:
    weight = np.random.default_rng(0).integers(-127, 128, (64, 10)).astype(np.int8)
    dense = linear(weight, scale, bias_scale)
    compact = expanding(dense)
    kinds = Counter(node.op_type for node in compact.graph.node)
    assert kinds["Cast"] == casts
    assert kinds["Mul"] == products
    onnx.save(dense, tmp_path / "dense.onnx")
    onnx.save(compact, tmp_path / "compact.onnx")
    x = np.random.default_rng(1).uniform(-3, 3, (20, 10, 1, 1)).astype(np.float32)
    wanted, got = (OnnxClassifier(tmp_path / f"{name}.onnx", threads=1).logits(x) for name in ("dense", "compact"))
    assert np.array_equal(got, wanted)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 1, 31), nn.Conv2d(1, 1, 31), nn.Linear(16, 10)
        self.a.weight.data *= torch.rand_like(self.a.weight) < 0.05
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(torch.relu(self.a(x))).flatten(1))


def test_a_weight_of_two_layers_is_expanded_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = float_model(Tied().eval(), (1, 64, 64))
    compact = expanding(dense)
    assert sum(node.op_type == "ScatterElements" for node in compact.graph.node) == 1
    onnx.save(dense, tmp_path / "dense.onnx")
    onnx.save(compact, tmp_path / "compact.onnx")
    x = torch.rand(3, 1, 64, 64).numpy()
    wanted, got = (OnnxClassifier(tmp_path / f"{name}.onnx", threads=1).logits(x) for name in ("dense", "compact"))
    assert np.array_equal(got, wanted)


def test_control_flow_and_functions_are_refused() -> None:
    model = linear(np.ones((2, 3), np.float32))
    branch = helper.make_graph(
        [helper.make_node("Identity", ["flat"], ["o"])], "b", [], [helper.make_tensor_value_info("o", 1, None)]
    )
    model.graph.node.append(helper.make_node("If", ["flat"], ["i"], then_branch=branch, else_branch=branch))
    with pytest.raises(WorkError, match="control flow"):
        expanding(model)
    model = linear(np.ones((2, 3), np.float32))
    model.functions.add().name = "f"
    with pytest.raises(WorkError, match="functions"):
        expanding(model)


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "largest"), [(0.01, 320_000), (0.001, 85_000)])
def test_size_of_a_resnet18(nets, keep: float, largest: int) -> None:
    from rprune.models.registry import Architecture, build

    torch.manual_seed(0)
    model = build(Architecture("cifar-resnet18", 10, (3, 32, 32))).eval()
    weights = list(prunable(model).values())
    sizes = np.array([weight.numel() for weight in weights])
    shares = sizes**0.25 * np.array([4, *[1] * (len(sizes) - 2), 4])  # as HARP leaves: size**-0.75, ends more
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(sizes, middle * shares).sum() < keep * sizes.sum() else (low, middle)
    for weight, kept in zip(weights, np.minimum(sizes, low * shares).round().astype(int), strict=True):
        weight.data.normal_(0, 0.4 / max(1.0, kept / len(weight)) ** 0.5)
        mask = torch.zeros(weight.numel())
        mask[weight.detach().abs().flatten().topk(kept).indices] = 1
        weight.data *= mask.view_as(weight)
    compact = expanding(qdq_model(nets.quantised(model, torch.rand(8, 3, 32, 32), (3, 32, 32))[2], (3, 32, 32), 10))
    assert compact.ByteSize() <= largest
