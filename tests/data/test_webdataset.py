"""Tar shards: the same data as image files, errors that name what is wrong, the same numbers from any worker."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rprune.data import sources
from rprune.data.loaders import WHOLE, Batch, Rows, Streamed, loader
from rprune.data.sources import load_data
from rprune.data.splits import ArraySplit, DataSet, FileSplit
from rprune.errors import InputError, UsageError

CPU = torch.device("cpu")
Members = Sequence[tuple[str, bytes]]


def tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def picture(seed: int, size: tuple[int, int] = (6, 5), kind: str = "PNG") -> bytes:
    """A random image of (width, height), encoded."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def sample(key: str, label: int, seed: int, **kind) -> Members:
    suffix = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind.get("kind", "PNG")]
    return [(f"{key}.{suffix}", picture(seed, **kind)), (f"{key}.cls", f"{label}\n".encode())]


def shards(root: Path, count: int = 10, splits: Sequence[str] = ("train", "test"), **kind) -> None:
    """``count`` samples a split in shards of four, classes in turn."""
    for s, split in enumerate(splits):
        for start in range(0, count, 4):
            samples = [sample(f"{i:05d}", i % 2, 100 * s + i, **kind) for i in range(start, min(start + 4, count))]
            tar(root / f"{split}-{start // 4:06d}.tar", [member for one in samples for member in one])


def both(tmp_path: Path, splits: Sequence[str], kind: str) -> tuple[str, str]:
    """The same images as a folder and as shards, in the same order."""
    suffix = kind.lower()
    for s, split in enumerate(splits):
        members: list[tuple[str, bytes]] = []
        for label, name in enumerate(("ant", "bee")):
            for k in range(5):
                content = picture(100 * s + 10 * label + k, (9 + k, 8), kind)
                path = tmp_path / "folder" / split / name / f"{k}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                members += [(f"{name}/{k}.cls", str(label).encode()), (f"{name}/{k}.{suffix}", content)]
        tar(tmp_path / "shards" / f"{split}-0.tar", members[:6])
        tar(tmp_path / "shards" / f"{split}-1.tar", members[6:])
    (tmp_path / "shards" / "classes.txt").write_text("ant\nbee\n")
    return f"imagefolder:{tmp_path / 'folder'}", f"webdataset:{tmp_path / 'shards'}"


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    ("splits", "kind"), [(("train", "test"), "PNG"), (("train", "val"), "JPEG"), (("train",), "WEBP")]
)
def test_shards_are_the_folder_they_were_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: Sequence[str], kind: str, resident: bool
) -> None:
    if not resident:
        monkeypatch.setattr(sources, "RESIDENT_BYTES", 0)
    one, two = (load_data(f"{source}?size=7") for source in both(tmp_path, splits, kind))
    assert one.classes == two.classes == ("ant", "bee")
    assert (one.shape, one.augment, one.threat) == (two.shape, two.augment, two.threat)
    assert one.digest == two.digest
    for name in ("train", "validation", "test"):
        here, there = one.split(name), two.split(name)
        assert type(here) is type(there) is (ArraySplit if resident else FileSplit)
        assert here.digest == there.digest
        assert np.array_equal(here.labels, there.labels)
        assert np.array_equal(here.pixels(0, 99), there.pixels(0, 99))
    assert len(one.train) + len(one.validation) + len(one.test) == 10 * len(splits)


def test_digest_of_files_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sha256 over shape and, in order, the sha256 of a file's bytes and its label in 8 bytes."""
    import hashlib

    monkeypatch.setattr(sources, "RESIDENT_BYTES", 0)
    for source in both(tmp_path, ("train", "test"), "PNG"):
        split = load_data(f"{source}?size=7").train
        sha = hashlib.sha256(repr(split.shape).encode())
        for place, label in zip(split.places, split.labels, strict=True):
            sha.update(hashlib.sha256(place.read()).digest() + int(label).to_bytes(8, "little"))
        assert split.digest == sha.hexdigest()


def test_size_is_the_first_images_and_classes_are_counted(tmp_path: Path) -> None:
    shards(tmp_path)
    found = load_data(f"webdataset:{tmp_path}")
    assert found.shape == (3, 5, 6)
    assert found.classes == ("0", "1")
    assert (len(found.train), len(found.validation), len(found.test)) == (9, 1, 10)
    assert found.augment == "crop-flip"


