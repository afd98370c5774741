"""Attacks by the names that papers and reports use. A name always means the same budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any

from rprune.attacks.adapter import Adapter
from rprune.attacks.apgd import APGD
from rprune.attacks.base import ATTACKS, Attack
from rprune.attacks.fab import FAB
from rprune.attacks.fgsm import FGSM
from rprune.attacks.names import TABLES
from rprune.attacks.pgd import PGD
from rprune.attacks.square import Square
from rprune.attacks.transfer import Transfer
from rprune.errors import UsageError, unknown_name
from rprune.registry import load_object

CE, DLR, TARGETED = APGD(), APGD(loss="dlr"), APGD(loss="dlr", targets=9)
SUITES: dict[str, tuple[Attack, ...]] = {
    "fgsm": (FGSM(),),
    "pgd10": (PGD(steps=10),),
    "pgd20": (PGD(steps=20),),
    "pgd50x5": (PGD(steps=50, restarts=5),),
    "pgd50x10": (PGD(steps=50, restarts=10),),
    "cw20-harp": (PGD(steps=20, step=0.25, loss="margin", kappa=50),),
    "apgd50x5": (APGD(steps=50, restarts=5),),
    "apgd-ce": (CE,),
    "apgd-dlr": (DLR,),
    "apgd-t": (TARGETED,),
    "fab-t": (FAB(),),
    "square": (Square(),),
    "aa-lite": (CE, TARGETED),
    "aa-standard": (CE, TARGETED, FAB(), Square()),
    "aa-plus": (APGD(restarts=5), APGD(loss="dlr", restarts=5), FAB(restarts=5), Square(), TARGETED),
    "aa-rand": (APGD(eot=20), APGD(loss="dlr", eot=20)),
    "aa-quant": (CE, TARGETED, Transfer(attack=CE), Transfer(attack=TARGETED), Square()),
    "aa-torchattacks10": (
        APGD(steps=10),
        APGD(steps=10, loss="dlr", targets=9),
        FAB(steps=10),
        Square(rescale=True),
    ),
}
HARP_EPS = "0.031"  # what HARP's code used for 8/255


def suite(name: str, own: Mapping[str, Iterable[Any]] | None = None) -> tuple[Attack, ...]:
    """The attacks that a name means.

    A name is one of ``own`` (a recipe's), of SUITES, of the registry of attacks (with its defaults), ``file.py:name``
    of an Attack or of a function ``(logits_fn, x, y) -> x_adv``, or several of these with commas.

    Raises UsageError for an unknown name, InputError for a file that cannot be loaded.
    """
    own = own or {}
    if name in TABLES:
        raise UsageError(
            f"{name} is a table of several suites", f"name one of them here: {', '.join(TABLES[name].values())}"
        )
    if name in own:
        return tuple(attack for spec in own[name] for attack in _attacks(spec))
    if "," in name:
        return tuple(attack for part in name.split(",") for attack in suite(part.strip(), own))
    return _attacks(name)


def _attacks(spec: str | Mapping[str, Any]) -> tuple[Attack, ...]:
    if isinstance(spec, str):
        if spec in SUITES:
            return SUITES[spec]
        if ":" in spec and not isinstance(load_object(spec), type):
            return (Adapter(function=spec),)
        if ":" not in spec and spec not in ATTACKS.all():
            raise unknown_name("attack or suite", spec, {*SUITES, *ATTACKS.all()})
    return (ATTACKS.build(spec),)


def with_transfer(attacks: tuple[Attack, ...], parents: Sized) -> tuple[Attack, ...]:
    """A suite for an artifact: if it has parents, and the suite no transfer, gradient attacks run on them as well."""
    if not parents or any(isinstance(attack, Transfer) for attack in attacks):
        return attacks
    return (*attacks, *(Transfer(attack=a) for a in attacks if a.needs_gradient and not isinstance(a, FAB)))
