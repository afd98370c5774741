"""Targets of attacks from artifacts and files: the net that is searched, and the one whose verdict counts."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rprune.errors import InputError
from rprune.evaluation.target import Target, steady
from rprune.export.c.engine import CClassifier
from rprune.export.compact import compact
from rprune.export.session import OnnxClassifier
from rprune.export.twin import onnx_twin
from rprune.pipeline.artifact import Artifact
from rprune.pipeline.forms import Deployed

CPU = torch.device("cpu")
PROBES = 32  # random images on which a file beside has to answer alike
ALIKE = 1e-3


class FileNet(nn.Module):
    """A file as a net without gradients: ONNX Runtime, or its compiled C source, computes the logits."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = CClassifier(path) if path.suffix == ".c" else OnnxClassifier(path)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.logits(x.detach().cpu().numpy())).to(x.device)


def search_net(
    model: nn.Module, shape: tuple[int, int, int], device: torch.device, compiled: bool = False
) -> nn.Module:
    """The same function, made for gradients of its input: batch norm folded, dead channels removed, frozen."""
    try:
        net: nn.Module = compact(model, shape)
    except InputError:  # a model that cannot be traced is searched as it is
        net = copy.deepcopy(model)
    net = steady(net).to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return torch.compile(net) if compiled else net  # type: ignore[return-value]  # a module, says its documentation


def of_artifact(artifact: Artifact, device: torch.device, compiled: bool = False) -> dict[str, Target]:
    """The float form and, where there is one, the 8-bit form of an artifact; the simulation is exact on a CPU alone."""
    deployed = Deployed.of(artifact)
    model, twin = deployed.model, deployed.twin
    shape = artifact.metadata.arch.input_shape
    guide = search_net(model, shape, device, compiled)
    found = {"float": Target.of(model.to(device), guide)}
    if twin is not None:
        found["8-bit"] = Target.of(twin, twin, (guide.to(CPU),))
    return found


def of_export(
    path: Path, model: nn.Module, twin: nn.Module | None, shape: tuple[int, int, int], device: torch.device
) -> Target:
    """A file of a bundle: ONNX Runtime over it, guided by what it was made from."""
    if twin is not None:
        return Target.of(FileNet(path), twin, (search_net(model, shape, CPU),))
    return Target.of(FileNet(path), search_net(model, shape, device))


def sources_of(path: Path) -> tuple[Path | None, str | None]:
    """The ONNX file that tells a file's gradients, itself or, of C, the one beside it that answers alike; or why none.

    Raises InputError when the file cannot be used at all.
    """
    if path.suffix == ".onnx":
        return path, None
    classifier = CClassifier(path)
    x = np.random.RandomState(0).random_sample((PROBES, *classifier.input_shape)).astype(np.float32)
    wanted = classifier.logits(x)
    for beside in (path.with_name("model.int8.onnx"), path.with_name("model.onnx")):
        try:
            got = OnnxClassifier(beside).logits(x)
        except Exception:  # not there, or not of this model: ONNX Runtime's errors share no base
            continue
        if alike(got, wanted):
            return beside, None
    return None, f"no ONNX file of the same model lies beside {path.name}"


def alike(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> bool:
    """Whether logits are the same up to rounding; those that are no numbers are not."""
    near = ALIKE * max(1.0, float(np.abs(wanted).max()))
    return found.shape == wanted.shape and bool(np.abs(found - wanted).max() <= near)


def of_file(
    path: Path, guide: Path | None, parents: tuple[Path, ...] = (), compiled: bool = False
) -> tuple[Target, str | None]:
    """An ONNX or C classifier, guided by a differentiable net read from the ONNX file ``guide``; parents are ONNX, too.

    Returns the target, and why there is no such net where there is none: it is then attacked without gradients.
    """
    why = None
    search: nn.Module | None = None
    try:
        search = None if guide is None else onnx_twin(guide).requires_grad_(False)
        search = torch.compile(search) if compiled and search is not None else search  # type: ignore[assignment]
    except InputError as error:
        why = error.message
    return Target.of(FileNet(path), search, tuple(onnx_twin(parent).requires_grad_(False) for parent in parents)), why
