"""The gate judges counts: exact numbers, both directions, both bounds."""

from __future__ import annotations

import pytest
from scipy.stats import beta

from rprune.errors import UsageError
from rprune.reports.gate import Policy, judge, policy_of, read_policy, rule_of
from rprune.reports.schema import Interval


@pytest.fixture(scope="module")
def report(load_helper):
    """Clean accuracy of the int8 file: 762 of 1000."""
    found = load_helper("reports/sample_report.py").sample_report(None)
    claims = [
        claim.model_copy(update={"correct": 762, "n": 1000, "value": 0.762, "interval": Interval.of(762, 1000)})
        if claim.metric == "clean_accuracy" and claim.artifact == "onnx-int8"
        else claim
        for claim in found.claims
    ]
    return found.model_copy(update={"claims": claims})


LOWER, UPPER = beta.ppf(0.025, 762, 239), beta.ppf(0.975, 763, 238)


def rule(report, **table):
    return judge(report, policy_of({"gate": [{"metric": "clean_accuracy"} | table]}, "test")).rules[0]


@pytest.mark.parametrize(
    ("op", "bound", "observed"),
    [(">=", "lower", LOWER), ("<=", "lower", UPPER), (">=", "point", 0.762), ("<=", "point", 0.762)],
)
def test_observed_is_the_bound_against_the_rule(report, op, bound, observed):
    found = rule(report, op=op, bound=bound, value=0.5)
    assert found.observed == pytest.approx(observed, abs=1e-12)
    assert found.passed == (op == ">=")
    assert rule(report, op=op, bound=bound, value=0.99).passed == (op == "<=")


def test_a_value_between_bound_and_point_fails_by_the_bound_alone(report):
    assert LOWER < 0.75 < 0.762
    assert not rule(report, value=0.75).passed
    assert rule(report, value=0.75, bound="point").passed
    assert not rule(report, op="<=", value=0.77).passed
    assert rule(report, op="<=", value=0.77, bound="point").passed


def test_equality_passes(report):
    assert rule(report, value=0.762, bound="point").passed
    assert rule(report, value=0.762, op="<=", bound="point").passed
    exact = rule(report, value=0).observed
    assert rule(report, value=exact).passed
    assert not rule(report, value=exact + 1e-15).passed


def test_counts_decide_not_the_written_value(report):
    claim = report.claim("clean_accuracy").model_copy(update={"value": 1.0, "interval": Interval.of(10, 10)})
    forged = report.model_copy(update={"claims": [claim]})
    assert rule(forged, value=0.75, bound="point").observed == 0.762


@pytest.mark.parametrize("op", [">=", "<="])
def test_missing_claim_fails(report, op):
    bare = report.model_copy(update={"claims": []})
    found = rule(bare, op=op, value=0.0)
    assert (found.passed, found.observed) == (False, None)
    assert "no claim" in found.message
    assert not rule(report, metric="clean_accuracy", artifact="weights", op=op, value=0).passed


def test_metrics_that_are_measured(report):
    sparsity, size = report.sparsity, report.subject("onnx-int8").bytes
    assert rule(report, metric="sparsity", value=sparsity.overall).passed
    assert not rule(report, metric="sparsity", value=sparsity.overall + 1e-9).passed
    assert rule(report, metric="kept", op="<=", value=sparsity.kept).passed
    assert not rule(report, metric="kept", op="<=", value=sparsity.kept - 1).passed
    assert rule(report, metric="bytes", op="<=", value=size).passed
    assert not rule(report, metric="bytes", op="<=", value=size - 1).passed
    without = report.model_copy(update={"subjects": [s for s in report.subjects if s.role != "masks"]})
    assert not rule(without, metric="bytes", artifact="masks", op="<=", value=1e12).passed


def test_words_of_old_reports(report):
    """``verify`` judges a stored gate again and compares it whole, with its words."""
    assert rule(report, metric="bytes", op="<=", value=12e6).message == "11262401 <= 1.2e+07"
    assert rule(report, metric="kept", op="<=", value=1e6).message == f"{report.sparsity.kept:g} <= 1e+06"
    assert rule(report, value=0.75).message == f"0.7620, 95 % bound {LOWER:.4f} (n=1000) is not >= 0.75"


