"""The state of an unfinished stage, written after every epoch and loadable with weights_only=True."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rprune.errors import InputError
from rprune.files import atomic


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all. Raises as :func:`rprune.files.atomic`."""
    with atomic(path) as temporary, temporary.open("wb") as file:  # torch's own does not say why it could not write
        torch.save(state, file)


def load_state(path: Path) -> dict[str, Any]:
    """Raises InputError when the file is damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise InputError(f"cannot resume from {path}: {error}", "delete it, or start over with --no-resume") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} is not the state of a stage", "delete it, or start over with --no-resume")
    return state
