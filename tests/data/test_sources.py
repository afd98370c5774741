from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rprune.data import sources
from rprune.data.loaders import Resident, Streamed, loader
from rprune.data.sources import load_data
from rprune.data.splits import ArraySplit, FileSplit
from rprune.errors import InputError, UsageError

CPU = torch.device("cpu")
DIGITS = "7deb41200e00f7b7f49c9dbb0e632086ab41e522d5e212f501ea4c5c92984a40"


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


# -- digits --------------------------------------------------------------------------------------------------


def test_digits_have_the_documented_counts(digits) -> None:
    assert [len(digits.split(name)) for name in ("train", "validation", "test")] == [1294, 144, 359]
    assert digits.shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    assert (digits.augment, str(digits.threat)) == ("none", "linf 0.1")
    assert digits.train.images.dtype == np.uint8
    assert digits.train.images.max() == 255
    assert len(np.unique(digits.train.images)) == 17
    assert set(digits.test.labels) == set(range(10))


def test_digits_splits_are_disjoint_and_complete(digits) -> None:
    from sklearn.datasets import load_digits

    rows = [row.tobytes() for name in ("train", "validation", "test") for row in digits.split(name).images]
    original = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(rows) == sorted(row.tobytes() for row in original)
    assert len(set(rows)) == len(rows)


def test_digits_never_change(digits) -> None:
    assert digits.digest == DIGITS
    assert load_data("digits").digest == DIGITS


def test_validation_share_moves_samples_between_train_and_validation_alone(digits) -> None:
    other = load_data("digits", validation=0.5)
    assert (len(other.train), len(other.validation)) == (719, 719)
    assert other.test.digest == digits.test.digest
    assert other.digest != digits.digest


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_validation_share_out_of_range_is_a_usage_error(share: float) -> None:
    with pytest.raises(UsageError, match="validation share"):
        load_data("digits", validation=share)


def test_augmentation_can_be_chosen_and_is_checked() -> None:
    assert load_data("digits", augment="crop").augment == "crop"
    unchecked = getattr(load_data, "__wrapped__", load_data)  # the hook of conftest would refuse the type first
    with pytest.raises(UsageError, match="unknown augmentation 'crop-flpi'") as caught:
        unchecked("digits", augment="crop-flpi")
    assert "did you mean 'crop-flip'" in caught.value.hint


def test_digits_take_no_place() -> None:
    with pytest.raises(UsageError, match="digits"):
        load_data("digits:somewhere")


# -- npz -----------------------------------------------------------------------------------------------------


def arrays(colours: int = 3, train: int = 20, test: int = 6) -> dict[str, np.ndarray]:
    random = np.random.RandomState(0)
    tail = (5, 7, colours) if colours else (5, 7)
    return {
        "train_images": random.randint(0, 256, (train, *tail)).astype(np.uint8),
        "train_labels": np.arange(train) % 3,
        "test_images": random.randint(0, 256, (test, *tail)).astype(np.uint8),
        "test_labels": np.arange(test) % 3,
    }


def saved(path: Path, **changes: np.ndarray | None) -> str:
    contents = {name: a for name, a in {**arrays(), **changes}.items() if a is not None}
    np.savez(path, **contents)
    return f"npz:{path}"


def test_digits_saved_as_npz_have_the_same_digest(tmp_path: Path, digits) -> None:
    images = np.concatenate([digits.train.images, digits.validation.images])[:, 0]
    labels = np.concatenate([digits.train.labels, digits.validation.labels])
    np.savez_compressed(
        tmp_path / "d.npz", train_images=images, train_labels=labels,
        test_images=digits.test.images[:, 0], test_labels=digits.test.labels.astype(np.uint8)[:, None],
    )  # fmt: skip
    found = load_data(f"npz:{tmp_path / 'd.npz'}")
    assert found.test.digest == digits.test.digest
    assert found.shape == digits.shape
    every = ArraySplit("train", np.concatenate([digits.train.images, digits.validation.images]), labels)
    rows = sorted(r.tobytes() for split in (found.train, found.validation) for r in split.images)
    assert rows == sorted(r.tobytes() for r in every.images)