@pytest.mark.parametrize(("size", "augment"), [(63, "crop-flip"), (64, "resized-crop-flip")])
def test_large_images_are_cropped_at_random_sizes_unless_told_otherwise(
    tmp_path: Path, size: int, augment: str
) -> None:
    shards(tmp_path)
    assert load_data(f"webdataset:{tmp_path}?size={size}").augment == augment
    assert load_data(f"webdataset:{tmp_path}?size={size}", augment="crop").augment == "crop"


def test_other_members_and_files_are_ignored(tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = []
    for i in range(4):
        members += [*sample(f"./deep/{i}", i % 2, i), (f"./deep/{i}.json", b"{}"), (f"./deep/{i}.seg.png", b"mask")]
    tar(tmp_path / "train-0.tar", [("._0.png", b"mac"), ("README", b"text"), *members])
    (tmp_path / "train-0.tar.idx").write_text("0")
    found = load_data(f"webdataset:{tmp_path}")
    assert len(found.train) + len(found.validation) + len(found.test) == 4


def cut(path: Path, at: int) -> None:
    path.write_bytes(path.read_bytes()[:at])


def damage(path: Path) -> None:
    """Overwrite the third member's header."""
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        at = archive.getmembers()[2].offset
    content[at : at + 512] = b"x" * 512
    path.write_bytes(bytes(content))


GOOD = [*sample("a", 0, 0), *sample("b", 1, 1), *sample("c", 1, 2)]
BROKEN = {
    "compressed inside": (lambda p: p.write_bytes(gzip.compress(p.read_bytes())), "is compressed"),
    "compressed by name": (lambda p: p.rename(p.with_name("train-9.tar.gz")), r"train-9\.tar\.gz is compressed"),
    "text": (lambda p: p.write_bytes(b"pixels\n" * 400), "cannot read shard"),
    "empty": (lambda p: p.write_bytes(b""), "cannot read shard"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "cannot read shard"),
    "cut in an image": (lambda p: cut(p, 700), "cannot read shard"),
    "cut between members": (lambda p: cut(p, 2048), "cut short or damaged"),
    "cut in a header": (lambda p: cut(p, 2048 + 100), "cut short or damaged"),
    "damaged header": (damage, "cut short or damaged"),
    "no samples": (lambda p: tar(p, []), "no images in"),
    "no label": (lambda p: tar(p, [*GOOD, ("d.png", picture(3))]), r"has an image but no d\.cls"),
    "no image": (lambda p: tar(p, [*GOOD, ("d.cls", b"1")]), r"has d\.cls but no image"),
    "two images": (lambda p: tar(p, [*GOOD, ("a.webp", picture(3, kind="WEBP"))]), "has key 'a' twice"),
    "two labels": (lambda p: tar(p, [*GOOD, ("a.cls", b"1")]), "has key 'a' twice"),
    "word as label": (lambda p: tar(p, [*GOOD, ("d.cls", b"cat")]), r"d\.cls in shard .* holds 'cat'"),
    "negative label": (lambda p: tar(p, [*GOOD, ("d.cls", b"-1")]), "holds '-1'"),
    "fraction as label": (lambda p: tar(p, [*GOOD, ("d.cls", b"1.5")]), "holds '1.5'"),
    "bytes as label": (lambda p: tar(p, [*GOOD, ("d.cls", b"\xff\n\x00")]), "holds"),
    "empty label": (lambda p: tar(p, [*GOOD, ("d.cls", b"")]), "holds ''"),
    "huge label": (lambda p: tar(p, [*GOOD, ("d.cls", b"9" * 40)]), "holds '9999"),
    "label above the classes": (lambda p: (p.parent / "classes.txt").write_text("x\ny\n"), "run to 2 for 2 class"),
    "no class names": (lambda p: (p.parent / "classes.txt").write_text("\n"), "run to 2 for 0 class"),
    "one class": (lambda p: (tar(p, GOOD[:2]), tar(p.with_name("test-0.tar"), GOOD[:2])), r"run to 0 for 1 class"),
    "classes that are no text": (lambda p: (p.parent / "classes.txt").write_bytes(b"\xff\xfe\xff"), "classes.txt"),
    "no image at all": (lambda p: tar(p, [("a.png", b"text"), ("a.cls", b"1")]), r"cannot read image a\.png in "),
    "another size": (lambda p: tar(p, [*GOOD, *sample("d", 0, 3, size=(7, 5))]), r"d\.png in .* is 7x5, others 6x5"),
    "no shards": (lambda p: p.unlink(), r"no shards train-\*\.tar"),
}  # fmt: skip


@pytest.mark.parametrize("problem", BROKEN)
def test_unusable_shards_are_input_errors(tmp_path: Path, problem: str) -> None:
    breaks, message = BROKEN[problem]
    path = tar(tmp_path / "train-0.tar", GOOD)
    tar(tmp_path / "test-0.tar", [*GOOD, *sample("z", 2, 7)])
    breaks(path)
    with pytest.raises(InputError, match=message) as caught:
        load_data(f"webdataset:{tmp_path}")
    assert str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message + caught.value.hint
    assert caught.value.hint


def test_an_image_too_large_to_decode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match=r"cannot read image 00000\.png in .*decompression bomb"):
        load_data(f"webdataset:{tmp_path}")


