"""FAB: its projection against slow exact solutions, the whole attack against a plain one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import nn

import rprune.attacks.fab as fab
from rprune.attacks.base import ATTACKS, margin
from rprune.attacks.fab import FAB, onto_plane
from rprune.attacks.noise import Keyed
from rprune.attacks.norms import size
from rprune.errors import UsageError
from rprune.evaluation.target import Rows
from rprune.threat import ThreatModel

both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def keyed(n, seed=0):
    return Keyed(seed, torch.arange(n))


def length(move, norm):
    return np.abs(move).max(initial=0.0) if norm == "linf" else math.sqrt((move**2).sum())


def slow_move(point, weights, value, norm):
    """onto_plane for one sample in float64: one pixel after the other is stopped at the box, in order of arrival.

    Returns the move, and whether it reaches the plane.
    """
    way = -np.sign(weights) * np.sign(value)
    room = np.where(way > 0, 1 - point, np.where(way < 0, point, 0.0))
    weight, need = np.abs(weights), abs(value)
    pace = np.where(weight > 0, 1.0 if norm == "linf" else weight, 0.0)
    moving = [i for i in range(len(weight)) if weight[i] > 0 and room[i] > 0]
    moving.sort(key=lambda i: room[i] / pace[i])
    stopped = 0.0
    for k, i in enumerate(moving):
        slope = sum(weight[j] * pace[j] for j in moving[k:])
        r = (need - stopped) / slope
        if r <= room[i] / pace[i]:
            return way * np.minimum(r * pace, room), True
        stopped += weight[i] * room[i]
    return way * room, need <= 0


# --- the projection ---------------------------------------------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("seed", range(8))
def test_slow_move_is_the_optimum(norm, seed):
    random = np.random.default_rng(seed)
    n = 5
    point, weights = random.random(n).round(seed % 3), random.normal(size=n) * (random.random(n) < 0.8)
    room = np.where(weights > 0, 1 - point, point)
    value = -0.6 * float(np.abs(weights) @ room)
    move, reached = slow_move(point, weights, value, norm)
    assert reached
    assert value + weights @ move == pytest.approx(0, abs=1e-12)
    box = [(-p, 1 - p) for p in point]
    if norm == "linf":  # variables: move and its largest entry
        bound = np.vstack([np.hstack([np.eye(n), -np.ones((n, 1))]), np.hstack([-np.eye(n), -np.ones((n, 1))])])
        best = linprog(
            [*[0.0] * n, 1.0], bound, np.zeros(2 * n), [[*weights, 0.0]], [-value], [*box, (0, None)], method="highs"
        ).fun
    else:
        plane = {"type": "eq", "fun": lambda d: value + weights @ d, "jac": lambda d: weights}
        best = math.sqrt(
            minimize(
                lambda d: d @ d, move * 0, jac=lambda d: 2 * d, bounds=box, constraints=plane, options={"ftol": 1e-14}
            ).fun
        )
    assert length(move, norm) == pytest.approx(best, abs=1e-7)


@both_norms
@both_types
def test_projection_is_the_slow_one(norm, dtype):
    generator = torch.Generator().manual_seed(0)
    point = torch.rand(40, 3, 4, 5, generator=generator, dtype=dtype).mul(1.6).sub(0.3).clamp(0, 1)
    weights = torch.randn(point.shape, generator=generator, dtype=dtype)
    weights[::2] *= torch.rand(weights[::2].shape, generator=generator, dtype=dtype) < 0.3
    room = torch.where(weights > 0, 1 - point, point)
    shares = torch.tensor([0, 1e-3, 0.1, 0.5, 0.9, 1.1, 5, 0.3], dtype=dtype).repeat(5)
    value = -shares * (weights.abs() * room).flatten(1).sum(1)
    moves = onto_plane(point, weights, value, norm)
    assert moves.dtype == dtype
    for i in range(40):
        p, w, move = (t[i].flatten().double().numpy() for t in (point, weights, moves))
        expected, _ = slow_move(p, w, float(value[i]), norm)
        np.testing.assert_allclose(move, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-10)


hard_weights = st.sampled_from([0.0, 1e-20, 1e-8, 1e-3, 1.0, 1.0, 30.0, 1e6]) | st.floats(1e-5, 10)
pixels = st.sampled_from([0.0, 1.0, 0.5]) | st.floats(1e-3, 0.999)
problems = st.lists(st.tuples(hard_weights, st.booleans(), pixels), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(problems, st.sampled_from([0, 1e-6, 0.1, 0.5, 0.99, 1, 1.01, 3]) | st.floats(0, 2), st.booleans())
def test_projection_of_hard_problems(problem, share, past):
    """Zero and tiny weights, faces of the box, planes out of reach or through the point, either side of the plane."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-10)):
        weights = torch.tensor([-w if negative else w for w, negative, _ in problem], dtype=dtype)
        point = torch.tensor([p for *_, p in problem], dtype=dtype)
        p, w = point.double().numpy(), weights.double().numpy()
        sign = 1.0 if past else -1.0
        capacity = float(np.abs(w) @ np.where(w * sign < 0, 1 - p, p))
        value = torch.tensor([sign * share * capacity], dtype=dtype)
        for norm in ("linf", "l2"):
            move = onto_plane(point[None], weights[None], value, norm)[0].double().numpy()
            assert (move[w == 0] == 0).all()
            assert (p + move >= -1e-7).all()
            assert (p + move <= 1 + 1e-7).all()
            # the exact solutions for planes a little nearer and a little further away
            near, far = (slow_move(p, w, float(value) * (1 + s * tolerance), norm)[0] for s in (-1, 1))
            assert length(near, norm) - tolerance <= length(move, norm) <= length(far, norm) + tolerance
            left = abs(float(value) + w @ move)
            assert left <= max(0.0, (share - 1) * capacity) + 2 * tolerance * (1 + share) * capacity


