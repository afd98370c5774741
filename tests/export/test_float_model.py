from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rprune.errors import InputError, RpruneError, WorkError
from rprune.export.onnx import float_model, stamp
from rprune.export.session import OnnxClassifier, load_onnx, weight_counts
from rprune.models.prunable import prunable

CASES = ("cnn-small", "lenet normalised", "cifar-resnet18")
KEEP = 0.05


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


@pytest.fixture(scope="module")
def exported(nets, tmp_path_factory):
    """(model, file) by case."""
    done = {}

    def export(case: str) -> tuple[nn.Module, Path]:
        if case not in done:
            model = nets.make(case, KEEP)
            path = tmp_path_factory.mktemp("float") / "model.onnx"
            onnx.save(float_model(model, nets.SHAPE), path)
            done[case] = (model, path)
        return done[case]

    return export


@pytest.mark.parametrize("case", CASES)
def test_float_file_equals_torch(nets, exported, case: str) -> None:
    model, path = exported(case)
    x = torch.cat([nets.digits(20)[0], nets.noise(13)])
    with torch.no_grad():
        wanted = model(x).numpy()
    for size in (1, 7, 33):
        got = OnnxClassifier(path, batch_size=size, threads=1).logits(x.numpy())
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
def test_float_file_names_its_ends(nets, exported, case: str) -> None:
    graph = load_onnx(exported(case)[1]).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["input", "logits"]
    shapes = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)]
    assert [shape[0].dim_param for shape in shapes] == ["batch", "batch"]
    assert [d.dim_value for d in shapes[0][1:]] == list(nets.SHAPE)
    assert [d.dim_value for d in shapes[1][1:]] == [10]


@pytest.mark.parametrize("case", CASES)
def test_float_file_keeps_weight_names_and_zeros(exported, case: str) -> None:
    model, path = exported(case)
    weights = prunable(model)
    wanted = {name: int(w.count_nonzero()) for name, w in weights.items()}
    assert {name: kept for name, (_, kept) in weight_counts(path).items()} == wanted
    stored = {t.name: numpy_helper.to_array(t) for t in load_onnx(path).graph.initializer}
    for name, weight in weights.items():
        assert stored[name].size == weight.numel()
        if stored[name].shape == weight.shape:
            assert np.array_equal(stored[name] == 0, weight.detach().numpy() == 0)


@pytest.mark.parametrize("case", CASES)
def test_float_file_says_nothing_of_this_machine(exported, case: str) -> None:
    _, path = exported(case)
    everything = path.read_bytes()
    for trace in (b"site-packages", b".py", b"/home", b"/tmp", b"/work", b"/usr", b"Traceback", b'File "'):
        assert trace not in everything, trace
    model = load_onnx(path)
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        assert not part.doc_string
        assert not part.metadata_props
    names = [n.name for n in model.graph.node] + [v for n in model.graph.node for v in (*n.input, *n.output)]
    assert not [name for name in names if "/" in name]
    assert all(t.data_location == TensorProto.DEFAULT for t in model.graph.initializer)
    assert len(model.functions) == 0


def test_export_leaves_the_model_as_it_was(nets) -> None:
    model = nets.make("lenet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    float_model(model, nets.SHAPE)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_model_that_torch_cannot_export_is_a_work_error(nets) -> None:
    class Branches(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum().item() > 0 else -x.flatten(1)

    with pytest.raises(WorkError, match="cannot export") as caught:
        float_model(Branches(), nets.SHAPE)
    assert "\n" not in caught.value.message


def test_stamp_replaces_the_metadata(exported) -> None:
    model = load_onnx(exported("cnn-small")[1])
    stamp(model, {"old": "1"})
    stamp(model, {"labels": "0,1", "input": "[0,1]"})
    assert [(e.key, e.value) for e in model.metadata_props] == [("input", "[0,1]"), ("labels", "0,1")]
    onnx.checker.check_model(model, full_check=True)


def identity(path: Path) -> Path:
    """A classifier whose logits are its input."""
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4, 1, 1])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph([helper.make_node("Flatten", ["input"], ["logits"])], "g", [given], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.save(model, path)
    return path


def test_predict_takes_the_first_of_the_largest(tmp_path: Path) -> None:
    rows = np.array([[0, 1, 1, 0], [2, 2, 2, 2], [0, 0, 0, 1], [-1, -2, -1, -3]], np.float32)
    session = OnnxClassifier(identity(tmp_path / "m.onnx"), batch_size=3)
    got = session.predict(rows.reshape(4, 4, 1, 1))
    assert got.tolist() == [1, 0, 3, 0]
    assert got.dtype == np.int64
    assert np.array_equal(session.logits(rows.reshape(4, 4, 1, 1)), rows)
    assert session.input_shape == (4, 1, 1)


@pytest.mark.parametrize("read", [OnnxClassifier, load_onnx, weight_counts])
@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "truncated", "zeros"])
def test_unreadable_files_are_input_errors_of_one_line(tmp_path: Path, exported, read, kind: str) -> None:
    path = tmp_path / "m.onnx"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        whole = exported("cnn-small")[1].read_bytes()
        contents = {"text": b"this is no model\n" * 9, "empty": b"", "truncated": whole[:2000], "zeros": bytes(500)}
        path.write_bytes(contents[kind])
    with pytest.raises(InputError, match=re.escape(str(path))) as caught:
        read(path)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert isinstance(caught.value, RpruneError)
    if kind == "missing":
        assert "not there" in caught.value.message
