from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rprune.errors import InputError
from rprune.export import guard as guard_module
from rprune.export.compact_onnx import expanding
from rprune.export.constants import Constants
from rprune.export.guard import guard
from rprune.export.session import OnnxClassifier, load_onnx, stored_weights, weight_counts
from rprune.export.twin import onnx_twin

READERS = {"load_onnx": load_onnx, "stored_weights": stored_weights, "onnx_twin": onnx_twin, "session": OnnxClassifier}


def node(kind: str, inputs: str = "", output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=f"{kind} of {output}", **attributes)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def network(
    *nodes: onnx.NodeProto,
    shape: tuple[Any, ...] = ("batch", 2, 4, 4),
    opset: int = 18,
    rank: int = 4,
    **constants: Any,
) -> onnx.ModelProto:
    """Image x to y."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), "g", [given], [out], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def refusal(model: onnx.ModelProto) -> str:
    with pytest.raises(InputError) as caught:
        guard(model, Path("m.onnx"))
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("m.onnx: ")
    return caught.value.message


def branches(*nodes: onnx.NodeProto, **constants: Any) -> dict[str, onnx.GraphProto]:
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    out = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    return {f"{side}_branch": helper.make_graph(nodes, side, [], out, tensors) for side in ("then", "else")}


YES = np.array(True)
BIG, FAR = numbers(1 << 30), numbers(1 << 40)
BOMBS: dict[str, onnx.ModelProto] = {
    "2^30": network(node("ConstantOfShape", "n", "c"), node("ReduceMax", "c", "d"), node("Mul", "x d"), n=BIG),
    "2^40": network(node("ConstantOfShape", "n", "c"), node("ReduceMax", "c", "d"), node("Mul", "x d"), n=FAR),
    "2^40 in a Constant": network(
        node("Constant", "", "n", value=numpy_helper.from_array(FAR)), node("ConstantOfShape", "n")
    ),
    "2^64, which overflows": network(node("ConstantOfShape", "n"), n=numbers(1 << 32, 1 << 32)),
    "many halves": network(*[node("ConstantOfShape", "n", f"c{k}") for k in range(3)], n=numbers(1 << 28)),
    "from arithmetic": network(
        node("Mul", "n n", "m"), node("Cast", "m", "f", to=1), node("Sqrt", "f", "s"), node("Cast", "s", "i", to=7),
        node("Concat", "i i", "j", axis=0), node("ConstantOfShape", "j"), n=numbers(1 << 16),
    ),
    "from the shape of the image": network(
        node("Shape", "x", "s"), node("Mul", "s n", "t"), node("ConstantOfShape", "t"), n=numbers(1 << 10),
    ),
    "from pixels": network(
        node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "i", to=7), node("Reshape", "i one", "j"),
        node("ConstantOfShape", "j"), one=numbers(1),
    ),
    "from numbers that are not computed": network(
        node("Exp", "e", "f"), node("Cast", "f", "i", to=7), node("ConstantOfShape", "i"), e=np.float32([30]),
    ),
    "from a random number": network(
        node("RandomUniform", "", "f", shape=[1], low=1e9, high=2e9), node("Cast", "f", "i", to=7),
        node("ConstantOfShape", "i"),
    ),
    "Expand": network(node("Expand", "a n"), a=np.float32([[1]]), n=numbers(1 << 20, 1 << 20)),
    "Expand of the image": network(node("Expand", "x n"), n=numbers(1 << 26, 1, 1, 1)),
    "Tile": network(node("Tile", "x n"), n=numbers(1, 1 << 20, 1 << 20, 1)),
    "Range": network(node("Range", "a b c"), a=np.int64(0), b=np.int64(1 << 40), c=np.int64(1)),
    "Range of floats": network(node("Range", "a b c"), a=np.float32(0), b=np.float32(1), c=np.float32(1e-12)),
    "Resize": network(node("Resize", "x r s"), r=np.float32([]), s=np.float32([1, 1, 1e5, 1e5])),
    "Resize to a size": network(node("Resize", "x r r n"), r=np.float32([]), n=numbers(1, 2, 1 << 20, 1 << 20)),
    "Upsample": network(node("Upsample", "x s"), s=np.float32([1, 1, 1e5, 1e5]), opset=9),
    "Pad": network(node("Pad", "x n"), n=numbers(0, 0, 0, 0, 0, 0, 1 << 40, 0)),
    "pads of a pool": network(node("MaxPool", "x", kernel_shape=[1 << 40, 1], pads=[1 << 40, 0, 1 << 40, 0])),
    "RandomNormal": network(node("RandomNormal", "", shape=[1 << 20, 1 << 20])),
    "EyeLike of a huge one": network(node("Expand", "a n", "b"), node("EyeLike", "b"), a=np.float32([[1]]), n=FAR),
    "OneHot": network(node("OneHot", "i n v"), i=numbers(*range(4)), n=np.int64(1 << 40), v=np.float32([0, 1])),
    "HannWindow": network(node("HannWindow", "n"), n=np.int64(1 << 40)),
    "an outer product": network(node("MatMul", "a b"), a=np.ones((1 << 15, 1), "f"), b=np.ones((1, 1 << 15), "f")),
    "a sum that broadcasts": network(node("Add", "a b"), a=np.ones((1 << 15, 1), "f"), b=np.ones((1, 1 << 15), "f")),
    "the image itself": network(node("Relu", "x"), shape=(1 << 20, 1, 1 << 20, 1)),
    "a branch": network(
        node("If", "yes", **branches(node("ConstantOfShape", "n", "out"), n=FAR)), yes=YES,
    ),
    "a branch in a branch": network(
        node("If", "yes", **branches(node("If", "yes", "out", **branches(node("ConstantOfShape", "n", "out"))))),
        yes=YES, n=FAR,
    ),
    "Range of com.microsoft": network(
        helper.make_node("Range", ["a", "b", "c"], ["y"], name="r", domain="com.microsoft"),
        a=np.int64(0), b=np.int64(1 << 40), c=np.int64(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_small_files_that_ask_for_much_are_refused(case: str) -> None:
    found = refusal(BOMBS[case])
    wanted = ("too large", "is not known before it runs", "negative")
    assert any(reason in found for reason in wanted), found
    assert "node " in found or case == "the image itself"


def loop() -> onnx.NodeProto:
    body = helper.make_graph(
        [node("ConstantOfShape", "n", "out"), node("Identity", "go", "more")],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", 9, [])],
        [helper.make_tensor_value_info("more", 9, []), helper.make_tensor_value_info("out", 1, None)],
    )
    return helper.make_node("Loop", ["times", "yes"], ["y"], name="loop", body=body)


def test_the_body_of_a_loop_is_walked() -> None:
    guard(network(loop(), n=numbers(3), times=np.int64(2), yes=YES), Path("m.onnx"))
    assert "too large" in refusal(network(loop(), n=FAR, times=np.int64(2), yes=YES))


@pytest.mark.parametrize("limit", [512 << 20])
def test_refusal_takes_little_memory_and_runs_nothing(tmp_path: Path, limit: int) -> None:
    names = ["2^30", "2^40", "Expand", "from arithmetic", "an outer product", "a branch", "Resize"]
    for place, name in enumerate(names):
        onnx.save(BOMBS[name], tmp_path / f"{place}.onnx")
    assert (tmp_path / "0.onnx").stat().st_size < 300
    code = f"""
