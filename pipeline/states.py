"""Which part of a checkpoint is the model's state_dict, and what wrappers put before its names. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rprune.errors import printable

STATE_KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "ema", "ema_state_dict",
    "state_dict_ema", "model_ema", "params", "weights",
)  # fmt: skip
"""Where training scripts put the weights, in the order in which they are looked for."""

UNFINISHED = "now"  # where ``resume.pt`` of an unfinished stage of ours has them

WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
"""What DataParallel, torch.compile and classes that hold a model put before every name."""

DEPTH = 4  # tables within tables

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Found(Generic[T]):
    """A state_dict. ``part``: the keys that lead to it, with dots; ``prefix``: what was taken off its names.

    ``others``: parts of the checkpoint that could have been taken instead.
    """

    state: dict[str, T]
    part: str = ""
    prefix: str = ""
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        """For people: what was taken, and from where."""
        words = [f"'{self.part}' of it"] if self.part else []
        words += [f"without the prefix {self.prefix}"] if self.prefix else []
        words += [f"not {', '.join(self.others)}"] if self.others else []
        return ", ".join(words)


def find_state(content: Any, tensor: type[T]) -> Found[T] | None:
    """The state_dict that ``content`` is or holds; None where there is none."""
    part: list[str] = []
    others: tuple[str, ...] = ()
    for _ in range(DEPTH):
        if _is_state(content, tensor):
            state, prefix = without_wrappers(dict(content))
            return Found(state, printable(".".join(part)), prefix, tuple(map(printable, others)))
        if not isinstance(content, Mapping):
            return None
        known = [key for key in (UNFINISHED, *STATE_KEYS) if _holds(content.get(key), tensor)]
        known = known or [key for key in content if isinstance(key, str) and _is_state(content[key], tensor)]
        if not known:
            return None
        part.append(known[0])
        others = others or tuple(known[1:])
        content = content[known[0]]
    return None


def without_wrappers(state: dict[str, T]) -> tuple[dict[str, T], str]:
    """The state without what stands before every name of it, and that prefix."""
    averaged = "n_averaged"  # the counter beside torch's AveragedModel
    if any(name.startswith("module.") for name in state):
        state = {name: value for name, value in state.items() if name != averaged}
    prefix = ""
    while wrapper := next((w for w in WRAPPERS if all(name.startswith(w) and name != w for name in state)), None):
        state = {name.removeprefix(wrapper): value for name, value in state.items()}
        prefix += wrapper
    return state, prefix


def _is_state(content: Any, tensor: type[T]) -> bool:
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(key, str) and isinstance(value, tensor) for key, value in content.items())


def _holds(content: Any, tensor: type[T], depth: int = DEPTH) -> bool:
    if not isinstance(content, Mapping) or not depth:
        return False
    return _is_state(content, tensor) or any(_holds(content.get(key), tensor, depth - 1) for key in STATE_KEYS)
