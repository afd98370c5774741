"""What changed between two reports: tests where they can be made, and regressions marked."""

from __future__ import annotations

import json

import pytest

from rprune.evaluation.statistics import fisher, mcnemar
from rprune.files import write_json
from rprune.reports import compare_forms
from rprune.reports.compare import compare
from rprune.reports.pairs import Pairs, read_source
from rprune.reports.schema import Latency, Report, Threat
from rprune.threat import ThreatModel


@pytest.fixture
def two(write, helper):
    """Clean: 5 lost, 6 gained. Robust: 16 lost, 2 gained."""
    clean, robust = helper.counts(5, 6, 150), helper.counts(16, 2, 90)
    return [write(name, clean[i], robust[i], [True] * 10) for i, name in enumerate(("main", "branch"))]


def changed(folder, **fields):
    table = json.loads((folder / "report.json").read_text()) | fields
    write_json(folder / "report.json", Report.model_validate(table).sealed().to_json())


def compared(before, after, alpha=0.05):
    return compare(Pairs(before=read_source(before), after=read_source(after)), alpha)


def of(found, metric, artifact="onnx-int8"):
    return next(c for c in found.changes if c.metric == metric and c.artifact in (artifact, ""))


def test_paired_claims(two):
    found = compared(*two)
    clean, robust = of(found, "clean_accuracy"), of(found, "robust_accuracy")
    assert (clean.verdict, clean.p, clean.test) == ("not significant", mcnemar(5, 6), "mcnemar-exact")
    assert (robust.verdict, robust.p) == ("regression", mcnemar(16, 2))
    assert (robust.paired.b, robust.paired.c) == (16, 2)
    assert of(compared(*reversed(two)), "robust_accuracy").verdict == "improvement"
    assert [c.metric for c in found.regressions] == ["robust_accuracy"]


def test_alpha_decides(two):
    p = mcnemar(16, 2)
    assert of(compared(*two, p), "robust_accuracy").verdict == "regression"
    assert of(compared(*two, p / 2), "robust_accuracy").verdict == "not significant"


def test_unpaired_claims(two):
    (two[0] / "evidence" / "samples.csv").unlink()
    change = of(compared(*two), "robust_accuracy")
    assert (change.test, change.paired) == ("fisher", None)
    assert change.p == fisher((106, 200), (92, 200))
    assert change.verdict == "not significant"  # pairs tell more
    assert "is not there" in change.unpaired


def test_report_against_itself(two):
    found = compared(two[0], two[0])
    assert not found.regressions
    assert not found.settings
    assert {change.verdict for change in found.changes} <= {"not significant", "similar"}


def test_claim_that_went_or_came(two, write, helper):
    bare = write("bare", helper.counts(5, 6, 150)[1], helper.counts(16, 2, 90)[0])
    gone = of(compared(two[0], bare), "certified_accuracy")
    assert (gone.verdict, gone.after, gone.note) == ("regression", None, "no longer in the report")
    assert of(compared(bare, two[0]), "certified_accuracy").verdict == "new"


def test_other_threat_and_other_data_are_not_compared(two, write, helper):
    small = {"robust_accuracy": {"threat": Threat.of(ThreatModel("linf", "4/255"))}}
    other = write("small", helper.counts(5, 6, 150)[0], helper.counts(16, 2, 90)[0], changes=small)
    change = of(compared(other, two[1]), "robust_accuracy")
    assert (change.verdict, change.note) == ("not comparable", "linf 4/255, then linf 8/255")
    data = json.loads((two[0] / "report.json").read_text())["data"]
    changed(two[0], data=data | {"sha256": "0" * 64})
    found = compared(*two)
    assert {of(found, metric).verdict for metric in ("clean_accuracy", "robust_accuracy")} == {"not comparable"}
    assert of(found, "clean_accuracy").p is None


@pytest.mark.parametrize(("place", "verdict"), [(1, "not comparable"), (0, "regression")])
def test_other_attack_never_makes_an_improvement(two, write, helper, place, verdict):
    fgsm = {"robust_accuracy": {"method": "fgsm"}}
    other = write("fgsm", helper.counts(5, 6, 150)[0], helper.counts(16, 2, 90)[1 - place], changes=fgsm)
    change = of(compared(two[place], other), "robust_accuracy")
    assert change.verdict == verdict
    assert "attacked by aa-quant, then by fgsm" in change.note


