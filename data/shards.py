"""Tar shards in the WebDataset layout, read at random: a plain tar says at which byte each member begins."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from rprune.data.places import ImagePlaces, Names
from rprune.data.splits import Labels
from rprune.errors import InputError

LAYOUT = "a shard holds KEY.jpg (jpeg, png, webp) and KEY.cls, the class index as text, for every sample"
SUFFIXES = {"jpg", "jpeg", "png", "webp"}
MAX_CLASSES = 1_000_000  # a larger index is a mistake, and would name as many classes
LONGEST = 1024  # letters of a name: an array gives all of them the room of the longest
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_T = TypeVar("_T")
_SHARD = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz)$")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # the key ends at the first dot of the file's name


def shards_of(folder: Path, split: str) -> list[Path]:
    """Shards ``SPLIT-*.tar`` in order of their names; compressed ones as well, which :func:`indexed` refuses."""
    return sorted(path for path in folder.glob(f"{split}-*") if _SHARD.search(path.name))


def indexed(shards: Sequence[Path]) -> tuple[ImagePlaces, Labels]:
    """The images of at least one shard, in order, and their labels. Reads the headers and the labels alone.

    Raises:
        InputError: a shard is compressed, cut short or cannot be read; an image without a label, or a label without
            one; two images of one key; a label that is no class index.
    """
    tables = [_index(path) for path in shards]
    counts = [len(labels) for *_, labels in tables]
    member, offset, size, labels = (np.concatenate(column) for column in zip(*tables, strict=True))
    files = np.array([os.fsencode(path) for path in shards], np.bytes_)
    return ImagePlaces(files, np.repeat(np.arange(len(counts)), counts), member, offset, size), labels


def class_names(file: Path) -> tuple[str, ...] | None:
    """One class a line; None where the file is not there. Raises InputError when it cannot be read."""
    try:
        return tuple(line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}", "write one class a line, in UTF-8") from None


def _index(path: Path) -> tuple[Names, Labels, Labels, Labels]:
    """Name, offset, size and label of each image of a shard."""
    images: dict[str, tuple[bytes, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            if path.suffix != ".tar" or file.read(6).startswith(_COMPRESSED):
                raise InputError(
                    f"shard {path} is compressed", "images are read at random: decompress it to a plain .tar"
                )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                end, place = os.fstat(file.fileno()).st_size, -1
                for member in archive:
                    if not (0 <= member.size <= end - member.offset_data and place < member.offset):
                        raise tarfile.ReadError(f"{member.name:.80} does not lie in it")
                    place = member.offset
                    if len(member.name) > LONGEST:
                        raise tarfile.ReadError(f"it has a name of {len(member.name)} letters")
                    parts = _NAME.fullmatch(member.name)
                    if parts is None or not member.isreg() or member.issparse():
                        continue
                    key, suffix = parts[1], parts[2].lower()
                    if suffix in SUFFIXES:
                        _put(images, key, (os.fsencode(member.name), member.offset_data, member.size), path)
                    elif suffix == "cls":
                        file.seek(member.offset_data)
                        _put(labels, key, _label(file.read(min(member.size, 32)), member.name, path), path)
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError("it is cut short or damaged")
    except InputError:
        raise
    except Exception as error:  # tarfile raises whatever damaged headers cause
        raise InputError(f"cannot read shard {path}: {error}", "copy or make it again, as a plain tar file") from None
    for key in images | labels:
        if key not in labels:
            raise InputError(f"shard {path} has an image but no {key}.cls", LAYOUT)
        if key not in images:
            raise InputError(f"shard {path} has {key}.cls but no image of that key", LAYOUT)
    names, offsets, sizes = zip(*images.values(), strict=True) if images else ((), (), ())
    offset, size, label = (np.array(column, np.int64) for column in (offsets, sizes, [labels[key] for key in images]))
    return np.array(names, np.bytes_), offset, size, label


def _put(table: dict[str, _T], key: str, value: _T, path: Path) -> None:
    if key in table:
        raise InputError(f"shard {path} has key '{key}' twice", LAYOUT)
    table[key] = value


def _label(content: bytes, name: str, path: Path) -> int:
    text = content.strip()
    if not text.isdigit() or int(text) >= MAX_CLASSES:
        raise InputError(
            f"{name} in shard {path} holds {content.decode(errors='replace')!r}",
            f"write a class index from 0 to {MAX_CLASSES - 1:,} as text",
        )
    return int(text)
