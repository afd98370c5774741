"""Random numbers that depend on seed, purpose, sample and position alone."""

import pytest
import torch

from rprune.attacks.noise import Keyed, Stream

LIKE = torch.empty(200, 3, 16, 16)
IDS = torch.arange(200)


def test_uniform_is_uniform_in_minus_one_to_one():
    values = Keyed(0, IDS).uniform(LIKE.double(), "a")
    assert values.shape == LIKE.shape
    assert values.min() >= -1
    assert values.max() <= 1
    assert float(values.mean()) == pytest.approx(0, abs=0.01)
    assert float(values.var()) == pytest.approx(1 / 3, abs=0.005)
    shares = torch.histc(values, 20, -1, 1) / values.numel()
    assert (shares - 0.05).abs().max() < 0.003
    assert Keyed(0, IDS).uniform(LIKE, "a").abs().max() <= 1


def test_normal_is_standard():
    values = Keyed(0, IDS).normal(LIKE.double(), "a").flatten()
    assert torch.isfinite(values).all()
    assert float(values.mean()) == pytest.approx(0, abs=0.01)
    assert float(values.var()) == pytest.approx(1, abs=0.02)
    assert float((values**3).mean()) == pytest.approx(0, abs=0.05)
    assert float((values**4).mean()) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_numbers_differ_by_seed_purpose_sample_and_position(kind):
    base = getattr(Keyed(0, IDS), kind)(LIKE, "a")
    others = [
        getattr(Keyed(1, IDS), kind)(LIKE, "a"),
        getattr(Keyed(0, IDS), kind)(LIKE, "b"),
        getattr(Keyed(0, IDS + 1000), kind)(LIKE, "a"),
    ]
    for other in others:
        assert (base == other).float().mean() < 0.001
        correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.01
    assert len(base.flatten().double().unique()) > 0.98 * base.numel()
    neighbours = torch.corrcoef(torch.stack([base[:-1].flatten(), base[1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.01
    flat = base.flatten(1)
    along = torch.corrcoef(torch.stack([flat[:, :-1].flatten(), flat[:, 1:].flatten()]))[0, 1]
    assert abs(float(along)) < 0.01


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_a_sample_has_the_same_numbers_in_any_batch(kind):
    whole = getattr(Keyed(3, IDS), kind)(LIKE, "a")
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:17]
    assert torch.equal(getattr(Keyed(3, order), kind)(LIKE[:17], "a"), whole[order])
    assert torch.equal(getattr(Keyed(3, IDS).select(order), kind)(LIKE[:17], "a"), whole[order])
    mask = torch.zeros(200, dtype=torch.bool).index_fill(0, order, True)
    assert torch.equal(getattr(Keyed(3, IDS).select(mask), kind)(LIKE[:17], "a"), whole[mask])


def test_numbers_are_the_same_on_every_machine():
    values = Keyed(0, torch.tensor([0, 7, 2**62])).uniform(torch.empty(3, 2, dtype=torch.float64), "pgd/0")
    again = Keyed(0, torch.tensor([2**62])).uniform(torch.empty(1, 2, dtype=torch.float64), "pgd/0")
    assert torch.equal(values[2:], again)
    assert values.tolist() == reference([0, 7, 2**62], 2, "0/pgd/0")


def reference(ids, columns, text):
    """The same hash on Python's whole numbers."""
    import hashlib

    word = (1 << 64) - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    rows = [mix((i + key) & word) for i in ids]
    return [[2 * (mix((r + c * 0x9E3779B97F4A7C15) & word) >> 11) * 2.0**-53 - 1 for c in range(columns)] for r in rows]


def test_stream_is_that_of_its_generator():
    first, second = (Stream(torch.Generator().manual_seed(0)) for _ in range(2))
    for kind in ("uniform", "normal", "uniform"):
        a, b = (getattr(stream, kind)(LIKE, "a") for stream in (first, second))
        assert torch.equal(a, b)
    assert a.abs().max() <= 1
    assert float(a.mean()) == pytest.approx(0, abs=0.01)
    assert not torch.equal(a, first.uniform(LIKE, "a"))
