"""What a stage leaves: weights, masks, integers, and everything the next stage needs to know.

One artifact has three forms with the same content: a folder (stage.json, model.safetensors, masks.safetensors,
quantization.safetensors), a ``.safetensors`` file and a ``.pt`` file that torch loads with weights_only=True.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pydantic
import safetensors
import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rprune.errors import InputError, IntegrityError, UsageError
from rprune.files import atomic, digest_of, file_digest, read_json, write_json
from rprune.models.registry import Architecture, build, is_trusted
from rprune.pipeline.environment import referenced_files
from rprune.pipeline.foreign import Foreign, Trust, load_foreign, load_pickled, weights_of
from rprune.pipeline.intake import classify
from rprune.registry import first_problem
from rprune.reports.schema import LineageEntry
from rprune.threat import ThreatModel
from rprune.training.state import save_state

FORMAT = "rprune.artifact/1"
MASK, INTEGER = "rprune.mask/", "rprune.quantization/"  # prefixes inside a single file
METADATA_KEY = "rprune"
TABLES = ("model.safetensors", "masks.safetensors", "quantization.safetensors")  # of the folder


class DataRecord(BaseModel):
    """Which data an artifact was made with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    validation: float
    augment: str
    classes: list[str]
    sha256: dict[str, str]  # split -> digest
    pseudo: str | None = None
    limit: int | None = None  # samples of each split, at most


