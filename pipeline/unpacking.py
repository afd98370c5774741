"""Packed files back to the forms that they came from, alone or in a bundle that was passed on without them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rprune.errors import InputError, IntegrityError, UsageError
from rprune.export.c.writer import c_source
from rprune.export.compact_onnx import expanding
from rprune.export.unpack import Packed, unpack
from rprune.files import atomic, file_digest, inside, readable, sync_folder, unwritable, write_text
from rprune.pipeline.artifact import save_tensors
from rprune.pipeline.forms import FILES, check_formats, rebuilt
from rprune.reports.partial import packed_forms
from rprune.reports.schema import Subject, read_report

MOST_BYTES = 1 << 30
HINT = "do not trust this folder, or take the version of rprune that its report names: others may write other bytes"


def unpacked(file: Path, out: Path, formats: Sequence[str] | None = None) -> list[Path]:
    """Write forms of a packed file into ``out``: its dense ONNX file and its dense tensors, or ``formats``.

    The ONNX files and the C source are those that the export wrote, to the byte. Returns what was written.

    Raises:
        InputError: the file is not there, damaged, or hostile (``export.unpack``).
        UsageError: unknown format, or one that the file's kind does not have.
    """
    content = read_packed(file)
    dense = "onnx-int8" if content.kind == "int8" else "onnx"
    chosen = ("safetensors", dense) if formats is None else tuple(formats)
    check_formats(chosen)
    other = {"onnx", "onnx-int8", "packed"}.intersection(chosen) - {dense}
    if other:
        raise UsageError(f"a packed {content.kind} network has no form {min(other)}", f"it has {dense}")
    network, model = rebuilt(content)
    written = []
    if "safetensors" in chosen:
        written.append(out / f"model{'.int8' if content.kind == 'int8' else ''}.safetensors")
        save_tensors(written[-1], dense_tensors(content))
    for name, made in ((dense, model), ("onnx-compact", model)):
        if name in chosen:
            written.append(out / next(key for key, role in FILES.items() if role == name))
            with atomic(written[-1]) as temporary:
                found = expanding(made) if name == "onnx-compact" else made
                temporary.write_bytes(found.SerializeToString())
    if "c" in chosen:
        source = c_source(network, content.input_shape)
        for suffix, text in ((".h", source.header), (".c", source.source)):
            written.append(out / f"model{suffix}")
            write_text(written[-1], text)
    return written


def whole_bundle(folder: Path, out: Path) -> tuple[list[Path], list[str]]:
    """Copy what a bundle's report names, and add what it was passed on without and its packed file holds.

    Returns what was restored, and the names of files that are still missing: weights, masks and, beside integers, the
    float model are in no packed file. ``out`` appears when all is there. A signature is not copied: it is of a folder
    without the restored files.

    Raises:
        InputError: no bundle, one that cannot be read, no packed file in it, or not a sound one.
        IntegrityError: a file, or what is restored, is not what the report names.
        UsageError: ``out`` exists, lies inside the bundle, or cannot be written.
        WorkError: the disk is full.
    """
    report, target = read_report(folder), out.resolve()
    try:
        there = target.exists()
    except OSError as error:
        raise unwritable(out, error) from None
    if there:
        raise UsageError(f"{out} exists", "choose another -o")
    if target.is_relative_to(folder.resolve()):
        raise UsageError(f"{out} lies in {folder}", "choose another -o")
    paths = {subject.name: inside(folder, subject.name) for subject in report.subjects}
    here = [subject for subject in report.subjects if paths[subject.name].exists()]
    missing = [subject for subject in report.subjects if subject not in here]
    for subject in here:
        check_digest(subject, paths[subject.name])
    wanted = [subject for subject in missing if subject.role in packed_forms(report)]
    packed = report.subject("packed")
    if packed is None or packed not in here:
        raise InputError(f"there is no packed file in {folder}", "restore only what 'rprune export' packed")
    for subject in missing:
        if subject.role == "evidence" or (subject in wanted and FILES.get(subject.name) != subject.role):
            raise IntegrityError(f"no packed file holds {subject.name}, which is missing", HINT)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=target.parent) as work:
            whole = Path(work) / "bundle"
            for name in ("report.json", *(subject.name for subject in here)):
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, whole / name)
            restore(Path(work) / "forms", whole, wanted, paths[packed.name])
            whole.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise unwritable(out, error) from None
    return [out / subject.name for subject in wanted], [s.name for s in missing if s not in wanted]


def restore(forms: Path, whole: Path, wanted: Sequence[Subject], packed: Path) -> None:
    """Put the missing forms of a packed file beside the other files of a bundle, each as the report names it."""
    if not wanted:
        return
    try:
        unpacked(packed, forms, sorted({"c" if subject.role == "c-header" else subject.role for subject in wanted}))
    except UsageError as error:  # forms that the report names, and a packed file of its kind does not have
        raise IntegrityError(error.message, HINT) from None
    for subject in wanted:
        (forms / subject.name).replace(whole / subject.name)
        check_digest(subject, whole / subject.name)


def check_digest(subject: Subject, path: Path) -> None:
    """Raises IntegrityError for other bytes than the report names, InputError for what cannot be read."""
    try:
        right = file_digest(path) == subject.sha256
    except OSError as error:
        raise InputError(f"cannot read {subject.name}: {error.strerror}", "check the files of the bundle") from None
    if not right:
        raise IntegrityError(f"{subject.name} differs from the sha256 in the report", HINT)


def read_packed(file: Path) -> Packed:
    """Raises InputError for files that are not there, far too large, or not sound."""
    try:
        if readable(file).stat().st_size > MOST_BYTES:
            raise InputError(f"{file} is larger than 1 GiB", "it is no packed file of rprune's")
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", "give a .packed.safetensors file") from None
    try:
        return unpack(data)
    except InputError as error:
        raise InputError(f"{file}: {error.message}", error.hint) from None


def dense_tensors(content: Packed) -> dict[str, Tensor]:
    """Every number of a packed network under plain names; integers with the scales that give them their values."""
    tensors = {f"{name}.weight": torch.from_numpy(array) for name, array in content.weights.items()}
    tensors |= {f"{name}.bias": torch.from_numpy(array) for name, array in content.biases.items()}
    tensors |= {f"{name}.weight_scale": torch.from_numpy(array) for name, array in content.scales.items()}
    for name, (scale, shift) in content.affine.items():
        tensors |= {f"{name}.scale": torch.from_numpy(scale), f"{name}.shift": torch.from_numpy(shift)}
    for name, found in content.activations.items():
        tensors[f"{name}.output_scale"] = torch.tensor(found.scale, dtype=torch.float32)
        tensors[f"{name}.output_zero_point"] = torch.tensor(found.zero_point, dtype=torch.uint8)
    return tensors
