"""Where data comes from: ``digits``, ``npz:FILE``, image files (``imagefolder``, ``webdataset``), torchvision's sets.

Nothing here uses the network unless ``download`` is true, and torch is imported for torchvision's sets alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rprune.data.archive import read_npz
from rprune.data.places import ImagePlaces
from rprune.data.shards import LAYOUT, MAX_CLASSES, class_names, indexed, shards_of
from rprune.data.splits import (
    ArraySplit,
    Augment,
    DataSet,
    FileSplit,
    Labels,
    Split,
    at_most,
    checked,
    hold_out,
    opened,
)
from rprune.errors import InputError, UsageError, unknown_name
from rprune.threat import ThreatModel

VALIDATION_SHARE = 0.1
RESIDENT_BYTES = 2 << 30
LARGE = 64  # pixels a side, from which training crops are of random size
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}

# (class in torchvision.datasets, constructor arguments for train and test, augmentation, default eps)
TORCHVISION: dict[str, tuple[str, dict[str, Any], dict[str, Any], Augment, str]] = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}, "crop-flip", "8/255"),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}, "crop-flip", "8/255"),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}, "crop", "8/255"),
    "mnist": ("MNIST", {"train": True}, {"train": False}, "none", "0.3"),
    "fashion-mnist": ("FashionMNIST", {"train": True}, {"train": False}, "none", "0.1"),
}
CHANNELS = (1, 3)
NPZ = (
    "an .npz file holds train_images and test_images, uint8 of n x height x width [x channels], "
    "train_labels and test_labels, integers from 0, and may hold class_names"
)
ABOUT = {
    "digits": "scikit-learn's handwritten digits, 1,797 images of 1x8x8, built in",
    "npz:FILE": NPZ,
    "imagefolder:DIR[?size=N]": "DIR/train/CLASS/*.png and DIR/test likewise; or DIR/CLASS/*.png, 20 % become the test",
    "webdataset:DIR[?size=N]": f"DIR/train-*.tar and DIR/test-*.tar (or val-*.tar; else 20 % of train); {LAYOUT}; "
    "DIR/classes.txt may name the classes, one a line",
}
KINDS = (*ABOUT, *TORCHVISION)


def load_data(
    source: str,
    *,
    download: bool = False,
    validation: float = VALIDATION_SHARE,
    augment: Augment | None = None,
    limit: int | None = None,
) -> DataSet:
    """Load a data set by its source string.

    Args:
        source: one of ``KINDS``. A torchvision name may carry its folder: ``cifar10:DIR``; without one the folder is
            ``$RPRUNE_DATA`` or ``~/.cache/rprune``.
        download: may the network be used.
        validation: share of the training data held out for model selection, in (0, 1).
        augment: overrides the source's own augmentation.
        limit: samples of each split, at most; always the same ones.

    Raises:
        UsageError: unknown source or a validation share outside (0, 1).
        InputError: the data is not there, or not readable; says what to fetch and where.
    """
    if not 0 < validation < 1:
        raise UsageError(f"validation share {validation} is not between 0 and 1", "use for example 0.1")
    if augment is not None and augment not in get_args(Augment):
        raise unknown_name("augmentation", augment, get_args(Augment))
    kind, _, place = source.partition(":")
    if kind in TORCHVISION:
        found = _torchvision(kind, place, download)
    elif kind in LOCAL:
        found = LOCAL[kind](place)
    else:
        raise unknown_name("data source", source, KINDS)
    full_train, test, classes, default_augment, eps = found
    train, held_out = hold_out(full_train, validation, ("train", "validation"))
    train, held_out, test = (at_most(split, limit) for split in (train, held_out, test))
    return DataSet(source, classes, train, held_out, test, augment or default_augment, ThreatModel("linf", eps))


_Found = tuple[Split, Split, tuple[str, ...], Augment, str]


def _digits(place: str) -> _Found:
    """Handwritten digits of UCI/scikit-learn: 1,797 images, 1x8x8, 17 grey levels; 20 % are the test split."""
    if place:
        raise UsageError(f"digits takes no place, got '{place}'", "write --data digits")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    classes = tuple(str(c) for c in range(10))
    everything = checked("all", images, bunch.target, classes, "digits")
    train, test = hold_out(everything, 0.2, ("train", "test"))
    return train, test, classes, "none", "0.1"


def _npz(place: str) -> _Found:
    """uint8 arrays train_images (n, h, w[, c]), train_labels, test_images, test_labels, optional class_names."""
    path = Path(place)
    if not path.is_file():
        raise InputError(f"data file {path} is not there", "give the path of an .npz file after 'npz:'")
    needed = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        arrays = read_npz(path, (*needed, "class_names"))
    except Exception as error:  # those of zip, zlib and numpy share no base
        raise InputError(f"cannot read {path}: {error}", "write it with numpy.savez") from None
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}", NPZ)
    labels = [arrays["train_labels"], arrays["test_labels"]]
    whole = all(array.size and array.dtype.kind in "iu" for array in labels)
    if not whole:
        raise InputError(f"{path} has labels that are not integers, or none", "store labels as integers 0 .. classes-1")
    count = max(int(array.max()) for array in labels) + 1
    if count > MAX_CLASSES:
        raise InputError(f"{path} has the label {count - 1}", f"labels are 0 .. classes-1, below {MAX_CLASSES:,}")
    names = arrays.get("class_names")
    classes = tuple(map(str, range(count) if names is None else names.reshape(-1)))
    splits = []
    for name in ("train", "test"):
        images = arrays[f"{name}_images"]
        images = images[..., None] if images.ndim == 3 else images
        if images.ndim == 4 and images.shape[3] not in CHANNELS:
            shape = "x".join(map(str, images.shape))
            raise InputError(f"{path}: {name}_images are {shape}", "store them as n x height x width x channels, uint8")
        images = images.transpose(0, 3, 1, 2) if images.ndim == 4 else images
        splits.append(checked(name, images, arrays[f"{name}_labels"].reshape(-1), classes, str(path)))
    if splits[0].shape != splits[1].shape:
        raise InputError(f"{path}: train images are {splits[0].shape}, test images {splits[1].shape}", "use one shape")
    augment: Augment = "crop-flip" if splits[0].shape[0] == 3 else "none"
    return splits[0], splits[1], classes, augment, "8/255"


def _imagefolder(place: str) -> _Found:
    """DIR/train/CLASS/*.png and DIR/test (or val) likewise; or DIR/CLASS/*.png, of which 20 % become the test split."""
    folder, _, query = place.partition("?")
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"data folder {root} is not there", "give a folder with one sub-folder a class")
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / n for n in ("test", "val") if (root / n).is_dir() and train_root != root), None)
    classes = tuple(sorted(p.name for p in train_root.iterdir() if p.is_dir()))
    if len(classes) < 2:
        raise InputError(f"{train_root} has {len(classes)} class folder(s)", "put images in one sub-folder a class")

    def listed(base: Path) -> _Listed:
        paths: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            below = sorted((base / name).rglob("*"))
            found = [os.fsencode(path) for path in below if path.suffix.lower() in IMAGE_SUFFIXES]
            paths += found
            labels += [label] * len(found)
        if not paths:
            known = " ".join(sorted(IMAGE_SUFFIXES))
            raise InputError(
                f"no images below {base}", f"put images in one sub-folder a class; known suffixes: {known}"
            )
        return ImagePlaces.whole(paths), np.array(labels, np.int64)

    train, test = listed(train_root), None if test_root is None else listed(test_root)
    return _of_images(f"imagefolder:{folder}", query, classes, train, test)


def _webdataset(place: str) -> _Found:
    """DIR/train-*.tar and DIR/test-*.tar (or val-*.tar); of train shards alone 20 % become the test split."""
    folder, _, query = place.partition("?")
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"data folder {root} is not there", f"give a folder with shards train-*.tar; {LAYOUT}")

    def listed(shards: list[Path]) -> _Listed:
        places, labels = indexed(shards)
        if not len(places):
            raise InputError(f"no images in {shards[0]}{' and the other shards' if shards[1:] else ''}", LAYOUT)
        return places, labels

    train_shards, test_shards = shards_of(root, "train"), shards_of(root, "test") or shards_of(root, "val")
    if not train_shards:
        raise InputError(f"no shards train-*.tar in {root}", f"name them train-000000.tar and so on; {LAYOUT}")
    train, test = listed(train_shards), listed(test_shards) if test_shards else None
    last = max(int(labels.max()) for _, labels in (train, test or train))
    named = class_names(root / "classes.txt")
    classes = tuple(map(str, range(last + 1))) if named is None else named
    if last >= len(classes) or len(classes) < 2:
        raise InputError(
            f"labels of the shards in {root} run to {last} for {len(classes)} class(es)",
            "labels must be 0 .. classes-1; classes.txt names one class a line",
        )
    return _of_images(f"webdataset:{folder}", query, classes, train, test)


_Listed = tuple[ImagePlaces, Labels]


def _of_images(
    source: str, query: str, classes: tuple[str, ...], train_images: _Listed, test_images: _Listed | None
) -> _Found:
    """Splits of stored images, in memory where they fit.

    Without ``?size=N`` all must have the first one's size. With N of at least ``LARGE`` training crops are those of
    ImageNet, since shifts by four pixels change little there.
    """
    size = _wanted_size(source, query)
    if size is None:
        with opened(train_images[0][0]) as image:
            channels, (width, height) = (1 if image.mode in ("1", "L") else 3), image.size
    else:
        channels, height, width = 3, size, size
    shape = (channels, height, width)

    def split(name: str, images: _Listed) -> Split:
        places, labels = images
        for place in places if size is None else ():
            with opened(place) as image:
                if image.size != (width, height):
                    raise InputError(
                        f"{place} is {image.width}x{image.height}, others {width}x{height}",
                        f"name one size: {source}?size=64",
                    )
        # folders come class by class; a fixed order at random makes every prefix a fair sample
        order = np.random.RandomState(0).permutation(len(places))
        found = FileSplit(name, places.select(order), labels[order], shape)
        resident = len(found) * channels * height * width <= RESIDENT_BYTES
        return ArraySplit(name, found.pixels(0, len(found)), found.labels) if resident else found

    if test_images is None:
        train, test = hold_out(split("all", train_images), 0.2, ("train", "test"))
    else:
        train, test = split("train", train_images), split("test", test_images)
    return train, test, classes, "resized-crop-flip" if size is not None and size >= LARGE else "crop-flip", "8/255"


def _wanted_size(source: str, query: str) -> int | None:
    if not query:
        return None
    key, _, value = query.partition("=")
    if key != "size" or not value.isdigit() or int(value) < 1:
        raise UsageError(f"cannot read '?{query}' of {source}", "write ?size=64")
    return int(value)


def data_folder() -> Path:
    """Of torchvision's sets, where the source names none."""
    return Path(os.environ.get("RPRUNE_DATA") or Path.home() / ".cache" / "rprune")


def _torchvision(kind: str, place: str, download: bool) -> _Found:
    from torchvision import datasets

    name, train_args, test_args, augment, eps = TORCHVISION[kind]
    root = Path(place) if place else data_folder()
    splits = []
    classes: tuple[str, ...] = ()
    for split, arguments in (("train", train_args), ("test", test_args)):
        try:
            found = getattr(datasets, name)(str(root), download=download, **arguments)
        except (RuntimeError, OSError) as error:
            if download:
                raise InputError(f"cannot download {kind}: {error}", f"fetch it by hand into {root}") from None
            raise InputError(
                f"{kind} is not below {root}",
                f"allow the network with --download, or put torchvision's {name} files there "
                f"(another folder: {kind}:DIR or RPRUNE_DATA)",
            ) from None
        images = np.asarray(found.data)
        labels = np.asarray(getattr(found, "targets", None) if hasattr(found, "targets") else found.labels)
        classes = tuple(getattr(found, "classes", ()) or map(str, range(int(labels.max()) + 1)))
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:
            images = images.transpose(0, 3, 1, 2)
        splits.append(checked(split, images, labels, classes, kind))
    return splits[0], splits[1], classes, augment, eps


LOCAL: dict[str, Callable[[str], _Found]] = {
    "digits": _digits,
    "npz": _npz,
    "imagefolder": _imagefolder,
    "webdataset": _webdataset,
}