import re, resource, sys
from pathlib import Path
import onnx.reference, onnxruntime
from rprune.errors import InputError
from rprune.export.session import OnnxClassifier, load_onnx, stored_weights
from rprune.export.twin import onnx_twin
now = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + {limit}, now + {limit}))
for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
    for read in (load_onnx, stored_weights, onnx_twin, OnnxClassifier):
        try:
            read(path)
        except InputError as error:
            print(str(error))
"""
    found = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert len(found.stdout.splitlines()) == 4 * len(names), found.stdout + found.stderr
    assert "MemoryError" not in found.stdout
    assert "bad_alloc" not in found.stdout


# -- what lies elsewhere, or does not fit


def external(tensor: TensorProto, location: str) -> TensorProto:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return tensor


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "beside.bin", "/dev/zero"])
@pytest.mark.parametrize("place", ["initializer", "constant", "branch", "sparse"])
def test_data_in_other_files_is_refused(tmp_path: Path, location: str, place: str) -> None:
    (tmp_path / "beside.bin").write_bytes(bytes(64))
    tensor = external(numpy_helper.from_array(np.float32([1, 2]), "t"), location)
    if place == "initializer":
        model = network(node("Relu", "x"))
        model.graph.initializer.append(tensor)
    elif place == "constant":
        model = network(node("Constant", "", "t", value=tensor), node("Relu", "x"))
    elif place == "branch":
        model = network(node("If", "yes", **branches(node("Constant", "", "out", value=tensor))), yes=YES)
    else:
        model = network(node("Relu", "x"))
        sparse = model.graph.sparse_initializer.add(dims=[4])
        sparse.values.CopyFrom(tensor)
        sparse.indices.CopyFrom(numpy_helper.from_array(numbers(0, 1)))
    assert "another file" in refusal(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    for read in READERS.values():
        with pytest.raises(InputError):
            read(tmp_path / "m.onnx")


def damaged(**fields: Any) -> onnx.ModelProto:
    model = network(node("Mul", "x t"), t=np.float32([[1, 2], [3, 4]]))
    for name, value in fields.items():
        model.graph.initializer[0].ClearField(name)
        if value == b"":
            continue
        if isinstance(value, list):
            getattr(model.graph.initializer[0], name).extend(value)
        else:
            setattr(model.graph.initializer[0], name, value)
    return model


TENSORS = {
    "more dimensions than data": (damaged(dims=[2, 3]), "it holds 16"),
    "less": (damaged(dims=[2]), "it holds 16"),
    "none": (damaged(dims=[1 << 20, 1 << 8], raw_data=b""), "it holds 0"),
    "product that overflows to 4": (damaged(dims=[1 << 32, 1 << 32]), "larger than 2 GiB"),
    "negative": (damaged(dims=[-2, -2]), "negative"),
    "too large": (damaged(dims=[1 << 30]), "larger than 2 GiB"),
    "other type": (damaged(data_type=TensorProto.INT64), "it holds 16"),
    "numbers in the field of another type": (damaged(raw_data=b"", int64_data=[1] * 4), "it holds 0"),
    "unknown type": (damaged(data_type=99), "type 99"),
    "odd bytes": (damaged(raw_data=bytes(15)), "it holds 15"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_hold_what_their_dimensions_say(case: str) -> None:
    model, reason = TENSORS[case]
    found = refusal(model)
    assert reason in found
    assert "'t'" in found


def test_sparse_tensors_are_dense_in_memory() -> None:
    for dims, right in (([1 << 10, 1 << 10], True), ([1 << 20, 1 << 20], False), ([3037000499, 3037000501], False)):
        model = network(node("Relu", "x"))
        sparse = model.graph.sparse_initializer.add(dims=dims)
        sparse.values.CopyFrom(numpy_helper.from_array(np.float32([1]), "s"))
        sparse.indices.CopyFrom(numpy_helper.from_array(numbers(0)))
        if right:
            guard(model, Path("m.onnx"))
        else:
            assert "too large" in refusal(model)


def test_functions_and_unknown_domains_are_refused() -> None:
    model = network(node("Relu", "x"))
    model.functions.add().name = "f"
    assert "functions" in refusal(model)
    model = network(helper.make_node("Relu", ["x"], ["y"], name="mine", domain="com.example"))
    assert "'com.example'" in refusal(model)
    assert "'mine'" in refusal(model)


def test_nodes_out_of_order_cycles_and_second_results_are_refused() -> None:
    assert "'a'" in refusal(network(node("Relu", "a"), node("Relu", "x", "a")))
    assert "'y'" in refusal(network(node("Add", "x y")))
    assert "'b'" in refusal(network(node("Relu", "b", "a"), node("Relu", "a", "b"), node("Relu", "x")))
    assert "made before" in refusal(network(node("ConstantOfShape", "n", "n"), n=numbers(3)))
    assert "made before" in refusal(network(node("Relu", "x"), node("Relu", "x")))


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protobuf message: its writers refuse what its readers refuse."""
    size, length = len(content), b""
    while size > 127:
        size, length = size >> 7, length + bytes([size & 127 | 128])
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def test_names_are_text(tmp_path: Path) -> None:
    whole = network(node("Relu", "x", "middle"), node("Relu", "middle")).SerializeToString()
    for name in (b"batch", b"middle", b"Relu"):
        (tmp_path / "m.onnx").write_bytes(whole.replace(name, b"\xff" * len(name)))
        for read in READERS.values():
            with pytest.raises(InputError, match="not UTF-8"):
                read(tmp_path / "m.onnx")


