"""One network in all its forms: the same integers, the same logits, and files that come back to the byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from rprune.errors import InputError, UsageError, WorkError
from rprune.export.c.engine import CClassifier
from rprune.export.session import OnnxClassifier, stored_weights
from rprune.files import file_digest, write_json
from rprune.pipeline import forms
from rprune.pipeline.artifact import Artifact
from rprune.pipeline.bundle import Source, export
from rprune.pipeline.forms import FORMATS, Deployed, rebuilt, write_models
from rprune.pipeline.quantizing import quantize
from rprune.pipeline.recipe import ExportStage, PruneStage, QuantizeStage
from rprune.pipeline.stages import adopt, compacted, prune
from rprune.pipeline.unpacking import read_packed, unpacked
from rprune.reports.schema import Report, read_report
from rprune.reports.verify import verify

pytestmark = pytest.mark.usefixtures("c_cache")

ALL = tuple(name for name in FORMATS if name not in ("safetensors", "onnx", "onnx-int8"))


@pytest.fixture(scope="module")
def sparse(bench, trained) -> Artifact:
    return prune(bench, trained, PruneStage(method="lwm", sparsity=0.9))


@pytest.fixture(scope="module")
def integers(bench, sparse) -> Artifact:
    return quantize(bench, sparse, QuantizeStage(portable=True))


@pytest.fixture(scope="module")
def few(bench, sparse) -> Artifact:
    return quantize(bench, sparse, QuantizeStage(mode="codebook", bits=3))


def images(bench, count: int = 1000) -> Any:
    """Test images and noise."""
    test = torch.from_numpy(bench.data.test.pixels(0, 300)).float() / 255
    noise = torch.rand(count, *bench.data.shape, generator=torch.Generator().manual_seed(3))
    return torch.cat([test, noise])[:count]


def test_every_form_of_the_integers_gives_the_same_logits(bench, integers, tmp_path: Path) -> None:
    deployed = Deployed.of(integers)
    found = write_models(deployed, ALL, bench, tmp_path)
    x = images(bench)
    with torch.no_grad():
        wanted = deployed.twin(x).numpy()
    for name in ("model.int8.onnx", "model.compact.onnx"):
        assert np.array_equal(OnnxClassifier(tmp_path / name).logits(x.numpy()), wanted)
    assert np.array_equal(CClassifier(tmp_path / "model.c").logits(x.numpy()), wanted)
    network, model = rebuilt(read_packed(tmp_path / "model.packed.safetensors"))
    with torch.no_grad():
        assert np.array_equal(network(x).numpy(), wanted)
    assert model.SerializeToString() == (tmp_path / "model.int8.onnx").read_bytes()
    equal = {f.file: f.bit_equal for f in found if f.source != "float model"}
    assert equal == dict.fromkeys(equal, True)
    assert set(equal) == {"model.int8.onnx", "model.compact.onnx", "model.packed.safetensors", "model.c"}


@pytest.mark.parametrize("kind", ["sparse", "few"])
def test_every_form_of_the_floats_gives_the_same_labels(bench, request, tmp_path: Path, kind: str) -> None:
    artifact = request.getfixturevalue(kind)
    write_models(Deployed.of(artifact), ALL, bench, tmp_path)
    assert not (tmp_path / "model.int8.onnx").exists()
    x = images(bench, 400)
    with torch.no_grad():
        wanted = artifact.model()(x).numpy()
    dense = OnnxClassifier(tmp_path / "model.onnx").logits(x.numpy())
    assert np.array_equal(OnnxClassifier(tmp_path / "model.compact.onnx").logits(x.numpy()), dense)
    for got in (dense, CClassifier(tmp_path / "model.c").logits(x.numpy())):
        assert np.abs(got - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())
    assert rebuilt(read_packed(tmp_path / "model.packed.safetensors"))[1].SerializeToString() == (
        (tmp_path / "model.onnx").read_bytes()
    )


def test_codebook_makes_small_files(bench, sparse, few, tmp_path: Path) -> None:
    for name, artifact in (("floats", sparse), ("few", few)):
        write_models(Deployed.of(artifact), ALL, bench, tmp_path / name)
    packed, compact = (
        [(tmp_path / folder / name).stat().st_size for folder in ("floats", "few")]
        for name in ("model.packed.safetensors", "model.compact.onnx")
    )
    assert packed[1] < 0.5 * packed[0]
    assert compact[1] < 0.9 * compact[0]
    weights = stored_weights(tmp_path / "few" / "model.onnx")
    assert all(len(np.unique(array[array != 0])) <= 7 for array in weights.values())


def test_unpacking_gives_every_file_back(bench, integers, tmp_path: Path) -> None:
    write_models(Deployed.of(integers), ALL, bench, tmp_path / "out")
    packed = tmp_path / "out" / "model.packed.safetensors"
    written = unpacked(packed, tmp_path / "back", ("safetensors", "onnx-int8", "onnx-compact", "c"))
    assert {path.name for path in written} == {
        "model.int8.safetensors", "model.int8.onnx", "model.compact.onnx", "model.c", "model.h",
    }  # fmt: skip
    for path in written:
        if path.name != "model.int8.safetensors":
            assert file_digest(path) == file_digest(tmp_path / "out" / path.name)
    dense = load_file(tmp_path / "back" / "model.int8.safetensors")
    for name, weight in stored_weights(tmp_path / "out" / "model.int8.onnx").items():
        assert np.array_equal(dense[name], weight)
        assert (dense[f"{name}_scale"] > 0).all()
    assert {path.name for path in unpacked(packed, tmp_path / "usual")} == {"model.int8.onnx", "model.int8.safetensors"}
    with pytest.raises(UsageError, match="has no form onnx"):
        unpacked(packed, tmp_path / "none", ("onnx",))


def test_unpacked_floats_are_the_weights(bench, sparse, tmp_path: Path) -> None:
    write_models(Deployed.of(sparse), ("packed",), bench, tmp_path / "out")
    unpacked(tmp_path / "out" / "model.packed.safetensors", tmp_path / "back")
    assert file_digest(tmp_path / "back" / "model.onnx") == file_digest(tmp_path / "out" / "model.onnx")
    weights = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in Deployed.of(sparse).network.state_dict().items():
        assert np.array_equal(weights[name], tensor.numpy())


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"not a packed file" * 100])
def test_files_that_are_not_packed_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.packed.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a sound packed file"):
        read_packed(path)
    with pytest.raises(InputError, match="cannot read"):
        read_packed(tmp_path / "none")


def test_a_file_that_disagrees_is_an_error(bench, integers, tmp_path: Path, monkeypatch) -> None:
    """Each comparison can fail: another network is written in place of the right one."""
    other = Deployed.of(quantize(bench, integers, QuantizeStage(observer="mse")))
    deployed = Deployed.of(integers)
    for name, wrong in (
        ("expanding", lambda _: forms.qdq_model(other.twin, bench.data.shape, 10)),
        ("pack_int8", lambda *_: forms.packing(other.network, other.quantization, deployed.metadata())),
        ("c_source", lambda *_: forms.written(other.twin, bench.data.shape)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(forms, "packing", forms.pack_int8, raising=False)
            patch.setattr(forms, "written", forms.c_source, raising=False)
            patch.setattr(forms, name, wrong)
            with pytest.raises(WorkError, match=r"disagrees|does not give"):
                write_models(deployed, ALL, bench, tmp_path / name)


def test_unknown_and_missing_formats(bench, few, sparse, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown format 'onnx-compct'"):
        write_models(Deployed.of(sparse), ("onnx-compct",), bench, tmp_path)
    with pytest.raises(UsageError, match="no integers"):
        write_models(Deployed.of(few), ("onnx-int8",), bench, tmp_path)


def test_source_is_written_where_no_compiler_is(bench, integers, tmp_path: Path, monkeypatch) -> None:
    def none() -> list[str]:
        raise WorkError("there is no C compiler", "")

    monkeypatch.setattr(forms, "compiler", none)
    found = write_models(Deployed.of(integers), ("c",), bench, tmp_path)
    assert (tmp_path / "model.c").exists()
    assert not any(f.file == "model.c" for f in found)


@pytest.fixture(scope="module")
def dead(bench, trained) -> Artifact:
    """Two channels of the first convolution have lost their weights; their biases are all that is left."""
    state = {name: tensor.clone() for name, tensor in trained.state.items()}
    first = next(name for name, tensor in state.items() if tensor.dim() == 4)
    state[first][:2] = 0
    state[first.replace("weight", "bias")][:2] = torch.tensor([-1.0, 0.5])
    return adopt(state, trained.metadata.arch, "pgd-at", bench, {"file": "dead.pt"})


def test_dead_channels_go_before_every_format(bench, dead, tmp_path: Path) -> None:
    small = compacted(bench, dead)
    assert small.metadata.lineage[-1].stage == "shrink"
    x = images(bench, 300)
    with torch.no_grad():
        torch.testing.assert_close(small.model()(x), dead.model()(x), rtol=1e-4, atol=1e-5)
    assert compacted(bench, small) is small
    made = quantize(bench, dead, QuantizeStage())
    kept = quantize(bench, dead, QuantizeStage(compact=False))
    sizes = [sum(w.numel() for w in Deployed.of(found).quantization.weights.values()) for found in (made, kept)]
    assert sizes[0] < sizes[1]
    source = Source("dead", {})
    stage = ExportStage(suite="fgsm", limit=20, health=False)
    report = export(bench, dead, stage, tmp_path / "small", source)
    whole = export(bench, dead, stage.model_copy(update={"compact": False}), tmp_path / "whole", source)
    assert report.sparsity.total < whole.sparsity.total == report.sparsity.dense_total
    assert report.footprint.dense_parameters == whole.footprint.dense_parameters
    assert report.footprint.dense_macs == whole.footprint.dense_macs > report.footprint.sparse_macs
    assert [check for check in verify(tmp_path / "small").checks if not check.passed] == []


@pytest.fixture(scope="module")
def bundle(bench, integers, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "out"
    stage = ExportStage(suite="fgsm", limit=40, health=False, formats=FORMATS, bench=True)
    export(bench, integers, stage, folder, Source("forms", {}))
    return folder


def test_report_says_what_ships(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    assert {s["role"] for s in report["subjects"]} >= {"onnx-compact", "packed", "c", "c-header"}
    integers, footprint = report["integers"], report["footprint"]
    assert integers["bits"] == 8
    assert integers["saturating_pairs"] == 0
    assert integers["exact"] == (max(integers["largest"].values()) < 2**24)
    assert footprint["kept"] == report["sparsity"]["kept"]
    packed = (bundle / "model.packed.safetensors").stat().st_size
    assert footprint["ratios"]["model.packed.safetensors"] == pytest.approx(footprint["dense_bytes"] / packed)
    assert 0 < footprint["bound"]["mask"] + footprint["bound"]["values"] < packed
    assert 0 < footprint["sparse_macs"] < footprint["dense_macs"]
    rows = {(row["file"], row["batch"]): row for row in report["speed"]}
    assert rows["model.onnx", 1]["ratio"] == 1
    assert rows["model.c", 64]["p50"] > 0
    page = (bundle / "report.html").read_text()
    for text in ("model.packed.safetensors", "Times as fast", "2<sup>24</sup>"):
        assert text in page


@pytest.mark.parametrize(("file", "check"), [("model.compact.onnx", "compact"), ("model.packed.safetensors", "packed")])
def test_verify_finds_a_form_of_other_weights(bench, bundle: Path, integers, tmp_path: Path, file, check) -> None:
    assert verify(bundle).passed
    folder = tmp_path / "bad"
    shutil.copytree(bundle, folder)
    other = quantize(bench, integers, QuantizeStage(observer="mse"))
    state = Deployed.of(other)
    weight = next(iter(state.quantization.weights.values()))
    weight.view(-1)[weight.view(-1).nonzero()[0]] *= -1
    forged = forms.simulated(state.network, state.quantization)
    if check == "compact":
        content = forms.expanding(forms.qdq_model(forged, bench.data.shape, 10)).SerializeToString()
    else:
        content = forms.pack_int8(state.network, state.quantization, {})
    (folder / file).write_bytes(content)
    report = read_report(folder)
    subjects = [
        s if s.name != file else s.model_copy(update={"sha256": file_digest(folder / file), "bytes": len(content)})
        for s in report.subjects
    ]
    sizes = report.size | {file: len(content)}
    ratios = report.footprint.ratios | {file: report.footprint.dense_bytes / len(content)}
    footprint = report.footprint.model_copy(update={"ratios": ratios})
    forged_report = report.model_copy(update={"subjects": subjects, "size": sizes, "footprint": footprint}).sealed()
    write_json(folder / "report.json", forged_report.to_json())
    found = verify(folder, "static")
    assert found.integrity
    assert [c.name for c in found.checks if not c.passed] == [check]


@pytest.mark.parametrize(
    ("field", "value"),
    [("integers.exact", False), ("footprint.density", 0.5), ("footprint.kept", 1), ("footprint.dense_bytes", 4)],
)
def test_verify_recomputes_integers_and_footprint(bundle: Path, tmp_path: Path, field: str, value: Any) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(bundle, folder)
    table = json.loads((folder / "report.json").read_text())
    part, name = field.split(".")
    table[part][name] = value
    write_json(folder / "report.json", Report.model_validate(table).sealed().to_json())
    assert [c.name for c in verify(folder, "static").checks if not c.passed] == [part]
