"""A drop is judged sample by sample, on evidence that is what its report says, or not at all."""

from __future__ import annotations

import json

import pytest

from rprune.errors import InputError, IntegrityError, UsageError
from rprune.evaluation.statistics import drop_interval, mcnemar
from rprune.files import file_digest, write_json
from rprune.reports.gate import judge, policy_of, policy_rule, read_policy, rule_of
from rprune.reports.pairs import Pairs, read_source
from rprune.reports.schema import Gate, Threat
from rprune.threat import ThreatModel


@pytest.fixture
def two(write, helper):
    """Clean: 9 lost, 5 gained. Robust: 14 lost, 2 gained. Certified, of the first 50: 3 lost."""
    clean, robust = helper.counts(9, 5, 150), helper.counts(14, 2, 90)
    certified = [True] * 20 + [False] * 30, [True] * 17 + [False] * 33
    return [write(name, clean[i], robust[i], certified[i]) for i, name in enumerate(("main", "branch"))]


def drop(before, after, metric="clean_accuracy", **table):
    policy = policy_of({"gate": [{"metric": metric, "max_drop": 0.05} | table]}, "x")
    pairs = Pairs(before=read_source(before), after=read_source(after))
    gate = judge(pairs.after.report, policy, pairs)
    assert Gate.model_validate(json.loads(json.dumps(gate.model_dump(mode="json")))) == gate
    return gate


@pytest.mark.parametrize(
    ("metric", "b", "c", "n"),
    [("clean_accuracy", 9, 5, 200), ("robust_accuracy", 14, 2, 200), ("certified_accuracy", 3, 0, 50)],
)
def test_counts_p_and_bound_of_a_drop(two, metric, b, c, n):
    gate = drop(*two, metric)
    (test,), (rule,) = gate.baseline.tests, gate.rules
    assert (test.b, test.c, test.n, test.delta) == (b, c, n, (c - b) / n)
    assert test.p == mcnemar(b, c)
    lower, upper = drop_interval(b, c, n)
    assert (test.lower, test.upper) == (-upper, -lower)
    assert rule.observed == upper
    assert (rule.drop, rule.op, rule.threshold) == (True, "<=", 0.05)
    assert gate.baseline.report == read_source(two[0]).report.id
    assert f"{b} lost, {c} gained, McNemar p=" in rule.message


def test_bound_decides_unless_the_point_is_asked_for(two):
    upper = drop_interval(9, 5, 200)[1]
    assert 0.02 < 0.05 < upper
    assert not drop(*two).rules[0].passed
    assert drop(*two, max_drop=upper).rules[0].passed
    assert not drop(*two, max_drop=upper - 1e-9).rules[0].passed
    point = drop(*two, bound="point", max_drop=0.02).rules[0]
    assert (point.passed, point.observed) == (True, 0.02)
    assert not drop(*two, bound="point", max_drop=0.0199).rules[0].passed


def test_a_gain_passes_and_a_gain_may_be_demanded(two):
    gate = drop(*reversed(two), "robust_accuracy", max_drop=0.0)
    assert gate.result == "passed"
    assert gate.rules[0].observed < 0
    assert not drop(*reversed(two), "robust_accuracy", max_drop=-0.1).rules[0].passed


def test_report_against_itself(two):
    rule = drop(two[0], two[0], max_drop=0.02).rules[0]
    assert rule.passed
    assert 0 < rule.observed == drop_interval(0, 0, 200)[1] < 0.02


def test_rule_and_policy_line_are_one(two):
    policy = policy_of({"gate": [{"metric": "clean_accuracy", "max_drop": 0.05, "bound": "point"}]}, "x")
    pairs = Pairs(before=read_source(two[0]), after=read_source(two[1]))
    (rule,) = judge(pairs.after.report, policy, pairs).rules
    assert policy_rule(rule) == policy.gate[0]


def unpaired(rule):
    assert (rule.passed, rule.observed) == (False, None)
    return rule.message


def test_without_samples_only_unpaired_counts_are_said(two):
    (two[0] / "evidence" / "samples.csv").unlink()
    gate = drop(*two)
    message = unpaired(gate.rules[0])
    assert "samples.csv" in message
    assert "is not there" in message
    assert "155/200 against 159/200" in message
    assert gate.baseline.tests == []


def test_other_samples_are_not_paired(write, two):
    short = [True] * 100
    assert "different samples" in unpaired(drop(write("short", short, short), two[1]).rules[0])


def test_other_file_is_not_paired(two):
    assert "covers clean, robust, certified of onnx-int8 alone" in unpaired(drop(*two, artifact="onnx").rules[0])


def test_missing_claim_on_either_side(two, write):
    bare = write("bare", [True] * 200, [True] * 200)
    assert "the baseline makes no claim of certified_accuracy" in unpaired(
        drop(bare, two[1], "certified_accuracy").rules[0]
    )
    assert "the report makes no claim" in unpaired(drop(two[0], bare, "certified_accuracy").rules[0])


