"""Energy of stages in words, and the CO2 that it stands for where the user says how much that is."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rprune.errors import UsageError

if TYPE_CHECKING:
    from rprune.reports.schema import Energy

VARIABLE = "RPRUNE_CO2"


def intensity() -> float | None:
    """Grams of CO2 equivalent a kWh, as the environment variable RPRUNE_CO2 says; None: unsaid, and none is assumed.

    Raises UsageError when it is no number from 0 on.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{VARIABLE}={text} is no number of grams", f"grams of CO2 a kWh of yours: {VARIABLE}=400")
    return value


def energy(joules: float) -> str:
    """In Wh or kWh."""
    hours = joules / 3600
    return f"{_three(hours / 1000)}\u00a0kWh" if hours >= 999.5 else f"{_three(hours)}\u00a0Wh"


def carbon(joules: float, grams: float) -> str:
    """In g or kg of CO2 equivalent: kWh times ``grams`` a kWh, as HARP (ICLR 2023, appendix A.8) tells its runs'."""
    mass = joules / 3.6e6 * grams
    return f"{_three(mass / 1000)}\u00a0kg CO2e" if mass >= 999.5 else f"{_three(mass)}\u00a0g CO2e"


def spent(found: Energy, grams: float | None) -> str:
    """Energy of a stage, and its CO2 where ``grams`` a kWh are known."""
    return total([found], grams)


def total(found: Sequence[Energy], grams: float | None) -> str:
    """Energy of stages together."""
    joules = sum(stage.joules for stage in found)
    text = energy(joules) if grams is None else f"{energy(joules)}, {carbon(joules, grams)}"
    return f"at least {text}" if any(stage.resumed for stage in found) else text


def counted(found: Energy) -> str:
    """The devices whose counters were read."""
    parts = [(found.gpus, "GPU"), (found.cpus, "CPU package")]
    return ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in parts if count)


def _three(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
