"""What every registered pruning method must keep to, whoever wrote it."""

import copy
import json
import math
import re

import pytest
import torch

from rprune.attacks.pgd import PGD
from rprune.data.loaders import Resident
from rprune.errors import InputError, UsageError, WorkError
from rprune.export.onnx import float_model
from rprune.export.qdq import qdq_model
from rprune.export.session import OnnxClassifier, stored_weights
from rprune.models.graph import trace
from rprune.models.prunable import prunable
from rprune.objectives.benign import Benign
from rprune.pruning.base import METHODS, Context, Fixed, Method, Pruner, Scored
from rprune.pruning.budget import Budget
from rprune.pruning.hydra import ScorePruner
from rprune.pruning.masks import count
from rprune.pruning.reparametrised import Reparametrised
from rprune.quantization.ptq import quantize, simulated
from rprune.threat import ThreatModel
from rprune.training.loop import Settings, fit

OPTIONS = {
    "harp": {"gamma_step": 0.5},
    "harp-r": {"gamma_step": 0.5},
    "s2ap": {"host": {"name": "harp", "gamma_step": 0.5}, "warmup": 1},
}
"""Keyword arguments of methods whose defaults do not suit three epochs of two steps."""

EPOCHS = 3
SETTINGS = Settings(epochs=EPOCHS, batch_size=24, lr=0.5, momentum=0.9, weight_decay=5e-3)
every_method = pytest.mark.every_method  # conftest.py gives each such test every name


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def method_named(name):
    return METHODS.build({"name": name, **OPTIONS.get(name, {})})


def budget_of(model, sparsity):
    return Budget.of({name: w.numel() for name, w in prunable(model).items()}, sparsity)