@both_norms
def test_projection_out_of_reach_goes_to_the_corner(norm):
    point = torch.tensor([[0.2, 0.7, 0.0, 1.0, 0.4]])
    weights = torch.tensor([[1.0, -2.0, -1.0, 3.0, 0.0]])
    move = onto_plane(point, weights, torch.tensor([-50.0]), norm)
    torch.testing.assert_close(point + move, torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.4]]))
    assert torch.equal(onto_plane(point, weights, torch.zeros(1), norm), torch.zeros_like(point))
    assert torch.equal(onto_plane(point, torch.zeros_like(point), torch.ones(1), norm), torch.zeros_like(point))
    for strange in (torch.nan, torch.inf, -torch.inf):
        assert torch.isfinite(onto_plane(point, weights, torch.tensor([strange]), norm)).all()


@both_norms
@both_types
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4, 1e30])
def test_projection_does_not_depend_on_the_scale_of_logits(norm, dtype, scale):
    generator = torch.Generator().manual_seed(3)
    point, weights = torch.rand(6, 30, generator=generator), torch.randn(6, 30, generator=generator)
    point, weights, value = point.to(dtype), weights.to(dtype), torch.linspace(-3, 3, 6, dtype=dtype)
    moves = [onto_plane(point, weights * s, value * s, norm) for s in (1.0, scale)]
    torch.testing.assert_close(*moves, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)


@both_norms
@pytest.mark.parametrize("decades", [0, 4, 10])
def test_newton_settles_within_its_steps(monkeypatch, norm, decades):
    generator = torch.Generator().manual_seed(decades)
    point = torch.rand(64, 768, generator=generator, dtype=torch.float64)
    weights = (decades * torch.randn(64, 768, generator=generator, dtype=torch.float64)).exp()
    value = -(weights * (1 - point)).sum(1) * torch.logspace(-6, 0, 64, dtype=torch.float64).mul(0.999999)
    moves = onto_plane(point, weights, value, norm)
    monkeypatch.setattr(fab, "NEWTON", 300)
    assert torch.equal(onto_plane(point, weights, value, norm), moves)


# --- the attack -------------------------------------------------------------------------------------------------------