def test_order_of_the_training_samples_is_kept_in_the_digest_of_the_pixels(tmp_path: Path) -> None:
    one, two = load_data(saved(tmp_path / "a.npz")), load_data(saved(tmp_path / "b.npz"))
    assert one.digest == two.digest
    changed = arrays()["test_images"].copy()
    changed[0, 0, 0, 0] ^= 1
    assert load_data(saved(tmp_path / "c.npz", test_images=changed)).digest != one.digest
    labels = np.array([1, 1, 2, 0, 1, 2])
    assert load_data(saved(tmp_path / "d.npz", test_labels=labels)).digest != one.digest


@pytest.mark.parametrize(("colours", "channels", "augment"), [(3, 3, "crop-flip"), (1, 1, "none"), (0, 1, "none")])
def test_npz_images_become_channels_first(tmp_path: Path, colours: int, channels: int, augment: str) -> None:
    contents = arrays(colours)
    found = load_data(saved(tmp_path / "d.npz", **contents))
    assert found.shape == (channels, 5, 7)
    assert (len(found.train), len(found.validation), len(found.test)) == (18, 2, 6)
    wanted = contents["test_images"].reshape(6, 5, 7, channels).transpose(0, 3, 1, 2)
    assert np.array_equal(found.test.images, wanted)
    assert found.classes == ("0", "1", "2")
    assert found.augment == augment


def test_npz_may_name_its_classes(tmp_path: Path) -> None:
    found = load_data(saved(tmp_path / "d.npz", class_names=np.array(["ant", "bee", "cow", "dog"])))
    assert found.classes == ("ant", "bee", "cow", "dog")


