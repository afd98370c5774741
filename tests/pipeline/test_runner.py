"""Runs of a recipe: reuse, locks, policies, and kill -9."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rprune.errors import InputError, UsageError
from rprune.files import stored_key, write_json
from rprune.pipeline import run as run_module
from rprune.pipeline.artifact import save_artifact
from rprune.pipeline.bench import Silent
from rprune.pipeline.recipe import read_recipe
from rprune.pipeline.run import Runner
from rprune.reports.gate import read_policy
from rprune.reports.schema import read_report
from rprune.reports.verify import verify

RECIPE = """
rprune = 1
name = "small"
policy = "gate.toml"
[data]
source = "digits"
[threat]
eps = "0.03"
[[stage]]
kind = "train"
objective = "benign"
epochs = 2
batch_size = 32
[[stage]]
kind = "prune"
method = "harp"
sparsity = 0.5
epochs = 2
[[stage]]
kind = "finetune"
epochs = 2
[[stage]]
kind = "quantize"
[[stage]]
kind = "certify"
limit = 20
n = 100
smoothing_limit = 5
[[stage]]
kind = "export"
health = false
suite = "pgd10"
limit = 40
"""
GATE = '[[gate]]\nmetric = "sparsity"\nvalue = 0.5\n'
KINDS = ["train", "prune", "finetune", "quantize", "certify", "export"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the recipe, its policy, and a finished run in ``out``."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "gate.toml").write_text(GATE)
    runner(folder, folder / "out").run()
    return folder


@pytest.fixture
def copy(home, tmp_path):
    """A copy of it to change."""
    shutil.copytree(home, tmp_path / "copy")
    return tmp_path / "copy"


def runner(folder: Path, out: Path, *settings: str) -> Runner:
    return Runner(read_recipe(folder / "recipe.toml", settings), folder, out, Silent(), "cpu")


def times(out: Path) -> dict[str, int]:
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.is_file()}


def reused(outcomes) -> list[bool]:
    return [outcome.reused for outcome in outcomes]


def test_suite_of_ones_own_is_part_of_the_export(copy):
    (copy / "own.py").write_text("def attack(logits_fn, x, y):\n    return x\n")
    own = f'suites = {{ mine = ["fgsm", "{copy / "own.py"}:attack", {{ name = "pgd", steps = 3 }}] }}\n'
    (copy / "recipe.toml").write_text(RECIPE.replace("[data]", f"{own}[data]"))
    said = "stage.export.suite=mine"
    assert [done for _, _, done in runner(copy, copy / "out", said).plan()] == [True] * 5 + [False]
    report = runner(copy, copy / "out", said).run()[-1].report
    rows = report.claim("robust_accuracy").attacks
    assert [row.name for row in rows if row.kind == "white-box"] == ["fgsm", "attack", "pgd"]
    assert all(done for _, _, done in runner(copy, copy / "out", said).plan())
    (copy / "own.py").write_text("def attack(logits_fn, x, y):\n    return 1 * x\n")
    assert not runner(copy, copy / "out", said).plan()[-1][2]


def test_first_run_makes_every_stage(home):
    names = {p.name for p in (home / "out").iterdir()}
    assert names == {
        "01-train", "02-prune", "03-finetune", "04-quantize", "05-certify", "export", "recipe.lock.json",
    }  # fmt: skip
    for name in ("01-train", "02-prune", "03-finetune"):
        rows = [json.loads(line) for line in (home / "out" / name / "log.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1, 2]
        assert not (home / "out" / name / "resume.pt").exists()


def test_second_run_reuses_everything(copy):
    before = times(copy / "out")
    found = []
    outcomes = runner(copy, copy / "out").run(found.append)
    assert reused(outcomes) == [True] * 6
    assert [outcome.kind for outcome in found] == KINDS
    assert times(copy / "out") == before


def test_plan_tells_what_is_done_and_writes_nothing(copy):
    before = times(copy / "out")
    assert [done for _, _, done in runner(copy, copy / "out").plan()] == [True] * 6
    plan = runner(copy, copy / "out", "stage.finetune.lr=0.02").plan()
    assert [(kind, done) for kind, _, done in plan] == list(zip(KINDS, [True] * 2 + [False] * 4, strict=True))
    assert [done for _, _, done in runner(copy, copy / "new").plan()] == [False] * 6
    assert times(copy / "out") == before
    assert not (copy / "new").exists()


def test_changed_finetune_repeats_it_and_what_follows(copy):
    before = times(copy / "out")
    outcomes = runner(copy, copy / "out", "stage.finetune.lr=0.02").run()
    assert reused(outcomes) == [True, True, False, False, False, False]
    after = times(copy / "out")
    for name in before:
        early = name.startswith(("01-", "02-"))
        assert (after[name] == before[name]) == early, name
    assert outcomes[-1].report.lineage[2].config["lr"] == 0.02


@pytest.mark.parametrize(
    ("setting", "kept"), [("stage.export.limit=30", 5), ("stage.certify.n=120", 4), ("name=other", 5), ("seed=1", 0)]
)
def test_only_what_depends_on_a_change_is_repeated(copy, setting, kept):
    plan = runner(copy, copy / "out", setting).plan()
    assert [done for _, _, done in plan] == [True] * kept + [False] * (6 - kept)


def test_other_code_reuses_nothing(copy, monkeypatch):
    monkeypatch.setattr(run_module, "source_digest", lambda: "other")
    assert not any(done for _, _, done in runner(copy, copy / "out").plan())


def test_other_policy_repeats_the_export_alone(copy):
    (copy / "gate.toml").write_text(GATE.replace("0.5", "0.6"))
    outcomes = runner(copy, copy / "out").run()
    assert reused(outcomes) == [True] * 5 + [False]
    assert outcomes[-1].report.gate.result == "failed"


def test_policy_judges_the_report(home):
    report = runner(home, home / "out").run()[-1].report
    assert report.gate.result == "passed"
    lock = json.loads((home / "out" / "recipe.lock.json").read_text())
    assert lock["policy_sha256"] == report.policy_sha256 == report.gate.policy_sha256
    assert lock["recipe"] == report.recipe


DROP = '\n[[gate]]\nmetric = "clean_accuracy"\nartifact = "onnx-int8"\nmax_drop = 0.2\n'


def against(folder: Path, baseline: Path | None, *settings: str) -> Runner:
    recipe = read_recipe(folder / "recipe.toml", settings)
    return Runner(recipe, folder, folder / "out", Silent(), "cpu", baseline=baseline)


def test_drops_are_judged_against_a_baseline_that_is_locked(home, copy):
    (copy / "gate.toml").write_text(GATE + DROP)
    old = read_report(home / "out" / "export")
    outcomes = against(copy, home / "out" / "export").run()
    assert reused(outcomes) == [True] * 5 + [False]
    gate = outcomes[-1].report.gate
    assert (gate.result, gate.rules[-1].drop, gate.baseline.report) == ("passed", True, old.id)
    assert json.loads((copy / "out" / "recipe.lock.json").read_text())["baseline"] == old.id
    assert reused(against(copy, home / "out" / "export").run()) == [True] * 6
    assert not against(copy, copy / "out" / "export").plan()[-1][2]  # with another baseline it is another gate
    policy = read_policy(copy / "gate.toml", baseline=True)
    found = verify(copy / "out" / "export", "static", policy)
    assert found.passed
    assert f"drops taken as told: hold them against report {old.id[:12]}" in next(
        check.detail for check in found.checks if check.name == "gate"
    )
    report = outcomes[-1].report
    easier = [*gate.rules[:-1], gate.rules[-1].model_copy(update={"threshold": 0.5})]
    forged = report.model_copy(update={"gate": gate.model_copy(update={"rules": easier})}).sealed()
    write_json(copy / "out" / "export" / "report.json", forged.to_json())
    assert not verify(copy / "out" / "export", "static", policy).passed


def test_baselines_that_make_no_sense_are_refused_before_any_work(home, copy):
    with pytest.raises(UsageError, match="no rule compares"):
        against(copy, home / "out" / "export")
    (copy / "gate.toml").write_text(GATE + DROP)
    with pytest.raises(UsageError) as error:
        against(copy, None)
    assert "--baseline REPORT" in error.value.hint
    with pytest.raises(InputError, match="of other test data"):
        against(copy, home / "out" / "export", "data.limit=20")
    assert against(copy, home / "out" / "export", "smoke=true").policy.needs_baseline
    (copy / "gate.toml").write_text(GATE + DROP + 'op = "<="\n')
    with pytest.raises(UsageError, match="a drop has no op"):
        against(copy, home / "out" / "export")


def test_lock_comes_before_the_first_stage(home, tmp_path, monkeypatch):
    seen = []

    def stop(*_arguments):
        seen.append(json.loads((tmp_path / "out" / "recipe.lock.json").read_text()))
        raise InputError("stop")

    monkeypatch.setattr(run_module, "run_stage", stop)
    with pytest.raises(InputError, match="stop"):
        runner(home, tmp_path / "out").run()
    assert seen[0]["recipe"]["name"] == "small"
    assert seen[0]["policy"]["gate"][0]["metric"] == "sparsity"
    assert {"train", "validation", "test"} == set(seen[0]["data"]["sha256"])
    assert "locked_at" in seen[0]


def test_lock_keeps_its_time_until_something_changes(copy):
    lock = copy / "out" / "recipe.lock.json"
    old = json.loads(lock.read_text()) | {"locked_at": "2020-01-01T00:00:00Z"}
    lock.write_text(json.dumps(old))
    runner(copy, copy / "out").run()
    assert json.loads(lock.read_text()) == old
    (copy / "gate.toml").write_text(GATE.replace("0.5", "0.4"))
    runner(copy, copy / "out").run()
    assert json.loads(lock.read_text())["locked_at"] != old["locked_at"]


def test_damaged_lock_is_an_input_error(copy):
    for text in ("{", "[]", "3"):
        (copy / "out" / "recipe.lock.json").write_text(text)
        with pytest.raises(InputError, match="damaged"):
            runner(copy, copy / "out").run()


def test_partial_folder_of_other_settings_is_not_resumed(copy):
    shutil.rmtree(copy / "out" / "03-finetune")
    partial = copy / "out" / "03-finetune.partial"
    partial.mkdir()
    (partial / "key.json").write_text('{"key": "of something else"}')
    (partial / "resume.pt").write_bytes(b"would fail to load")
    outcomes = runner(copy, copy / "out").run()
    assert reused(outcomes)[:3] == [True, True, False]
    assert not partial.exists()
    assert not (copy / "out" / "03-finetune" / "resume.pt").exists()


def test_damaged_state_of_this_run_is_an_input_error(copy):
    folder, partial = copy / "out" / "03-finetune", copy / "out" / "03-finetune.partial"
    key = stored_key(folder)
    shutil.rmtree(folder)
    partial.mkdir()
    (partial / "key.json").write_text(json.dumps({"key": key}))
    (partial / "resume.pt").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"resume\.pt"):
        runner(copy, copy / "out").run()


def test_tampered_stage_is_not_built_upon(copy):
    from rprune.errors import IntegrityError

    with (copy / "out" / "02-prune" / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(IntegrityError):
        runner(copy, copy / "out").run()


def test_reruns_give_the_same_bytes(home, tmp_path):
    runner(home, tmp_path / "again").run()
    for name in (
        "01-train/model.safetensors", "02-prune/masks.safetensors", "03-finetune/model.safetensors",
        "04-quantize/quantization.safetensors", "export/model.onnx", "export/model.int8.onnx",
        "export/evidence/samples.csv", "export/evidence/adversarial.safetensors",
    ):  # fmt: skip
        assert (tmp_path / "again" / name).read_bytes() == (home / "out" / name).read_bytes(), name


@pytest.mark.slow
def test_start_from_a_checkpoint(trained, tmp_path):
    text = RECIPE.replace('kind = "train"\nobjective = "benign"\nepochs = 2\nbatch_size = 32\n[[stage]]\n', "")
    (tmp_path / "gate.toml").write_text(GATE)
    for name, content in (("own.pt", None), ("foreign.pt", trained.state)):
        if content is None:
            save_artifact(trained, tmp_path / name)
        else:
            torch.save(content, tmp_path / name)
        (tmp_path / "recipe.toml").write_text(f"checkpoint = {str(tmp_path / name)!r}\n{text}")
        settings = ("stage.prune.method=lwm", "stage.prune.objective=benign", "stage.finetune.epochs=1")
        out = tmp_path / name.removesuffix(".pt")
        outcomes = runner(tmp_path, out, *settings).run()
        assert [outcome.kind for outcome in outcomes] == KINDS[1:]
        assert outcomes[0].folder.name == "01-prune"
        sparsity = outcomes[-1].report.sparsity
        assert sparsity.kept == sparsity.budget <= 11124  # weights of dead channels are gone
        assert reused(runner(tmp_path, out, *settings).run()) == [True] * 5


@pytest.mark.parametrize(
    "setting",
    [
        "stage.train.objective=trade", "stage.train.schedule=cosin", "stage.prune.method=harpp",
        "stage.export.suite=pgd11", "model.arch=cnn-smal", "policy=none.toml", "stage.prune.sparsity=0.99999",
        "stage.prune.method.allocation=unifrm", "stage.prune.method.initial_scores=scald",
    ],
)  # fmt: skip
def test_mistakes_are_found_before_any_work(home, tmp_path, setting):
    with pytest.raises(UsageError):
        runner(home, tmp_path / "out", setting)
    assert not (tmp_path / "out").exists()


LONG = RECIPE.replace('kind = "finetune"\nepochs = 2', 'kind = "finetune"\nepochs = 40')


def start(folder: Path, out: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rprune", "run", "recipe.toml", "-o", out, "--device", "cpu", "-q"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
def test_killed_run_ends_with_the_same_bytes(tmp_path):
    (tmp_path / "recipe.toml").write_text(LONG)
    (tmp_path / "gate.toml").write_text(GATE)
    whole = start(tmp_path, "whole")
    killed = start(tmp_path, "killed")
    state = tmp_path / "killed" / "03-finetune.partial" / "resume.pt"
    stamps: set[int] = set()
    deadline = time.monotonic() + 100
    while len(stamps) < 5:
        assert time.monotonic() < deadline, "the fine-tuning stage never wrote its state"
        assert killed.poll() is None, "the run ended before it could be killed"
        if state.exists():
            stamps.add(state.stat().st_mtime_ns)
        time.sleep(0.01)
    killed.kill()
    assert killed.wait(20) == -signal.SIGKILL
    done = len(torch.load(state, weights_only=True)["history"])
    assert 4 <= done < 40
    assert not (tmp_path / "killed" / "03-finetune").exists()

    again = start(tmp_path, "killed")
    assert again.wait(150) == 0
    assert whole.wait(150) == 0
    for name in ("03-finetune/model.safetensors", "export/model.int8.onnx", "export/model.onnx"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((tmp_path / "killed").glob("*.partial"))
    log = (tmp_path / "killed" / "03-finetune" / "log.jsonl").read_text()
    assert log == (tmp_path / "whole" / "03-finetune" / "log.jsonl").read_text()
    assert len(log.splitlines()) == 40
