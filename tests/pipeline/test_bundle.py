"""The export: what stands in the report is what stands in the files."""

from __future__ import annotations

import csv

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from rprune.errors import InputError, WorkError
from rprune.files import digest_of, file_digest
from rprune.pipeline.bundle import Source, export
from rprune.pipeline.certificate import sealed
from rprune.pipeline.certifying import certify
from rprune.pipeline.claims import proved_samples
from rprune.pipeline.finish import tidy
from rprune.pipeline.recipe import CertifyStage, ExportStage
from rprune.pipeline.single import read_certificates
from rprune.reports.gate import policy_of
from rprune.reports.schema import read_report

N = 60


@pytest.fixture(scope="module")
def certificates(bench, quantized):
    stage = CertifyStage(eps="0.005", n=100, limit=N, smoothing_limit=5)
    return sealed(certify(bench, quantized, stage), None)


@pytest.fixture(scope="module")
def made(bench, quantized, certificates, tmp_path_factory):
    """(folder, report) of an export under a policy."""
    folder = tmp_path_factory.mktemp("bundle")
    policy = policy_of({"gate": [{"metric": "sparsity", "value": 0.5}, {"metric": "clean_accuracy", "value": 1}]}, "x")
    report = export(
        bench, quantized, ExportStage(suite="pgd10", limit=N), folder, Source("x", {}, policy), certificates
    )
    return folder, report


@pytest.fixture(scope="module")
def rows(made):
    with (made[0] / "evidence" / "samples.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def initializers(path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def test_report_on_disk_is_the_one_returned(made):
    folder, report = made
    assert read_report(folder) == report
    assert report.id == report.computed_id()


def test_budget_is_met_exactly(made, quantized):
    sparsity = made[1].sparsity
    assert sparsity.kept == sparsity.budget == sparsity.float_nonzero == quantized.metadata.budget
    assert sparsity.kept <= 11124  # weights of dead channels are gone
    assert sparsity.kept == sum(layer.nonzero for layer in sparsity.by_layer)
    assert sparsity.kept == sum(int(mask.sum()) for mask in quantized.masks.values())


def test_integer_zeros_are_the_float_zeros(made, quantized):
    folder, report = made
    wide, small = initializers(folder / "model.onnx"), initializers(folder / "model.int8.onnx")
    for layer in report.sparsity.by_layer:
        assert small[layer.name].dtype == np.int8
        assert np.array_equal(wide[layer.name] == 0, small[layer.name] == 0)
        assert np.array_equal(wide[layer.name] != 0, quantized.masks[layer.name].numpy())
    assert report.sparsity.int8_zeros_equal_float_zeros is True


def test_certified_is_robust_is_clean_sample_by_sample(rows):
    certified = robust = clean = 0
    for row in rows:
        right = row["label"] == row["clean_prediction"]
        unbroken = right and not row["attack"]
        if row["certified"] == "1":
            assert right
        clean, robust, certified = clean + right, robust + unbroken, certified + (row["certified"] == "1")
    assert certified > 0
    assert robust < clean < len(rows)


def test_claims_count_the_evidence(made, rows):
    _, report = made
    clean = sum(row["label"] == row["clean_prediction"] for row in rows)
    broken = sum(bool(row["attack"]) for row in rows)
    assert report.claim("clean_accuracy").correct == clean
    assert report.claim("robust_accuracy").correct == clean - broken
    assert report.claim("certified_accuracy").correct == sum(row["certified"] == "1" for row in rows)
    assert report.evidence.witness_count == broken
    assert {claim.n for claim in report.claims if claim.metric != "smoothed_certified_accuracy"} == {N}


def test_witnesses_belong_to_broken_samples(made, rows, bench):
    witnesses = load_file(made[0] / "evidence" / "adversarial.safetensors")
    kinds = {"index": "uint8", "float_index": "float"}
    for name, kind in kinds.items():
        assert witnesses[name].tolist() == [int(row["index"]) for row in rows if row["witness"] == kind]
    index = np.concatenate([witnesses[name] for name in kinds])
    assert sorted(index.tolist()) == [int(row["index"]) for row in rows if row["attack"]]
    x = np.concatenate([witnesses["x"].astype(np.float32) / np.float32(255), witnesses["float_x"]])
    clean = bench.data.test.pixels(0, N)[index].astype(np.float32) / np.float32(255)
    assert np.abs(x - clean).max() <= bench.threat.eps + 1e-6
    assert x.min() >= 0
    assert x.max() <= 1


def test_subjects_are_the_files(made):
    folder, report = made
    tidy(folder)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {subject.name for subject in report.subjects} == files - {"report.json", "report.html"}
    for subject in report.subjects:
        assert subject.sha256 == file_digest(folder / subject.name)
        assert subject.bytes == (folder / subject.name).stat().st_size


def test_lineage_and_gate(made, quantized):
    _, report = made
    stages = [entry.stage for entry in report.lineage if entry.stage != "shrink"]
    assert stages == ["train", "prune", "quantize", "export"]
    assert report.lineage[-1].parent == quantized.digest
    assert report.gate.result == "failed"
    assert [rule.passed for rule in report.gate.rules] == [True, False]
    assert report.policy_sha256 == report.gate.policy_sha256


def test_float_model_alone(bench, trained, tmp_path):
    report = export(bench, trained, ExportStage(suite="fgsm", limit=20, health=False), tmp_path, Source("x", {}))
    assert report.subject("onnx-int8") is None
    assert report.sparsity.measured_on == "onnx"
    assert {claim.artifact for claim in report.claims} == {"onnx"}
    assert report.gate is None


def test_certificates_of_other_data_are_refused(bench, certificates, quantized, tmp_path):
    import json

    other = certificates | {"data": {"source": "npz:other.npz", "sha256": "0" * 64}}
    (tmp_path / "c.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="changed after"):
        read_certificates(tmp_path / "c.json", quantized, bench)
    other["digest"] = digest_of({key: value for key, value in other.items() if key != "digest"})
    (tmp_path / "c.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="other data"):
        read_certificates(tmp_path / "c.json", quantized, bench)


def test_certificates_of_other_weights_are_refused(bench, certificates, trained, tmp_path):
    import json

    (tmp_path / "c.json").write_text(json.dumps(certificates))
    with pytest.raises(InputError, match="another model"):
        read_certificates(tmp_path / "c.json", trained, bench)


def test_a_broken_sample_that_is_certified_is_a_bug(bench, quantized, certificates, tmp_path):
    from rprune.threat import ThreatModel

    bounds = certificates["bounds"]
    forged = {**certificates, "bounds": {**bounds, "eps": "0.5", "levels": [dict(bounds["levels"][0])]}}
    forged["bounds"]["levels"][0] |= {"eps": "0.5", "proved": [1] * N}
    bench_of_attack = type(bench)(bench.data, bench.section, ThreatModel.of("linf", "0.5"), 0, bench.device)
    with pytest.raises(WorkError, match="certified and broken"):
        export(
            bench_of_attack,
            quantized,
            ExportStage(suite="fgsm", limit=N, health=False),
            tmp_path,
            Source("x", {}),
            forged,
        )
    assert not (tmp_path / "report.json").exists()
    assert proved_samples(bench, {}) is None


def test_weights_off_the_budget_are_not_exported(bench, quantized, tmp_path):
    with pytest.raises(WorkError, match="budget"):
        export(
            bench, quantized.with_metadata(budget=11000), ExportStage(suite="fgsm", limit=5), tmp_path, Source("x", {})
        )
    assert not (tmp_path / "report.json").exists()
