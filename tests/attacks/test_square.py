"""Square Attack against a plain implementation of the paper's algorithms."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from rprune.attacks.base import ATTACKS, margin
from rprune.attacks.noise import Keyed
from rprune.attacks.norms import within
from rprune.attacks.square import HALVINGS, Square, draw, pattern, square_side, windows
from rprune.errors import UsageError
from rprune.evaluation.target import Rows
from rprune.threat import ThreatModel

both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])
every_shape = pytest.mark.parametrize("shape", [(1, 5, 5), (3, 7, 12), (1, 12, 6), (3, 16, 16)], ids=str)
EPS = {"linf": "0.1", "l2": "0.7"}


def net_for(shape, classes=4, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(shape[0], 6, 3, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(6 * math.prod(shape[1:]), classes),
        ]
        return nn.Sequential(*layers).double().eval()


def images_for(shape, n=6, seed=1):
    """Some pixels are 0 or 1, so that the box cuts perturbations off."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, *shape, generator=generator, dtype=torch.float64).mul_(1.3).sub_(0.15).clamp_(0, 1)


def labels(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


class Recorder(nn.Module):
    """A net that keeps every batch it is asked about, and refuses to build a graph."""

    def __init__(self, net):
        super().__init__()
        self.net, self.asked = net, []

    def forward(self, x):
        assert not torch.is_grad_enabled()
        self.asked.append(x.clone())
        return self.net(x)


# --- the paper, read aloud: one sample, one pixel at a time -------------------------------------------------------


def plain_eta(side):
    """Equation 2 and the text around it, with indices from 1."""
    k = side // 2
    eta = np.zeros((side, side))
    for width, first, sign in ((k, 0, 1), (side - k, k, -1)):
        n = side // 2
        for r in range(1, side + 1):
            for s in range(1, width + 1):
                m = n - max(abs(r - side // 2 - 1), abs(s - width // 2 - 1))
                eta[r - 1, first + s - 1] = sign * sum(1 / (n + 1 - i) ** 2 for i in range(m + 1))
    return eta


def place(number, places):
    return min(int((number + 1) / 2 * places), places - 1)


def plain_start(x, norm, eps, key):
    c, h, w = x.shape
    if norm == "linf":
        numbers = key.uniform(torch.empty(1, c, 1, w, dtype=torch.float64), "square/0/start")[0].numpy()
        return np.clip(x + eps * np.where(numbers >= 0, 1, -1), 0, 1)
    side = max(min(h, w) // 5, 1)
    rows, columns = h // side, w // side
    numbers = key.uniform(torch.empty(1, c + 1, rows, columns, dtype=torch.float64), "square/0/start")[0].numpy()
    top, left = (h - rows * side) // 2, (w - columns * side) // 2
    delta, eta = np.zeros(x.shape), plain_eta(side)
    for i in range(rows):
        for j in range(columns):
            tile = eta if numbers[0, i, j] >= 0 else eta.T
            for channel in range(c):
                sign = 1 if numbers[channel + 1, i, j] >= 0 else -1
                r, s = top + i * side, left + j * side
                delta[channel, r : r + side, s : s + side] = sign * tile
    return np.clip(x + eps * delta / np.linalg.norm(delta), 0, 1)


def plain_recolour(point, x, eps, side, numbers):
    c, h, w = x.shape
    r, s = place(numbers[c], h - side + 1), place(numbers[c + 1], w - side + 1)
    delta = np.zeros(x.shape)
    for channel in range(c):
        delta[channel, r : r + side, s : s + side] = 2 * eps if numbers[channel] >= 0 else -2 * eps
    return np.clip(np.clip(point + delta, x - eps, x + eps), 0, 1)


def plain_move_mass(point, x, eps, side, numbers):
    c, h, w = x.shape
    nu = point - x
    r1, s1, r2, s2 = (place(number, n - side + 1) for number, n in zip(numbers[c : c + 4], (h, w, h, w), strict=True))
    one, two = np.zeros((h, w), bool), np.zeros((h, w), bool)
    one[r1 : r1 + side, s1 : s1 + side] = True
    two[r2 : r2 + side, s2 : s2 + side] = True
    unused = max(eps**2 - (nu**2).sum(), 0)
    eta = plain_eta(side) if numbers[c + 4] >= 0 else plain_eta(side).T
    eta = eta / np.linalg.norm(eta)
    for i in range(c):
        rho = 1 if numbers[i] >= 0 else -1
        mine = nu[i][one].reshape(side, side)
        length = np.linalg.norm(mine)
        temp = rho * eta + (mine / length if length > 0 else 0)
        available = math.sqrt((nu[i][one | two] ** 2).sum() + unused / c)
        nu[i][two] = 0
        nu[i][one] = (temp / np.linalg.norm(temp) * available).flatten()
    return np.clip(x + nu / np.linalg.norm(nu) * eps, 0, 1)


def plain_side(query, h, w, norm):
    p = 0.8
    for end in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
        if query > end:
            p /= 2
    side = round(math.sqrt(p * h * w))
    if norm == "linf":
        return min(max(side, 1), h, w)
    side = max(side, 3)
    if side % 2 == 0:
        side += 1
    while side > min(h, w):
        side -= 2
    return side


def plain_square(net, x, y, norm, eps, budget, seed, sample, overshoot=0.0):
    """Algorithm 1 on one image: every point that it asks about, the best of them, and its margin."""
    key = Keyed(seed, torch.tensor([sample]))
    c, h, w = x.shape
    count = c + (2 if norm == "linf" else 5)
    asked, best, lowest = [], None, math.inf
    for query in range(budget):
        if query % 50 == 0:
            block = key.uniform(torch.empty(1, 50, count, dtype=torch.float64), f"square/0/{query // 50}")[0].tolist()
        if query == 0:
            point = plain_start(x, norm, eps, key)
        else:
            propose = plain_recolour if norm == "linf" else plain_move_mass
            point = propose(best, x, eps, plain_side(query, h, w, norm), block[query % 50])
        asked.append(point)
        logits = net(torch.from_numpy(point)[None])[0].tolist()
        value = logits[y] - max(z for j, z in enumerate(logits) if j != y)
        if value < lowest:
            best, lowest = point, value
        if lowest <= -overshoot:
            break
    return asked, best, lowest


@both_norms
@every_shape
def test_every_step_is_the_papers(norm, shape):
    net, x, ids = net_for(shape), images_for(shape), torch.tensor([3, 0, 11, 5, 4, 1])
    y, threat = labels(net, x), ThreatModel.of(norm, EPS[norm])
    recorder = Recorder(net)
    found = Square(budget=55, overshoot=math.inf).search(recorder, x, y, threat, Keyed(7, ids))
    for k, sample in enumerate(ids.tolist()):
        with torch.no_grad():
            plain = plain_square(net, x[k].numpy(), int(y[k]), norm, threat.eps, 55, 7, sample, math.inf)
        asked = np.stack([batch[k].numpy() for batch in recorder.asked])
        np.testing.assert_allclose(asked, np.stack(plain[0]), rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.x[k].numpy(), plain[1], rtol=0, atol=1e-12)
        assert float(found.margin[k]) == pytest.approx(plain[2], abs=1e-12)


@both_norms
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_samples_leave_at_their_first_wrong_point(norm, classes):
    shape, budget = (3, 6, 9), 40
    net, x = net_for(shape, classes), images_for(shape, 16)
    y, threat = labels(net, x), ThreatModel.of(norm, {"linf": "0.06", "l2": "0.35"}[norm])
    found = Square(budget=budget).evaluate(net, x, y, threat, Keyed(0, torch.arange(16)))
    assert 0 < found.broken.sum() < 16
    for k in range(16):
        with torch.no_grad():
            asked, best, lowest = plain_square(net, x[k].numpy(), int(y[k]), norm, threat.eps, budget, 0, k)
        assert len(asked) == int(found.queries[k])
        np.testing.assert_allclose(found.x[k].numpy(), best, rtol=0, atol=1e-12)
        assert float(found.margin[k]) == pytest.approx(lowest, abs=1e-12)


# --- its parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [*range(1, 12), 20, 45])
def test_pattern_is_equation_2(side):
    upright, turned = pattern(side, torch.float64, torch.device("cpu"))
    eta = plain_eta(side)
    np.testing.assert_allclose(upright.numpy(), eta / np.linalg.norm(eta), rtol=0, atol=1e-14)
    assert torch.equal(turned, upright.T)
    assert (upright[:, : side // 2] > 0).all()
    assert (upright[:, side // 2 :] < 0).all()


def test_share_of_the_image_halves_after_the_papers_queries():
    for budget in (100, 5000, 10_000):
        shares = [Square(budget=budget).share(query) for query in range(1, 9000)]
        halved = tuple(query for query in range(1, 8999) if shares[query] < shares[query - 1])
        assert halved == HALVINGS
        assert shares[0] == 0.8
        assert shares[-1] == 0.8 / 2**9
    rescaled = [Square(budget=1000, rescale=True).share(query) for query in range(1000)]
    assert [query for query in range(999) if rescaled[query + 1] < rescaled[query]] == [n // 10 for n in HALVINGS]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_squares_fit_whatever_the_image(norm):
    for height in range(5, 34):
        for width in range(5, 34):
            for query in (1, 11, 60, 300, 5000, 9999):
                side = square_side(Square().share(query), height, width, norm)
                assert side == plain_side(query, height, width, norm)
                assert 1 <= side <= min(height, width)
                assert norm == "linf" or (side % 2 == 1 and side >= 3)
    assert [square_side(Square().share(query), 32, 32, "linf") for query in (1, 11, 51, 201, 501, 1001)] == [
        *(29, 20, 14, 10, 7, 5)
    ]
    assert [square_side(Square().share(query), 32, 32, "l2") for query in (1, 11, 51, 201, 501, 1001)] == [
        *(29, 21, 15, 11, 7, 5)
    ]
    assert square_side(1.0, 6, 6, "l2") == 5


@dataclass(frozen=True)
class Constant(Keyed):
    value: float = 0.0

    def uniform(self, like, purpose):  # noqa: ARG002
        return torch.full_like(like, self.value)


def test_a_square_lies_at_every_place_where_it_fits_alike():
    x = torch.zeros(1_000, 1, 5, 7)
    corners = draw(x, "linf", [3] * 50, Keyed(0, torch.arange(len(x))), "t").corners
    counts = torch.bincount(corners.flatten(), minlength=35).view(5, 7)
    assert (counts[3:] == 0).all()
    assert (counts[:, 5:] == 0).all()
    assert ((counts[:3, :5] / corners.numel() - 1 / 15).abs() < 0.005).all()
    ends = [
        draw(x[:1], "linf", [3] * 50, Constant(0, torch.zeros(1, dtype=torch.int64), end), "t") for end in (-1.0, 1.0)
    ]
    assert [set(end.corners.flatten().tolist()) for end in ends] == [{0}, {18}]
    (pixels,) = windows(torch.tensor([[0], [18]]), 3, x[:2])
    assert pixels[:, 0].tolist() == [[0, 1, 2, 7, 8, 9, 14, 15, 16], [18, 19, 20, 25, 26, 27, 32, 33, 34]]


# --- the whole ----------------------------------------------------------------------------------------------------


@both_norms
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_proposal_lies_in_ball_and_box(norm, shape, dtype):
    net, x = net_for(shape).to(dtype), images_for(shape).to(dtype)
    y, threat = labels(net, x), ThreatModel.of(norm, EPS[norm])
    recorder = Recorder(net)
    Square(budget=55, overshoot=math.inf).search(recorder, x, y, threat, Keyed(0, torch.arange(len(x))))
    assert len(recorder.asked) == 55
    for point in recorder.asked:
        assert within(point, x, threat, 1e-6 if dtype == torch.float32 else 1e-12).all()
        assert point.dtype == dtype
    moved = [(a != b).any() for a, b in pairwise(recorder.asked)]
    assert sum(moved) > 45


@both_norms
def test_l2_points_use_up_the_ball_where_the_box_allows(norm):
    """Away from 0 and 1 nothing is cut off: l2 perturbations have norm eps, linf ones eps at every pixel."""
    shape = (3, 8, 8)
    net, x = net_for(shape), 0.5 + 0 * images_for(shape)
    recorder = Recorder(net)
    threat = ThreatModel.of(norm, EPS[norm])
    Square(budget=55, overshoot=math.inf).search(recorder, x, labels(net, x), threat, Keyed(0, torch.arange(len(x))))
    for point in recorder.asked:
        sizes = (point - x).abs() if norm == "linf" else (point - x).flatten(1).norm(dim=1)
        torch.testing.assert_close(sizes, torch.full_like(sizes, threat.eps), rtol=0, atol=1e-12)


@both_norms
def test_eps_zero_asks_about_the_images_alone(norm):
    shape = (3, 6, 6)
    net, x = net_for(shape), images_for(shape)
    recorder = Recorder(net)
    noise = Keyed(0, torch.arange(len(x)))
    found = Square(budget=20).search(recorder, x, labels(net, x), ThreatModel.of(norm, "0"), noise)
    assert all(torch.equal(point, x) for point in recorder.asked)
    assert torch.equal(found.x, x)
    assert not found.broken.any()


@both_norms
@pytest.mark.parametrize("channels", [1, 3])
def test_same_bits_in_any_batch(oracle_net, norm, channels):
    net, x, y = oracle_net
    x, y = x[:14], y[:14]
    if channels == 1:
        net, x = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False).requires_grad_(False), net), x[:, :1].contiguous()
        net[0].weight.fill_(1.0)
    net, threat = Rows(net, 4), ThreatModel.of(norm, {"linf": "0.05", "l2": "0.5"}[norm])
    attack = Square(budget=52, restarts=2)
    whole = attack.evaluate(net, x, y, threat, Keyed(0, torch.arange(14)))
    assert 0 < whole.broken.sum() < 14
    order = torch.randperm(14, generator=torch.Generator().manual_seed(4))
    for part in (order[:1], order[1:6], order[6:]):
        found = attack.evaluate(net, x[part], y[part], threat, Keyed(0, part))
        assert torch.equal(found.x, whole.x[part])
        assert torch.equal(found.margin, whole.margin[part])
        assert torch.equal(found.queries, whole.queries[part])


@both_norms
def test_forward_passes_are_counted_exactly(norm):
    shape = (1, 6, 6)
    net, x = net_for(shape), images_for(shape, 10)
    y, threat = labels(net, x), ThreatModel.of(norm, {"linf": "0.08", "l2": "0.3"}[norm])
    attack = Square(budget=8, restarts=3)
    whole = attack.evaluate(net, x, y, threat, Keyed(0, torch.arange(10)))
    assert 0 < whole.broken.sum() < 10
    assert attack.queries() == attack.queries(classes=2) == 24
    assert (whole.queries[~whole.broken] == 24).all()
    for k in range(10):
        recorder = Recorder(net)
        attack.search(recorder, x[k : k + 1], y[k : k + 1], threat, Keyed(0, torch.tensor([k])))
        assert sum(map(len, recorder.asked)) == int(whole.queries[k])


@both_norms
def test_samples_that_are_done_are_dropped(norm):
    shape = (3, 6, 6)
    net, x = net_for(shape), images_for(shape, 60)
    y, threat = labels(net, x), ThreatModel.of(norm, EPS[norm])
    recorder = Recorder(net)
    found = Square(budget=100).search(recorder, x, y, threat, Keyed(0, torch.arange(60)))
    assert found.broken.sum() > 20
    assert int(found.queries.sum()) <= sum(map(len, recorder.asked)) <= int(found.queries.sum()) / 0.95


@both_norms
def test_more_queries_never_break_fewer(oracle_net, norm):
    net, x, y = oracle_net
    threat = ThreatModel.of(norm, {"linf": "0.08", "l2": "0.8"}[norm])
    found = [
        Square(budget=budget).evaluate(net, x[:64], y[:64], threat, Keyed(0, torch.arange(64)))
        for budget in (3, 25, 80)
    ]
    for few, many in pairwise(found):
        assert (many.broken >= few.broken).all()
        assert many.broken.sum() > few.broken.sum()
        assert (many.margin <= few.margin + 1e-5).all()


@both_norms
def test_transfer_form_goes_past_the_boundary(norm):
    shape = (3, 6, 6)
    net, x = net_for(shape), images_for(shape, 20)
    y, threat, noise = labels(net, x), ThreatModel.of(norm, EPS[norm]), Keyed(0, torch.arange(20))
    near, half, deep = (
        attack.evaluate(net, x, y, threat, noise)
        for attack in (Square(budget=90), Square(budget=90, overshoot=0.1), Square(budget=90).for_transfer())
    )
    assert (deep.queries == 90).all()
    assert (deep.margin <= half.margin + 1e-12).all()
    assert (half.margin <= near.margin + 1e-12).all()
    assert deep.margin.mean() < near.margin.mean() - 0.02
    assert torch.equal(near.broken, deep.broken)
    gone = half.queries < 90
    assert gone.any()
    assert (half.margin[gone] <= -0.1).all()


class NumpyNet(nn.Module):
    """Logits from somewhere without gradients, in another precision, read-only."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, x):
        logits = x.numpy().reshape(len(x), -1).astype(np.float64) @ self.weights
        return torch.from_numpy(logits)


@both_norms
def test_net_without_gradients(norm):
    x = images_for((3, 6, 8), 12).float()
    net = NumpyNet(np.random.default_rng(0).normal(size=(144, 5)))
    y = labels(net, x)
    found = Square(budget=100).evaluate(net, x, y, ThreatModel.of(norm, EPS[norm]), Keyed(0, torch.arange(12)))
    assert not Square.needs_gradient
    assert found.broken.any()
    assert found.x.dtype == found.margin.dtype == torch.float32
    torch.testing.assert_close(found.margin, margin(net(found.x), y).float())


class OftenBroken(nn.Module):
    """NaN for images with a bright corner."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).masked_fill((x[:, 0, 0, 0] > 0.5)[:, None], torch.nan)


@both_norms
def test_points_where_the_net_breaks_down_are_never_taken(norm):
    shape = (3, 6, 6)
    x = images_for(shape, 20)
    x[:, 0, 0, 0] = 0.5
    net = OftenBroken(net_for(shape))
    y = labels(net.net, x)
    recorder = Recorder(net)
    attack = Square(budget=55, overshoot=math.inf)
    found = attack.search(recorder, x, y, ThreatModel.of(norm, EPS[norm]), Keyed(0, torch.arange(20)))
    assert torch.stack(recorder.asked)[:, :, 0, 0, 0].gt(0.5).any()
    assert torch.isfinite(found.margin).all()
    assert (found.x[:, 0, 0, 0] <= 0.5).all()


@pytest.mark.parametrize(
    "options", [{"budget": 0}, {"budget": 2.5}, {"p_init": 0}, {"p_init": 1.1}, {"restarts": 0}, {"overshoot": -1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        ATTACKS.build({"name": "square", **options})
