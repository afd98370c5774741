from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from rprune.data.loaders import CROP_PADDING, WHOLE, Batch, Mixed, Resident, Rows, augmented, to_unit

AUGMENTS = ("none", "crop", "crop-flip", "resized-crop-flip")


def images(count: int = 40, shape: tuple[int, int, int] = (3, 9, 7)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, *shape), generator=generator, dtype=torch.uint8)


def resident(count: int = 40) -> Resident:
    return Resident(images(count), torch.arange(count) % 10)


def candidates(image: Tensor, flips: tuple[bool, ...]) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop of the zero-padded image, and which it is."""
    pad = CROP_PADDING
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * pad, width + 2 * pad), np.uint8)
    padded[:, pad : pad + height, pad : pad + width] = image.numpy()
    found = {}
    for top, left, flip in itertools.product(range(2 * pad + 1), range(2 * pad + 1), flips):
        crop = padded[:, top : top + height, left : left + width]
        found[(crop[:, :, ::-1] if flip else crop).tobytes()] = (top, left, flip)
    return found


@pytest.mark.parametrize(("augment", "flips"), [("crop", (False,)), ("crop-flip", (False, True))])
def test_augmentation_makes_shifts_and_flips_alone(augment: str, flips: tuple[bool, ...]) -> None:
    assert CROP_PADDING == 4
    x = images(60)
    got = augmented(x, torch.Generator().manual_seed(1), augment, Rows.of(len(x), WHOLE))
    bytes_of = (got * 255).round().to(torch.uint8)
    assert torch.equal(to_unit(bytes_of), got)
    drawn = []
    for image, result in zip(x, bytes_of, strict=True):
        every = candidates(image, flips)
        assert len(every) == 81 * len(flips)
        drawn.append(every[result.numpy().tobytes()])
    assert {flip for *_, flip in drawn} == set(flips)
    assert len({top for top, *_ in drawn}) == 9
    assert len({left for _, left, _ in drawn}) == 9
    assert len(set(drawn)) > 30


def test_every_shift_and_flip_is_about_equally_likely() -> None:
    image = images(1)
    every = candidates(image[0], (False, True))
    got = augmented(image.expand(8100, -1, -1, -1), torch.Generator().manual_seed(0), "crop-flip", Rows.of(8100, WHOLE))
    rows = (got * 255).round().to(torch.uint8).numpy()
    draws = [every[row.tobytes()] for row in rows]
    assert len(set(draws)) == 162
    counts = np.unique([top * 18 + left * 2 + flip for top, left, flip in draws], return_counts=True)[1]
    assert counts.min() > 20  # 50 expected, standard deviation 7
    assert counts.max() < 90


def test_no_augmentation_is_exact() -> None:
    x = images()
    got = augmented(x, torch.Generator(), "none", Rows.of(len(x), WHOLE))
    assert torch.equal(got, x.float() / 255)
    assert torch.equal((got * 255).to(torch.uint8), x)
    assert got.dtype == torch.float32


def test_augmentation_leaves_the_images_alone() -> None:
    data = resident()
    before = data.images.clone()
    for augment in AUGMENTS:
        for batch in data.shuffled(16, torch.Generator(), augment):
            batch.x.zero_()
    assert torch.equal(data.images, before)


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("batch_size", [1, 7, 40, 100])
def test_every_epoch_visits_every_sample_once(augment: str, batch_size: int) -> None:
    data = resident()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        batches = list(data.shuffled(batch_size, generator, augment))
        ids = torch.cat([batch.ids for batch in batches])
        assert sorted(ids.tolist()) == list(range(40))
        assert [len(batch.y) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert torch.equal(torch.cat([batch.y for batch in batches]), data.labels[ids])
        if augment == "none":
            assert torch.equal(torch.cat([batch.x for batch in batches]), data.images[ids].float() / 255)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_epoch_is_reproduced_by_its_generator(augment: str) -> None:
    data = resident()

    def epochs(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        torch.rand(3)  # the global generator plays no part
        return [t for _ in range(2) for batch in data.shuffled(9, generator, augment) for t in batch]

    one, two, other = epochs(4), epochs(4), epochs(5)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[2], other[2])
    assert not torch.equal(one[2], one[len(one) // 2 + 2])


@pytest.mark.parametrize("limit", [None, 1, 17, 40, 500])
def test_ordered_gives_the_first_samples_as_they_are(limit: int | None) -> None:
    data = resident()
    batches = list(data.ordered(8, limit))
    n = min(limit or 40, 40)
    assert torch.equal(torch.cat([batch.ids for batch in batches]), torch.arange(n))
    assert torch.equal(torch.cat([batch.x for batch in batches]), data.images[:n].float() / 255)
    assert torch.equal(torch.cat([batch.y for batch in batches]), data.labels[:n])
    assert len(data) == 40


def test_mixed_batches_hold_as_many_extra_samples_and_every_one_in_turn():
    labelled, extra = resident(40), Resident(images(25, (3, 9, 7)), torch.full((25,), 7))
    mixed = Mixed(labelled, extra)
    assert len(mixed) == 40
    batches = list(mixed.shuffled(16, torch.Generator().manual_seed(0), "none"))
    assert [len(batch.y) for batch in batches] == [32, 32, 16]
    own = torch.cat([batch.ids[: len(batch.ids) // 2] for batch in batches])
    other = torch.cat([batch.ids[len(batch.ids) // 2 :] for batch in batches]) - 40
    assert own.sort().values.tolist() == list(range(40))
    assert other[:25].sort().values.tolist() == list(range(25))  # a whole pass before any comes again
    assert all(bool((batch.y[len(batch.y) // 2 :] == 7).all()) for batch in batches)
    again = list(mixed.shuffled(16, torch.Generator().manual_seed(0), "none"))
    assert all(torch.equal(a.x, b.x) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("kind", ["resident", "mixed"])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_are_those_of_the_whole_batches(augment: str, kind: str, parts: int) -> None:
    data: Resident | Mixed = resident(40)
    if kind == "mixed":
        data = Mixed(data, Resident(images(25, (3, 9, 7)), torch.full((25,), 7)))

    def epoch(part: tuple[int, int]) -> list[Batch]:
        return list(data.shuffled(13, torch.Generator().manual_seed(2), augment, part))

    whole, pieces = epoch(WHOLE), [epoch((i, parts)) for i in range(parts)]
    sizes = data.sizes(13)
    assert [len(batch.y) for batch in whole] == sizes
    for step, batch in enumerate(whole):
        places = [Rows.of(sizes[step], (i, parts)) for i in range(parts)]
        assert sum(place.share for place in places) == pytest.approx(1)
        for piece, place in zip(pieces, places, strict=True):
            for mine, all_ in zip(piece[step], batch, strict=True):
                assert torch.equal(mine, all_[place.index])
            assert place.share in (0, len(piece[step].y) / sizes[step])
    assert len(Rows.of(1, (1, 2)).index) == 1  # a process without a sample takes one that does not count
    assert Rows.of(1, (1, 2)).share == 0
