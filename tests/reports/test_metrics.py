"""What a gate can judge besides accuracies: certificates at a radius, latency, health, multiply-accumulates."""

from __future__ import annotations

import pytest
from scipy.stats import beta

from rprune.errors import UsageError
from rprune.reports.gate import judge, policy_of, policy_rule, rule_of
from rprune.reports.metrics import METRICS
from rprune.reports.schema import Bound, Footprint, Latency, Rule


@pytest.fixture(scope="module")
def report(load_helper):
    """With latencies and a footprint."""
    rows = [
        Latency(file=file, runtime=runtime, batch=batch, threads=threads, calls=100, p50=p50, p95=2 * p50)
        for file, runtime, batch, threads, p50 in [
            ("model.onnx", "ONNX Runtime", 1, 1, 10.5),
            ("model.int8.onnx", "ONNX Runtime", 64, 1, 99.0),
            ("model.int8.onnx", "ONNX Runtime", 1, 4, 0.9),
            ("model.int8.onnx", "ONNX Runtime", 1, 1, 2.5),
            ("model.int8.onnx", "OpenVINO", 1, 1, 1.5),
        ]
    ]
    counts = {"kept": 1, "total": 2, "dense_weights": 2, "dense_parameters": 2, "dense_bytes": 8, "density": 0.5}
    footprint = Footprint(
        **counts, side={}, bound=Bound(mask=1, values=1), sparse_macs=5_000_000, dense_macs=9_000_000, ratios={}
    )
    found = load_helper("reports/sample_report.py").sample_report(None)
    return found.model_copy(update={"speed": rows, "footprint": footprint})


def judged(report, **table) -> Rule:
    (rule,) = judge(report, policy_of({"gate": [table]}, "test")).rules
    assert Rule.model_validate_json(rule.model_dump_json()) == rule
    assert policy_of({"gate": [policy_rule(rule).model_dump()]}, "again").gate[0] == policy_rule(rule)
    return rule


@pytest.mark.parametrize(
    ("table", "observed"),
    [
        ({"metric": "latency", "op": "<=", "value": 2.5}, 2.5),  # the first runtime, one image, one thread
        ({"metric": "latency", "op": "<=", "value": 11, "artifact": "onnx"}, 10.5),
        ({"metric": "macs", "op": "<=", "value": 5e6}, 5e6),
        ({"metric": "macs", "op": "==", "value": 5_000_000}, 5e6),
        ({"metric": "bytes", "op": "==", "value": 11_262_401}, 11_262_401),
        ({"metric": "attack_health", "op": "==", "value": "ok"}, "ok"),
    ],
)
def test_value_that_is_judged(report, table, observed):
    rule = judged(report, **table)
    assert (rule.passed, rule.observed) == (True, observed)
    if table["op"] != "==":
        assert not judged(report, **table | {"value": observed - 1e-6}).passed
    elif observed != "ok":
        assert not judged(report, **table | {"value": observed + 1}).passed


@pytest.mark.parametrize(
    ("metric", "eps", "correct", "n"),
    [
        ("certified_accuracy", "8/255", 112, 1000),
        ("certified_accuracy", "2/255", 462, 1000),
        ("certified_accuracy", "0.00392156862745098", 601, 1000),
        ("robust_accuracy", "4/255", 613, 1000),
        ("smoothed_certified_accuracy", "0.25", 49, 100),
        ("certified_accuracy", None, 112, 1000),
    ],
)
def test_count_under_a_named_threat(report, metric, eps, correct, n):
    table = {"metric": metric, "value": 0.01} | ({} if eps is None else {"eps": eps})
    assert judged(report, **table).observed == pytest.approx(beta.ppf(0.025, correct, n - correct + 1))
    assert judged(report, **table, bound="point").observed == correct / n
    norm = "l2" if metric.startswith("smoothed") else "linf"
    assert judged(report, **table, norm=norm).passed
    other = judged(report, **table, norm="l2" if norm == "linf" else "linf")
    assert (other.passed, other.observed) == (False, None)
    assert "is not claimed" in other.message


