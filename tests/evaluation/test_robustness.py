from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rprune.attacks.base import Attack, Found
from rprune.attacks.fgsm import FGSM
from rprune.attacks.pgd import PGD
from rprune.attacks.square import Square
from rprune.attacks.transfer import Transfer
from rprune.certification.confidence import ABSTAIN
from rprune.certification.ibp import certified
from rprune.certification.smoothing import Smoothed, Smoothing
from rprune.data.loaders import Resident
from rprune.errors import UsageError
from rprune.evaluation.accuracy import classes_of, predictions
from rprune.evaluation.certificates import SmoothedSet, certify_bounds, certify_smoothing
from rprune.evaluation.robustness import robustness
from rprune.evaluation.target import Rows, Target, steady
from rprune.models.graph import trace
from rprune.threat import ThreatModel

SHAPE = (1, 4, 4)
THREAT = ThreatModel("linf", "0.1")


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.hidden, self.head = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(x.flatten(1))))


class Constant(nn.Module):
    """Always certain of one class, with a gradient of nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * 0 + torch.tensor([1.0, 0.0, 0.0])


def dataset(net: nn.Module, n: int = 60, wrong: int = 6) -> Resident:
    """Images labelled by the net itself, the first ``wrong`` of them falsely."""
    images = torch.randint(0, 256, (n, *SHAPE), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    labels = classes_of(net)(images.float() / 255)
    labels[:wrong] = (labels[:wrong] + 1) % 3
    return Resident(images, labels)


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


@pytest.fixture(scope="module")
def data(net: Net) -> Resident:
    return dataset(net)


ATTACK = PGD(steps=5, restarts=2)


class Verdicts(nn.Module):
    """An artifact that is known by its classes alone."""

    def __init__(self, predict) -> None:
        super().__init__()
        self.predict = predict

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(self.predict(x), 3).float()


def run(net, data, *, search=None, verify=None, parents=(), attacks=(ATTACK,), **options):
    artifact = net if verify is None else Verdicts(verify)
    return robustness(Target(artifact, search or net, parents), data, THREAT, list(attacks), **options)


def queries(found) -> int:
    return int(found.queries.sum())


def misses(found) -> int:
    return sum(tally.misses for tally in found.tallies)


def test_some_samples_break_and_some_do_not(net: Net, data: Resident) -> None:
    found = run(net, data)
    assert 0 < found.correct < found.clean.correct == 54


def test_reported_points_lie_in_the_ball_and_fool_the_artifact(net: Net, data: Resident) -> None:
    found = run(net, data)
    images = data.images.float() / 255
    assert float((found.points - images[found.broken_ids]).abs().max()) <= THREAT.eps + 1e-6
    assert bool(((found.points >= 0) & (found.points <= 1)).all())
    assert torch.equal(classes_of(net)(found.points), found.adversarial)
    assert bool((found.adversarial != data.labels[found.broken_ids]).all())
    assert found.broken_ids.tolist() == sorted(set(found.broken_ids.tolist()))
    assert len(found.broken_by) == len(found.broken_ids)
    assert set(found.broken_by) == {"pgd"}


def test_only_the_verdict_of_the_artifact_counts(net: Net, data: Resident) -> None:
    images = data.images.flatten(1).float() / 255

    def always_right(x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), images).argmin(1)  # the image that a point was made from
        return data.labels[nearest]

    found = run(net, data, verify=always_right, batch_size=60)
    assert found.correct == 60
    assert misses(found) > 0
    assert len(found.broken_ids) == 0
    assert len(found.points) == 0
    honest = run(net, data)
    assert misses(honest) == 0


def test_artifact_that_breaks_where_the_search_net_does_not_counts_as_broken(net: Net, data: Resident) -> None:
    # labels of 0 alone: the search net is right everywhere, the artifact is wrong off the images themselves
    zeros = Resident(data.images, torch.zeros(60, dtype=torch.int64))
    known = {image.numpy().tobytes() for image in data.images.float() / 255}

    def brittle(x: Tensor) -> Tensor:
        return torch.tensor([0 if image.numpy().tobytes() in known else 2 for image in x])

    found = run(net, zeros, search=Constant().eval(), verify=brittle, attacks=[PGD(steps=1)], grid=False)
    assert found.clean.correct == 60
    assert found.correct == 0
    assert misses(found) == 0
    assert found.adversarial.tolist() == [2] * 60


def test_clean_errors_are_not_robust_and_not_attacked(net: Net, data: Resident) -> None:
    found = run(net, data)
    assert not found.robust[:6].any()
    assert not set(found.broken_ids.tolist()) & set(range(6))
    assert torch.equal(found.clean.right, torch.arange(60) >= 6)
    everything_wrong = Resident(data.images, (classes_of(net)(data.images.float() / 255) + 1) % 3)
    nothing = run(net, everything_wrong)
    assert (nothing.correct, queries(nothing), misses(nothing), len(nothing.broken_ids)) == (0, 0, 0, 0)


@pytest.mark.parametrize("attack", [ATTACK, FGSM(), PGD(steps=3, start="near", loss="margin")])
def test_batch_size_does_not_matter(net: Net, data: Resident, attack: Attack) -> None:
    whole = run(net, data, attacks=[attack], batch_size=60)
    for size in (1, 7, 59):
        found = run(net, data, attacks=[attack], batch_size=size)
        assert torch.equal(found.robust, whole.robust)
        assert torch.equal(found.broken_ids, whole.broken_ids)
        assert torch.equal(found.queries, whole.queries)
        torch.testing.assert_close(found.points, whole.points, rtol=0, atol=1e-6)


def test_order_of_the_samples_asked_for_does_not_matter(net: Net, data: Resident) -> None:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    whole, found = run(net, data), run(net, data, ids=order, batch_size=10)
    assert torch.equal(found.ids, torch.arange(60))
    assert torch.equal(found.broken_ids, whole.broken_ids)
    torch.testing.assert_close(found.points, whole.points, rtol=0, atol=1e-6)
    assert found.clean.correct == whole.clean.correct


def test_order_of_the_samples_does_not_matter_without_noise(net: Net, data: Resident) -> None:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    attack = PGD(steps=5, start="none")
    whole = run(net, data, attacks=[attack])
    found = run(net, Resident(data.images[order], data.labels[order]), attacks=[attack])
    assert torch.equal(found.robust, whole.robust[order])


@pytest.mark.parametrize("limit", [1, 20, 60, 1000])
def test_limit_takes_the_first_samples(net: Net, data: Resident, limit: int) -> None:
    whole, found = run(net, data), run(net, data, limit=limit, batch_size=8)
    n = min(limit, 60)
    assert found.clean.n == n
    assert torch.equal(found.robust, whole.robust[:n])


def test_seed_decides_the_noise(net: Net, data: Resident) -> None:
    attack = PGD(steps=1, step=0.01)
    same = [run(net, data, attacks=[attack], seed=1).points for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0][:1], run(net, data, attacks=[attack], seed=2).points[:1])


class Recorder(nn.Module):
    """Counts the samples that pass through it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.sizes = inner, []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.inner(x)


