"""S2AP: the perturbation of its vector, the steps written out, and which hosts it takes."""

import pytest
import torch

from rprune.errors import UsageError
from rprune.models.prunable import prunable
from rprune.objectives.benign import Benign
from rprune.pruning.base import METHODS, Context
from rprune.pruning.budget import Budget
from rprune.pruning.hydra import ScorePruner
from rprune.pruning.s2ap import S2AP
from rprune.training.averaging import perturbed
from rprune.training.loop import Settings, fit


@pytest.fixture
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def bound(model, method):
    budget = Budget.of({n: w.numel() for n, w in prunable(model).items()}, 0.9)
    return METHODS.build(method).bind(model, budget, Context(3, 2))


def test_s2ap_perturb(vectors_others):
    v = vectors_others["s2ap_perturb"]
    net = torch.nn.Linear(2, 1, bias=False).double()
    net.weight.data = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    pruner = ScorePruner(net, {"weight": 1})
    scores = pruner.scores["weight"]
    scores.data = torch.tensor([v["scores"]], dtype=torch.float64)
    scores.grad = torch.tensor([v["grad"]], dtype=torch.float64)
    with perturbed(pruner, pruner.parameters(), v["gamma"]):
        assert (scores.detach() - torch.tensor([v["scores"]])).flatten().tolist() == pytest.approx(v["z"], abs=1e-7)
    assert scores.detach().flatten().tolist() == v["scores"]


def test_the_mask_follows_the_perturbed_scores():
    net = torch.nn.Linear(2, 1, bias=False)
    pruner = ScorePruner(net, {"weight": 1})
    pruner.scores["weight"].data = torch.tensor([[1.0, 0.99]])
    pruner.scores["weight"].grad = torch.tensor([[-1.0, 1.0]])
    with perturbed(pruner, pruner.parameters(), 0.1):
        assert (net.weight == 0).tolist() == [[True, False]]
    pruner.refresh()
    assert (net.weight == 0).tolist() == [[False, True]]


@pytest.mark.parametrize("host", ["harp", "hydra"])
def test_steps_are_those_of_the_definition(tiny, host):
    """s <- s - lr g(s + gamma |s| g(s) / |g(s)|), layer by layer; from the warm-up's end on."""
    settings = Settings(epochs=3, batch_size=48, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
    model, other = tiny.net().eval(), tiny.net().eval()
    pruner = bound(model, {"name": "s2ap", "host": host, "gamma": 0.05, "warmup": 2})
    assert (pruner.radius, pruner.radius_from) == (0.05, 2)
    fit(model, pruner, Benign(), tiny.data(), settings)

    slow = bound(other, host)
    trained = list(slow.parameters())
    for epoch in range(3):
        order = torch.Generator().manual_seed(0)  # one batch an epoch: only its sum over samples counts
        (batch,) = tiny.data().shuffled(48, order, "none")
        other.train()
        slow.before_epoch(epoch)

        def gradients(batch=batch):
            other.zero_grad()
            for tensor in trained:
                tensor.grad = None
            loss = torch.nn.functional.cross_entropy(other(batch.x), batch.y)
            penalty = slow.penalty()
            (loss if penalty is None else loss + penalty).backward()
            slow.before_step()
            return [tensor.grad.clone() for tensor in trained]

        found = gradients()
        if epoch == 2:
            statistics = [buffer.clone() for buffer in other.buffers()]
            held = {name: score.detach().clone() for name, score in slow.scores.items()}
            with torch.no_grad():
                for score in slow.scores.values():
                    score += 0.05 * score.norm() * score.grad / score.grad.norm()
            slow.refresh()
            found = gradients()
            with torch.no_grad():
                for name, score in slow.scores.items():
                    score.copy_(held[name])
                for buffer, value in zip(other.buffers(), statistics, strict=True):
                    buffer.copy_(value)
        with torch.no_grad():
            for tensor, gradient in zip(trained, found, strict=True):
                tensor -= 0.1 * gradient
        slow.after_step()
        slow.after_epoch(epoch)
    for name, score in pruner.scores.items():
        torch.testing.assert_close(score, slow.scores[name], rtol=1e-4, atol=1e-6)
    unperturbed = tiny.net()
    plain = bound(unperturbed, host)
    fit(unperturbed, plain, Benign(), tiny.data(), settings)
    assert not torch.allclose(plain.scores["fc.weight"], pruner.scores["fc.weight"], rtol=1e-4, atol=1e-6)


def test_warm_up_is_the_host_alone(tiny):
    found = []
    for method in ("hydra", {"name": "s2ap", "host": "hydra", "warmup": 3}):
        model = tiny.net()
        pruner = bound(model, method)
        fit(model, pruner, Benign(), tiny.data(), Settings(epochs=3, batch_size=24))
        found.append(pruner.finish() | model.state_dict())
    assert tiny.same_bits(*found)


def test_only_scores_are_perturbed(tiny):
    model = tiny.net()
    pruner = bound(model, "s2ap")
    for tensor in pruner.parameters():
        tensor.grad = torch.ones_like(tensor)
    still = [t for t in pruner.parameters() if not any(t is s for s in pruner.scores.values())]
    assert any(t is pruner.r for t in still)
    before = [tensor.detach().clone() for tensor in still]
    scores = {name: score.detach().clone() for name, score in pruner.scores.items()}
    with perturbed(pruner, pruner.parameters(), pruner.radius):
        assert all(torch.equal(now, then) for now, then in zip(still, before, strict=True))
        assert all(not torch.equal(score, scores[name]) for name, score in pruner.scores.items())


@pytest.mark.parametrize("host", ["lwm", "harp-r", "scratch", "snip", "s2ap"])
def test_a_host_without_scores_is_refused_with_the_recipe(host):
    with pytest.raises(UsageError, match="s2ap perturbs scores"):
        METHODS.build({"name": "s2ap", "host": host})


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("hidra", "unknown method 'hidra'"),
        ({"name": "hydra", "alocation": "erk"}, "unknown option"),
        ({"name": "hydra", "allocation": "erkk"}, "unknown allocator 'erkk'"),
    ],
)
def test_mistakes_in_the_host_are_found_with_the_recipe(host, reason):
    with pytest.raises(UsageError, match=reason):
        METHODS.build({"name": "s2ap", "host": host})


def test_options_of_the_host(tiny):
    pruner = bound(tiny.net(), {"name": "s2ap", "host": {"name": "hydra", "allocation": "erk"}})
    assert pruner.counts() == bound(tiny.net(), {"name": "hydra", "allocation": "erk"}).counts()
    assert S2AP().host == "harp"
