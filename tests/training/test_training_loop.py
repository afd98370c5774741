"""The training loop: schedules, selection, history, resume, and what it leaves alone."""

import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from rprune.errors import InputError, UsageError, WorkError
from rprune.objectives.base import Loss, Objective
from rprune.objectives.benign import Benign
from rprune.objectives.pgd_at import PGDAT
from rprune.pipeline.states import find_state
from rprune.pruning.base import Pruner
from rprune.threat import ThreatModel
from rprune.training.loop import Settings, fit
from rprune.training.schedules import SCHEDULES, schedule
from rprune.training.state import load_state, save_state

SETTINGS = Settings(epochs=3, batch_size=16, lr=0.05)


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def run(tiny, settings=SETTINGS, objective=None, model=None, **options):
    model = tiny.net() if model is None else model
    found = fit(model, Pruner(model), objective or Benign(), tiny.data(40), settings, **options)
    return model, found


def test_lr_cosine_ref(vectors):
    for key, table in vectors["lr_cosine_ref"].items():
        _, lr, epochs = key.split()
        for epoch, expected in table.items():
            factor = schedule("cosine-by-epoch")(int(epoch), 0.7, int(epochs[1:]))
            assert float(lr[2:]) * factor == pytest.approx(expected, abs=1e-12), (key, epoch)


def test_cosine_falls_from_one_to_zero_by_steps():
    values = [schedule("cosine")(epoch, step / 4, 5) for epoch in range(5) for step in range(4)]
    assert values[0] == 1
    assert values == sorted(values, reverse=True)
    assert schedule("cosine")(2, 0.5, 5) == pytest.approx(0.5)
    assert schedule("cosine")(4, 1.0, 5) == pytest.approx(0, abs=1e-12)


def test_constant():
    assert {schedule("constant")(epoch, 0.3, 9) for epoch in range(9)} == {1.0}


def test_unknown_schedule_offers_the_nearest(tiny):
    with pytest.raises(UsageError, match="unknown schedule 'cosin'") as caught:
        run(tiny, replace(SETTINGS, schedule="cosin"))
    assert "did you mean 'cosine'" in caught.value.hint


@pytest.mark.parametrize("name", SCHEDULES)
def test_optimizer_steps_at_the_rates_of_the_schedule(tiny, monkeypatch, name):
    rates = []
    original = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    run(tiny, replace(SETTINGS, schedule=name))
    assert rates == [0.05 * schedule(name)(epoch, step / 3, 3) for epoch in range(3) for step in range(3)]


@dataclass(frozen=True)
class Diverging(Objective):
    """Turns to ``value`` in a given epoch."""

    at: float
    value: float = float("nan")

    def __call__(self, net, x, y, progress, noise):  # noqa: ARG002
        logits = net(x)
        loss = nn.functional.cross_entropy(logits, y)
        yield lambda: Loss(loss * self.value if progress >= self.at else loss, logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(tiny, tmp_path, value):
    epochs = []
    file = tmp_path / "state.pt"
    with pytest.raises(WorkError, match="epoch 2") as caught:
        run(tiny, objective=Diverging(1 / 3, value), on_epoch=lambda log: epochs.append(log.epoch), state_file=file)
    assert "learning rate" in caught.value.hint
    assert epochs == [1]
    assert f"epoch 1 is kept in {file}" in caught.value.message
    state = load_state(file)
    assert len(state["history"]) == 1
    kept = find_state(state, torch.Tensor).state  # what another command may start from
    assert kept.keys() == tiny.net().state_dict().keys()
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())


def test_weights_that_are_not_finite_behind_a_finite_loss(tiny, tmp_path, monkeypatch):
    """The last step of an epoch spoils them: no loss of that epoch shows it."""
    step, steps = torch.optim.SGD.step, []

    def spoiling(self, *arguments):
        steps.append(step(self, *arguments))
        if len(steps) == 6:
            self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.SGD, "step", spoiling)
    with pytest.raises(WorkError, match="weights are not finite in epoch 2; epoch 1 is kept"):
        run(tiny, state_file=tmp_path / "state.pt")
    assert len(load_state(tmp_path / "state.pt")["history"]) == 1


