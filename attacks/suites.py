"""Attacks by the names that papers and reports use."""

from __future__ import annotations

from rprune.attacks.base import Attack
from rprune.attacks.fgsm import FGSM
from rprune.attacks.pgd import PGD
from rprune.errors import unknown_name

SUITES: dict[str, tuple[Attack, ...]] = {
    "fgsm": (FGSM(),),
    "pgd10": (PGD(steps=10),),
    "pgd20": (PGD(steps=20),),
    "pgd50x5": (PGD(steps=50, restarts=5),),
    "pgd50x10": (PGD(steps=50, restarts=10),),
}


def suite(name: str) -> tuple[Attack, ...]:
    """Raises UsageError for an unknown name."""
    if name not in SUITES:
        raise unknown_name("attack suite", name, SUITES)
    return SUITES[name]