def test_each_attack_and_net_is_tried_on_survivors_alone(net: Net, data: Resident) -> None:
    other = Recorder(Net(seed=0)).eval()
    own = run(net, data, attacks=[FGSM()])
    both = run(net, data, parents=(other,), attacks=[FGSM(), Transfer(attack=ATTACK)])
    assert max(other.sizes) <= own.correct
    assert both.correct <= own.correct
    by = dict(zip(both.broken_ids.tolist(), both.broken_by, strict=True))
    assert all(by[i] == "fgsm" for i in own.broken_ids.tolist())


def test_transferred_points_are_named(net: Net, data: Resident) -> None:
    blind = Constant().eval()
    attacks = [FGSM(), ATTACK, Transfer(attack=FGSM()), Transfer(attack=ATTACK)]
    found = run(net, data, search=blind, parents=(net,), attacks=attacks)
    assert set(found.broken_by) <= {"fgsm", "pgd", "transfer fgsm", "transfer pgd"}
    assert {"transfer fgsm", "transfer pgd"} & set(found.broken_by)
    assert [(tally.name, tally.kind) for tally in found.tallies][2:] == [
        ("transfer fgsm", "transfer"),
        ("transfer pgd", "transfer"),
    ]
    alone = run(net, data, search=blind, attacks=attacks)
    assert found.correct < alone.correct
    assert alone.tallies[2].tried == 0


def test_transfer_does_not_stop_at_the_boundary_of_the_other_net(data: Resident) -> None:
    seen: list[float] = []

    class Watched(PGD):
        def search(self, net, x, y, threat, noise) -> Found:
            seen.append(self.overshoot)
            return super().search(net, x, y, threat, noise)

    one, two = Net(0).eval(), Net(1).eval()
    run(one, data, parents=(two,), attacks=[Watched(steps=2), Transfer(attack=Watched(steps=2))], grid=False)
    # a point on the very boundary may count as a miss of the first net, which then goes on too
    assert seen[0] == 0.0
    assert set(seen[1:]) == {math.inf}