@pytest.mark.parametrize("depth", [40, 2000])
def test_graphs_deep_in_each_other_are_refused(tmp_path: Path, depth: int) -> None:
    graph = b""
    for _ in range(depth):  # graph > node > attribute > graph
        graph = field(1, field(5, field(6, graph)))
    (tmp_path / "m.onnx").write_bytes(network(node("Relu", "x")).SerializeToString() + field(7, graph))
    for read in READERS.values():
        with pytest.raises(InputError) as caught:
            read(tmp_path / "m.onnx")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_files_beyond_2_gib_are_not_read(tmp_path: Path, name: str) -> None:
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate((1 << 31) + 1)  # a hole: it takes no disk
    with pytest.raises(InputError, match="2 GiB"):
        READERS[name](tmp_path / "m.onnx")


# -- what still loads

H, W = "height", "width"
FINE: dict[str, onnx.ModelProto] = {
    "shapes by arithmetic": network(
        node("Shape", "x", "s"), node("Gather", "s zero", "b"), node("Unsqueeze", "b axes", "b1"),
        node("Concat", "b1 rest", "t", axis=0), node("Reshape", "x t"), zero=np.int64(0), axes=numbers(0),
        rest=numbers(-1),
    ),
    "an expanded class token": network(
        node("Shape", "x", "s"), node("Gather", "s first", "b"), node("Concat", "b rest", "t", axis=0),
        node("Expand", "token t"), first=numbers(0), rest=numbers(2, 3), token=np.ones((1, 1, 3), "f"),
    ),
    "open height and width": network(
        node("Shape", "x", "s"), node("Mul", "s two", "t"), node("Resize", "x none none t"), shape=("n", 3, H, W),
        two=numbers(1, 1, 2, 2), none=np.float32([]),
    ),
    "zeros of open size": network(
        node("Shape", "x", "s"), node("ConstantOfShape", "s", "z"), node("Add", "x z"), shape=("n", 3, H, W),
    ),
    "a constant of some size": network(node("ConstantOfShape", "n"), n=numbers(1 << 10, 1 << 10)),
    "a branch": network(node("If", "yes", **branches(node("Relu", "x", "out"))), yes=YES),
    "operators of com.microsoft": network(
        helper.make_node("Gelu", ["x"], ["g"], domain="com.microsoft"),
        helper.make_node("Unheard", ["g"], ["y"], domain="com.microsoft"),
    ),
    "int4 and other types": network(
        node("Relu", "x"), a=numpy_helper.to_array(helper.make_tensor("a", TensorProto.INT4, [3], [1, 2, 3])),
        b=np.float16([1, 2]), c=YES, d=np.float64(1), e=np.complex64([1j]),
    ),
    "text": network(node("Relu", "x"), a=np.array(["a", "b"], object)),
    "numbers in fields of their type": network(node("Relu", "x")),
    "a batch of one": network(node("Relu", "x"), shape=(1, 3, 8, 8)),
}  # fmt: skip
for _kind, _count in ((1, 4), (3, 4), (6, 4), (7, 4), (9, 4), (10, 4), (11, 4), (13, 4), (14, 4), (16, 4), (22, 3)):
    _values: list[Any] = [1] * _count
    FINE["numbers in fields of their type"].graph.initializer.append(
        helper.make_tensor(f"t{_kind}", _kind, [_count], _values)
    )


