from __future__ import annotations

import json
import re

import pytest

from rprune.files import readable_json
from rprune.reports.bom import bom


def model(report):
    return bom(report)["components"][0]


def metrics(report):
    return model(report)["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]


def properties(report):
    return {entry["name"]: entry["value"] for entry in model(report)["properties"]}


def cases(sample, hostile):
    yield sample()
    yield sample(None, weak=True, complete=False)
    yield sample(None, claims=[], lineage=[], limitations=[], model={})
    for evil in (hostile.EVIL, hostile.BROKEN, ""):
        yield hostile.hostile(sample("failed"), evil)


def test_official_schema_of_1_6_takes_it(sample, hostile):
    pytest.importorskip("cyclonedx")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(readable_json(bom(sample()) | {"bomFormat": "x"})) is not None
    for report in cases(sample, hostile):
        assert validator.validate_str(readable_json(bom(report))) is None


def test_model_is_its_main_file(sample):
    report = sample()
    [main] = [subject for subject in report.subjects if subject.role == "onnx-int8"]
    assert model(report)["type"] == "machine-learning-model"
    assert model(report)["hashes"] == [{"alg": "SHA-256", "content": main.sha256}]


def test_every_file_and_data_set_is_a_component_that_the_model_depends_on(sample):
    report = sample()
    table = bom(report)
    files = {c["name"]: c["hashes"][0]["content"] for c in table["components"] if c["type"] == "file"}
    assert files == {subject.name: subject.sha256 for subject in report.subjects}
    refs = [component["bom-ref"] for component in table["components"]]
    assert len(set(refs)) == len(refs)
    assert table["dependencies"] == [{"ref": "model", "dependsOn": refs[1:]}]
    named = [entry["ref"] for entry in model(report)["modelCard"]["modelParameters"]["datasets"]]
    assert named == ["data:train", "data:validation", "data:test"]
    assert set(named) < set(refs)


def test_metrics_are_text_with_their_interval(sample):
    report = sample()
    for metric, claim in zip(metrics(report), report.claims, strict=True):
        assert float(metric["value"]) == claim.value
        assert float(metric["confidenceInterval"]["lowerBound"]) == claim.interval.lower
        assert float(metric["confidenceInterval"]["upperBound"]) == claim.interval.upper
        assert f"n = {claim.n:,}" in metric["slice"]


def test_number_of_a_weak_attack_is_another_metric(sample):
    report = sample(None, weak=True, complete=False)
    assert [m["type"] for m in metrics(report)].count("robust_accuracy UNRELIABLE INCOMPLETE") == 1
    said = model(report)["modelCard"]["considerations"]["technicalLimitations"]
    assert any("robust_accuracy@onnx-int8: UNRELIABLE: R4" in line for line in said)
    assert properties(report)["rprune:claim:robust_accuracy@onnx-int8:health"] == "failed"
    assert properties(report)["rprune:claim:robust_accuracy@onnx-int8:complete"] == "false"
    assert properties(report)["rprune:claim:robust_accuracy@onnx:health"] == "ok"


def test_properties_say_threat_suite_and_gate(sample):
    found = properties(sample("failed"))
    assert found["rprune:threat:norm"] == "linf"
    assert found["rprune:threat:eps"] == "8/255"
    assert found["rprune:gate"] == "failed"
    assert found["rprune:claim:robust_accuracy@onnx-int8:suite"] == "aa-quant"
    assert "rprune:gate" not in properties(sample(None))
    unexamined = properties(sample(None, attacked=False))
    assert unexamined["rprune:claim:robust_accuracy@onnx:health"] == "not examined"


def test_serial_number_and_time_are_those_of_the_report(sample):
    one, other = bom(sample()), bom(sample("failed"))
    assert one == bom(sample())
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", one["serialNumber"])
    assert one["serialNumber"] != other["serialNumber"]
    assert one["metadata"]["timestamp"] == "2026-03-02T08:15:00+00:00"
    assert "timestamp" not in bom(sample(created="yesterday"))["metadata"]


def test_what_is_not_known_is_left_out(sample):
    text = json.dumps(bom(sample(None, model={})))
    for field in ("modelArchitecture", "inputs", "licenses", "null"):
        assert field not in text