def test_progress_counts_up_to_the_total(net: Net, data: Resident) -> None:
    calls: list[tuple[str, int, int, int]] = []
    found = run(net, data, batch_size=25, limit=55, on_progress=lambda *call: calls.append(call))
    assert [done for _, done, _, _ in calls] == [0, 25, 49]
    assert {(name, total) for name, _, _, total in calls} == {("pgd", 49)}  # 6 of 55 were wrong before
    assert calls[-1][2] == found.correct


def test_more_attacks_never_raise_the_score(net: Net, data: Resident) -> None:
    scores = [run(net, data, attacks=attacks).correct for attacks in ([FGSM()], [FGSM(), ATTACK])]
    assert scores[1] <= scores[0]


def test_attacks_that_cannot_run_leave_no_number_that_looks_whole(net: Net, data: Resident) -> None:
    blind = Target(net, None)
    found = robustness(blind, data, THREAT, [ATTACK, Square(budget=5)])
    assert [tally.tried for tally in found.tallies] == [0, 54]
    assert not found.complete
    assert robustness(blind, data, THREAT, [Transfer(attack=ATTACK), Square(budget=5)]).complete
    with pytest.raises(UsageError) as caught:
        robustness(blind, data, THREAT, [ATTACK, Transfer(attack=ATTACK)])
    assert "pgd, transfer pgd cannot run" in caught.value.message


def test_no_attack_gives_the_clean_score(net: Net, data: Resident) -> None:
    found = run(net, data, attacks=[])
    assert found.correct == found.clean.correct == 54
    assert queries(found) == 0


def test_predictions_follow_the_labels(net: Net, data: Resident) -> None:
    found = predictions(classes_of(net), data, limit=30, batch_size=7)
    assert (found.n, found.correct) == (30, 24)
    assert torch.equal(found.labels, data.labels[:30])


# -- certificates ---------------------------------------------------------------------------------------------------


def test_interval_certificates_count_right_samples_alone(net: Net, data: Resident) -> None:
    network = trace(net, SHAPE)
    threat = ThreatModel("linf", "0.01")
    found = certify_bounds(network, data, threat)
    truth = classes_of(net)(data.images.float() / 255)
    proved = certified(network, data.images.float() / 255, truth, threat)
    assert 0 < int(proved[6:].sum()) < 54
    assert torch.equal(found.proved, proved & (truth == data.labels))
    assert not found.proved[:6].any()
    assert found.correct == int(found.proved.sum())
    assert found.clean.correct == 54
    limited = certify_bounds(network, data, threat, limit=20)
    assert torch.equal(limited.proved, found.proved[:20])


def test_interval_certificates_do_not_count_ties(data: Resident) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 3)
            nn.init.zeros_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1))

    tied = Resident(data.images, torch.zeros(60, dtype=torch.int64))
    found = certify_bounds(trace(Tied(), SHAPE), tied, ThreatModel("linf", "0.01"))
    assert found.clean.correct == 60
    assert found.correct == 0


def test_certified_samples_are_robust(net: Net, data: Resident) -> None:
    network = trace(net, SHAPE)
    threat = ThreatModel("linf", "0.01")
    proved = certify_bounds(network, data, threat).proved
    found = robustness(Target(net, net), data, threat, [PGD(steps=20, restarts=3)])
    assert bool((found.robust | ~proved).all())


def test_smoothed_set_counts_right_classes_with_a_large_enough_radius() -> None:
    verdicts = [
        Smoothed(1, 9, 10, 0.5),
        Smoothed(1, 9, 10, 0.2),
        Smoothed(ABSTAIN, 5, 10, 0.0),
        Smoothed(2, 9, 10, 0.9),
    ]
    found = SmoothedSet([1, 1, 1, 0], verdicts)
    assert [found.correct_at(r) for r in (0.0, 0.2, 0.21, 0.5, 0.51)] == [2, 2, 1, 1, 0]


def test_smoothing_a_split_is_replayed_sample_by_sample(net: Net, data: Resident) -> None:
    smoothing, predict = Smoothing(sigma=0.1, n0=20, n=200), classes_of(net)
    seen: list[tuple[int, int, int]] = []
    found = certify_smoothing(
        predict, data, 3, smoothing, target=0.05, seed=5, limit=12, on_progress=lambda *counts: seen.append(counts)
    )
    assert found.labels == data.labels[:12].tolist()
    again = smoothing.certify(predict, data.images[7:8].float() / 255, [7], 3, 5, 0.05)
    assert found.verdicts[7] == again[0]
    assert seen[-1] == (12, found.correct_at(0.05), 12)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.a, self.b, self.c = nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x.flatten(1))))))