def test_random_states_of_the_caller_are_untouched(tiny, tmp_path):
    torch.manual_seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  not Python's: beartype draws from it
    objective = PGDAT(threat=ThreatModel.of("linf", "0.01"))
    run(tiny, objective=objective, augment="crop-flip", state_file=tmp_path / "s.pt")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_random_state_is_put_back_after_an_error(tiny):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with pytest.raises(WorkError):
        run(tiny, objective=Diverging(0.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_result_does_not_depend_on_the_callers_random_state(tiny):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 5))
        with torch.no_grad():
            model[2].weight.fill_(0.01)
            model[2].bias.zero_()
        states.append(run(tiny, model=model)[0].state_dict())
    assert tiny.same_bits(*states)


def test_other_seed_other_weights(tiny):
    first, second, third = (run(tiny, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert tiny.same_bits(first, second)
    assert not tiny.same_bits(first, third)


def test_history_has_one_entry_an_epoch(tiny):
    seen = []
    _, found = run(tiny, validate=lambda net: {"score": 0.5, "other": 2.0}, on_epoch=seen.append)
    assert found.history == seen
    assert [log.epoch for log in found.history] == [1, 2, 3]
    assert all(log.epochs == 3 for log in found.history)
    assert all({"loss", "train_accuracy", "score", "other"} <= set(log.values) for log in found.history)
    assert all(0 <= log.values["train_accuracy"] <= 1 for log in found.history)


def test_logged_loss_is_the_mean_over_samples(tiny):
    model = tiny.net().eval()
    data = tiny.data(40)
    batch = next(iter(data.ordered(40)))

    @dataclass(frozen=True)
    class InEvalMode(Objective):
        def __call__(self, net, x, y, progress, noise):  # noqa: ARG002
            net.eval()
            logits = net(x)
            yield lambda: Loss(nn.functional.cross_entropy(logits, y), logits)

    with torch.no_grad():
        logits = model(batch.x)
    _, found = run(tiny, Settings(epochs=1, batch_size=16, lr=1e-12), InEvalMode(), model)
    values = found.history[0].values
    assert values["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, batch.y)), rel=1e-5)
    assert values["train_accuracy"] == pytest.approx(float((logits.argmax(1) == batch.y).float().mean()))


def scored(scores, states):
    """A validation that gives these scores in turn and keeps the states it has seen."""
    left = iter(scores)

    def validate(net):
        states.append({name: t.clone() for name, t in net.state_dict().items()})
        return {"score": next(left)}

    return validate


@pytest.mark.parametrize(
    ("select", "scores", "selected"),
    [
        ("best", [0.2, 0.9, 0.4], 2),
        ("best", [0.9, 0.2, 0.4], 1),
        ("best", [0.5, 0.9, 0.9], 3),  # of equal ones the latest
        ("last", [0.9, 0.5, 0.1], 3),
    ],
)
def test_selected_state_is_restored(tiny, select, scores, selected):
    states = []
    model, found = run(tiny, replace(SETTINGS, select=select), validate=scored(scores, states))
    assert found.selected_epoch == selected
    assert found.score == scores[selected - 1]
    assert tiny.same_bits(model.state_dict(), states[selected - 1])
    assert not tiny.same_bits(states[0], states[-1])


def test_without_validation_the_last_epoch_is_taken(tiny):
    _, found = run(tiny)
    assert found.selected_epoch == 3


class NeverThere(Pruner):
    def within_budget(self):
        return False


class ThereInTheSecond(Pruner):
    epochs = 0

    def after_epoch(self, epoch):
        self.epochs = epoch + 1

    def within_budget(self):
        return self.epochs == 2


def test_only_states_within_the_budget_are_selected(tiny):
    for kind, expected in ((NeverThere, None), (ThereInTheSecond, 2)):
        for select in ("best", "last"):
            model, states = tiny.net(), []
            settings = replace(SETTINGS, select=select)
            validate = scored([0.9, 0.1, 0.95], states)
            found = fit(model, kind(model), Benign(), tiny.data(40), settings, validate=validate)
            assert found.selected_epoch == expected
            assert tiny.same_bits(model.state_dict(), states[(expected or 3) - 1])


@pytest.mark.parametrize("stop_after", [1, 2])
def test_resumed_is_uninterrupted(tiny, tmp_path, stop_after):
    class Stop(Exception):
        pass

    def stop(log):
        if log.epoch == stop_after:
            raise Stop

    def validate(net):
        with torch.no_grad():
            return {"score": float(net.fc.bias.sum())}

    options = {"augment": "crop-flip", "validate": validate, "seed": 5}
    objective = PGDAT(threat=ThreatModel.of("linf", "0.01"))
    expected = run(tiny, objective=objective, **options)
    file = tmp_path / "state.pt"
    with pytest.raises(Stop):
        run(tiny, objective=objective, state_file=file, on_epoch=stop, **options)
    seen = []
    model, found = run(
        tiny, objective=objective, state_file=file, on_epoch=lambda log: seen.append(log.epoch), **options
    )
    assert seen == list(range(stop_after + 1, 4))
    assert found == expected[1]
    assert tiny.same_bits(model.state_dict(), expected[0].state_dict())


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_damaged_state_file(tiny, tmp_path, damage):
    file = tmp_path / "state.pt"
    run(tiny, replace(SETTINGS, epochs=1), state_file=file)
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "text": b"not a state", "truncated": whole[: len(whole) // 2]}[damage])
    with pytest.raises(InputError, match="cannot resume") as caught:
        run(tiny, state_file=file)
    assert "--no-resume" in caught.value.hint


def test_state_file_with_code_in_it_is_refused(tmp_path):
    file = tmp_path / "state.pt"
    torch.save({"now": print}, file)
    with pytest.raises(InputError, match="cannot resume"):
        load_state(file)


def test_state_file_that_is_not_a_state(tmp_path):
    file = tmp_path / "state.pt"
    torch.save([1, 2], file)
    with pytest.raises(InputError):
        load_state(file)


def test_state_goes_to_disk_and_back(tmp_path):
    state = {"a": torch.arange(3), "b": {"c": [1, 2.5, None, "x", True]}}
    save_state(tmp_path / "deep" / "state.pt", state)
    back = load_state(tmp_path / "deep" / "state.pt")
    assert torch.equal(back.pop("a"), state.pop("a"))
    assert back == state
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["state.pt"]


def test_zero_epochs_change_nothing(tiny):
    model, found = run(tiny, replace(SETTINGS, epochs=0))
    assert tiny.same_bits(model.state_dict(), tiny.net().state_dict())
    assert (found.history, found.selected_epoch, found.score) == ([], None, None)


def test_every_yielded_loss_is_one_step(tiny):
    @dataclass(frozen=True)
    class Twice(Objective):
        def __call__(self, net, x, y, progress, noise):  # noqa: ARG002
            for _ in range(2):
                logits = net(x)
                yield functools.partial(Loss, nn.functional.cross_entropy(logits, y), logits)

    class Counting(Pruner):
        steps = 0

        def after_step(self):
            self.steps += 1

    model = tiny.net()
    pruner = Counting(model)
    fit(model, pruner, Twice(), tiny.data(40), SETTINGS)
    assert pruner.steps == 3 * 3 * 2


def test_loss_goes_down(tiny):
    _, found = run(tiny, replace(SETTINGS, epochs=8))
    assert found.history[-1].values["loss"] < 0.5 * found.history[0].values["loss"]
