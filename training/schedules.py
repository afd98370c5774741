"""Learning-rate schedules as factors of the base rate. A name may carry numbers: ``piecewise:0.5,0.75``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rprune.errors import UsageError, unknown_name

Schedule = Callable[[int, float, int], float]
"""(epoch from 0, share of the epoch done in [0,1), epochs) -> factor of the base learning rate."""


def cosine() -> Schedule:
    """Half a cosine from 1 to 0 over all steps (Loshchilov and Hutter, ICLR 2017, without restarts)."""
    return lambda epoch, done, epochs: 0.5 * (1 + math.cos(math.pi * (epoch + done) / epochs))


def cosine_by_epoch() -> Schedule:
    """The schedule of HYDRA's and HARP's code: one value an epoch, and one epoch late."""
    return lambda epoch, done, epochs: 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def constant() -> Schedule:
    """The base rate throughout."""
    return lambda epoch, done, epochs: 1.0


def piecewise(*milestones: float) -> Schedule:
    """Divided by 10 at each of these shares of the stage; 0.5,0.75 unless given (He et al., CVPR 2016)."""
    wanted = milestones or (0.5, 0.75)
    return lambda epoch, done, epochs: 0.1 ** sum(epoch + done >= share * epochs - 1e-9 for share in wanted)


def one_cycle(peak: float = 0.4) -> Schedule:
    """Linear from 0 to 1 at this share of the stage and back to 0 (Smith, 2017; Wong et al., ICLR 2020: 0.4)."""

    def factor(epoch: int, done: float, epochs: int) -> float:
        share = (epoch + done) / epochs
        return share / peak if share < peak else max(0.0, (1 - share) / (1 - peak))

    return factor


def thirds(period: float = 20) -> Schedule:
    """Starts over every so many epochs, divided by 10 after each third of them (Ye et al., ICCV 2019, their code)."""
    return lambda epoch, done, epochs: 0.1 ** (3 * (epoch % period) // period)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "cosine-by-epoch": cosine_by_epoch,
    "constant": constant,
    "piecewise": piecewise,
    "one-cycle": one_cycle,
    "thirds": thirds,
}
NUMBERS = {"piecewise": (0.0, 1.0, 9), "one-cycle": (0.0, 1.0, 1), "thirds": (0.0, math.inf, 1)}
"""Range (exclusive) and greatest count of the numbers that a schedule takes."""
COUNTED = {"thirds": 20.0}
"""Schedules that count epochs, and from which number; the others go by shares of a stage."""


def schedule(name: str) -> Schedule:
    """The schedule that a name means. Raises UsageError for an unknown name, and for numbers that it does not take."""
    kind, _, text = name.partition(":")
    if kind not in SCHEDULES:
        raise unknown_name("schedule", kind, SCHEDULES)
    return SCHEDULES[kind](*_numbers(name, kind, text.split(",") if text else []))


def shortened(name: str, share: float) -> str:
    """The schedule for this share of the epochs: the same name, but where its number counts epochs."""
    kind, _, text = name.partition(":")
    if kind not in COUNTED:
        return name
    return f"{kind}:{share * (float(text) if text else COUNTED[kind]):g}"


def _numbers(name: str, kind: str, texts: Sequence[str]) -> list[float]:
    low, high, most = NUMBERS.get(kind, (0.0, 0.0, 0))
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = [math.nan]
    if len(numbers) > most or not all(low < number < high for number in numbers):
        hint = f"up to {most} numbers above {low:g}" + (f" and below {high:g}" if high < math.inf else "")
        raise UsageError(f"schedule {name} has numbers that {kind} does not take", hint if most else f"write {kind}")
    return numbers


def warmed_up(base: Schedule, epochs_of_warmup: float) -> Schedule:
    """Rises linearly from 0 to ``base`` over the first epochs (Goyal et al., 2017)."""
    if epochs_of_warmup <= 0:
        return base
    return lambda epoch, done, epochs: min(1.0, (epoch + done) / epochs_of_warmup) * base(epoch, done, epochs)
