"""Model files of others as weights: what is taken out of them, and what is never run."""

from __future__ import annotations

import argparse
import importlib
import pathlib
import pickle
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rprune.errors import InputError, printable
from rprune.files import file_digest
from rprune.models.guess import COUNTER, described, guess
from rprune.models.registry import Architecture
from rprune.pipeline.intake import PICKLED, Kind, explain, read_checkpoint
from rprune.pipeline.pickles import HARMLESS, NUMPY, PATHS
from rprune.pipeline.states import DEPTH, STATE_KEYS, Found, find_state

Trust = Callable[[str], None]
"""Is told what is about to run, before anything of a file runs. Where there is none, nothing runs."""

SHOWN = 6  # names of globals in an error


@dataclass(frozen=True, eq=False)
class Foreign:
    """The weights of somebody's file. ``ran``: the names that were imported and called to read it; usually none."""

    path: Path
    kind: Kind
    found: Found[Tensor]
    ran: tuple[str, ...] = ()

    @property
    def state(self) -> dict[str, Tensor]:
        """Names without what wrappers put before them; float32 where the numbers are floats."""
        return self.found.state

    def guessed(self, input_shape: tuple[int, int, int] | None, classes: int, source: str) -> Architecture:
        """The architecture that the weights tell, for images (C, H, W) of a data source with so many classes.

        Raises InputError where they tell none, or one for other classes.
        """
        try:
            arch = guess({name: tuple(tensor.shape) for name, tensor in self.state.items()}, input_shape)
        except InputError as error:
            raise InputError(f"{self.path}: {error.message}", error.hint) from None
        if arch.num_classes != classes:
            raise InputError(
                f"{self.path} is a {described(arch)} with {arch.num_classes} classes, {source} has {classes}",
                "give the matching --data",
            )
        return arch

    @property
    def record(self) -> dict[str, Any]:
        """What the lineage says of it."""
        found = self.found
        said: dict[str, Any] = {"file": self.path.name, "sha256": file_digest(self.path), "kind": self.kind}
        said |= {key: value for key, value in {"part": found.part, "prefix": found.prefix}.items() if value}
        return said | ({"loaded_unsafely": True, "globals": list(self.ran)} if self.ran else {})


def load_pickled(path: Path, kind: Kind, trust: Trust | None) -> tuple[Any, tuple[str, ...]]:
    """The content of a pickled file, and the names of code that ran to make it.

    Raises InputError when the pickle names code and ``trust`` is None; when it cannot be read.
    """
    held = read_checkpoint(path, kind).pickle
    unsafe = held.unsafe
    if not unsafe and kind == "bare pickle":
        raise InputError(f"{path} is a bare pickle without weights", "save model.state_dict() with torch.save")
    if not unsafe:
        try:
            with torch.serialization.safe_globals(_harmless(held.globals)):
                return torch.load(path, map_location="cpu", weights_only=True), ()
        except Exception as error:  # unpickling and zip errors share no base
            raise InputError(f"cannot load {path}: {_first_line(error)}", "save model.state_dict()") from None
    if trust is None:
        names = ", ".join(unsafe[:SHOWN]) + (f" and {len(unsafe) - SHOWN} more" if len(unsafe) > SHOWN else "")
        raise InputError(
            f"{path} holds pickled code ({names}), which is never run",
            "save model.state_dict() instead; or, if you made the file yourself, --trust-pickle runs it",
        )
    trust(f"{path} is unpickled, which runs code that it names: {', '.join(unsafe)}; sha256 {file_digest(path)}")
    try:
        if kind == "bare pickle":
            with path.open("rb") as file:
                return pickle.load(file), tuple(unsafe)
        return torch.load(path, map_location="cpu", weights_only=False), tuple(unsafe)
    except Exception as error:  # whatever the code in it raises
        hint = "its classes must be importable: run rprune where they lie, or save model.state_dict()"
        raise InputError(f"cannot load {path}: {type(error).__name__}: {_first_line(error)}", hint) from None


def weights_of(content: Any, path: Path, kind: Kind, ran: tuple[str, ...] = ()) -> Foreign:
    """The state_dict in what a file held. Raises InputError if there is none, or something in it is no plain tensor."""
    found = find_state(_tables(content), Tensor)
    if found is None:
        raise InputError(
            f"{path} holds no state_dict", f"save model.state_dict(), or put it under one of: {', '.join(STATE_KEYS)}"
        )
    return Foreign(path, kind, Found(_plain(found.state, path), found.part, found.prefix, found.others), ran)


def load_foreign(path: Path, kind: Kind, trust: Trust | None) -> Foreign:
    """The weights of a file that is no artifact. Raises InputError where none can be had without running it."""
    if kind == "exported program":
        from rprune.pipeline.exported import package_state

        return weights_of(package_state(path), path, kind)
    if kind not in PICKLED:
        raise InputError(
            f"{path} is {explain(kind)}", "give a state_dict, a file that rprune wrote, or its stage folder"
        )
    content, ran = load_pickled(path, kind, trust)
    return weights_of(content, path, kind, ran)


def module_in(content: Any) -> nn.Module | None:
    """The module that was pickled whole, on its own or in a checkpoint."""
    if isinstance(content, nn.Module):
        return content
    tables = [content[key] for key in STATE_KEYS if key in content] if isinstance(content, Mapping) else []
    return next((found for table in tables if (found := module_in(table)) is not None), None)


def _tables(content: Any, depth: int = DEPTH) -> Any:
    """Modules as their state_dicts, where weights are looked for."""
    if isinstance(content, nn.Module):
        return content.state_dict()
    if isinstance(content, Mapping) and depth:
        found = {key: _tables(content[key], depth - 1) for key in STATE_KEYS if key in content}
        return {**content, **found}
    return content


def _plain(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise InputError(f"{path}: {name!r:.80} is no plain tensor of numbers", "save the float model's state_dict")
        tensor = tensor.detach().cpu()
        plain[name] = tensor.float() if tensor.is_floating_point() else tensor
    # batch norm of torch before 0.4.1 did not count
    layers = [name.removesuffix("running_var") for name in plain if name.endswith(".running_var")]
    return {f"{layer}{COUNTER}": torch.tensor(0) for layer in layers} | plain


def _harmless(names: frozenset[str]) -> list[Any]:
    """What a pickle may call, beyond torch's own list, of what it does call."""
    known: dict[str, Any] = {
        "argparse.Namespace": argparse.Namespace,
        "types.SimpleNamespace": types.SimpleNamespace,
        "collections.defaultdict": _table,  # torch puts items into plain tables alone
    }
    known |= {f"builtins.{kind.__name__}": kind for kind in (int, float, list, dict)}
    found = [(known[name], name) for name in sorted(names & known.keys())]
    for name in sorted(names & NUMPY):
        module, _, attribute = name.replace("numpy.core.", "numpy._core.").rpartition(".")
        found.append((getattr(importlib.import_module(module), attribute), name))
    if names & NUMPY:  # numpy's types of numbers are classes of their own, which no pickle names
        types_of_numbers = (name for name in HARMLESS if name.startswith("numpy.dtypes."))
        found += [(getattr(importlib.import_module("numpy.dtypes"), n.rpartition(".")[2]), n) for n in types_of_numbers]
    for name in sorted(names & PATHS):  # those of the other system as well
        found.append((pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath, name))
    return found


def _table(*_default: Any) -> dict[Any, Any]:
    return {}


def _first_line(error: Exception) -> str:
    """Of torch's long advice the line that says what is wrong."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return printable(text.partition("\n")[0], 160) or type(error).__name__