def context():
    """With all that a method may ask for: data, a loss, a threat."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (48, 3, 8, 8), generator=generator, dtype=torch.uint8)
    data = Resident(images, torch.randint(0, 5, (48,), generator=generator))
    return Context(
        EPOCHS,
        2,
        threat=ThreatModel.of("linf", "8/255"),
        batches=lambda: data.shuffled(24, torch.Generator().manual_seed(6), "none"),
        loss=lambda net, batch: torch.nn.functional.cross_entropy(net(batch.x), batch.y),
    )


def bound(method, model, sparsity):
    return method.bind(model, budget_of(model, sparsity), context())


def train(model, pruner, tiny, **options):
    return fit(model, pruner, Benign(), tiny.data(), SETTINGS, **options)


def check_held(weights, masks, values=None):
    """Weights outside the masks are +0.0; those inside are not lost, and are ``values`` where these are given."""
    for name, mask in masks.items():
        weight = weights[name].detach()
        assert mask.dtype == torch.bool
        assert mask.shape == weight.shape
        assert not weight[~mask].any(), f"{name} has weights outside its mask"
        assert not torch.signbit(weight[~mask]).any(), f"{name} has negative zeros"
        if values is not None:
            assert torch.equal(weight[mask], values[name][mask]), f"{name} lacks weights that its mask keeps"


def watch(pruner):
    """Check the model after every step; the list tells how many steps were checked."""
    steps = []
    original = pruner.after_step

    def after_step():
        original()
        weights = prunable(pruner.model)
        if isinstance(pruner, Scored):
            check_held(weights, pruner.current_masks(), pruner.weights)
        elif isinstance(pruner, Reparametrised):
            check_held(weights, pruner.current_masks())
        else:
            check_held(weights, pruner._masks if isinstance(pruner, Fixed) else {})
        steps.append(1)

    pruner.after_step = after_step
    return steps


@pytest.fixture(scope="module")
def finished(tiny):
    """(net, pruner, final masks) of a method after a search with the default settings; made once for each."""
    cache = {}

    def get(name, sparsity):
        if (name, sparsity) not in cache:
            model = tiny.net()
            pruner = bound(method_named(name), model, sparsity)
            train(model, pruner, tiny)
            cache[name, sparsity] = model, pruner, pruner.finish()
        return cache[name, sparsity]

    return get


@every_method
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99, 0.999])
def test_budget_is_met_exactly(finished, name, sparsity):
    model, pruner, masks = finished(name, sparsity)
    total = sum(w.numel() for w in prunable(model).values())
    kept = math.floor(total * (1000 - round(1000 * sparsity)) / 1000)
    assert list(masks) == list(prunable(model))
    assert count(masks) == kept
    assert count(pruner.masks()) == kept
    assert all(mask.any() for mask in masks.values()), "a layer is empty"


@every_method
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99, 0.999])
def test_finished_model_holds_the_weights_its_masks_keep(finished, name, sparsity):
    model, _, masks = finished(name, sparsity)
    check_held(prunable(model), masks)
    nonzero = sum(int(w.count_nonzero()) for w in prunable(model).values())
    assert nonzero == count(masks), "the masks keep weights that are zero in the model"


@every_method
def test_masks_hold_while_fine_tuning(finished, tiny, name):
    model, _, masks = finished(name, 0.9)
    model = copy.deepcopy(model)
    before = copy.deepcopy(prunable(model))
    pruner = Fixed(model, masks)
    steps = watch(pruner)
    train(model, pruner, tiny)
    check_held(prunable(model), masks)
    assert len(steps) == 2 * EPOCHS
    assert pruner.masks() is masks
    assert all(not torch.equal(weight, before[layer]) for layer, weight in prunable(model).items())


def test_fixed_masks_gradients_before_the_step_and_weights_after_it(tiny):
    model = tiny.net()
    masks = {name: w > 0 for name, w in prunable(model).items()}
    pruner = Fixed(model, masks)
    check_held(prunable(model), masks)
    for weight in prunable(model).values():
        weight.grad = torch.ones_like(weight)
    pruner.before_step()
    assert all(torch.equal(w.grad, masks[name].to(w.dtype)) for name, w in prunable(model).items())
    with torch.no_grad():
        for weight in prunable(model).values():
            weight.sub_(1)
    pruner.after_step()
    check_held(prunable(model), masks)


@every_method
def test_model_runs_with_the_pruners_masks_at_every_step(tiny, name):
    model = tiny.net()
    pruner = bound(method_named(name), model, 0.9)
    if isinstance(pruner, Scored):
        check_held(prunable(model), pruner.current_masks(), pruner.weights)
    steps = watch(pruner)
    train(model, pruner, tiny)
    assert len(steps) == 2 * EPOCHS


class Forgetful(ScorePruner):
    """Learns scores, but forgets to write the weights that they choose."""

    def after_step(self):
        pass


class Multiplying(ScorePruner):
    """Masks by a product, which turns negative weights to negative zeros."""

    def write(self, masks):
        with torch.no_grad():
            for name, mask in masks.items():
                self._held[name].copy_(self.weights[name] * mask)


@pytest.mark.parametrize(("broken", "reason"), [(Forgetful, "outside its mask|lacks weights"), (Multiplying, "zeros")])
def test_the_check_of_every_step_catches(tiny, broken, reason):
    model = tiny.net()
    pruner = broken(model, {name: w.numel() // 10 for name, w in prunable(model).items()})
    watch(pruner)
    with pytest.raises(AssertionError, match=reason):
        train(model, pruner, tiny)


def test_masks_move_in_these_tests(tiny):
    """Else the checks of every step would be empty."""
    model = tiny.net()
    pruner = bound(method_named("hydra"), model, 0.9)
    start = {name: mask.clone() for name, mask in pruner.masks().items()}
    train(model, pruner, tiny)
    assert any(not torch.equal(mask, start[name]) for name, mask in pruner.masks().items())


@every_method
def test_state_dict_is_the_plain_one(finished, tiny, name):
    model, _, _ = finished(name, 0.9)
    plain = tiny.net().state_dict()
    assert {n: (t.shape, t.dtype) for n, t in model.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in plain.items()
    }
    assert type(model) is tiny.TinyResNet
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.slow
@every_method
def test_zeros_survive_8_bits_and_both_files_keep_exactly_the_masks(finished, tiny, tmp_path, name):
    model, _, masks = finished(name, 0.9)
    shape = (3, 8, 8)
    network = trace(model, shape)
    x = tiny.batch(16)[0]
    found = quantize(network, [x])
    twin = simulated(network, found)
    models = {"float": float_model(model, shape), "int8": qdq_model(twin, shape, tiny.CLASSES)}
    for form, net in {"float": model, "int8": twin}.items():
        file = tmp_path / f"{form}.onnx"
        file.write_bytes(models[form].SerializeToString())
        stored = stored_weights(file)
        for layer, mask in masks.items():
            assert (stored[layer] != 0).tolist() == mask.tolist(), f"{form} {layer}"
        with torch.no_grad():
            expected = net(x).argmax(1)
        assert OnnxClassifier(file).predict(x.numpy()).tolist() == expected.tolist()


@every_method
def test_same_seed_same_masks(finished, tiny, name):
    first, _, masks = finished(name, 0.9)
    torch.manual_seed(123)  # what the caller has drawn before does not matter
    model = tiny.net()
    pruner = bound(method_named(name), model, 0.9)
    train(model, pruner, tiny)
    assert tiny.same_bits(pruner.finish(), masks)
    assert tiny.same_bits(model.state_dict(), first.state_dict())


class Stop(Exception):
    pass


@every_method
@pytest.mark.parametrize("stop_after", [1, 2])
def test_interrupted_and_resumed_is_uninterrupted(tiny, tmp_path, name, stop_after):
    def score(net):
        with torch.no_grad():
            return {"score": -float(net.fc.weight.abs().sum())}

    def run(state_file, on_epoch=lambda log: None):
        model = tiny.net()
        pruner = bound(method_named(name), model, 0.9)
        found = train(model, pruner, tiny, validate=score, state_file=state_file, on_epoch=on_epoch)
        return model, pruner.finish(), found

    def stop(log):
        if log.epoch == stop_after:
            raise Stop

    file = tmp_path / "state.pt"
    with pytest.raises(Stop):
        run(file, stop)
    model, masks, found = run(file)
    expected_model, expected_masks, expected = run(None)
    assert tiny.same_bits(model.state_dict(), expected_model.state_dict())
    assert tiny.same_bits(masks, expected_masks)
    assert found == expected
    again, masks, found = run(file)  # nothing is left to do
    assert tiny.same_bits(again.state_dict(), expected_model.state_dict())
    assert tiny.same_bits(masks, expected_masks)
    assert found == expected


@every_method
def test_diverged_training_is_a_work_error(tiny, name):
    class Broken(Benign):
        def __call__(self, net, x, y, progress, noise):
            for compute in super().__call__(net, x, y, progress, noise):
                loss = compute()
                yield lambda loss=loss: type(loss)(loss.value * float("nan"), loss.logits)

    model = tiny.net()
    pruner = bound(method_named(name), model, 0.9)
    with pytest.raises(WorkError, match="nan"):
        fit(model, pruner, Broken(), tiny.data(), SETTINGS)


@every_method
def test_description_gives_the_method_back(name):
    method = method_named(name)
    table = json.loads(json.dumps(METHODS.describe(method)))
    assert table["name"] == name
    assert METHODS.build(table) == method
    assert METHODS.build(name) == METHODS.get(name)()
    assert eval(repr(method), {type(method).__name__: type(method), "PGD": PGD}) == method


@every_method
def test_docstring_is_a_card_that_names_its_paper(name):
    cls = METHODS.get(name)
    text = " ".join((cls.__doc__ or "").split())
    assert re.search(r"[A-Z]\w+( et al\.| and [A-Z]\w+)?, [\w -]+ (19|20)\d\d", text), text
    assert cls.epochs >= 0


@every_method
@pytest.mark.parametrize("options", [{"allocatoin": "erk"}, {"allocation": 3}])
def test_options_that_do_not_exist_or_fit_are_refused(name, options):
    with pytest.raises(UsageError):
        METHODS.build({"name": name, **options})


@pytest.mark.parametrize("name", [n for n, cls in METHODS.all().items() if "allocation" in cls.__dataclass_fields__])
@pytest.mark.parametrize("allocation", ["erk", "lamp", "magnitude"])
def test_every_allocation_meets_the_budget(tiny, name, allocation):
    model = tiny.net()
    method = METHODS.build({"name": name, **OPTIONS.get(name, {}), "allocation": allocation})
    pruner = bound(method, model, 0.95)
    train(model, pruner, tiny)
    assert count(pruner.finish()) == budget_of(model, 0.95).kept


@pytest.mark.parametrize(("wrong", "right"), [("hidra", "hydra"), ("HARP", "harp"), ("lmw", "lwm")])
def test_unknown_method_offers_the_nearest(wrong, right):
    with pytest.raises(UsageError, match=f"unknown method '{wrong}'") as caught:
        METHODS.build(wrong)
    assert right in caught.value.hint
    if wrong != "HARP":
        assert f"'{right}'" in caught.value.hint


def test_dense_training_prunes_nothing(tiny):
    model = tiny.net()
    pruner = Pruner(model)
    train(model, pruner, tiny)
    assert pruner.finish() == {}
    assert all(bool((w != 0).all()) for w in prunable(model).values())


def test_a_method_of_the_user_is_found_by_its_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from rprune.pruning.base import Method, Pruner\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Method):\n"
        "    strength: float = 1.0\n"
        "    def bind(self, model, budget, context):\n"
        "        return Pruner(model)\n"
        "class NotOne:\n"
        "    pass\n"
    )
    method = METHODS.build({"name": f"{file}:Mine", "strength": 2.0})
    assert isinstance(method, Method)
    assert method.strength == 2.0
    with pytest.raises(InputError, match="not a method"):
        METHODS.build(f"{file}:NotOne")
    with pytest.raises(InputError, match="has no"):
        METHODS.build(f"{file}:Gone")
