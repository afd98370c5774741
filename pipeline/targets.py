"""Targets of attacks from artifacts and files: the net that is searched, and the one whose verdict counts."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from rprune.errors import InputError
from rprune.evaluation.target import Target, steady
from rprune.export.compact import compact
from rprune.export.session import OnnxClassifier, stored_weights
from rprune.export.twin import onnx_twin
from rprune.pipeline.artifact import Artifact
from rprune.pipeline.stages import networks

CPU = torch.device("cpu")


class OnnxNet(nn.Module):
    """An ONNX file as a net without gradients: ONNX Runtime computes the logits."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = OnnxClassifier(path)

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
    model, twin = networks(artifact)
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
        return Target.of(OnnxNet(path), twin, (search_net(model, shape, CPU),))
    return Target.of(OnnxNet(path), search_net(model, shape, device))


def of_onnx(path: Path, parents: tuple[Path, ...] = (), compiled: bool = False) -> tuple[Target, str | None]:
    """Any ONNX classifier, guided by a differentiable net read from the same file; parents are ONNX files too.

    Returns the target, and why there is no such net where there is none: it is then attacked without gradients.
    """
    why = None
    search: nn.Module | None = None
    try:
        search = onnx_twin(path).requires_grad_(False)
        search = torch.compile(search) if compiled else search  # type: ignore[assignment]
    except InputError as error:
        why = error.message
    return Target.of(OnnxNet(path), search, tuple(onnx_twin(parent).requires_grad_(False) for parent in parents)), why


def is_quantized(path: Path) -> bool:
    """Whether an ONNX file stores weights in 8 bits."""
    return any(array.dtype.name in ("int8", "uint8") for array in stored_weights(path).values())
