"""Model files that bring their own program: .pt2, TorchScript, and modules that were pickled whole."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rprune.errors import InputError, first_line
from rprune.files import file_digest
from rprune.models.normalize import Normalize
from rprune.pipeline.exported import Exported
from rprune.pipeline.foreign import Trust, load_pickled, module_in
from rprune.pipeline.intake import PICKLED, PROGRAMS, classify, read_checkpoint
from rprune.pipeline.pickles import Call
from rprune.pipeline.states import STATE_KEYS

WORDS = {"exported program": "torch.export graph", "torchscript": "TorchScript", "checkpoint": "pickled module"}


class Program(nn.Module):
    """Somebody's net behind one that takes images in [0,1]: normalised first where ``mean`` and ``std`` are given."""

    def __init__(self, net: nn.Module, mean: Sequence[float] = (), std: Sequence[float] = ()) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std) if mean else None
        self.net = net
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x if self.normalize is None else self.normalize(x))
        if not isinstance(logits, Tensor):
            raise TypeError(f"it gives a {type(logits).__name__}, not a tensor of logits")
        return logits


def is_program(path: Path, trust: bool = False) -> bool:
    """Whether a file answers by a program of its own; pickled modules do where they may be loaded.

    Raises InputError when the file cannot be used at all.
    """
    if path.is_dir() or path.suffix in (".onnx", ".c"):
        return False
    kind = classify(path)
    if kind in PROGRAMS:
        return True
    return trust and kind in PICKLED and _has_module(path)


def open_program(
    path: Path, trust: Trust | None, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> tuple[Program, str, bool]:
    """The program of a file on the CPU, frozen and in eval mode; what it is, in words; whether it runs by trust alone.

    Raises InputError when it cannot be read, or is not to be run without ``trust``.
    """
    kind = classify(path)
    if kind == "exported program":
        return Program(Exported(path), mean, std), WORDS[kind], False
    if kind == "torchscript":
        return Program(_scripted(path, trust), mean, std), WORDS[kind], True
    content, _ = load_pickled(path, kind, trust)
    net = module_in(content)
    assert net is not None  # is_program found it
    return Program(net.float(), mean, std), WORDS["checkpoint"], True


def _scripted(path: Path, trust: Trust | None) -> nn.Module:
    if trust is None:
        raise InputError(
            f"{path} is a TorchScript program, which may read and write files as it runs",
            "export it with torch.export or to ONNX; or, if you made the file yourself, --trust-pickle runs it",
        )
    trust(f"{path} is a TorchScript program, which may read and write files; sha256 {file_digest(path)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that torch.export is the future
            net: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:  # the interpreter's errors share no base
        raise InputError(f"cannot load {path}: {first_line(error)}", "save it with this version of torch") from None
    return net


def _has_module(path: Path) -> bool:
    """A module that was pickled whole has its tables of parameters and modules as its state."""
    pending = [read_checkpoint(path, classify(path)).pickle.root]
    while pending:
        value = pending.pop()
        if isinstance(value, Call) and isinstance(value.state, dict) and "_modules" in value.state:
            return True
        if isinstance(value, dict):
            pending += [value[key] for key in STATE_KEYS if key in value]
    return False