@pytest.mark.parametrize("case", FINE)
def test_what_exporters_write_is_let_through(case: str) -> None:
    guard(FINE[case], Path("m.onnx"))


def test_large_weights_are_not_computed(monkeypatch) -> None:
    """The size of constants is that of the tensors, views aside: a VGG16 with 138 million weights passes."""
    expanded = [
        node("ConstantOfShape", "n", "z"), node("ScatterElements", "z i v", "w"), node("Reshape", "w sizes", "r"),
        node("DequantizeLinear", "r s", "d"), node("MatMul", "x d"),
    ]  # fmt: skip
    constants = {"n": numbers(138 << 20), "i": numbers(5), "v": np.int8([1]), "sizes": numbers(4, -1)}
    model = network(*expanded, s=np.float32(1), **constants)
    zero = numpy_helper.from_array(np.zeros(1, np.int8))
    model.graph.node[0].attribute.append(helper.make_attribute("value", zero))
    guard(model, Path("m.onnx"))
    monkeypatch.setattr(guard_module, "LARGEST", 400 << 20)
    assert "constants of the file" in refusal(model)


@pytest.mark.slow
def test_exports_of_torchvision_pass(tmp_path: Path) -> None:
    import torchvision

    from rprune.export.onnx import float_model

    model = torchvision.models.mobilenet_v3_small(weights=None, num_classes=10)
    onnx.save(float_model(model.eval(), (3, 32, 32)), tmp_path / "m.onnx")
    assert OnnxClassifier(tmp_path / "m.onnx").input_shape == (3, 32, 32)
    assert weight_counts(tmp_path / "m.onnx")