def test_doubtful_number_is_no_improvement(two, write, helper):
    weak = write("weak", helper.counts(5, 6, 150)[0], helper.counts(16, 2, 90)[0], weak=True)
    found = compared(two[1], weak)
    assert (of(found, "robust_accuracy").verdict, of(found, "robust_accuracy").note) == ("not comparable", "UNRELIABLE")
    assert (of(found, "attack_health").before, of(found, "attack_health").after) == ("ok", "failed")
    assert of(found, "attack_health").verdict == "regression"
    assert of(compared(weak, two[1]), "attack_health").verdict == "improvement"


def test_sizes_within_a_hundredth_are_similar(two):
    table = json.loads((two[0] / "report.json").read_text())
    files = json.loads((two[1] / "report.json").read_text())["subjects"]
    for growth, verdict in ((1.009, "similar"), (1.02, "regression"), (0.98, "improvement")):
        subjects = [s | {"bytes": int(s["bytes"] * growth)} for s in files]
        sparse = table["sparsity"] | {"overall": 1 - growth * (1 - table["sparsity"]["overall"])}
        changed(two[1], subjects=subjects, sparsity=sparse)
        found = compared(*two)
        assert of(found, "bytes", "onnx").verdict == of(found, "sparsity").verdict == verdict


def test_latency_is_judged_on_one_machine_outside_the_noise(two):
    def rows(p50):
        row = Latency(
            file="model.onnx", runtime="ONNX Runtime", batch=1, threads=1, calls=9, p50=p50, p95=1.2 * p50, ratio=1.0
        )
        return [row.model_dump()]

    changed(two[0], speed=rows(1.0))
    for p50, verdict in ((1.1, "similar"), (1.3, "regression"), (0.8, "improvement")):
        changed(two[1], speed=rows(p50))
        assert of(compared(*two), "latency", "onnx").verdict == verdict
    environment = json.loads((two[1] / "report.json").read_text())["environment"]
    changed(two[1], speed=rows(9.0), environment=environment | {"cpu": "another"})
    change = of(compared(*two), "latency", "onnx")
    assert (change.verdict, change.note) == ("similar", "another machine or runtime: not judged")


def test_settings_that_differ_by_stage(two):
    table = json.loads((two[1] / "report.json").read_text())
    prune = next(entry for entry in table["lineage"] if entry["stage"] == "prune")
    prune["config"] |= {"sparsity": 0.9, "new": True}
    prune["config"]["objective"]["beta"] = 3.0
    changed(two[1], lineage=table["lineage"], recipe=table["recipe"] | {"seed": 3})
    assert [(s.key, s.before, s.after) for s in compared(*two).settings] == [
        ("seed", None, 3),
        ("stage.prune.new", None, True),
        ("stage.prune.objective.beta", 6.0, 3.0),
        ("stage.prune.sparsity", 0.99, 0.9),
    ]


def test_forms_say_the_same(two):
    found = compared(*two)
    table = json.loads(json.dumps(compare_forms.to_json(found), allow_nan=False))
    assert (table["regressions"], table["not_comparable"], table["same_data"]) == (1, 0, True)
    robust = next(c for c in table["changes"] if (c["metric"], c["artifact"]) == ("robust_accuracy", "onnx-int8"))
    assert (robust["verdict"], robust["paired"]["b"], robust["paired"]["c"]) == ("regression", 16, 2)
    row = next(r for r in compare_forms.rows(found) if r[:2] == ["robust_accuracy", "onnx-int8"])
    assert row[2:4] == ["53.0\u00a0%", "46.0\u00a0%"]
    assert row[4].startswith("-7.0 [-11.")
    assert row[-1] == "REGRESSION"
    text = compare_forms.markdown(found)
    assert text.startswith("### rprune compare: 1 regression\n")
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + len(compare_forms.rows(found))