def test_eps_as_a_number_is_the_one_that_was_written(report):
    assert judged(report, metric="smoothed_certified_accuracy", eps=0.25, value=0.1).observed is not None


def test_eps_that_was_not_measured_fails_and_says_which_were(report):
    rule = judged(report, metric="certified_accuracy", eps="3/255", value=0.0)
    assert not rule.passed
    assert "certified_accuracy 3/255 is not claimed; the claim is for linf 0.5/255, 1/255, 2/255, 4/255, 8/255" in (
        rule.message
    )


def test_doubt_of_an_attack_holds_at_every_eps(load_helper):
    weak = load_helper("reports/sample_report.py").sample_report(None, weak=True)
    assert judged(weak, metric="robust_accuracy", eps="4/255", value=0.1).message.startswith("UNRELIABLE")
    health = judged(weak, metric="attack_health", op="==", value="ok")
    assert (health.passed, health.observed) == (False, "failed")
    assert "R4 black-box beats white-box" in health.message


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"metric": "latency", "op": "<=", "value": 1e9}, "no latency of onnx-int8"),
        ({"metric": "macs", "op": "<=", "value": 1e12}, "no footprint"),
        ({"metric": "attack_health", "op": "==", "value": "ok"}, "was not checked"),
        ({"metric": "attack_health", "op": "==", "value": "ok", "artifact": "c"}, "no claim of robust_accuracy for c"),
        ({"metric": "bytes", "op": "<=", "value": 1e12, "artifact": "packed"}, "no file of role packed"),
        ({"metric": "certified_accuracy", "value": 0, "artifact": "onnx"}, "no claim of certified_accuracy for onnx"),
    ],
)
def test_what_the_report_does_not_say_fails(load_helper, table, words):
    bare = load_helper("reports/sample_report.py").sample_report(None, attacked=False)
    rule = judged(bare, **table)
    assert (rule.passed, rule.observed) == (False, None)
    assert words in rule.message


@pytest.mark.parametrize(
    "table",
    [
        {"metric": "attack_health", "value": "ok"},
        {"metric": "attack_health", "op": "==", "value": 1},
        {"metric": "attack_health", "op": "==", "value": "failed"},
        {"metric": "clean_accuracy", "op": "==", "value": 0.5},
        {"metric": "sparsity", "op": "==", "value": 0.99},
        {"metric": "latency", "op": "==", "value": 1},
        {"metric": "kept", "op": "==", "value": "ok"},
        {"metric": "sparsity", "op": ">=", "value": "ok"},
        {"metric": "clean_accuracy", "eps": "1/255", "value": 0.5},
        {"metric": "sparsity", "norm": "l2", "value": 0.5},
        {"metric": "robust_accuracy", "norm": "l1", "value": 0.5},
        {"metric": "robust_accuracy", "eps": "small", "value": 0.5},
    ],
)
def test_rules_that_nothing_could_be_judged_by(table):
    with pytest.raises(UsageError) as error:
        policy_of({"gate": [table]}, "x")
    assert error.value.hint


@pytest.mark.parametrize("metric", METRICS)
def test_misspelt_metric_is_offered(metric):
    with pytest.raises(UsageError) as error:
        policy_of({"gate": [{"metric": metric[:-1] + "q", "value": 0.5}]}, "x")
    assert f"did you mean '{metric}'?" in error.value.hint


def test_rules_of_the_command_line_with_a_threat():
    assert rule_of("certified_accuracy:linf:2/255@onnx=3/10", ">=", "point") == {
        "metric": "certified_accuracy", "artifact": "onnx", "op": ">=", "value": 0.3, "bound": "point",
        "norm": "linf", "eps": "2/255",
    }  # fmt: skip
    assert rule_of("robust_accuracy:0.1=0.3", "<=", "lower")["eps"] == "0.1"
    assert "norm" not in rule_of("robust_accuracy:0.1=0.3", "<=", "lower")
    assert rule_of("attack_health=ok", "==", "lower")["value"] == "ok"
    for text in ("a:b:c:d=1", "attack_health=fine", "x=", "=", ""):
        with pytest.raises(UsageError):
            rule_of(text, ">=", "lower")