def test_rules_name_the_file(report):
    low = rule(report, metric="robust_accuracy", artifact="onnx", value=0).observed
    assert low != rule(report, metric="robust_accuracy", value=0).observed


def test_one_failed_rule_fails_the_gate(report):
    rules = [{"metric": "sparsity", "value": 0.1}, {"metric": "clean_accuracy", "value": 1}]
    assert judge(report, policy_of({"gate": rules[:1]}, "x")).result == "passed"
    gate = judge(report, policy_of({"gate": rules}, "x"))
    assert (gate.result, [r.passed for r in gate.rules]) == ("failed", [True, False])
    assert "is not >= 1" in gate.rules[1].message


@pytest.mark.parametrize("bound", ["lower", "point"])
@pytest.mark.parametrize(("op", "value"), [(">=", 0.1), ("<=", 0.9), (">=", 0.9)])
def test_weak_attack_fails_the_rule_unless_it_is_allowed(load_helper, op, value, bound):
    report = load_helper("reports/sample_report.py").sample_report(None, weak=True)
    table = {"metric": "robust_accuracy", "op": op, "value": value, "bound": bound}
    strict, lax = rule(report, **table), rule(report, **table, allow_unreliable=True)
    assert not strict.passed
    assert strict.message.startswith("UNRELIABLE: R4 black-box beats white-box, R6 right at a huge eps, R10 transfer")
    assert lax.passed == (op == "<=" or value == 0.1)
    assert "UNRELIABLE: R4" in lax.message  # allowed, not hidden
    assert (strict.observed, strict.allow_unreliable, lax.allow_unreliable) == (lax.observed, False, True)
    assert rule(report, **table | {"artifact": "onnx"}).message.startswith("0.452")
    assert not rule(report, metric="clean_accuracy", value=0.7).message.startswith("UNRELIABLE")


def test_incomplete_attack_fails_the_rule_unless_it_is_allowed(load_helper):
    report = load_helper("reports/sample_report.py").sample_report(None, complete=False)
    strict = rule(report, metric="robust_accuracy", value=0.1)
    assert not strict.passed
    assert strict.message.startswith("INCOMPLETE: ")
    assert rule(report, metric="robust_accuracy", value=0.1, allow_unreliable=True).passed
    both = load_helper("reports/sample_report.py").sample_report(None, weak=True, complete=False)
    message = rule(both, metric="robust_accuracy", value=0.1).message
    assert message.startswith("UNRELIABLE: ")
    assert "; INCOMPLETE: " in message


def test_attack_that_nobody_examined_does_not_pass(load_helper):
    report = load_helper("reports/sample_report.py").sample_report(None, attacked=False)
    found = rule(report, metric="robust_accuracy", value=0.4)
    assert not found.passed
    assert found.message.startswith("UNEXAMINED")
    assert rule(report, metric="robust_accuracy", value=0.4, allow_unreliable=True).passed
    assert rule(report, metric="clean_accuracy", value=0.4).passed


def test_switch_of_the_command_line(load_helper, tmp_path, capsys):
    from rprune.cli.app import main
    from rprune.files import write_json

    report = load_helper("reports/sample_report.py").sample_report(None, weak=True)
    write_json(tmp_path / "report.json", report.to_json())
    policy = tmp_path / "gate.toml"
    policy.write_text('[[gate]]\nmetric = "robust_accuracy"\nvalue = 0.4\n')

    def code(*options):
        with pytest.raises(SystemExit) as end:
            main(["gate", str(tmp_path), *map(str, options)])
        return end.value.code or 0

    bar = ("--min", "robust_accuracy=0.4")
    assert code(*bar) == 1
    assert "UNRELIABLE" in capsys.readouterr().out
    assert code(*bar, "--allow-unreliable") == 0
    assert "UNRELIABLE" in capsys.readouterr().out
    assert code(*bar, "--allow-unreliable", "--policy", policy) == 1  # the policy decides for itself
    assert code("--allow-unreliable", "--policy", policy) == 2
    assert "allow_unreliable = true" in capsys.readouterr().err
    policy.write_text(policy.read_text() + "allow_unreliable = true\n")
    assert code("--policy", policy) == 0


