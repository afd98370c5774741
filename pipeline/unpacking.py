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
from rprune.files import atomic, file_digest, inside, is_endless, readable, write_text
from rprune.pipeline.artifact import save_tensors
from rprune.pipeline.forms import FILES, check_formats, rebuilt
from rprune.reports.schema import read_report
from rprune.reports.text import packed_forms

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
    """Copy a bundle, and add the files that it was passed on without and that its packed file restores.

    Returns what was restored, and the names of files that are still missing: weights, masks and, beside integers, the
    float model are in no packed file. ``out`` appears when all is there.

    Raises:
        InputError: no bundle, no packed file in it, or not a sound one.
        IntegrityError: the packed file, or what it restores, is not what the report names.
        UsageError: ``out`` exists.
    """
    report = read_report(folder)
    packed = report.subject("packed")
    if packed is None or not inside(folder, packed.name).is_file():
        raise InputError(f"there is no packed file in {folder}", "restore only what 'rprune export' packed")
    if out.exists():
        raise UsageError(f"{out} exists", "choose another -o")
    missing = {subject.role: subject for subject in report.subjects if not inside(folder, subject.name).exists()}
    wanted = [role for role in packed_forms(report) if role in missing]
    formats = ["c" if role == "c-header" else role for role in wanted]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        whole = Path(work) / "bundle"
        shutil.copytree(folder, whole, symlinks=True, ignore=_endless)
        if formats:
            for path in unpacked(whole / packed.name, Path(work) / "restored", formats):
                if not (whole / path.name).exists():
                    path.replace(whole / path.name)
        for subject in (packed, *(missing[role] for role in wanted)):
            if file_digest(inside(whole, subject.name)) != subject.sha256:
                raise IntegrityError(f"{subject.name} differs from the sha256 in the report", HINT)
        whole.replace(out)
    restored = [out / missing[role].name for role in wanted]
    return restored, [subject.name for role, subject in missing.items() if role not in wanted]


def _endless(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if is_endless(Path(folder) / name)]


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
