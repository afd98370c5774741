"""Learning-rate schedules as factors of the base rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from rprune.errors import unknown_name

Schedule = Callable[[int, float, int], float]
"""(epoch from 0, share of the epoch done in [0,1), epochs) -> factor of the base learning rate."""


def cosine(epoch: int, done: float, epochs: int) -> float:
    """Half a cosine from 1 to 0 over all steps (Loshchilov and Hutter, ICLR 2017, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * (epoch + done) / epochs))


def cosine_by_epoch(epoch: int, done: float, epochs: int) -> float:  # noqa: ARG001  constant within an epoch
    """The schedule of HYDRA's and HARP's code: one value an epoch, and one epoch late."""
    return 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def constant(epoch: int, done: float, epochs: int) -> float:  # noqa: ARG001
    return 1.0


SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "cosine-by-epoch": cosine_by_epoch, "constant": constant}


def schedule(name: str) -> Schedule:
    """Raises UsageError for an unknown name."""
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    return SCHEDULES[name]
