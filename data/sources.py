"""Where data comes from: ``digits``, ``npz:FILE``, ``imagefolder:DIR``, or a torchvision set by name.

Nothing here uses the network unless ``download`` is true, and torch is imported for torchvision's sets alone.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from zipfile import BadZipFile

import numpy as np

from rprune.data.splits import ArraySplit, Augment, DataSet, FileSplit, Split, checked, hold_out, opened, read_image
from rprune.errors import InputError, UsageError, unknown_name
from rprune.threat import ThreatModel

VALIDATION_SHARE = 0.1
RESIDENT_BYTES = 2 << 30
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
}
KINDS = ("digits", "npz:FILE", "imagefolder:DIR[?size=N]", *TORCHVISION)


def load_data(
    source: str, *, download: bool = False, validation: float = VALIDATION_SHARE, augment: Augment | None = None
) -> DataSet:
    """Load a data set by its source string.

    Args:
        source: one of ``KINDS``. A torchvision name may carry its folder: ``cifar10:DIR``; without one the folder is
            ``$RPRUNE_DATA`` or ``~/.cache/rprune``.
        download: may the network be used.
        validation: share of the training data held out for model selection, in (0, 1).
        augment: overrides the source's own augmentation.

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
    threat = ThreatModel("linf", eps)
    return DataSet(source, classes, train, held_out, test, augment or default_augment, threat)


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
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, BadZipFile, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}", "write it with numpy.savez") from None
    needed = ("train_images", "train_labels", "test_images", "test_labels")
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}", NPZ)
    labels = [arrays["train_labels"], arrays["test_labels"]]
    whole = all(array.size and array.dtype.kind in "iu" for array in labels)
    if not whole:
        raise InputError(f"{path} has labels that are not integers, or none", "store labels as integers 0 .. classes-1")
    count = int(max(array.max() for array in labels)) + 1
    names = arrays.get("class_names")
    classes = tuple(map(str, names)) if names is not None else tuple(map(str, range(count)))
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
    size = _folder_size(query)
    if size is None:
        first = next(iter(_image_files(train_root, classes)), None)
        if first is None:
            raise InputError(f"no images below {train_root}", f"known suffixes: {' '.join(sorted(IMAGE_SUFFIXES))}")
        with opened(first[0]) as image:
            channels, (width, height) = (1 if image.mode in ("1", "L") else 3), image.size
    else:
        channels, height, width = 3, size, size
    shape = (channels, height, width)

    def read(base: Path, name: str) -> Split:
        listed = list(_image_files(base, classes))
        # folders come class by class; a fixed order at random makes every prefix a fair sample
        files = [listed[i] for i in np.random.RandomState(0).permutation(len(listed))]
        split = FileSplit(name, tuple(p for p, _ in files), np.array([c for _, c in files], np.int64), shape)
        if not files:
            raise InputError(f"no images below {base}", "put images in one sub-folder a class")
        if size is None:
            for path in split.paths:
                with opened(path) as image:
                    if image.size != (width, height):
                        raise InputError(
                            f"{path} is {image.width}x{image.height}, others {width}x{height}",
                            f"name one size: imagefolder:{folder}?size=64",
                        )
        if len(split) * channels * height * width > RESIDENT_BYTES:
            return split
        return ArraySplit(name, np.stack([read_image(path, shape) for path in split.paths]), split.labels)

    if test_root is None:
        train, test = hold_out(read(train_root, "all"), 0.2, ("train", "test"))
    else:
        train, test = read(train_root, "train"), read(test_root, "test")
    return train, test, classes, "crop-flip", "8/255"


def _folder_size(query: str) -> int | None:
    if not query:
        return None
    key, _, value = query.partition("=")
    if key != "size" or not value.isdigit() or int(value) < 1:
        raise UsageError(f"cannot read '?{query}' of the image folder", "write ?size=64")
    return int(value)


def _image_files(base: Path, classes: tuple[str, ...]) -> Any:
    for label, name in enumerate(classes):
        for path in sorted((base / name).rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                yield path, label


def _torchvision(kind: str, place: str, download: bool) -> _Found:
    from torchvision import datasets

    name, train_args, test_args, augment, eps = TORCHVISION[kind]
    root = Path(place or os.environ.get("RPRUNE_DATA") or Path.home() / ".cache" / "rprune")
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


LOCAL: dict[str, Callable[[str], _Found]] = {"digits": _digits, "npz": _npz, "imagefolder": _imagefolder}