BROKEN = {
    "missing array": ({"test_labels": None}, "lacks test_labels"),
    "float images": ({"train_images": arrays()["train_images"] / 255}, "train images are float64"),
    "label above the classes": ({"class_names": np.array(["a", "b"])}, "labels run from 0 to 2 for 2 classes"),
    "negative label": ({"train_labels": np.arange(20) % 3 - 1}, "labels run from -1"),
    "too few labels": ({"train_labels": np.arange(19) % 3}, "labels"),
    "no samples": ({"test_images": np.zeros((0, 5, 7, 3), np.uint8), "test_labels": np.zeros(0, np.int64)}, "test"),
    "flat images": ({"train_images": np.zeros((20, 35), np.uint8)}, "train has images"),
    "other test size": ({"test_images": np.zeros((6, 5, 8, 3), np.uint8)}, "test"),
    "fractional labels": ({"train_labels": np.arange(20) % 3 + 0.5}, "label"),
    "text labels": ({"train_labels": np.array(["cat"] * 20)}, "label"),
    "pickled objects": ({"class_names": np.array(["a", None], dtype=object)}, "cannot read"),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_unusable_npz_contents_are_input_errors(tmp_path: Path, problem: str) -> None:
    changes, message = BROKEN[problem]
    with pytest.raises(InputError, match=message) as caught:
        load_data(saved(tmp_path / "d.npz", **changes))
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("problem", ["missing", "folder", "text", "empty", "truncated", "damaged", "single array"])
def test_unreadable_npz_files_are_input_errors(tmp_path: Path, problem: str) -> None:
    path = tmp_path / "d.npz"
    source = saved(path)
    whole = path.read_bytes()
    if problem in ("missing", "folder"):
        path.unlink()
        if problem == "folder":
            path.mkdir()
    elif problem == "single array":
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(5))
        path.write_bytes(buffer.getvalue())
    else:
        middle = len(whole) // 4
        damaged = whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 40]) + whole[middle + 40 :]
        contents = {"text": b"pixels\n" * 40, "empty": b"", "truncated": whole[: len(whole) // 2], "damaged": damaged}
        path.write_bytes(contents[problem])
    with pytest.raises(InputError, match=r"d\.npz") as caught:
        load_data(source)
    assert caught.value.hint


# -- image folders -------------------------------------------------------------------------------------------


def png(path: Path, seed: int, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> np.ndarray:
    """Write a random image of (width, height); returns its pixels, channels first."""
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def folder(root: Path, splits: tuple[str, ...] = ("train", "test"), count: int = 5, **kind) -> dict[str, list]:
    """Two classes, ``count`` images each; returns the pixels by split, in the order of the files."""
    pixels: dict[str, list] = {}
    for i, split in enumerate(splits):
        for j, name in enumerate(("ant", "bee")):
            for k in range(count):
                image = png(root / split / name / f"{k}.png", 100 * i + 10 * j + k, **kind)
                pixels.setdefault(split, []).append((image, j))
    return pixels


@pytest.mark.parametrize(("test_name", "mode"), [("test", "RGB"), ("val", "RGB"), ("test", "L")])
def test_folder_with_train_and_test(tmp_path: Path, test_name: str, mode: str) -> None:
    pixels = folder(tmp_path, ("train", test_name), mode=mode)
    found = load_data(f"imagefolder:{tmp_path}")
    assert found.classes == ("ant", "bee")
    assert found.shape == (1 if mode == "L" else 3, 5, 6)
    assert (len(found.train), len(found.validation), len(found.test)) == (9, 1, 10)
    rows = [(image.tobytes(), int(label)) for image, label in zip(found.test.images, found.test.labels, strict=True)]
    assert sorted(rows) == sorted((np.ascontiguousarray(image).tobytes(), label) for image, label in pixels[test_name])
    assert 0 < found.test.labels[:5].sum() < 5  # no prefix is one class alone
    assert found.augment == "crop-flip"


def test_flat_folder_is_split(tmp_path: Path) -> None:
    pixels = folder(tmp_path, ("",))
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    found = load_data(f"imagefolder:{tmp_path}", validation=0.25)
    assert (len(found.train), len(found.validation), len(found.test)) == (6, 2, 2)
    rows = [(r.tobytes(), int(y)) for s in (found.train, found.validation, found.test)
            for r, y in zip(s.images, s.labels, strict=True)]  # fmt: skip
    assert sorted(rows) == sorted((np.ascontiguousarray(image).tobytes(), label) for image, label in pixels[""])


def test_folder_of_one_wanted_size(tmp_path: Path) -> None:
    folder(tmp_path, size=(6, 5))
    png(tmp_path / "train" / "ant" / "wide.png", 1, (20, 9))
    png(tmp_path / "test" / "bee" / "tall.png", 2, (4, 9), "L")
    found = load_data(f"imagefolder:{tmp_path}?size=4")
    assert found.shape == (3, 4, 4)
    assert found.test.images.shape == (11, 3, 4, 4)


def test_resizing_keeps_the_centre(tmp_path: Path) -> None:
    folder(tmp_path, size=(8, 4))
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 200
    Image.fromarray(image).save(tmp_path / "test" / "ant" / "0.png")
    found = load_data(f"imagefolder:{tmp_path}?size=4")
    assert sum(bool((image == 200).all()) for image in found.test.images) == 1


def test_mixed_sizes_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder(tmp_path)
    png(tmp_path / "test" / "bee" / "9.png", 1, (7, 5))
    with pytest.raises(InputError, match=r"9\.png is 7x5, others 6x5") as caught:
        load_data(f"imagefolder:{tmp_path}")
    assert "?size=" in caught.value.hint


@pytest.mark.parametrize("query", ["", "?size=4"])
@pytest.mark.parametrize("which", ["first", "later", "truncated"])
def test_corrupt_image_is_an_input_error_that_names_it(tmp_path: Path, query: str, which: str) -> None:
    folder(tmp_path)
    path = tmp_path / "train" / "ant" / ("0.png" if which == "first" else "3.png")
    path.write_bytes(path.read_bytes()[:60] if which == "truncated" else b"this is no image")
    with pytest.raises(InputError, match=f"{path.name}") as caught:
        load_data(f"imagefolder:{tmp_path}{query}")
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("query", ["", "?size=4"])
def test_empty_folders_are_input_errors(tmp_path: Path, query: str) -> None:
    with pytest.raises(InputError, match="0 class folder"):
        load_data(f"imagefolder:{tmp_path}{query}")
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "test" / name).mkdir(parents=True)
    with pytest.raises(InputError, match="no images below"):
        load_data(f"imagefolder:{tmp_path}{query}")
    for name in ("ant", "bee"):
        png(tmp_path / "train" / name / "0.png", 0)
    with pytest.raises(InputError, match=r"no images below .*test"):
        load_data(f"imagefolder:{tmp_path}{query}")


def test_missing_folder_and_bad_size_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not there"):
        load_data(f"imagefolder:{tmp_path / 'nowhere'}")
    folder(tmp_path)
    for query in ("?size=", "?size=0", "?size=-4", "?width=4", "?size=4x4"):
        with pytest.raises(UsageError, match="cannot read"):
            load_data(f"imagefolder:{tmp_path}{query}")


def test_training_folder_without_test_folder_is_split_or_named(tmp_path: Path) -> None:
    folder(tmp_path, ("train",))
    found = load_data(f"imagefolder:{tmp_path}")
    assert len(found.train) + len(found.validation) + len(found.test) == 10


@pytest.mark.parametrize("query", ["", "?size=4"])
def test_streamed_images_are_the_resident_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str) -> None:
    folder(tmp_path)
    source = f"imagefolder:{tmp_path}{query}"
    resident = load_data(source)
    monkeypatch.setattr(sources, "RESIDENT_BYTES", 0)
    streamed = load_data(source)
    for name in ("train", "validation", "test"):
        here, there = resident.split(name), streamed.split(name)
        assert isinstance(here, ArraySplit)
        assert isinstance(there, FileSplit)
        assert np.array_equal(here.pixels(0, 3), there.pixels(0, 3))
        one, two = loader(here, CPU), loader(there, CPU)
        assert isinstance(one, Resident)
        assert isinstance(two, Streamed)
        assert len(one) == len(two) == len(here)
        for limit in (None, 1):
            assert_same(one.ordered(4, limit), two.ordered(4, limit))
        for augment in ("none", "crop", "crop-flip"):
            generators = [torch.Generator().manual_seed(8) for _ in range(2)]
            assert_same(one.shuffled(4, generators[0], augment), two.shuffled(4, generators[1], augment))
    assert streamed.digest == load_data(source).digest


def assert_same(one, two) -> None:
    one, two = list(one), list(two)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def test_streamed_corrupt_image_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    monkeypatch.setattr(sources, "RESIDENT_BYTES", 0)
    found = load_data(f"imagefolder:{tmp_path}?size=4")
    found.test.places[1].path.write_bytes(b"gone bad")
    with pytest.raises(InputError, match="cannot read image"):
        list(loader(found.test, CPU).ordered(4))


# -- torchvision and names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist", "fashion-mnist"])
def test_absent_torchvision_set_says_how_to_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for source, place in ((f"{name}:{tmp_path}", tmp_path), (name, tmp_path / "env")):
        monkeypatch.setenv("RPRUNE_DATA", str(tmp_path / "env"))
        with pytest.raises(InputError, match=f"{name} is not below") as caught:
            load_data(source)
        assert str(place) in caught.value.message
        assert "--download" in caught.value.hint


def test_torchvision_set_is_read_from_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeCIFAR10:
        def __init__(self, root: str, *, download: bool, train: bool) -> None:
            assert root is not None
            assert not download
            n = 20 if train else 6
            self.data = np.arange(n * 4 * 4 * 3, dtype=np.uint8).reshape(n, 4, 4, 3)
            self.targets = [i % 10 for i in range(n)]
            self.classes = list("abcdefghij")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCIFAR10)
    found = load_data("cifar10")
    assert found.shape == (3, 4, 4)
    assert (len(found.train), len(found.validation), len(found.test)) == (18, 2, 6)
    assert found.classes == tuple("abcdefghij")
    assert np.array_equal(found.test.images, FakeCIFAR10("", download=False, train=False).data.transpose(0, 3, 1, 2))
    assert str(found.threat) == "linf 8/255"


@pytest.mark.parametrize(
    ("source", "near"),
    [("cifra10", "cifar10"), ("digit", "digits"), ("fashionmnist", "fashion-mnist"), ("CIFAR10", "")],
)
def test_unknown_source_offers_the_nearest(source: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"unknown data source '{source}'") as caught:
        load_data(source)
    assert "digits" in caught.value.hint
    if near:
        assert f"did you mean '{near}'" in caught.value.hint


def test_npz_of_channels_first_is_refused_with_the_layout(tmp_path: Path) -> None:
    images, labels = np.zeros((4, 3, 8, 8), np.uint8), np.arange(4)
    path = tmp_path / "chw.npz"
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    with pytest.raises(InputError, match="4x3x8x8") as caught:
        load_data(f"npz:{path}")
    assert "height x width x channels" in caught.value.hint
