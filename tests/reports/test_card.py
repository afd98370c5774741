from __future__ import annotations

import pytest

from rprune.reports.card import metadata, render_card, yaml


def front(card):
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    return head, body


def test_front_matter_is_the_metadata(sample):
    reader = pytest.importorskip("yaml")
    report = sample()
    head, body = front(render_card(report))
    assert reader.safe_load(head) == metadata(report)
    assert body.startswith("\n# resnet18-cifar10-harp99-int8\n")


def test_hub_reads_one_result_a_claim(sample):
    report = sample()
    [result] = metadata(report)["model-index"][0]["results"]
    assert result["dataset"]["revision"] == report.data.sha256
    assert [metric["value"] for metric in result["metrics"]] == [claim.value for claim in report.claims]
    assert not any(metric["verified"] for metric in result["metrics"])
    assert all({"type", "name", "value"} <= set(metric) for metric in result["metrics"])


def test_nothing_is_said_that_only_the_author_knows(sample):
    text = render_card(sample()).lower()
    for word in ("license", "licence", "intended use", "[more information needed]", "todo"):
        assert word not in text


def test_tags_are_what_the_bundle_holds(sample):
    assert metadata(sample())["tags"] == ["adversarial-robustness", "pruning", "int8", "onnx"]
    report = sample(None)
    bare = report.model_copy(
        update={
            "subjects": [report.subjects[0]],
            "claims": [],
            "sparsity": report.sparsity.model_copy(update={"overall": 0.0}),
        }
    )
    assert metadata(bare) == {"pipeline_tag": "image-classification", "tags": []}


def test_weak_and_unfinished_attacks_are_marked_in_both_parts(sample):
    report = sample(None, weak=True, complete=False)
    names = [metric["name"] for metric in metadata(report)["model-index"][0]["results"][0]["metrics"]]
    assert sum(name.endswith("UNRELIABLE, INCOMPLETE") for name in names) == 1
    assert "43.9 % UNRELIABLE INCOMPLETE" in front(render_card(report))[1]


@pytest.mark.parametrize("evil", ["EVIL", "BROKEN"])
def test_no_text_of_the_report_becomes_a_key(sample, hostile, evil):
    reader = pytest.importorskip("yaml")
    report = hostile.hostile(sample(), getattr(hostile, evil))
    head, _ = front(render_card(report))
    found = reader.safe_load(head)
    assert found == metadata(report)
    assert set(found) == set(metadata(sample()))


@pytest.mark.parametrize(
    "value",
    ["", "yes", "null", "1.0", "a: b", "# c", "- d", "'", '"', "\\", "\n---\n", "\u2028\u2029\x85\x7f\x00\ufeff\ufffe",
     "é猫🐈", "\u202e", 0.0, 1.0, 1e-05, 1.5e-07, 123456, -1, True, False, None],
)  # fmt: skip
def test_every_scalar_is_read_back(value):
    reader = pytest.importorskip("yaml")
    assert reader.safe_load("\n".join(yaml({"a": [{"b": value, "c": [value, value]}]}))) == {
        "a": [{"b": value, "c": [value, value]}]
    }


def test_data_set_is_named_without_the_folders_of_its_owner(sample):
    data = sample().data.model_copy(update={"source": "imagefolder:/home/alice/flowers?size=32"})
    text = render_card(sample(data=data))
    assert "alice" not in text
    assert "imagefolder:flowers" in text