def small_net(classes=4, shape=(3, 5, 6), seed=0, dtype=torch.float64):
    """A smooth random net, and images on which it is right and wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 24), nn.Softplus(), nn.Linear(24, classes))
        net = net.to(dtype).eval().requires_grad_(False)
        x = torch.rand(9, *shape, dtype=dtype).mul(1.2).sub(0.1).clamp(0, 1)
    y = net(x).argmax(1)
    y[::4] = (y[::4] + 1) % classes
    return net, x, y


def slow_fab(attack, net, x, y, norm, reach, noise, early):
    """One sample, plainly: every point at which the net is called, the nearest misclassified point and its distance."""
    calls, best, best_point = [x], math.inf, x
    ranks = [int(c) for c in net(x[None])[0].argsort(descending=True) if c != y]
    if net(x[None])[0].argmax() != y:
        return calls, 0.0, x
    for restart in range(attack.restarts):
        for rank, target in enumerate(ranks[: attack.targets]):
            at = x.clone()
            if restart:
                purpose = f"fab-t/{restart}/{rank}"
                way = (noise.uniform if norm == "linf" else noise.normal)(x[None], purpose)[0]
                at = (x + min(best, reach) / 2 * way / length(way.numpy().ravel(), norm)).clamp(0, 1)
            for _ in range(attack.steps):
                calls.append(at)
                variable = at.clone().requires_grad_()
                logits = net(variable[None])[0]
                value = logits[target] - logits[y]
                (gradient,) = torch.autograd.grad(value, variable)
                value, w = float(value.detach()), gradient.numpy().ravel()
                p, q = at.numpy().ravel(), x.numpy().ravel()
                d1, _ = slow_move(p, w, value, norm)
                d2, _ = slow_move(q, w, value + w @ (q - p), norm)
                a1, a2 = max(length(d1, norm), 1e-8), max(length(d2, norm), 1e-8)
                alpha = min(max(a1 / (a1 + a2), 0), attack.alpha_max)
                new = (p + attack.eta * d1) * (1 - alpha) + (q + attack.eta * d2) * alpha
                new = torch.from_numpy(new.clip(0, 1)).view_as(x)
                calls.append(new)
                at = new
                if net(new[None])[0].argmax() != y:
                    far = length((new - x).numpy().ravel(), norm)
                    if far <= reach and far < best:
                        best, best_point = far, new
                        if early:
                            return calls, best, best_point
                    at = x + attack.beta * (new - x)
    return calls, best, best_point


@both_norms
@pytest.mark.parametrize("early", [True, False], ids=["search", "distances"])
def test_fab_is_the_slow_one_step_by_step(norm, early):
    net, x, y = small_net()
    attack = FAB(steps=10, targets=2, restarts=2)
    reach = (0.12 if norm == "linf" else 0.5) if early else 1.0 if norm == "linf" else math.sqrt(x[0].numel())
    calls = []
    handle = net.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].detach().clone()))
    if early:
        found = attack.evaluate(net, x, y, ThreatModel.of(norm, reach), keyed(9))
        points, queries = found.x, found.queries
        distance = torch.where(found.broken, size(points - x, norm), torch.inf)
    else:
        distance, points = attack.distances(net, x, y, norm, keyed(9))
    handle.remove()
    expected = [
        slow_fab(attack, net, x[i], int(y[i]), norm, reach, Keyed(0, torch.tensor([i])), early) for i in range(9)
    ]
    torch.testing.assert_close(distance, torch.tensor([d for _, d, _ in expected], dtype=x.dtype), rtol=0, atol=1e-9)
    torch.testing.assert_close(points, torch.stack([p for *_, p in expected]), rtol=0, atol=1e-9)
    assert distance.isfinite().any()
    if early:
        assert queries.tolist() == [len(plain) for plain, *_ in expected]
        assert len(set(queries.tolist())) > 1
    else:
        right = [i for i in range(9) if distance[i] > 0]
        for step, batch in enumerate(calls[1:], start=1):
            plain = torch.stack([expected[i][0][step] for i in right])
            torch.testing.assert_close(batch, plain, rtol=0, atol=1e-9)
        assert len(calls) == len(expected[right[0]][0]) == attack.queries(4)


@both_norms
@pytest.mark.parametrize("classes", [2, 4])
def test_linear_nets_have_exact_distances(norm, classes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(45, classes)).double().eval()
        x = torch.rand(12, 3, 3, 5, dtype=torch.float64).mul(1.4).sub(0.2).clamp(0, 1)
    y = net(x).argmax(1)
    y[0] = (y[0] + 1) % classes
    weight, logits = net[1].weight.detach().numpy(), net(x).detach().numpy()
    exact = []
    for i, label in enumerate(y.tolist()):
        others = [t for t in range(classes) if t != label]
        moves = [
            slow_move(x[i].numpy().ravel(), weight[t] - weight[label], logits[i, t] - logits[i, label], norm)
            for t in others
        ]
        exact.append(min((length(move, norm) if reached else math.inf for move, reached in moves)))
    exact[0] = 0.0
    exact = torch.tensor(exact, dtype=x.dtype)
    assert exact.isfinite().sum() > 8
    distance, point = FAB(steps=5, eta=1 + 1e-9).distances(net, x, y, norm, keyed(12))
    torch.testing.assert_close(distance, exact, rtol=1e-7, atol=0)
    torch.testing.assert_close(size(point - x, norm), distance.where(distance.isfinite(), 0), rtol=0, atol=0)
    found = distance.isfinite()
    assert (margin(net(point), y)[found] <= 0).all()
    usual, _ = FAB(steps=20).distances(net, x, y, norm, keyed(12))
    assert (usual >= exact * (1 - 1e-12)).all()
    assert (usual[found] <= 1.01 * exact[found]).all()  # eta goes a little past the boundary


@both_norms
def test_search_breaks_what_is_nearer_than_eps(norm):
    net, x, y = small_net(seed=2)
    attack = FAB(steps=8)
    distance, _ = attack.distances(net, x, y, norm, keyed(9))
    for eps in (distance[(distance > 0) & distance.isfinite()].sort().values[::2] * 1.000001).tolist():
        found = attack.evaluate(net, x, y, ThreatModel.of(norm, eps), keyed(9))
        assert torch.equal(found.broken, distance <= eps)
        clean = margin(net(x), y)
        assert torch.equal(found.margin[~found.broken], clean[~found.broken])
        assert torch.equal(found.x[~found.broken], x[~found.broken])
        torch.testing.assert_close(found.margin, margin(net(found.x), y), rtol=0, atol=1e-12)


class Counting(nn.Module):
    """Counts images; its class never changes."""

    def __init__(self, classes, shape):
        super().__init__()
        self.linear, self.images = nn.Linear(math.prod(shape), classes), 0
        with torch.no_grad():
            self.linear.bias[0] += 1e4

    def forward(self, x):
        self.images += len(x)
        return self.linear(x.flatten(1))


@both_norms
@pytest.mark.parametrize(
    ("classes", "targets", "restarts", "runs"),
    [(2, 9, 1, 1), (3, 9, 2, 4), (4, 2, 1, 2), (10, 9, 1, 9), (99, 9, 1, 9)],
)
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 7, 12)])
def test_forward_passes_are_counted_exactly(norm, classes, targets, restarts, runs, shape):
    attack = FAB(steps=7, targets=targets, restarts=restarts)
    net = Counting(classes, shape).eval()
    x, y = torch.rand(3, *shape), torch.zeros(3, dtype=torch.int64)
    passes = 1 + runs * 2 * 7
    found = attack.evaluate(net, x, y, ThreatModel.of(norm, "0.1"), keyed(3))
    assert not found.broken.any()
    assert torch.equal(found.x, x)
    assert found.queries.tolist() == [passes] * 3
    assert net.images == 3 * passes
    assert attack.queries(classes) == passes


def test_budget_is_autoattacks():
    assert FAB().queries(10) == 1 + 9 * 100 * 2
    assert FAB().queries(2) == 1 + 100 * 2
    assert FAB().label == "fab-t"


@both_norms
@both_types
@pytest.mark.parametrize("classes", [2, 3, 4, 10, 100])
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 7, 12)])
def test_any_number_of_classes_and_shape(norm, dtype, classes, shape):
    net, x, y = small_net(classes, shape, dtype=dtype)
    threat = ThreatModel.of(norm, "0.6" if norm == "linf" else "9")
    found = FAB(steps=5).evaluate(net, x, y, threat, keyed(9))
    assert found.x.dtype == found.margin.dtype == dtype
    assert torch.equal(found.broken, net(found.x).argmax(1) != y)
    assert found.broken.sum() > (net(x).argmax(1) != y).sum()
    still = FAB(steps=3).evaluate(net, x, y, ThreatModel.of(norm, "0"), keyed(9))
    assert torch.equal(still.x, x)
    assert torch.equal(still.broken, net(x).argmax(1) != y)


@both_norms
def test_results_are_the_same_bits_in_any_batch(oracle_net, norm):
    net, x, y = oracle_net
    net, x, y = Rows(net, 8).eval(), x[:24], y[:24]
    attack, threat = FAB(steps=5, targets=2, restarts=2), ThreatModel.of(norm, "0.06" if norm == "linf" else "0.7")
    whole = attack.evaluate(net, x, y, threat, keyed(24))
    distance, nearest = attack.distances(net, x, y, norm, keyed(24))
    assert 4 < whole.broken.sum() < 24
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for part in (order[:1], order[1:8], order[8:]):
        found = attack.evaluate(net, x[part], y[part], threat, Keyed(0, part))
        assert torch.equal(found.x, whole.x[part])
        assert torch.equal(found.margin, whole.margin[part])
        assert torch.equal(found.queries, whole.queries[part])
        alone, points = attack.distances(net, x[part], y[part], norm, Keyed(0, part))
        assert torch.equal(alone, distance[part])
        assert torch.equal(points, nearest[part])


@both_norms
def test_restarts_begin_around_the_image_and_never_find_less(norm):
    net, x, y = small_net(seed=3)
    calls = []
    handle = net.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].detach().clone()))
    one, _ = FAB(steps=2, targets=1).distances(net, x, y, norm, keyed(9))
    first = len(calls)
    three, _ = FAB(steps=2, targets=1, restarts=3).distances(net, x, y, norm, keyed(9))
    handle.remove()
    assert (three <= one).all()
    starts = [calls[first + 1 + 4 * restart] for restart in range(3)]
    right = one > 0
    assert torch.equal(starts[0], x[right])
    radius = one[right].clamp_max(1.0 if norm == "linf" else math.sqrt(x[0].numel())) / 2
    assert (size(starts[1] - x[right], norm) <= radius + 1e-12).all()
    assert (size(starts[1] - x[right], norm) > 0.2 * radius).all()
    assert not torch.equal(starts[1], starts[2])


class Steep(nn.Module):
    """Right everywhere for class 0, by infinite gradients where a pixel is 0; ``last`` is its last logit."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, x):
        assert torch.isfinite(x).all()
        roots = x.flatten(1).sqrt().sum(1)
        return torch.stack([0 * roots, roots - 100, (roots - roots) * roots + self.last], 1)


