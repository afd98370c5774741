from __future__ import annotations

import pytest

from rprune.reports.robustbench import robustbench


def with_suite(report, suite):
    claims = [c.model_copy(update={"method": suite}) if c.metric == "robust_accuracy" else c for c in report.claims]
    return report.model_copy(update={"claims": claims})


def test_fields_are_theirs(sample):
    table = robustbench(sample())
    assert table["clean_acc"] == "77.20"
    assert table["reported"] == "43.90"
    assert (table["eps"], table["threat_model"]) == ("8/255", "Linf")
    assert table["architecture"] == "cifar-resnet18"
    assert table["unreliable"] is False
    assert "1,000 of 10,000 test images" in table["footnote"]


def test_only_autoattack_is_called_autoattack(sample):
    assert "autoattack_acc" not in robustbench(sample())
    assert robustbench(with_suite(sample(), "aa-standard"))["autoattack_acc"] == "43.90"


@pytest.mark.parametrize(
    ("made", "word"),
    [({"weak": True}, "UNRELIABLE"), ({"complete": False}, "INCOMPLETE"), ({"attacked": False}, "UNEXAMINED")],
)
def test_doubtful_numbers_are_unreliable_and_say_why(sample, made, word):
    table = robustbench(sample(None, **made))
    assert table["unreliable"] is True
    assert word in table["footnote"]


def test_what_is_not_known_is_null_or_not_there(sample):
    table = robustbench(sample(None, claims=[], model={}))
    assert [table[name] for name in ("link", "authors", "venue", "architecture", "additional_data")] == [None] * 5
    assert not {"clean_acc", "reported", "autoattack_acc", "unreliable", "footnote"} & set(table)


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ({"data": {"pseudo": "npz:more.npz"}, "stage": []}, True),
        ({"data": {"pseudo": None}, "stage": [{"kind": "train"}]}, False),
        ({"data": {"pseudo": None}, "stage": [{"kind": "finetune", "teacher": "big.pt"}]}, None),
        ({"data": {"pseudo": None}, "stage": [], "checkpoint": "model.pt"}, None),
        ({"command": "export"}, None),
    ],
)
def test_additional_data_is_said_only_where_the_recipe_tells(sample, recipe, wanted):
    assert robustbench(sample(recipe=recipe))["additional_data"] is wanted


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digits", "digits"),
        ("cifar10:/data/c10", "cifar10"),
        ("npz:a/b.npz", "npz:b.npz"),
        ("imagefolder:x/y/?size=8", "imagefolder:y"),
    ],
)
def test_data_set_has_their_name_and_no_folder(sample, source, name):
    report = sample()
    assert robustbench(sample(data=report.data.model_copy(update={"source": source})))["dataset"] == name