def test_other_threat_is_not_compared(two, write, helper):
    small = {"robust_accuracy": {"threat": Threat.of(ThreatModel("linf", "4/255"))}}
    other = write("small", *helper.counts(9, 5, 150)[:1], helper.counts(14, 2, 90)[0], changes=small)
    assert "linf 4/255, the report for linf 8/255" in unpaired(drop(other, two[1], "robust_accuracy").rules[0])
    assert drop(other, two[1]).rules[0].observed is not None  # clean accuracy has no threat


def test_other_attack_counts_only_where_it_is_allowed(two, write, helper):
    weak = {"robust_accuracy": {"method": "fgsm"}}
    other = write("weak", helper.counts(9, 5, 150)[1], helper.counts(14, 2, 90)[1], changes=weak)
    strict = drop(two[0], other, "robust_accuracy", max_drop=0.2).rules[0]
    assert not strict.passed
    assert strict.message.startswith("OTHER ATTACK: fgsm against aa-quant of the baseline; drop 0.06")
    assert drop(two[0], other, "robust_accuracy", max_drop=0.2, allow_unreliable=True).rules[0].passed


@pytest.mark.parametrize("doubt", ["weak", "unfinished"])
@pytest.mark.parametrize("place", [0, 1])
def test_weak_attack_on_either_side_fails_the_rule(two, write, helper, place, doubt):
    more = {"weak": True} if doubt == "weak" else {"complete": False}
    robust = helper.counts(14, 2, 90)[place]
    two[place] = write("other", helper.counts(9, 5, 150)[place], robust, **more)
    rule = drop(*two, "robust_accuracy", max_drop=0.2).rules[0]
    assert not rule.passed
    assert rule.message.startswith("UNRELIABLE" if doubt == "weak" else "INCOMPLETE")
    assert ("(baseline)" in rule.message) == (place == 0)
    assert drop(*two, "robust_accuracy", max_drop=0.2, allow_unreliable=True).rules[0].passed


def test_changed_samples_are_an_integrity_error(two):
    file = two[0] / "evidence" / "samples.csv"
    file.write_text(file.read_text().replace("0,0,0", "0,0,1", 1))
    with pytest.raises(IntegrityError, match="differs from the sha256"):
        drop(*two)


def test_samples_outside_the_folder_are_not_read(two):
    table = json.loads((two[0] / "report.json").read_text())
    table["evidence"]["samples"] = "../branch/evidence/samples.csv"
    write_json(two[0] / "report.json", table)
    with pytest.raises(IntegrityError, match="outside its folder"):
        drop(*two)


def test_evidence_that_contradicts_its_claim_is_refused(two):
    table = json.loads((two[1] / "report.json").read_text())
    claim = next(c for c in table["claims"] if c["id"] == "clean_accuracy@onnx-int8")
    claim["correct"] += 10
    write_json(two[1] / "report.json", table)
    with pytest.raises(InputError, match="says 155 of 200, and not the 165 of 200"):
        drop(*two)


def test_samples_that_cannot_be_read(two):
    file = two[0] / "evidence" / "samples.csv"
    file.write_text("a,b\n1,2\n")
    table = json.loads((two[0] / "report.json").read_text())
    for subject in table["subjects"]:
        if subject["name"] == "evidence/samples.csv":
            subject["sha256"] = file_digest(file)
    write_json(two[0] / "report.json", table)
    with pytest.raises(InputError, match="has columns a, b"):
        drop(*two)


def test_other_test_data_are_refused(two):
    table = json.loads((two[0] / "report.json").read_text())
    table["data"]["sha256"] = "0" * 64
    write_json(two[0] / "report.json", table)
    with pytest.raises(InputError, match="different test data"):
        drop(*two)


def test_drop_without_a_baseline_fails(two):
    policy = policy_of({"gate": [{"metric": "clean_accuracy", "max_drop": 0.05}]}, "x")
    gate = judge(read_source(two[1]).report, policy)
    assert "no baseline" in unpaired(gate.rules[0])
    assert gate.baseline is None


@pytest.mark.parametrize(
    "table",
    [
        {"metric": "clean_accuracy", "max_drop": 2},
        {"metric": "clean_accuracy", "max_drop": float("nan")},
        {"metric": "clean_accuracy", "max_drop": 0.1, "value": 0.5},
        {"metric": "sparsity", "max_drop": 0.1},
        {"metric": "smoothed_certified_accuracy", "max_drop": 0.1},
        {"metric": "robust_accuracy", "max_drop": 0.1, "eps": "4/255"},
    ],
)
def test_drops_that_make_no_sense(table):
    with pytest.raises(UsageError) as error:
        policy_of({"gate": [table]}, "x")
    assert error.value.hint


def test_policy_with_a_drop_is_for_the_gate_alone(tmp_path):
    """A run or an export has no baseline: hours of work would end in a failed gate."""
    path = tmp_path / "gate.toml"
    path.write_text('[[gate]]\nmetric = "clean_accuracy"\nmax_drop = 0.02\n')
    assert read_policy(path, baseline=True).needs_baseline
    with pytest.raises(UsageError, match="needs a baseline"):
        read_policy(path)
    assert rule_of("clean_accuracy@onnx=0.02", None, "lower") == {
        "metric": "clean_accuracy", "artifact": "onnx", "max_drop": 0.02, "bound": "lower",
    }  # fmt: skip
