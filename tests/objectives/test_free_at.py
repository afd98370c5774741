"""Free-AT against a hand-written loop, and what it carries from batch to batch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rprune.attacks.noise import Stream
from rprune.attacks.norms import within
from rprune.objectives.free_at import FreeAT
from rprune.pruning.base import Pruner
from rprune.threat import ThreatModel
from rprune.training.loop import Settings, fit

THREATS = [ThreatModel.of("linf", "8/255"), ThreatModel.of("l2", "0.5")]
both_norms = pytest.mark.parametrize("threat", THREATS, ids=str)
SIZES = (8, 8, 5)


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


def stream():
    return Stream(torch.Generator().manual_seed(0))


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def trained(net, batches, threat, noise, replays=4, after_replay=lambda: None):
    """The net after one pass over the batches, driven as the training loop does."""
    optimizer = sgd(net)
    for x, y in batches:
        for compute in FreeAT(threat=threat, replays=replays)(net, x, y, 0.0, noise):
            optimizer.zero_grad()
            compute().value.backward()
            optimizer.step()
            after_replay()
    return net


@both_norms
def test_against_a_loop_by_hand(tiny, threat):
    batches = [tiny.batch(n, seed) for seed, n in enumerate(SIZES)]
    ours, theirs, noise = tiny.net().train(), tiny.net().train(), stream()
    trained(ours, batches, threat, noise)

    optimizer, kept = sgd(theirs), torch.zeros(8, 3, 8, 8)
    for x, y in batches:
        for _ in range(4):
            delta = kept[: len(x)].clone().requires_grad_()
            optimizer.zero_grad()
            cross_entropy(theirs((x + delta).clamp(0, 1)), y).backward()
            for i, gradient in enumerate(delta.grad):
                if threat.norm == "linf":
                    kept[i] = (kept[i] + threat.eps * gradient.sign()).clamp(-threat.eps, threat.eps)
                else:
                    moved = kept[i] + threat.eps * gradient / gradient.norm()
                    kept[i] = moved * min(1.0, threat.eps / float(moved.norm()))
            optimizer.step()

    torch.testing.assert_close(noise.memory["free-at"], kept, rtol=0, atol=2e-6)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@both_norms
def test_images_stay_in_ball_and_box(tiny, threat):
    net, inputs = tiny.net().train(), []
    net.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach().clone()))
    batches = [tiny.batch(n, seed) for seed, n in enumerate(SIZES)]
    trained(net, batches, threat, stream())
    assert len(inputs) == 4 * len(SIZES)
    for i, point in enumerate(inputs):
        x = batches[i // 4][0]
        assert within(point, x, threat).all()
        assert torch.equal(point, x) == (i == 0)


def test_perturbation_is_carried_to_the_next_batch(tiny):
    threat = THREATS[0]
    net, noise, inputs = tiny.net().train(), stream(), []
    trained(net, [tiny.batch()], threat, noise)
    carried = noise.memory["free-at"].clone()
    assert (carried.abs() == threat.eps).any()
    net.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach().clone()))
    x, y = tiny.batch(5, seed=1)
    trained(net, [(x, y)], threat, noise)
    assert torch.equal(inputs[0], (x + carried[:5]).clamp(0, 1))
    assert torch.equal(noise.memory["free-at"][5:], carried[5:])
    assert not torch.equal(noise.memory["free-at"][:5], carried[:5])


def test_larger_batch_starts_anew(tiny):
    noise = stream()
    trained(tiny.net().train(), [tiny.batch(3), tiny.batch(8)], THREATS[0], noise)
    assert len(noise.memory["free-at"]) == 8


def test_gradient_of_the_last_call_moves_the_perturbation(tiny):
    """With AWP the loss is computed twice in a step, the second time at other weights."""
    x, y = tiny.batch()
    found = []
    for first in (True, False):
        net, noise = tiny.net().train(), stream()
        for compute in FreeAT(threat=THREATS[0], replays=1)(net, x, y, 0.0, noise):
            if first:
                kept = copy.deepcopy(net.state_dict())
                with torch.no_grad():
                    net.fc.weight.neg_()
                compute().value.backward()
                net.load_state_dict(kept)
            net.zero_grad()
            compute().value.backward()
        found.append((noise.memory["free-at"], net.fc.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_loss_that_is_never_computed_moves_nothing(tiny):
    noise = stream()
    assert len(list(FreeAT(threat=THREATS[0], replays=3)(tiny.net().train(), *tiny.batch(), 0.0, noise))) == 3
    assert not noise.memory["free-at"].any()


@pytest.mark.parametrize("awp", [0.0, 0.01])
def test_resumed_is_uninterrupted(tiny, tmp_path, awp):
    """The perturbation starts an epoch at 0, so there is nothing of it to save."""

    class Stop(Exception):
        pass

    def stop(log):
        if log.epoch == 1:
            raise Stop

    def run(**options):
        model = tiny.net()
        settings = Settings(epochs=2, batch_size=8, lr=0.02, awp=awp)
        found = fit(model, Pruner(model), FreeAT(threat=THREATS[0], replays=2), tiny.data(20), settings, **options)
        return model.state_dict(), found

    expected, history = run()
    with pytest.raises(Stop):
        run(state_file=tmp_path / "state.pt", on_epoch=stop)
    state, resumed = run(state_file=tmp_path / "state.pt")
    assert tiny.same_bits(state, expected)
    assert resumed == history


def test_loss_goes_down_on_an_easy_task():
    """Two classes of flat images that eps cannot confuse."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x = torch.cat([torch.full((4, 1, 2, 2), 0.1), torch.full((4, 1, 2, 2), 0.9)])
    y = torch.tensor([0] * 4 + [1] * 4)
    trained(net, [(x, y)] * 30, ThreatModel.of("linf", "0.1"), stream())
    assert (net((x - 0.1 * (2 * y - 1)[:, None, None, None]).clamp(0, 1)).argmax(1) == y).all()
