"""Random crops of random size: geometry against torchvision's, pixels against Pillow's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from rprune.data.crops import NUMBERS, TRIES, flips, windows
from rprune.data.loaders import WHOLE, Rows, augmented, drawn
from rprune.data.places import ImagePlace
from rprune.data.splits import read_image

SIZES = [(375, 500), (64, 64), (500, 180), (20, 300)]  # of the last two many and all tries fail


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).rand(count, NUMBERS)


def slow(height: int, width: int, given: np.ndarray) -> tuple[int, int, int, int]:
    """torchvision's get_params, its random numbers replaced by given ones."""
    for area, aspect in zip(given[:TRIES], given[TRIES : 2 * TRIES], strict=True):
        target = height * width * (0.08 + 0.92 * area)
        ratio = math.exp(math.log(3 / 4) + aspect * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(given[-3] * (height - h + 1)), int(given[-2] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(w / (3 / 4))
    elif width / height > 4 / 3:
        w = round(h * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", SIZES)
def test_windows_are_those_of_the_slow_loop(size: tuple[int, int]) -> None:
    drawn_ = numbers(500)
    assert windows(*size, drawn_).tolist() == [list(slow(*size, row)) for row in drawn_]


@pytest.mark.parametrize("size", SIZES)
def test_windows_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    count = 3000
    torch.manual_seed(0)
    image = torch.zeros(1, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    ours = windows(*size, numbers(count))
    for figures in (
        lambda w: w[:, 2] * w[:, 3],
        lambda w: w[:, 3] / w[:, 2],
        lambda w: w[:, 0],
        lambda w: w[:, 1],
    ):
        one, two = figures(ours), figures(theirs)
        assert abs(one.mean() - two.mean()) <= 4 * math.sqrt((one.var() + two.var()) / count)
        assert ks_2samp(one, two, method="asymp").pvalue > 1e-3


def test_areas_and_aspects_fill_their_ranges() -> None:
    _, _, high, wide = windows(1000, 1000, numbers(20000)).T
    area, aspect = high * wide / 1e6, wide / high
    assert 0.079 < area.min() < 0.085
    assert 0.95 < area.max() <= 1
    assert 0.748 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.336
    assert abs(np.log(aspect).mean()) < 0.01


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**32 - 1))
def test_windows_lie_inside_every_image(height: int, width: int, seed: int) -> None:
    extreme = np.concatenate([numbers(4, seed), np.zeros((1, NUMBERS)), np.full((1, NUMBERS), np.nextafter(1, 0))])
    top, left, high, wide = windows(height, width, extreme).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (high >= 1).all()
    assert (wide >= 1).all()
    assert (top + high <= height).all()
    assert (left + wide <= width).all()


def smooth(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A random image without single bright pixels, as photographs are: uint8 (height, width, channels)."""
    coarse = np.random.RandomState(seed).randint(0, 256, (6, 6, channels)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC))
                     for c in np.moveaxis(coarse, 2, 0)], 2)  # fmt: skip


def resized(image: Image.Image, row: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What torchvision makes of the window and flip that ``row`` says: (height, width, channels)."""
    found = tv.resized_crop(image, *windows(image.height, image.width, row[None])[0].tolist(), list(size))
    return np.asarray(tv.hflip(found) if flips(row[None])[0] else found)


@pytest.mark.parametrize("shape", [(3, 32, 24), (1, 16, 16)])
def test_crops_of_resident_images_are_pillows_to_one_step(shape: tuple[int, int, int]) -> None:
    _, height, width = shape
    random = np.random.RandomState(1)
    images = torch.from_numpy(random.randint(0, 256, (40, *shape)).astype(np.uint8))
    rows = Rows.of(40, WHOLE)
    given = drawn(torch.Generator().manual_seed(3), rows)
    got = augmented(images, torch.Generator().manual_seed(3), "resized-crop-flip", rows)
    for image, row, result in zip(images.numpy(), given, got, strict=True):
        wanted = np.stack([resized(Image.fromarray(plane), row, (height, width)) for plane in image])
        assert np.abs((result * 255).numpy() - wanted).max() <= 1.001  # Pillow rounds between its two passes
    assert 10 < flips(given).sum() < 30


def test_the_whole_image_is_left_as_it_is() -> None:
    """Area 1 and aspect 1: a window of the size of the image, to the bit."""
    whole = np.zeros((1, NUMBERS))
    whole[:, :TRIES], whole[:, TRIES : 2 * TRIES], whole[:, -1] = 1 - 1e-12, 0.5, 0.9
    image = torch.from_numpy(smooth(16, 16).transpose(2, 0, 1).copy())[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rprune.data.loaders.drawn", lambda generator, rows: whole)
        got = augmented(image, torch.Generator(), "resized-crop-flip", Rows.of(1, WHOLE))
    assert torch.equal(got, image.float() / 255)


def stored(tmp_path: Path, pixels: np.ndarray, suffix: str) -> ImagePlace:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pixels).save(path, **({"quality": 95} if suffix == "jpg" else {}))
    return ImagePlace(path)


def test_crops_of_files_are_torchvisions(tmp_path: Path) -> None:
    for suffix, size in (("png", (90, 120)), ("jpg", (40, 30))):
        place = stored(tmp_path, smooth(*size), suffix)
        for row in numbers(20):
            with Image.open(place.path) as image:
                wanted = resized(image.convert("RGB"), row, (24, 20))
            assert np.array_equal(read_image(place, (3, 24, 20), row), wanted.transpose(2, 0, 1))


def test_large_jpegs_are_decoded_at_a_fraction_and_look_the_same(tmp_path: Path) -> None:
    place = stored(tmp_path, smooth(700, 900), "jpg")
    reduced = 0
    for row in numbers(12):
        with Image.open(place.path) as image:
            wanted = resized(image.convert("RGB"), row, (32, 32)).transpose(2, 0, 1)
        got = read_image(place, (3, 32, 32), row)
        reduced += not np.array_equal(got, wanted)
        assert np.abs(got.astype(int) - wanted).mean() < 1.5
        assert np.array_equal(got, read_image(place, (3, 32, 32), row))
    assert reduced > 6


def test_grey_files_have_one_channel(tmp_path: Path) -> None:
    place = stored(tmp_path, smooth(30, 40, 1)[..., 0], "png")
    assert read_image(place, (1, 8, 8), numbers(1)[0]).shape == (1, 8, 8)
    assert read_image(place, (3, 8, 8), numbers(1)[0]).shape == (3, 8, 8)


def test_rows_have_the_numbers_of_the_whole_batch() -> None:
    whole: Tensor = torch.from_numpy(drawn(torch.Generator().manual_seed(1), Rows.of(10, WHOLE)))
    for part in ((0, 3), (1, 3), (2, 3)):
        rows = Rows.of(10, part)
        assert torch.equal(torch.from_numpy(drawn(torch.Generator().manual_seed(1), rows)), whole[rows.index])
