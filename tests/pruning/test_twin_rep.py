"""Twin-Rep: the numeric vector, training against a net of two factors, and the one pruning."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from rprune.models.prunable import prunable
from rprune.objectives.benign import Benign
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget
from rprune.pruning.masks import count
from rprune.pruning.twin_rep import TwinPruner
from rprune.training.loop import Settings, fit


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def bound(tiny, sparsity=0.9, epochs=4, dtype=torch.float32, **options):
    model = tiny.net(dtype=dtype)
    budget = Budget.of({name: w.numel() for name, w in prunable(model).items()}, sparsity)
    return model, METHODS.build({"name": "twin-rep", **options}).bind(model, budget, Context(epochs, 2))


def test_twinrep(vectors_others):
    v = vectors_others["twinrep"]
    net = nn.Linear(4, 1, bias=False).double()
    twins = tuple({"weight": torch.tensor([v[key]], dtype=torch.float64)} for key in ("w", "aux"))
    pruner = TwinPruner(net, Budget.of({"weight": 4}, v["ratio"]), twins, prune_at=1)
    assert net.weight.detach().flatten().tolist() == pytest.approx(v["product"])
    assert not pruner.within_budget()
    pruner.before_epoch(0)
    assert count(pruner.current_masks()) == 4
    pruner.before_epoch(1)
    assert pruner.within_budget()
    mask = pruner.current_masks()["weight"]
    assert mask.flatten().int().tolist() == v["mask"]
    assert float(net.weight.detach().abs()[mask].min()) == pytest.approx(v["threshold"])
    assert net.weight.detach().flatten().tolist() == pytest.approx(
        [p * m for p, m in zip(v["product"], v["mask"], strict=True)]
    )


def test_ten_steps_are_those_of_a_net_of_two_factors(tiny):
    model, pruner = bound(tiny, 0.3, dtype=torch.float64)  # where no layer is held at its floor
    model.eval()
    factors = {label: {n: pruner.learned[f"{label} {n}"].detach().clone() for n in pruner._held} for label in "wv"}
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n not in pruner._held}
    masks = {name: torch.ones_like(w) for name, w in pruner._held.items()}
    trained = [*factors["w"].values(), *factors["v"].values(), *others.values()]
    for tensor in trained:
        tensor.requires_grad_()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3}
    oracle = torch.optim.SGD(trained, **options)
    ours = torch.optim.SGD(list(pruner.parameters()), **options)
    pruner.attach(ours)
    for step in range(10):
        x, y = tiny.batch(seed=step, dtype=torch.float64)
        if step % 2 == 0:
            pruner.before_epoch(step // 2)
        if step == 2:
            products = {n: (factors["w"][n] * factors["v"][n]).detach().abs() for n in masks}
            threshold = torch.cat([p.flatten() for p in products.values()]).topk(pruner.budget.kept).values.min()
            masks = {n: (p >= threshold).double() for n, p in products.items()}
        product = {n: factors["w"][n] * factors["v"][n] * mask for n, mask in masks.items()}
        oracle.zero_grad()
        nn.functional.cross_entropy(functional_call(model, product | others, (x,)), y).backward()
        oracle.step()
        model.zero_grad()
        ours.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        pruner.before_step()
        ours.step()
        pruner.after_step()
    for name, mask in masks.items():
        torch.testing.assert_close(pruner.learned[f"w {name}"].detach(), factors["w"][name].detach())
        torch.testing.assert_close(pruner.learned[f"v {name}"].detach(), factors["v"][name].detach())
        expected = factors["w"][name] * factors["v"][name] * mask
        torch.testing.assert_close(prunable(model)[name].detach(), expected.detach())
        assert torch.equal(pruner.masks()[name].double(), mask)


@pytest.mark.parametrize(("prune_at", "epochs", "first"), [(0.1, 30, 3), (0.1, 4, 1), (0.9, 4, 3), (0.5, 1, 0)])
def test_prunes_once_and_never_again(tiny, prune_at, epochs, first):
    model, pruner = bound(tiny, epochs=epochs, prune_at=prune_at)
    seen, masks = [], {}

    def on_epoch(log):
        seen.append(round(log.values["kept_share"] * pruner.budget.total))
        if log.epoch == first + 1:
            masks.update(pruner.masks())

    result = fit(model, pruner, Benign(), tiny.data(), Settings(epochs=epochs, batch_size=24), on_epoch=on_epoch)
    assert seen == [pruner.budget.total] * first + [pruner.budget.kept] * (epochs - first)
    assert all(mask is masks[name] or torch.equal(mask, masks[name]) for name, mask in pruner.finish().items())
    assert result.selected_epoch > first


def test_factors_are_two_draws_of_the_models_own(tiny):
    model, pruner = bound(tiny)
    fresh = nn.Linear(256, 5)
    for label in "wv":
        factor = pruner.learned[f"{label} fc.weight"].detach()
        assert float(factor.std()) == pytest.approx(float(fresh.weight.detach().std()), rel=0.1)
    assert not torch.equal(pruner.learned["w fc.weight"], pruner.learned["v fc.weight"])
    assert float(model.bn1.weight.detach().min()) == 1


def test_given_weights_are_kept_as_a_product(tiny):
    model, pruner = bound(tiny, reinitialize=False)
    for name, weight in prunable(tiny.net()).items():
        torch.testing.assert_close(prunable(model)[name], weight)
        torch.testing.assert_close(pruner.learned[f"w {name}"].abs(), pruner.learned[f"v {name}"])
