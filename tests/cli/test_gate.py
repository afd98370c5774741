"""The gate as CI calls it: every exit code in every format, files for GitHub, JUnit; and compare."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from rprune.files import write_json

FORMS = ("human", "json", "github", "markdown")
BASELINE = ("--max-drop", "clean_accuracy=0.06", "--baseline")


@pytest.fixture
def bundles(load_helper, tmp_path):
    """The pair of bundles, and policies."""
    sample = load_helper("reports/sample_report.py").sample_report
    load_helper("reports/paired_reports.py").write_pair(tmp_path, sample)
    (tmp_path / "gate.toml").write_text(
        '[[gate]]\nmetric = "sparsity"\nvalue = 0.9\n\n[[gate]]\nmetric = "robust_accuracy"\nmax_drop = 0.02\n'
    )
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


def spoil(bundles):
    with (bundles / "main" / "evidence" / "samples.csv").open("a") as file:
        file.write("\n")


CODES = {
    0: ("gate", "branch", *BASELINE, "main"),
    1: ("gate", "branch", "--policy", "gate.toml", "--baseline", "main"),
    2: ("gate", "branch", "--max-drop", "clean_accuracy=0.05"),
    3: ("gate", "branch", *BASELINE, "broken.json"),
    5: ("gate", "branch", *BASELINE, "main"),  # spoilt
}


@pytest.mark.parametrize("form", [*FORMS, "--json"])
@pytest.mark.parametrize("code", CODES)
def test_every_exit_code_in_every_format(call, bundles, monkeypatch, code, form):
    files = {name: bundles / name for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    for name, file in files.items():
        file.write_text("before\n")
        monkeypatch.setenv(name, str(file))
    if code == 5:
        spoil(bundles)
    said = call(*CODES[code], *([form] if form == "--json" else ["--format", form]), cwd=bundles)
    assert said.code == code, said.err
    told = {name: file.read_text() for name, file in files.items()}
    if form != "github":
        assert set(told.values()) == {"before\n"}
    if code > 1:
        error, hint = said.err.splitlines()
        assert (error[:7], hint[:6]) == ("error: ", "hint: ")
        if form == "github":
            (line,) = said.out.splitlines()
            assert line.startswith("::error title=rprune gate::")
            assert told["GITHUB_OUTPUT"] == "before\nresult=error\n"
        else:
            assert said.out == ""
        return
    assert said.err == ""
    result = ("passed", "failed")[code]
    if form in ("json", "--json"):
        assert said.json["result"] == result
        assert said.json["baseline"]["tests"][0]["test"] == "mcnemar-exact"
    elif form == "markdown":
        assert said.out.startswith(f"### rprune gate: {result}\n")
    else:
        assert said.out.splitlines()[-1].startswith(f"GATE {result.upper()}")
    if form == "github":
        assert told["GITHUB_STEP_SUMMARY"].startswith(f"before\n### rprune gate: {result}\n")
        outputs = dict(line.split("=") for line in told["GITHUB_OUTPUT"].splitlines()[1:])
        assert outputs.pop("result") == result
        assert set(outputs) == ({"clean_accuracy_drop"}, {"sparsity", "robust_accuracy_drop"})[code]
        errors = [line for line in said.out.splitlines() if line.startswith("::")]
        assert len(errors) == code
        assert all(line.startswith("::error file=gate.toml,line=5,title=rprune gate%3A") for line in errors)


def test_github_variables_need_not_be_set(call, bundles, monkeypatch):
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"):
        monkeypatch.delenv(name, raising=False)
    assert call(*CODES[1], "--format", "github", cwd=bundles).code == 1
    monkeypatch.setenv("GITHUB_OUTPUT", str(bundles))
    said = call(*CODES[1], "--format", "github", cwd=bundles)
    assert said.code == 2
    assert "cannot write GITHUB_OUTPUT" in said.err


def test_junit_is_written_whatever_the_outcome(call, bundles):
    for code in (0, 1):
        said = call(*CODES[code], "--junit", f"ci/{code}.xml", cwd=bundles)
        assert said.code == code
        suite = ElementTree.parse(bundles / "ci" / f"{code}.xml").getroot()[0]
        assert (suite.get("tests"), suite.get("failures")) == (str(1 + code), str(code))
        properties = {p.get("name"): p.get("value") for p in suite.find("properties")}
        assert properties["baseline"] == json.loads((bundles / "main" / "report.json").read_text())["id"]


def test_junit_does_not_overwrite_unasked(call, bundles):
    (bundles / "junit.xml").write_text("mine")
    call(*CODES[0], "--junit", "junit.xml", cwd=bundles).refused(2)
    assert (bundles / "junit.xml").read_text() == "mine"
    assert call(*CODES[0], "--junit", "junit.xml", "--force", cwd=bundles).code == 0
    assert "<testsuites" in (bundles / "junit.xml").read_text()


def test_nothing_is_written_after_an_error(call, bundles):
    spoil(bundles)
    call(*CODES[5], "--junit", "junit.xml", cwd=bundles).refused(5)
    assert not (bundles / "junit.xml").exists()


def test_exit_zero_is_for_verdicts_alone(call, bundles):
    said = call(*CODES[1], "--exit-zero", cwd=bundles)
    assert (said.code, said.out.splitlines()[-1]) == (0, "GATE FAILED  1 of 2 rules")
    spoil(bundles)
    call(*CODES[5], "--exit-zero", cwd=bundles).refused(5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--min", "sparsity=0.9", "--baseline", "main"), "no rule compares with --baseline"),
        (("--policy", "gate.toml"), "there is no baseline"),
        (("--max-drop", "sparsity=0.1", "--baseline", "main"), "a drop of sparsity cannot be judged"),
        (("--max-drop", "clean_accuracy=2", "--baseline", "main"), "max_drop"),
        (("--min", "sparsity=0.9", "--json", "--format", "github"), "two forms"),
        (("--equal", "clean_accuracy=0.5",), "cannot be =="),
        (("--min", "attack_health=ok",), "attack_health cannot be >= ok"),
        (("--min", "latnecy=3",), "unknown metric 'latnecy'"),
    ],
)  # fmt: skip
def test_requests_that_make_no_sense(call, bundles, arguments, words):
    assert words in call("gate", "branch", *arguments, cwd=bundles).refused(2)


def test_reports_of_other_data_are_refused(call, bundles):
    table = json.loads((bundles / "main" / "report.json").read_text())
    table["data"]["sha256"] = "0" * 64
    write_json(bundles / "main" / "report.json", table)
    assert "different test data" in call(*CODES[0], cwd=bundles).refused(3)
    assert "different test data" in call("compare", "main", "branch", "--fail-on", "regression", cwd=bundles).refused(3)
    said = call("compare", "main", "branch", cwd=bundles)
    assert said.code == 0
    assert said.err.startswith("warning: the reports are of different test data")


def test_policy_with_a_drop_is_refused_before_any_work(call, bundles):
    """An export has no baseline, and this run names none."""
    (bundles / "recipe.toml").write_text(
        'rprune = 1\nname = "x"\npolicy = "gate.toml"\n[data]\nsource = "digits"\n[[stage]]\nkind = "train"\n'
    )
    for command in (
        ("export", "model.pt", "--policy", "gate.toml", "-o", "new"),
        ("run", "recipe.toml", "-o", "new"),
    ):
        assert "needs a baseline" in call(*command, cwd=bundles).refused(2)


@pytest.mark.parametrize(("fail_on", "code"), [((), 0), (("--fail-on", "regression"), 1)])
@pytest.mark.parametrize("form", ["human", "json", "markdown", "--json"])
def test_compare(call, bundles, form, fail_on, code):
    said = call(
        "compare", "main", "branch", *([form] if form == "--json" else ["--format", form]), *fail_on, cwd=bundles
    )
    assert said.code == code, said.err
    assert said.err == ""
    if form in ("json", "--json"):
        assert said.json["regressions"] == 1
    else:
        assert "REGRESSION" in said.out
        assert "McNemar" in said.out
    back = call("compare", "branch", "main", "--fail-on", "regression", cwd=bundles)
    assert back.code == 0
    assert back.out.splitlines()[-1] == "NO REGRESSION"


def test_compare_of_what_cannot_be(call, bundles):
    call("compare", "main", "broken.json", cwd=bundles).refused(3)
    call("compare", "main", "none", cwd=bundles).refused(3)
    call("compare", "main", "branch", "--alpha", 2, cwd=bundles).refused(2)
    call("compare", "main", "branch", "--json", "--format", "markdown", cwd=bundles).refused(2)
    spoil(bundles)
    call("compare", "main", "branch", cwd=bundles).refused(5)


def test_on_a_real_bundle(call, chain, bundle):
    """Two exports of one model: the same predictions, other attacks."""
    drops = ("--max-drop", "clean_accuracy=0.1", "--max-drop", "certified_accuracy=0.5")
    said = call("gate", chain / "out", *drops, "--baseline", chain / "out", "--json", cwd=chain.folder)
    assert said.code == 0, said.out
    assert [(test["b"], test["c"], test["p"]) for test in said.json["baseline"]["tests"]] == [(0, 0, 1.0)] * 2
    said = call("gate", chain / "out", "--max-drop", "robust_accuracy=0.5", "--baseline", bundle, cwd=chain.folder)
    assert said.code == 1
    assert "different samples" in said.out  # 60 of the one, 40 of the other
    said = call("compare", bundle, chain / "out", cwd=chain.folder)
    assert said.code == 0
    assert "stage.export.limit" in said.out


def test_smoke_run_is_neither_passed_nor_compared(call, bundles):
    table = json.loads((bundles / "branch" / "report.json").read_text()) | {"smoke": True}
    write_json(bundles / "branch" / "report.json", table)
    said = call("gate", "branch", *BASELINE, "main", "--format", "github", cwd=bundles)
    assert said.code == 1
    assert said.out.startswith("::error file=branch,title=rprune gate%3A smoke (report)::SMOKE RUN")
    said = call("gate", "main", *BASELINE, "branch", cwd=bundles)
    assert said.code == 1
    assert "the baseline is a SMOKE RUN" in said.out
    said = call("compare", "main", "branch", "--fail-on", "regression", cwd=bundles)
    assert said.code == 1
    assert "NOT COMPARABLE: smoke run" in said.out
    assert "after: SMOKE RUN" in said.out
