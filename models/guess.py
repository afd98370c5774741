"""Which architecture a state_dict belongs to, told from its names and shapes; no value is looked at.

``fingerprints.json`` says which architectures have such names; these alone are built, on the meta device, and compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rprune.errors import InputError, printable
from rprune.models.registry import Architecture

if TYPE_CHECKING:
    from torch import nn

TABLE = Path(__file__).with_name("fingerprints.json")
SIDES = (32, 28, 8, 16, 64, 96, 128, 224, 299)  # of square images, tried in turn where nobody says
NEAR = 0.25  # of the names in common: below, nothing is called near
COUNTER = "num_batches_tracked"  # of batch norm; files of old have none
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_WIDTHS: dict[str, tuple[int, int]] = {  # first convolution's channels = width * the first number; the default
    "lenet": (2, 16), "cifar-resnet18": (1, 64), "cifar-resnet34": (1, 64), "cifar-resnet50": (1, 64),
}  # fmt: skip


def fingerprint(names: Any) -> str:
    """A digest of a state_dict's names, batch norm's counters apart."""
    import hashlib

    kept = sorted(name for name in names if not name.endswith(COUNTER))
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]


def sketch(names: Any, size: int = 48) -> list[int]:
    """The smallest hashes of the names: two sketches tell how many names two architectures share (bottom-k MinHash).

    Source: Broder, "On the resemblance and containment of documents", 1997.
    """
    import zlib

    return sorted(zlib.crc32(name.encode()) for name in names if not name.endswith(COUNTER))[:size]


def resemblance(one: list[int], other: list[int], size: int = 48) -> float:
    """About the names that two state_dicts share over all that they have."""
    smallest = sorted({*one, *other})[:size]
    both = set(one) & set(other)
    return sum(value in both for value in smallest) / max(len(smallest), 1)


@cache
def table() -> dict[str, Any]:
    """``torchvision``: the version it was made with; ``candidates``: fingerprint -> names; ``sketches``: by name."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def candidates(names: Any) -> list[str]:
    """Architectures whose state_dict has exactly these names."""
    found: list[str] = table()["candidates"].get(fingerprint(names), [])
    return found


def nearest(names: Any) -> list[tuple[str, float]]:
    """Architectures by their share of names in common, the nearest first."""
    mine = sketch(names)
    rated = [(name, resemblance(mine, other)) for name, other in table()["sketches"].items()]
    return sorted(rated, key=lambda pair: -pair[1])


def guess(shapes: Shapes, input_shape: tuple[int, int, int] | None = None) -> Architecture:
    """The one architecture whose state_dict has these names and shapes.

    ``input_shape`` (C, H, W): of the images it is for; without, the first of ``SIDES`` that fits is told.

    Raises InputError where none has, and says which comes nearest; and where several have.
    """
    names = candidates(shapes)
    fits: list[Architecture] = []
    differs = ""
    for name in names:
        found, differs = _compared(name, shapes, input_shape)
        fits += [] if found is None else [found]
    if len(fits) == 1:
        return fits[0]
    if fits:
        listed = ", ".join(arch.name for arch in fits)
        raise InputError(f"the weights fit several architectures: {listed}", "say which: --arch NAME")
    hint = "say what it is: --arch NAME, or file.py:factory of yours"
    if names:
        raise InputError(f"the weights have the names of {', '.join(names)}, and other shapes: {differs}", hint)
    name, share = nearest(shapes)[0]
    if share < NEAR:
        first = ", ".join(map(printable, sorted(shapes)[:3]))
        raise InputError(f"the weights ({first}, ...) are of no architecture that rprune knows", hint)
    found, differs = _compared(name, shapes, input_shape)
    if found is not None:  # torchvision has come to other names since the table was made
        return found
    raise InputError(f"the weights are of no architecture that rprune knows; nearest is {name}: {differs}", hint)


def described(arch: Architecture) -> str:
    """An architecture as the options that name it."""
    return arch.name + "".join(f" {key}={value}" for key, value in arch.kwargs.items())


def built(arch: Architecture) -> nn.Module:
    """The model without memory for its weights."""
    import torch
    from torch.overrides import TorchFunctionMode

    from rprune.models.registry import build

    class Empty(TorchFunctionMode):
        """New parameters go to the meta device; the few numbers that constructors compute with do not."""

        def __torch_function__(
            self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if function is torch.empty:
                kwargs["device"] = "meta"
            return function(*args, **kwargs)

    with Empty():
        return build(arch)


def shapes_of(arch: Architecture) -> dict[str, Shape]:
    """Names and shapes of an architecture's state_dict, in its order."""
    return {name: tuple(tensor.shape) for name, tensor in built(arch).state_dict().items()}


def _compared(name: str, shapes: Shapes, input_shape: tuple[int, int, int] | None) -> tuple[Architecture | None, str]:
    """The architecture of this name with the classes, width and image size that the weights tell; or what differs."""
    convolutions = (shape for key, shape in shapes.items() if key.endswith("weight") and len(shape) == 4)
    first: Shape = shapes.get("conv1.weight") or next(convolutions, (1, 3, 1, 1))
    kwargs: dict[str, Any] = {}
    if name in _WIDTHS and len(shapes.get("conv1.weight", ())) == 4:
        per, usual = _WIDTHS[name]
        width = shapes["conv1.weight"][0] // per
        kwargs = {} if width in (0, usual) else {"width": width}
    places = [input_shape] if input_shape else [(first[1], side, side) for side in SIDES]
    differs = ""
    last: dict[str, Shape] = {}
    for place in places:
        try:
            wanted = shapes_of(Architecture(name, 1000, place, kwargs))
            if list(wanted.values()) == list(last.values()):  # the size of images makes no difference
                break
            last = wanted
            head = list(wanted)[-1]  # the classifier comes last in all of them
            classes = (shapes.get(head) or (1000,))[0]
            arch = Architecture(name, classes, place, kwargs)
            wanted = wanted if classes == 1000 else shapes_of(arch)
        except InputError as error:  # images too small for it
            differs = differs or error.message
            continue
        now = difference(wanted, shapes)
        if not now:
            return arch, ""
        differs = differs or now
    return None, differs


def difference(wanted: Shapes, given: Shapes) -> str:
    """The first names and shapes that differ, in words; nothing where there are none."""
    missing = [name for name in wanted if name not in given and not name.endswith(COUNTER)]
    extra = [name for name in given if name not in wanted and not name.endswith(COUNTER)]
    other = [name for name in wanted if name in given and tuple(given[name]) != tuple(wanted[name])]
    parts = [f"missing {', '.join(missing[:3])}"] if missing else []
    parts += [f"unknown {', '.join(map(printable, extra[:3]))}"] if extra else []
    if other:
        parts.append(f"{other[0]} is {tuple(given[other[0]])}, not {tuple(wanted[other[0]])}")
    return "; ".join(parts)