class Metadata(BaseModel):
    """What travels with the tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = FORMAT
    stage: str
    architecture: dict[str, Any]
    data: DataRecord
    norm: str
    eps: str
    objective: dict[str, Any]
    seed: int
    smoke: bool = False
    sparsity: float | None = None
    budget: int | None = None  # kept weights, exactly
    dense_total: int | None = None  # conv and linear weights before shrinking
    lineage: list[LineageEntry] = []
    environment: dict[str, Any] = {}

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel.of(self.norm, self.eps)

    @property
    def arch(self) -> Architecture:
        return Architecture.from_dict(self.architecture)


@dataclass(frozen=True, eq=False)
class Artifact:
    """Plain weights by state_dict name, masks by weight name, and the 8-bit form if there is one."""

    metadata: Metadata
    state: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    quantization: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """sha256 over names, types, shapes and values of all tensors: the same in every form of the artifact."""
        sha = hashlib.sha256()
        for prefix, table in (("", self.state), (MASK, self.masks), (INTEGER, self.quantization)):
            for name in sorted(table):
                tensor = table[name].detach().cpu().contiguous()
                sha.update(f"{prefix}{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
                sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    @cached_property
    def identity(self) -> str:
        """sha256 of all that decides its answers: tensors, architecture with normalisation, code that is a file."""
        architecture = self.metadata.architecture
        code = sorted(referenced_files(architecture["name"]).values())
        return digest_of({"tensors": self.digest, "architecture": architecture, "code": code})

    @property
    def loaded_unsafely(self) -> bool:
        """Whether code of somebody's file ran to read the weights that it comes from."""
        return any(entry.config.get("loaded_unsafely") is True for entry in self.metadata.lineage)

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The plain module, with these weights, in eval mode."""
        arch = self.metadata.arch
        if is_trusted(arch.name):  # of any size that a file can name: it takes memory only once the weights fit
            with torch.device("meta"):
                check_state(build(arch), self.state, arch.name)
        model = build(arch)
        load_state(model, self.state, self.metadata.architecture["name"])
        return model.to(device).eval()

    def with_metadata(self, **changes: Any) -> Artifact:
        return replace(self, metadata=self.metadata.model_copy(update=changes))


def load_state(model: nn.Module, state: dict[str, Tensor], arch: str) -> None:
    """Load strictly. Raises InputError that names the first key or shape that does not fit."""
    check_state(model, state, arch)
    model.load_state_dict(state)


def check_state(model: nn.Module, state: dict[str, Tensor], arch: str) -> None:
    """Raises InputError as :func:`load_state`, and loads nothing."""
    wanted = model.state_dict()
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or extra:
        first = f"missing {missing[0]}" if missing else f"unknown {extra[0]}"
        raise InputError(
            f"the weights do not fit {arch}: {len(missing)} keys missing, {len(extra)} unknown ({first})",
            "check --arch",
        )
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise InputError(
                f"the weights do not fit {arch}: {name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}",
                "check --arch, its arguments, and the number of classes of the data",
            )


def save_artifact(artifact: Artifact, path: Path) -> None:
    """Write the form that the suffix asks for: ``.pt``, ``.safetensors``, or a folder."""
    if path.suffix == ".pt":
        content = {
            METADATA_KEY: artifact.metadata.model_dump_json(),
            "state_dict": artifact.state,
            "masks": artifact.masks,
            "quantization": artifact.quantization,
        }
        save_state(path, content)
    elif path.suffix == ".safetensors":
        tensors = dict(artifact.state)
        tensors |= {MASK + name: mask for name, mask in artifact.masks.items()}
        tensors |= {INTEGER + name: tensor for name, tensor in artifact.quantization.items()}
        save_tensors(path, tensors, {METADATA_KEY: artifact.metadata.model_dump_json()})
    elif path.suffix:
        raise UsageError(f"cannot write '{path.suffix}' files", "name a .pt or .safetensors file, or a folder")
    else:
        save_folder(artifact, path)


def save_folder(artifact: Artifact, path: Path) -> None:
    """The folder form, whatever the folder is called."""
    save_tensors(path / "model.safetensors", artifact.state)
    if artifact.masks:
        save_tensors(path / "masks.safetensors", artifact.masks)
    if artifact.quantization:
        save_tensors(path / "quantization.safetensors", artifact.quantization)
    files = {p.name: file_digest(p) for p in sorted(path.glob("*.safetensors"))}
    write_json(path / "stage.json", {"metadata": artifact.metadata.model_dump(mode="json"), "files": files})


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with atomic(path) as temporary:
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        temporary.write_bytes(save(content, metadata))  # save_file keeps its files from everybody but their owner


def load_artifact(path: Path, trusted: str | None = None) -> Artifact:
    """Read an artifact in any of its forms.

    ``trusted``: the name of an architecture outside rprune and torchvision that the user asked for by name.

    Raises:
        InputError: not there, damaged, not an rprune artifact, or of an untrusted architecture.
        IntegrityError: a folder whose files are not the ones it lists.
    """
    found = load_any(path, trusted)
    if not isinstance(found, Artifact):
        raise InputError(
            f"{path} holds plain weights without rprune's metadata", "say what they are: --arch and --data"
        )
    return found


def load_any(path: Path, trusted: str | None = None, trust: Trust | None = None) -> Artifact | Foreign:
    """An artifact, or the weights of somebody's file.

    Runs code from the file only where there is ``trust``, which is told before.

    Raises InputError and IntegrityError as :func:`load_artifact` does, and where there are no weights to be had.
    """
    if path.is_dir():
        return _load_folder(path, trusted)
    kind = classify(path)
    if kind == "safetensors":
        return _load_safetensors(path, trusted)
    if kind != "checkpoint":
        return load_foreign(path, kind, trust)
    content, ran = load_pickled(path, kind, trust)
    if isinstance(content, dict) and METADATA_KEY in content:
        if ran:
            raise InputError(f"{path} says that rprune wrote it, and holds code", "it was changed; restore it")
        metadata = _metadata(content[METADATA_KEY], path, trusted)
        state, masks, integers = (content.get(key) for key in ("state_dict", "masks", "quantization"))
        return _checked(Artifact(metadata, state, masks, integers), path)  # type: ignore[arg-type]  # checked there
    return weights_of(content, path, kind, ran)


def _load_folder(path: Path, trusted: str | None) -> Artifact:
    record = read_json(path / "stage.json", "stage record")
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or "model.safetensors" not in files or "metadata" not in record:
        raise InputError(f"{path / 'stage.json'} is not the record of a stage", "run the stage again")
    tables: dict[str, dict[str, Tensor]] = {}
    for name, digest in files.items():
        file = path / name
        if name not in TABLES or not file.is_file() or file_digest(file) != digest:
            raise IntegrityError(
                f"{file} is not the file that {path / 'stage.json'} lists", "restore it, or run the stage again"
            )
        tables[name] = _tensors(file)
    get = tables.get
    metadata = _metadata(json.dumps(record["metadata"]), path, trusted)
    tensors = (tables["model.safetensors"], get("masks.safetensors", {}), get("quantization.safetensors", {}))
    return _checked(Artifact(metadata, *tensors), path)


def _checked(artifact: Artifact, path: Path) -> Artifact:
    """Raises InputError unless the tables are what the metadata promises."""
    tables = (artifact.state, artifact.masks, artifact.quantization)
    whole = all(isinstance(t, dict) and all(map(_is_whole, t.values())) for t in tables)
    if whole:
        whole = all(
            name in artifact.state and artifact.state[name].shape == m.shape for name, m in artifact.masks.items()
        )
        whole = whole and all(mask.dtype == torch.bool for mask in artifact.masks.values())
        whole = whole and all("/" in name for name in artifact.quantization)
    if not whole:
        raise InputError(f"{path} holds damaged tensors", "write it again, or restore it from a copy")
    return artifact


def _is_whole(tensor: Any) -> bool:
    """Plain numbers, each of which the file holds: a view of one number may stand for any number of them."""
    plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
    plain = plain and tensor.device.type == "cpu"
    return plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors and torch raise families of their own
        raise InputError(f"cannot read {path}: {error}", "the file is damaged; restore it") from None


def _load_safetensors(path: Path, trusted: str | None) -> Artifact | Foreign:
    tensors = _tensors(path)
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        return weights_of(tensors, path, "safetensors")

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    state = {n: t for n, t in tensors.items() if not n.startswith((MASK, INTEGER))}
    return _checked(Artifact(_metadata(text, path, trusted), state, part(MASK), part(INTEGER)), path)


def _metadata(text: str, path: Path, trusted: str | None) -> Metadata:
    try:
        metadata = Metadata.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise InputError(
            f"{path} has unreadable metadata: {first_problem(error)}", "write it with this version of rprune"
        ) from None
    try:
        digest_of(metadata.architecture)
    except ValueError as error:  # NaN, or text that is none
        raise InputError(f"{path} has an unreadable architecture: {error}", "write the file again") from None
    if metadata.format != FORMAT:
        raise InputError(f"{path} has format {metadata.format}", f"this version reads {FORMAT}")
    name = metadata.arch.name
    if not is_trusted(name) and name != trusted:
        # a file must never be able to name code that then runs
        raise InputError(
            f"{path} was made with the architecture {name}, which is not built in", f"say so: --arch {name}"
        )
    return metadata