@both_norms
@pytest.mark.parametrize("last", [-200.0, -math.inf, math.nan])
def test_a_net_that_breaks_down_is_never_shown_broken_images(norm, last):
    net, x, y = Steep(last).eval(), torch.rand(4, 1, 5, 5).sub(0.3).clamp(0, 1), torch.zeros(4, dtype=torch.int64)
    found = FAB(steps=3, restarts=2).evaluate(net, x, y, ThreatModel.of(norm, 1), keyed(4))
    assert not found.broken.any()
    assert torch.equal(found.x, x)
    distance, _ = FAB(steps=3).distances(net, x, y, norm, keyed(4))
    assert distance.isinf().all()


def test_nothing_is_found_on_a_constant_net():
    net = nn.Sequential(nn.Flatten(), nn.Linear(25, 3)).eval()
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.copy_(torch.tensor([1.0, 0.0, 0.5]))
    x = torch.rand(2, 1, 5, 5)
    distance, point = FAB(steps=3).distances(net, x, torch.tensor([0, 1]), "l2", keyed(2))
    assert distance.tolist() == [math.inf, 0.0]
    assert torch.equal(point, x)
    assert all(p.requires_grad for p in net.parameters())


def test_distances_leave_the_net_as_it_was():
    net = nn.Sequential(nn.Flatten(), nn.Linear(25, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    FAB(steps=3).distances(net, torch.rand(4, 1, 5, 5), torch.tensor([0, 1, 2, 0]), "linf", keyed(4))
    assert all(module.training for module in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"targets": 0}, {"restarts": 0}, {"alpha_max": 1.5}, {"eta": 0.9}, {"beta": 0}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        ATTACKS.build({"name": "fab", **options})
