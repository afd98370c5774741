"""action.yml: its steps run in a shell as the runner would, on reports, with this interpreter for the install step."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "action.yml").read_text()
BLOCK = re.compile(r"^( +)(\w+): \|\n((?:\1 +.*\n|\n)+)", re.MULTILINE)


def read_action():
    """Inputs with their defaults, and the steps as (id, env, run), read by hand: YAML is no dependency."""
    inputs = {}
    for name, body in re.findall(r"^  ([\w-]+):\n((?:    .*\n)+)", TEXT.partition("\noutputs:")[0], re.MULTILINE):
        default = re.search(r"^    default: (.*)$", body, re.MULTILINE)
        inputs[name] = default[1] if default else ""
    steps = []
    for part in TEXT.partition("  steps:\n")[2].split("    - ")[1:]:
        env = dict(re.findall(r"^        (\w+): (.*)$", part.partition("run: |")[0], re.MULTILINE))
        env = {name: value for name, value in env.items() if name.isupper()}
        (block,) = BLOCK.findall(part)
        run = re.sub(r"^ {8}", "", block[2], flags=re.MULTILINE)
        steps.append((re.match(r"id: (\w+)", part)[1], env, run))
    return inputs, steps


INPUTS, STEPS = read_action()


def test_reading_by_hand_is_reading_as_yaml():
    yaml = pytest.importorskip("yaml")
    table = yaml.safe_load(TEXT)
    assert {name: str(body.get("default", "")) for name, body in table["inputs"].items()} == INPUTS
    steps = table["runs"]["steps"]
    assert [(step["id"], step["env"], step["run"].strip()) for step in steps] == [
        (i, e, r.strip()) for i, e, r in STEPS
    ]
    assert table["runs"]["using"] == "composite"
    assert all(step["shell"] == "bash" for step in steps)


def test_inputs_are_never_pasted_into_a_script():
    for _, _, run in STEPS:
        assert "${{" not in run


def test_what_is_installed_is_what_the_project_asks_for():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    named = re.findall(r"'(\w[^']*[<>=][^']*)'", STEPS[0][2].partition("version-check")[2])
    assert len(named) == 5
    assert set(named) <= set(wanted)


@pytest.fixture
def action(load_helper, tmp_path):
    """``action(**inputs)``: the gate step; exit code, stdout, and its outputs."""
    sample = load_helper("reports/sample_report.py").sample_report
    load_helper("reports/paired_reports.py").write_pair(tmp_path, sample)
    outputs, summary = tmp_path / "outputs", tmp_path / "summary"

    def run(**given: str):
        values = INPUTS | {name.replace("_", "-"): value for name, value in given.items()}
        places = {f"inputs.{name}": value for name, value in values.items()}
        places["steps.install.outputs.python"] = sys.executable
        (_, env, script) = STEPS[1]
        env = {name: re.sub(r"\$\{\{ (\S+) \}\}", lambda m: places[m[1]], value) for name, value in env.items()}
        for file in (outputs, summary):
            file.write_text("")
        (tmp_path / "step.sh").write_text(script)
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "step.sh"],
            cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path)), "GITHUB_OUTPUT": str(outputs),
                 "GITHUB_STEP_SUMMARY": str(summary), **env},
        )  # fmt: skip
        table = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
        return done.returncode, done.stdout, table, summary.read_text()

    return run


def test_gate_that_passes(action, tmp_path):
    rules = {"min": "sparsity=0.9\n\n  clean_accuracy=0.5", "equal": "attack_health=ok", "max": "bytes=2e7"}
    code, said, outputs, summary = action(report="branch", max_drop="clean_accuracy=0.06", baseline="main", **rules)
    assert code == 0, said
    assert said.splitlines()[-1] == "GATE PASSED"
    assert (outputs["result"], outputs["junit"]) == ("passed", "rprune-gate.xml")
    assert float(outputs["sparsity"]) > 0.9
    assert summary.startswith("### rprune gate: passed")
    assert len(ElementTree.parse(tmp_path / "rprune-gate.xml").findall(".//testcase")) == 5


def test_gate_that_fails(action, tmp_path):
    (tmp_path / "my gate.toml").write_text('[[gate]]\nmetric = "robust_accuracy"\nmax_drop = 0.02\n')
    code, said, outputs, summary = action(report="branch", policy="my gate.toml", baseline="main", junit="ci/a b.xml")
    assert code == 1
    assert said.startswith("::error file=my gate.toml,line=1,title=rprune gate%3A robust_accuracy drop")
    assert (outputs["result"], outputs["junit"]) == ("failed", "ci/a b.xml")
    assert (tmp_path / "ci" / "a b.xml").exists()
    assert "### rprune gate: failed" in summary
    assert action(report="branch", policy="my gate.toml", baseline="main", junit="ci/a b.xml")[0] == 1  # again


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"report": "branch"}, 2),
        ({"report": "none", "min": "sparsity=0.9"}, 3),
        ({"report": "branch", "min": "sparsity=0.9", "bound": "upper"}, 2),
        ({"report": "--help", "min": "sparsity=0.9"}, 3),  # a path, whatever it looks like
        ({"report": "$(touch trap)", "min": "sparsity=$(touch trap)"}, 2),
    ],
)
def test_mistakes_have_their_own_codes(action, tmp_path, given, code):
    found, said, outputs, _ = action(**given)
    assert found == code, said
    assert "junit" not in outputs
    assert outputs.get("result", "error") == "error"
    assert not (tmp_path / "trap").exists()


def test_changed_evidence_has_its_own_code(action, tmp_path):
    (tmp_path / "main" / "evidence" / "samples.csv").write_text("x")
    code, said, outputs, _ = action(report="branch", max_drop="clean_accuracy=0.1", baseline="main")
    assert code == 5
    assert said.startswith("::error title=rprune gate::")
    assert outputs == {"result": "error"}


def test_policy_by_point(action):
    assert action(report="branch", max_drop="clean_accuracy=0.015", baseline="main")[0] == 1
    assert action(report="branch", max_drop="clean_accuracy=0.015", baseline="main", bound="point")[0] == 0