def test_unknown_metric_offers_the_nearest():
    with pytest.raises(UsageError) as error:
        policy_of({"gate": [{"metric": "robust_acuracy", "value": 0}]}, "x")
    assert "did you mean 'robust_accuracy'?" in error.value.hint


@pytest.mark.parametrize(
    "table",
    [
        {}, {"gate": []}, {"gate": [{}]}, {"gate": [{"metric": "sparsity"}]}, {"gates": []},
        {"gate": [{"metric": "sparsity", "value": 0.5, "op": ">"}]},
        {"gate": [{"metric": "sparsity", "value": 0.5, "bound": "upper"}]},
        {"gate": [{"metric": "sparsity", "value": 0.5, "treshold": 1}]},
        {"gate": [{"metric": "sparsity", "value": "high"}]},
        {"gate": [{"metric": "sparsity", "value": float("nan")}]},
    ],
)  # fmt: skip
def test_policies_with_a_mistake(table):
    with pytest.raises(UsageError) as error:
        policy_of(table, "gate.toml")
    assert "\n" not in error.value.message
    assert error.value.hint


def test_rule_for_a_file_that_cannot_exist_is_refused():
    """A misspelt role would fail every claim, and be ignored by sparsity."""
    with pytest.raises(UsageError) as error:
        policy_of({"gate": [{"metric": "sparsity", "artifact": "onnx-int", "value": 0.5}]}, "x")
    assert "did you mean 'onnx-int8'?" in error.value.hint


def test_policy_from_a_file(tmp_path):
    path = tmp_path / "gate.toml"
    path.write_text('[[gate]]\nmetric = "sparsity"\nvalue = 0.5\n')
    policy = read_policy(path)
    assert policy.gate[0].model_dump() == {
        "metric": "sparsity", "artifact": "onnx-int8", "op": ">=", "value": 0.5, "bound": "lower",
    }  # fmt: skip
    path.write_text("gate")
    with pytest.raises(UsageError, match="not TOML"):
        read_policy(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_policy(tmp_path / "none.toml")


def test_digest_of_a_policy(tmp_path):
    def digest(text: str) -> str:
        (tmp_path / "gate.toml").write_text(text)
        return read_policy(tmp_path / "gate.toml").sha256

    base = digest('[[gate]]\nmetric = "sparsity"\nvalue = 0.5\n')
    assert base == digest('# a remark\n[[gate]]\nvalue = 0.5\nop = ">="\nmetric = "sparsity"\nbound = "lower"\n')
    others = [
        digest('[[gate]]\nmetric = "sparsity"\nvalue = 0.6\n'),
        digest('[[gate]]\nmetric = "kept"\nvalue = 0.5\n'),
        digest('[[gate]]\nmetric = "sparsity"\nvalue = 0.5\nop = "<="\n'),
        digest('[[gate]]\nmetric = "sparsity"\nvalue = 0.5\nbound = "point"\n'),
        digest('[[gate]]\nmetric = "sparsity"\nvalue = 0.5\nartifact = "onnx"\n'),
        digest('[[gate]]\nmetric = "sparsity"\nvalue = 0.5\n' * 2),
    ]
    others.append(digest('[[gate]]\nmetric = "sparsity"\nvalue = 0.5\nallow_unreliable = true\n'))
    assert len({base, *others}) == 8
    assert base == digest('[[gate]]\nmetric = "sparsity"\nvalue = 0.5\nallow_unreliable = false\n')
    assert base == "901871fb38f654b7e03342c68f08bbd9aa4f75afa6203eb65f9629b5616e104d"  # as before there was the switch
    assert base == Policy.model_validate({"gate": [{"metric": "sparsity", "value": 0.5}]}).sha256


def test_rules_of_the_command_line():
    assert rule_of("robust_accuracy = 0.45", ">=", "lower") == {
        "metric": "robust_accuracy", "artifact": "onnx-int8", "op": ">=", "value": 0.45, "bound": "lower",
    }  # fmt: skip
    assert rule_of("bytes@onnx=1e6", "<=", "point")["artifact"] == "onnx"
    for text in ("robust_accuracy", "robust_accuracy=", "robust_accuracy=high", "robust_accuracy=nan"):
        with pytest.raises(UsageError, match="cannot read"):
            rule_of(text, ">=", "lower")