# -- damaged compact files


def compact(weight: np.ndarray | None = None) -> onnx.ModelProto:
    """A compact file with one expanded weight; initializers by kind are found with ``part``."""
    if weight is None:
        weight = np.zeros((4, 600), np.float32)
        weight.flat[[0, 5, 700, 701, 1500, 2399]] = [1, -2, 3, -4, 5, -6]
    model = network(
        node("Flatten", "x", "f"), node("Gemm", "f w", transB=1), shape=("batch", 6, 10, 10), rank=2, w=weight
    )  # fmt: skip
    return expanding(model)


def part(model: onnx.ModelProto, kind: str, place: int) -> TensorProto:
    """The initializer that is an input of the one node of a kind."""
    (found,) = [n for n in model.graph.node if n.op_type == kind]
    (tensor,) = [t for t in model.graph.initializer if t.name == found.input[place]]
    return tensor


def put(tensor: TensorProto, array: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def with_places(*places: int) -> onnx.ModelProto:
    """Places written out, as no encoder would: instead of the sum of gaps."""
    model = compact()
    scatter = next(n for n in model.graph.node if n.op_type == "ScatterElements")
    scatter.input[1] = "places"
    model.graph.initializer.append(numpy_helper.from_array(numbers(*places), "places"))
    return model


def change(kind: str, place: int, array: Any) -> onnx.ModelProto:
    model = compact()
    put(part(model, kind, place), np.asarray(array))
    return model


GAPS = numpy_helper.to_array(part(compact(), "Cast", 0))
DAMAGED = {
    "negative place": with_places(*range(-1, 5)),
    "place twice": with_places(0, 5, 5, 701, 1500, 2399),
    "places that fall": with_places(0, 5, 701, 700, 1500, 2399),
    "place outside": with_places(0, 5, 700, 701, 1500, 2400),
    "gaps that pass the end": change("Cast", 0, GAPS + GAPS.dtype.type(1)),
    "less gaps than values": change("Cast", 0, GAPS[:-1]),
    "more gaps than values": change("Cast", 0, np.append(GAPS, GAPS.dtype.type(0))),
    "steps of minus one": change("Add", 1, np.int64(-1)),
    "another shape": change("Reshape", 1, numbers(4, 599)),
    "a shape of open size": change("Reshape", 1, numbers(4, -1)),
    "a smaller ground": change("ConstantOfShape", 0, numbers(2399)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_expansions_are_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "m.onnx").write_bytes(DAMAGED[case].SerializeToString())
    with pytest.raises(InputError) as caught:
        stored_weights(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "m.onnx") in str(caught.value)
    if case != "a shape of open size":  # which a runtime computes all the same
        with pytest.raises(InputError):
            onnx_twin(tmp_path / "m.onnx")


def test_zeros_alone_are_no_stored_weight(tmp_path: Path) -> None:
    model = compact()
    by_kind = {entry.op_type: entry for entry in model.graph.node}
    by_kind["Reshape"].input[0] = by_kind["ConstantOfShape"].output[0]
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert stored_weights(tmp_path / "m.onnx") == {}


def test_an_expansion_by_many_steps_is_refused(tmp_path: Path) -> None:
    model = compact()
    place = next(k for k, n in enumerate(model.graph.node) if n.op_type == "ScatterElements")
    source = model.graph.node[place].input[1]
    steps = []
    for step in range(10_000):
        steps.append(helper.make_node("Add", [source, "none"], [f"step{step}"]))
        source = f"step{step}"
    model.graph.initializer.append(numpy_helper.from_array(np.int64(0), "none"))
    model.graph.node[place].input[1] = source
    nodes = [*model.graph.node[:place], *steps, *model.graph.node[place:]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="too many steps"):
        stored_weights(tmp_path / "m.onnx")


# -- chance

WHOLE = compact().SerializeToString()


def expanded_by_the_runtime(path: Path) -> dict[str, np.ndarray]:
    """What ONNX Runtime makes of the weights: they are made outputs of the file."""
    model = onnx.load(path)
    values = Constants(model.graph).weights()
    made = {name: value for name, value in values.items() if name != value}
    if not made:
        return {}
    needed, nodes = set(made.values()), []
    for entry in reversed(model.graph.node):
        if not needed.isdisjoint(entry.output):
            nodes.insert(0, entry)
            needed.update(entry.input)
    del model.graph.output[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(helper.make_empty_tensor_value_info(value) for value in made.values())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    image = np.zeros([n if isinstance(n, int) else 1 for n in given.shape], np.float32)
    return dict(zip(made, session.run(list(made.values()), {given.name: image}), strict=True))


def examine(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    answers: dict[str, Any] = {}
    errors: list[InputError] = []
    for name, read in READERS.items():
        try:
            answers[name] = read(path)
        except InputError as error:
            errors.append(error)
    assert all("\n" not in error.message and str(path) in error.message for error in errors)
    if "stored_weights" in answers and "session" in answers:
        for name, wanted in expanded_by_the_runtime(path).items():
            assert np.array_equal(answers["stored_weights"][name], wanted, equal_nan=True)


@settings(max_examples=150, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_end_in_an_error_or_in_what_the_runtime_reads(tmp_path_factory, flips) -> None:
    data = bytearray(WHOLE)
    for place, change in flips:
        data[place] ^= change
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard_module, "LARGEST", 1 << 20)
        examine(tmp_path_factory.mktemp("flip") / "m.onnx", bytes(data))


@settings(max_examples=40, deadline=None)
@given(end=st.integers(0, len(WHOLE) - 1), extra=st.binary(max_size=8))
def test_truncated_files_end_in_an_error_or_in_what_the_runtime_reads(tmp_path_factory, end: int, extra: bytes) -> None:
    examine(tmp_path_factory.mktemp("cut") / "m.onnx", WHOLE[:end] + extra)


def test_the_whole_file_is_read_by_all(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(WHOLE)
    for read in READERS.values():
        read(tmp_path / "m.onnx")
    (found,) = expanded_by_the_runtime(tmp_path / "m.onnx").values()
    assert np.array_equal(found, stored_weights(tmp_path / "m.onnx")["w"])
    assert np.count_nonzero(found) == 6
