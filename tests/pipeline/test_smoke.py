"""Recipes cut down to a minute: the same chain with the least of everything, marked from end to end."""

from __future__ import annotations

import pytest

from rprune.attacks.base import ATTACKS
from rprune.attacks.suites import SUITES, suite
from rprune.data.sources import load_data
from rprune.errors import UsageError
from rprune.objectives.base import OBJECTIVES
from rprune.pipeline.artifact import load_artifact
from rprune.pipeline.bench import Bench, Silent
from rprune.pipeline.certifying import smoothing_of
from rprune.pipeline.recipe import DataSection, PruneStage, read_recipe, shipped_recipes
from rprune.pipeline.run import Runner
from rprune.pipeline.single import Request, open_model
from rprune.pipeline.smoke import SAMPLES, weakened
from rprune.pipeline.stages import epochs_of, run_stage
from rprune.threat import ThreatModel

RECIPE = """
rprune = 1
name = "small"
policy = "gate.toml"
[data]
source = "digits"
[[stage]]
kind = "train"
objective = { name = "trades", beta = 3.0 }
epochs = 30
warmup = 5
[[stage]]
kind = "prune"
sparsity = 0.5
[[stage]]
kind = "quantize"
mode = "qat"
[[stage]]
kind = "certify"
[[stage]]
kind = "export"
suite = "aa-standard"
"""


@pytest.fixture
def read(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return lambda *settings: read_recipe(tmp_path / "recipe.toml", settings)


def test_what_is_named_stays_and_what_takes_time_is_cut(read):
    whole, cut = read(), read("smoke=true")
    assert not whole.smoke
    assert (cut.smoke, cut.name, cut.data.limit) == (True, "small-smoke", SAMPLES)
    assert [stage.kind for stage in cut.stage] == [stage.kind for stage in whole.stage]
    assert [epochs_of(stage) for stage in cut.stage] == [1, 1, 1, 0, 0]
    train, pruned, _, certify, export = cut.stage
    assert (train.objective["name"], train.objective["beta"], train.objective["attack"]["steps"]) == ("trades", 3.0, 1)
    assert train.warmup == pytest.approx(5 / 30)
    assert (pruned.sparsity, pruned.method, pruned.objective) == (0.5, "harp", None)
    assert (certify.n0, certify.n, certify.radius) == (10, 100, None)
    assert [a.label for a in suite(export.suite, cut.suites)] == [a.label for a in SUITES["aa-standard"]]
    assert not export.health


def test_limits_of_the_recipe_that_are_smaller_stay(read):
    cut = read(
        "smoke=true", "data.limit=12", "stage.export.limit=3", "stage.certify.limit=1", "stage.train.batch_size=4"
    )
    assert (cut.data.limit, cut.stage[-1].limit, cut.stage[-2].limit, cut.stage[0].batch_size) == (12, 3, 1, 4)


def test_few_draws_reach_the_radius_that_is_left(read):
    cut = read("smoke=true", "stage.certify.radius=0.5", "stage.certify.sigma=0.25").stage[-2]
    assert cut.radius < smoothing_of(cut, ThreatModel("linf", "0.1"), 64)[0].reach(64)
    assert read("smoke=true", "stage.certify.radius=0.1").stage[-2].radius == 0.1


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_can_be_cut(name):
    assert read_recipe(shipped_recipes()[name], ["smoke=true"]).smoke


@pytest.mark.parametrize("name", sorted(OBJECTIVES.all()))
def test_every_objective_can_be_cut(read, name):
    cut = read("smoke=true", f'stage.train.objective="{name}"').stage[0].objective
    built = OBJECTIVES.build(cut, threat=ThreatModel("linf", "0.1"))
    assert cut["name"] == name
    assert built.attack_used is None or built.attack_used.queries() <= 2


@pytest.mark.parametrize("name", sorted(SUITES))
def test_every_suite_can_be_cut_and_written_down(name):
    for attack in SUITES[name]:
        less = weakened(attack)
        assert less.queries() < attack.queries() or less == attack
        assert ATTACKS.build(ATTACKS.describe(less)) == less
    assert weakened(SUITES["aa-quant"][2]).attack.steps == 1


@pytest.mark.parametrize("setting", ["stage.export.suite=aa-lit", "stage.train.objective=trade"])
def test_misspelt_names_are_found(read, setting):
    with pytest.raises(UsageError) as error:
        read("smoke=true", setting)
    assert "did you mean" in error.value.hint


def test_a_limit_takes_the_same_samples_of_every_split():
    whole, first, again = load_data("digits"), load_data("digits", limit=50), load_data("digits", limit=50)
    assert [len(first.split(name)) for name in ("train", "validation", "test")] == [50, 50, 50]
    assert first.digest == again.digest != whole.digest
    assert load_data("digits", limit=10**6).digest == whole.digest
    assert len(set(first.train.labels.tolist())) == 10


def test_the_mark_stays_with_what_is_made_of_a_smoke_model(trained, tmp_path):
    """A model of a smoke run, exported by a command of its own, is not passed off as another."""
    from rprune.pipeline.artifact import save_artifact

    bench = Bench.open(DataSection(source="digits", limit=20), None, 0, "cpu")
    bench.smoke = True
    marked = run_stage(bench, PruneStage(method="lwm", sparsity=0.5), trained)
    assert marked.metadata.smoke
    save_artifact(marked, tmp_path / "m.pt")
    opened, found = open_model(tmp_path / "m.pt", Request(), Silent())
    assert opened.smoke
    assert found.metadata.data.limit == opened.section.limit == 20
    assert len(opened.data.test) == 20


def test_a_whole_run_is_marked_and_verified(tmp_path):
    from rprune.reports.gate import judge, policy_of
    from rprune.reports.html import render_html
    from rprune.reports.text import SMOKE
    from rprune.reports.verify import verify

    (tmp_path / "recipe.toml").write_text(RECIPE.replace('mode = "qat"', "").replace("aa-standard", "pgd10"))
    (tmp_path / "gate.toml").write_text('[[gate]]\nmetric = "sparsity"\nvalue = 0.5\n')
    recipe = read_recipe(tmp_path / "recipe.toml", ["smoke=true", "data.limit=16", "stage.train.objective=benign"])
    outcomes = Runner(recipe, tmp_path, tmp_path / "out", Silent(), "cpu").run()
    report = outcomes[-1].report
    assert (report.smoke, report.data.limit, report.data.samples, report.name) == (True, 16, 16, "small-smoke")
    assert all(load_artifact(outcome.folder).metadata.smoke for outcome in outcomes[:3])
    assert (report.gate.result, [rule.metric for rule in report.gate.rules]) == ("failed", ["smoke", "sparsity"])
    found = verify(tmp_path / "out" / "export")
    assert (found.passed, found.smoke) == (True, True)
    page = render_html(report)
    assert page.index(SMOKE) < page.index("Clean accuracy")
    easy = policy_of({"gate": [{"metric": "sparsity", "value": 0.1}]}, "test")
    assert judge(report, easy).result == "failed"
    assert judge(report.model_copy(update={"smoke": False}), easy).result == "passed"
