"""Attacks given as functions: what they get, what they may return, and what is said when they return something else."""

import copy
from pathlib import Path

import pytest
import torch

from rprune.attacks.adapter import Adapter
from rprune.attacks.base import ATTACKS, cross_entropy, margin
from rprune.attacks.noise import Keyed
from rprune.attacks.norms import size
from rprune.attacks.pgd import PGD
from rprune.attacks.suites import suite
from rprune.errors import InputError, UsageError
from rprune.threat import ThreatModel

FILE = Path(__file__).parent / "own_attacks.py"
LINF, L2 = ThreatModel.of("linf", "0.03"), ThreatModel.of("l2", "0.5")


@pytest.fixture(scope="module")
def scene(load_helper):
    tiny = load_helper("pruning/tiny_net.py")
    net = tiny.net(seed=1, dtype=torch.float64).eval()
    x, _ = tiny.batch(24, seed=2, dtype=torch.float64)
    with torch.no_grad():
        return net, x, net(x).argmax(1)


def own(name):
    return Adapter(function=f"{FILE}:{name}")


def run(name, scene, threat=LINF, seed=0):
    net, x, y = scene
    return own(name).evaluate(net, x, y, threat, Keyed(seed, torch.arange(len(x))))


def test_own_pgd_is_ours(scene):
    net, x, y = scene
    found = run("my_pgd", scene)
    ours = PGD(steps=4, step=0.02 / 0.03, start="none")
    point = ours.perturb(net, x, LINF, cross_entropy(y), Keyed(0, torch.arange(24)))
    torch.testing.assert_close(found.x, point, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(found.margin, margin(net(found.x), y))
    assert found.broken.any()
    assert (found.queries == 5).all()  # four steps, and the look at the point


def test_own_l2_attack_that_calls_backward(scene):
    net, _, _ = scene
    found = run("my_l2_pgd", scene, L2)
    assert found.broken.any()
    assert all(p.grad is None for p in net.parameters())
    assert size(found.x - scene[1], "l2").max() <= 0.5 + 1e-9


def test_attack_runs_where_gradients_are_switched_off(scene):
    with torch.no_grad():
        assert run("my_pgd", scene).broken.any()


def test_random_numbers_follow_the_seed_and_leave_no_trace(scene):
    before = torch.get_rng_state()
    first, again, other = (run("random_start", scene, seed=seed).x for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_images_are_the_functions_own_copy(scene):
    _, x, y = scene
    images, classes = x.clone(), y.clone()
    found = run("in_place", scene)
    assert torch.equal(x, images)
    assert torch.equal(y, classes)
    torch.testing.assert_close(found.x, x * 0.999)


def test_points_come_back_in_the_images_precision(scene):
    net, x, y = scene
    found = own("in_float64").evaluate(copy.deepcopy(net).float(), x.float(), y, LINF, Keyed(0, torch.arange(24)))
    assert found.x.dtype == found.margin.dtype == torch.float32
    assert torch.equal(found.x, x.float())


def test_a_hair_outside_is_moved_back(scene):
    net, x, y = scene
    x = x * 0.5
    found = own("a_hair_outside").evaluate(net, x, y, LINF, Keyed(0, torch.arange(len(x))))
    assert (found.x - x).abs().max() <= 0.03 + 1e-12


@pytest.mark.parametrize(
    ("name", "threat", "message"),
    [
        ("too_far", LINF, "too_far went 0.04 from an image, which linf 0.03 does not allow"),
        ("my_pgd", ThreatModel.of("linf", "0"), "my_pgd went 0.03 from an image"),
        ("my_pgd", ThreatModel.of("l2", "0.1"), "which l2 0.1 does not allow"),
        ("out_of_the_box", LINF, r"out_of_the_box left \[0,1\] by 0.03"),
        ("not_finite", LINF, "not_finite returned images that are not finite"),
        ("nothing", LINF, "nothing returned NoneType, not a tensor"),
        ("as_numpy", LINF, "as_numpy returned ndarray, not a tensor"),
        ("only_successes", LINF, r"only_successes returned shape \(\d+, 3, 8, 8\) for \(24, 3, 8, 8\)"),
        ("number", LINF, "number is no function"),
    ],
)
def test_wrong_results_are_refused_with_the_functions_name(scene, name, threat, message):
    with pytest.raises(UsageError, match=message) as caught:
        run(name, scene, threat)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["absent", "no_such_file.py:attack", "rprune.nowhere:attack"])
def test_functions_that_are_not_there(scene, name):
    function = f"{FILE}:{name}" if ":" not in name else name
    with pytest.raises(InputError):
        Adapter(function=function).evaluate(*scene, LINF, Keyed(0, torch.arange(24)))


@pytest.mark.parametrize("options", [{}, {"function": "pgd"}, {"function": "file.py:"}, {"function": ":pgd"}])
def test_options_that_name_no_function_are_refused(options):
    with pytest.raises(UsageError, match="adapter: function"):
        ATTACKS.build({"name": "adapter", **options})


def test_attack_has_the_functions_name():
    assert own("my_pgd").label == "my_pgd"
    assert Adapter(function="pkg.module:square").label == "square"
    assert own("my_pgd").needs_gradient
    assert suite(f"{FILE}:my_pgd") == (own("my_pgd"),)