def test_a_cascade_asks_each_bound_for_what_is_left(data: Resident) -> None:
    from rprune.certification.bounds import METHODS, lower_margins
    from rprune.certification.ibp import proved as holds

    network, threat = trace(Deep(), SHAPE), ThreatModel("linf", "0.02")
    x = data.images.float() / 255
    with torch.no_grad():
        labels = network(x).argmax(1)
    labels[:6] = (labels[:6] + 1) % 3
    split = Resident(data.images, labels)
    broken = robustness(Target(network, network), split, threat, (PGD(steps=20, restarts=2),), grid=False)
    falsified = ~broken.robust & (broken.clean.predicted == labels)
    seen: list[dict[str, int]] = []
    found = certify_bounds(
        network,
        split,
        threat,
        METHODS,
        falsified=set(falsified.nonzero().flatten().tolist()),
        on_progress=lambda counts: seen.append(dict(counts)),
    )
    exact = {
        name: holds(lower_margins(trace(Deep(), SHAPE).double(), x, labels, threat, name), labels) for name in METHODS
    }
    assert bool(falsified.any())
    for i, (status, method) in enumerate(zip(found.status, found.method, strict=True)):
        if i < 6:
            assert (status, method) == ("misclassified", "")
        elif falsified[i]:
            assert (status, method) == ("falsified", "attack")
        else:
            first = next((name for name in METHODS if exact[name][i]), "")
            assert (status, method) == ("certified" if first else "unknown", first)
            assert (float(found.margin[i]) > 0) == bool(first)
    assert found.counts()["certified"] == found.correct == int(found.proved.sum())
    assert len({method for method in found.method if method in METHODS}) > 1
    assert bool((found.rounded <= found.proved).all())
    assert seen[-1] == found.counts()


# -- nets whose rows do not depend on their batch -------------------------------------------------------------------


class Odd(nn.Module):
    """Linear layers of sizes at which matrix kernels round some rows otherwise, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.again, self.head = nn.Linear(16, 97), nn.Linear(97, 97, bias=False), nn.Linear(97, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.again(torch.relu(self.again(torch.relu(self.first(x.flatten(1))))))))


def test_steady_net_is_the_same_function_with_rows_of_their_own() -> None:
    odd = Odd().eval()
    net, x = Rows(steady(steady(odd))), torch.rand(50, *SHAPE)
    assert isinstance(odd.head, nn.Linear)

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.clone().requires_grad_()
        logits = net(images)
        return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), images)[0]

    logits, gradient = both(x)
    torch.testing.assert_close(logits, odd(x).detach(), rtol=1e-5, atol=1e-6)
    for _ in range(5):
        part = torch.randperm(50)[:37]
        again = both(x[part])
        assert torch.equal(again[0], logits[part])
        assert torch.equal(again[1], gradient[part])


class Sized(nn.Module):
    """Notes the sizes of its calls; logits at ``other`` of them round in another way."""

    def __init__(self, other: int = 0) -> None:
        super().__init__()
        self.other, self.sizes = other, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return x.flatten(1)[:, :3] + 1e-6 * (len(x) == self.other)


def test_only_sizes_that_come_are_tried() -> None:
    """A trial at all of them is most of what a short attack on a large net takes."""
    sized = Sized()
    rows = Rows(sized, 512)
    rows(torch.rand(1040, *SHAPE))
    rows(torch.rand(9, *SHAPE))
    assert sized.sizes == [512, 32, 512, 512, 32, 32]
    rows(torch.rand(40, *SHAPE))
    assert sized.sizes[6:] == [64, 64]
    rows(torch.rand(512, *SHAPE))
    rows(torch.rand(500, *SHAPE))
    assert sized.sizes[8:] == [512, 512]


def test_a_size_that_rounds_otherwise_is_not_used() -> None:
    sized = Sized(other=32)
    rows, x = Rows(sized, 512), torch.rand(40, *SHAPE)
    assert torch.equal(rows(x[:20]), x[:20].flatten(1)[:, :3])
    assert sized.sizes == [512, 32, 512]
    assert torch.equal(rows(x), x.flatten(1)[:, :3])
    assert sized.sizes[3:] == [64, 64]


def test_a_net_without_odd_sizes_is_not_copied() -> None:
    even = nn.Sequential(nn.Flatten(), nn.Linear(16, 32))
    assert steady(even) is even