def test_missing_folder_and_bad_size_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not there"):
        load_data(f"webdataset:{tmp_path / 'nowhere'}")
    shards(tmp_path)
    with pytest.raises(UsageError, match=r"cannot read '\?size=x' of webdataset"):
        load_data(f"webdataset:{tmp_path}?size=x")


# -- streaming -----------------------------------------------------------------------------------------------


@pytest.fixture
def streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    shards(tmp_path, 30, kind="JPEG", size=(50, 40))
    monkeypatch.setattr(sources, "RESIDENT_BYTES", 0)
    return load_data(f"webdataset:{tmp_path}?size=16")


def epoch(split: FileSplit, augment: str, workers: int, part: tuple[int, int] = WHOLE) -> list[Batch]:
    data = loader(split, CPU, workers)
    assert isinstance(data, Streamed)
    return list(data.shuffled(11, torch.Generator().manual_seed(4), augment, part))


def same(one: Sequence[Batch], two: Sequence[Batch]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("augment", ["none", "crop-flip", "resized-crop-flip"])
def test_any_number_of_workers_gives_the_same_numbers(streamed: DataSet, augment: str) -> None:
    assert same(epoch(streamed.train, augment, 0), epoch(streamed.train, augment, 2))


@pytest.mark.parametrize("augment", ["none", "crop-flip", "resized-crop-flip"])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_streamed_batches_are_those_of_the_whole(streamed: DataSet, augment: str, parts: int) -> None:
    whole = epoch(streamed.train, augment, 0)
    for i in range(parts):
        for piece, batch in zip(epoch(streamed.train, augment, 0, (i, parts)), whole, strict=True):
            index = Rows.of(len(batch.y), (i, parts)).index
            assert all(torch.equal(mine, all_[index]) for mine, all_ in zip(piece, batch, strict=True))


def test_random_sizes_come_from_the_whole_image_and_the_generator_alone(streamed: DataSet) -> None:
    first = epoch(streamed.train, "resized-crop-flip", 0)
    plain = {int(i): x for batch in epoch(streamed.train, "none", 0) for x, i in zip(batch.x, batch.ids, strict=True)}
    assert sorted(plain) == list(range(len(streamed.train)))
    assert [len(batch.y) for batch in first] == [11, 11, 5]
    assert all(not torch.equal(x, plain[int(i)]) for batch in first for x, i in zip(batch.x, batch.ids, strict=True))
    torch.rand(3)
    assert same(first, epoch(streamed.train, "resized-crop-flip", 0))
    other = list(loader(streamed.train, CPU, 0).shuffled(11, torch.Generator().manual_seed(5), "resized-crop-flip"))
    assert not same(first, other)


def test_samples_are_taken_in_the_order_asked_for(streamed: DataSet) -> None:
    data = loader(streamed.train, CPU, 0)
    ids = torch.tensor([7, 0, 7, 3])
    found = data.take(ids)
    every = next(iter(data.ordered(99)))
    assert torch.equal(found.x, every.x[ids])
    assert torch.equal(found.y, every.y[ids])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("lost", ["image", "shard"])
def test_what_went_bad_since_the_start_is_one_line(streamed: DataSet, workers: int, lost: str) -> None:
    place = streamed.test.places[3]
    if lost == "shard":
        place.path.unlink()
    else:
        with place.path.open("r+b") as file:
            file.seek(place.offset)
            file.write(b"gone bad")
    with pytest.raises(InputError, match=r"cannot read image \d+\.jpg in .*test-00000\d\.tar") as caught:
        list(loader(streamed.test, CPU, workers).ordered(4))
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_split_is_cheap_to_send_to_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "RESIDENT_BYTES", 0)
    content = picture(0)
    tar(
        tmp_path / "train-0.tar",
        [m for i in range(3000) for m in ((f"{i:08d}.png", content), (f"{i:08d}.cls", b"%d" % (i % 2)))],
    )
    split = load_data(f"webdataset:{tmp_path}?size=4").train
    assert len(pickle.dumps(split)) < 50 * len(split) + 2000
    assert split.select(np.array([5, 2])).places[1].read() == content
