"""A run within a time: how many epochs fit, and that what was decided stays decided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rprune.pipeline import anytime as anytime_module
from rprune.pipeline.anytime import FILE, LEAST, Anytime, fitted, shortened
from rprune.pipeline.bench import Silent
from rprune.pipeline.cost import Cost
from rprune.pipeline.recipe import FinetuneStage, PruneStage, QuantizeStage, TrainStage, read_recipe
from rprune.pipeline.run import Runner
from rprune.reports.schema import read_report
from rprune.training import schedules
from rprune.training.world import World

RECIPE = """
rprune = 1
name = "quick"
[data]
source = "digits"
[[stage]]
kind = "train"
objective = "benign"
epochs = 8
warmup = 2
[[stage]]
kind = "prune"
method = "harp"
sparsity = 0.5
epochs = 6
[[stage]]
kind = "export"
health = false
suite = "pgd10"
limit = 5
"""


def priced(seconds: float, once: float = 0.0, at_most: bool = False) -> Cost:
    return Cost(0 if at_most else 1, 0.0, seconds, 0, seconds if at_most else once, at_most)


COSTS = st.builds(
    lambda once, each, at_most: priced(once + each, once, at_most), *[st.floats(0, 1e4)] * 2, st.booleans()
)


@given(st.lists(st.tuples(COSTS, st.integers(0, 200)), min_size=1, max_size=6), st.floats(1, 1e5))
def test_what_fits(stages, seconds: float) -> None:
    costs = [cost if count else priced(cost.seconds, cost.seconds) for cost, count in stages]
    epochs = [0 if cost.at_most else count for cost, (_, count) in zip(costs, stages, strict=True)]
    found = fitted(costs, epochs, seconds)
    assert all(min(count, 1) <= fit <= count for fit, count in zip(found, epochs, strict=True))
    more = fitted(costs, epochs, 2 * seconds)
    assert all(a <= b for a, b in zip(found, more, strict=True))
    spent = sum(
        cost.seconds if cost.at_most else cost.once + (cost.seconds - cost.once) * fit / max(count, 1)
        for cost, fit, count in zip(costs, found, epochs, strict=True)
    )
    reserved = sum(cost.seconds for cost in costs if cost.at_most)
    if all(fit > 1 or not count for fit, count in zip(found, epochs, strict=True)) and found != epochs:
        assert spent - reserved <= max(seconds - reserved, LEAST * seconds) * (1 + 1e-9)
    if sum(cost.seconds for cost in costs) <= seconds:
        assert found == epochs


def test_one_factor_for_all() -> None:
    costs = [priced(100, 10), priced(50), priced(4, 4), priced(30, at_most=True)]
    assert fitted(costs, [100, 20, 0, 0], 114) == [50, 10, 0, 0]  # 70 of 140 seconds
    assert fitted(costs, [100, 20, 0, 0], 40) == [max(1, int(100 * 6 / 140)), 1, 0, 0]  # half is for training


def test_what_is_counted_in_epochs_shrinks() -> None:
    stage = shortened(TrainStage(epochs=100, warmup=5, awp_from=75), 20)
    assert (stage.epochs, stage.warmup, stage.awp_from) == (20, 1.0, 15)
    assert shortened(PruneStage(sparsity=0.9, method="harp"), 5).epochs == 5  # 20 by itself
    assert shortened(QuantizeStage(mode="qat"), 10).epochs == 10


def test_what_a_method_or_its_schedule_counts_in_epochs_shrinks() -> None:
    admm = {"name": "robust-admm", "rho": 0.001, "every": 30}
    stage = shortened(PruneStage(sparsity=0.9, method=admm, epochs=100, schedule="thirds:30"), 10)
    assert stage.method == admm | {"every": 3}
    assert stage.schedule == "thirds:3"
    assert shortened(PruneStage(sparsity=0.9, method="robust-admm"), 5).method == "robust-admm", "none is named"
    assert shortened(PruneStage(sparsity=0.9, method="s2ap"), 4).method == {"name": "s2ap", "warmup": 1}
    one = PruneStage(sparsity=0.9, method=admm, epochs=100, schedule="thirds")
    assert shortened(one, 1).method == admm | {"every": 1}
    assert schedules.schedule(shortened(one, 1).schedule)(0, 0.5, 1) == 1
    assert shortened(one, 100) == one.model_copy(update={"schedule": "thirds:20"})


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_shortened_schedule_has_the_same_shape(name: str, share: float) -> None:
    whole, less = (schedules.schedule(text) for text in (name, schedules.shortened(name, share)))
    for epoch in range(0, 60, 10):
        if name != "cosine-by-epoch":  # which is one epoch late
            assert less(int(epoch * share), 0.0, int(60 * share)) == pytest.approx(whole(epoch, 0.0, 60))


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(anytime_module.time, "monotonic", lambda: Clock.now)
    return Clock


STAGES = (TrainStage(epochs=10), FinetuneStage(epochs=10))


def test_later_stages_take_what_is_left(tmp_path: Path, clock) -> None:
    costs = [priced(100), priced(100)]
    plan = Anytime(tmp_path, 100, STAGES, "recipe", World())
    assert plan.decide(0, lambda: costs).epochs == 5
    clock.now = 80  # it took longer than the trial said
    plan.passed()
    assert plan.decide(1, lambda: costs).epochs == 2
    clock.now = 0
    again = Anytime(tmp_path, 100, STAGES, "recipe", World())
    assert [again.known(index).epochs for index in range(2)] == [5, 2]
    assert again.spent == 80
    again.decide(0, lambda: pytest.fail("it was decided"))
    for other in (Anytime(tmp_path, 50, STAGES, "recipe", World()), Anytime(tmp_path, 100, STAGES, "x", World())):
        assert [other.known(index).epochs for index in range(2)] == [10, 10]


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    for text in ("", "[]", '{"key": 1}', '{"key": 1, "epochs": 3, "spent": 0}'):
        (tmp_path / FILE).write_text(text)
        assert Anytime(tmp_path, 100, STAGES, "recipe", World()).known(0) == STAGES[0]


def test_a_run_says_what_it_ran(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    recipe = read_recipe(tmp_path / "recipe.toml", [])

    def runner() -> Runner:
        return Runner(recipe, tmp_path, tmp_path / "out", Silent(), "cpu", 1e6)

    costs = [priced(8e6), priced(12e6), priced(9e9, at_most=True)]
    monkeypatch.setattr(Runner, "costs", lambda self: costs)
    assert runner().fitted(costs) == [1, 1, 0]
    monkeypatch.setattr(anytime_module, "LEAST", 6.0)  # of 20, later of 12
    first = runner().run()
    assert [outcome.reused for outcome in first] == [False] * 3
    report = read_report(tmp_path / "out" / "export")
    ran = {entry.stage: entry.config for entry in report.lineage}
    assert (ran["train"]["epochs"], ran["train"]["warmup"], ran["prune"]["epochs"]) == (2, 0.5, 2)
    assert [stage.get("epochs") for stage in report.recipe["stage"]] == [2, 2, None]
    monkeypatch.setattr(Runner, "costs", lambda self: pytest.fail("all was decided"))
    assert [done for _, _, done in runner().plan()] == [True] * 3
    assert [outcome.reused for outcome in runner().run()] == [True] * 3
    assert json.loads((tmp_path / "out" / FILE).read_text())["epochs"] == {"0": 2, "1": 2}
