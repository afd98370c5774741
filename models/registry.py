"""Architectures by name: built-in ones, torchvision's classifiers, and the user's own factories."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rprune.errors import InputError, RpruneError, UsageError, unknown_name
from rprune.registry import load_object

if TYPE_CHECKING:
    from torch import nn

_TORCHVISION = "torchvision:"

# Name -> ("module:Class", preset arguments). Strings, so that listing the names does not import torch.
BUILTIN: dict[str, tuple[str, dict[str, Any]]] = {
    "lenet": ("rprune.models.lenet:LeNet", {}),
    "cnn-small": ("rprune.models.cnn:CNNSmall", {}),
    "cnn-large": ("rprune.models.cnn:CNNLarge", {}),
    "vgg4": ("rprune.models.vgg:VGG4", {}),
    "vgg16": ("rprune.models.vgg:VGG16", {}),
    "cifar-resnet18": ("rprune.models.resnet:ResNet", {"block": "basic", "blocks": (2, 2, 2, 2)}),
    "cifar-resnet34": ("rprune.models.resnet:ResNet", {"block": "basic", "blocks": (3, 4, 6, 3)}),
    "cifar-resnet50": ("rprune.models.resnet:ResNet", {"block": "bottleneck", "blocks": (3, 4, 6, 3)}),
    "wrn-28-2": ("rprune.models.wrn:WideResNet", {"widen": 2}),
    "wrn-28-4": ("rprune.models.wrn:WideResNet", {"widen": 4}),
    "wrn-28-10": ("rprune.models.wrn:WideResNet", {"widen": 10}),
    "flat": ("rprune.models.flat:flat", {}),
}


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a model again, weights apart.

    `name` is a built-in name, `torchvision:NAME`, `package.module:factory` or `path/file.py:factory`; `input_shape`
    is (C, H, W); `kwargs` go to the factory and must be JSON-able; empty `mean` and `std` mean raw [0, 1] pixels.
    Raises InputError for shapes, class counts or normalisations that cannot be used.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"its name is {self.name!r:.80}")
        shape = tuple(self.input_shape)
        if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
            raise InputError(
                f"input shape {list(shape)} is not (channels, height, width)",
                "give three positive whole numbers, such as 3, 32, 32",
            )
        if self.num_classes < 1:
            raise InputError(f"a classifier cannot have {self.num_classes} classes", "give a number of at least 1")
        for key in ("mean", "std"):
            values = tuple(map(float, getattr(self, key)))
            if len(values) not in (0, shape[0]):
                raise InputError(
                    f"{key} has {len(values)} value(s) for {shape[0]} channel(s)",
                    "give one value per channel, or none for raw [0, 1] pixels",
                )
            object.__setattr__(self, key, values)
        if len(self.mean) != len(self.std):
            raise InputError("normalisation needs both mean and std", "give both, or neither")
        object.__setattr__(self, "input_shape", shape)
        object.__setattr__(self, "kwargs", dict(self.kwargs))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values; `from_dict` gives an equal architecture back."""
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "input_shape": list(self.input_shape),
            "kwargs": dict(self.kwargs),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """The architecture of a `to_dict()` dictionary; raises InputError for missing or unknown fields."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        missing = sorted({"name", "num_classes", "input_shape"} - set(values))
        if unknown or missing:
            raise InputError(
                f"not an architecture: missing {missing}, unknown {unknown}",
                f"the fields are: {', '.join(cls.__dataclass_fields__)}",
            )
        try:
            return cls(**values)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"not an architecture: {error}", "write the file again") from None


def names() -> tuple[str, ...]:
    """The built-in architectures that a user may ask for; does not import torch. ``flat`` needs a list of layers."""
    return tuple(name for name in BUILTIN if name != "flat")


def is_trusted(name: str) -> bool:
    """Whether building `name` runs only code of rprune and torchvision, never the user's own."""
    return name in BUILTIN or name.startswith(_TORCHVISION)


def build(arch: Architecture) -> nn.Module:
    """A new model with fresh weights: float32, on the CPU (or `meta`, inside `torch.device("meta")`), in train mode.

    It maps (B, *arch.input_shape) in [0, 1] to logits (B, num_classes), normalising inside if arch.mean is given.
    For user code, `num_classes` and `input_shape` are passed only if the factory accepts them.
    Raises UsageError for unknown names and arguments, InputError for code that cannot be loaded or run, for a
    factory that does not return an nn.Module, and for images too small for the architecture.
    """
    import torch

    from rprune.models.normalize import normalized

    shared = {"num_classes": arch.num_classes, "input_shape": arch.input_shape}
    if arch.name in BUILTIN:
        target, preset = BUILTIN[arch.name]
        module, _, attribute = target.partition(":")
        factory = getattr(importlib.import_module(module), attribute)
        _check_kwargs(arch, set(inspect.signature(factory).parameters) - set(shared) - set(preset))
        model = _call(arch.name, factory, {**shared, **preset, **arch.kwargs})
    elif arch.name.startswith(_TORCHVISION):
        model = _torchvision(arch)
    else:
        model = _foreign(arch, shared)
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"'{arch.name}' returned a {type(model).__name__}, not a torch.nn.Module", "return the model itself"
        )
    if not any(tensor.is_meta for tensor in model.parameters()):
        model = model.cpu()
    model = model.float().train()
    return normalized(model, arch.mean, arch.std)


def _check_kwargs(arch: Architecture, accepted: set[str]) -> None:
    for key in arch.kwargs:
        if key not in accepted:
            raise unknown_name(f"argument of architecture {arch.name}", key, accepted)


def _torchvision(arch: Architecture) -> object:
    import torchvision

    name = arch.name.removeprefix(_TORCHVISION)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise unknown_name("torchvision model", name, known)
    try:
        return torchvision.models.get_model(name, weights=None, num_classes=arch.num_classes, **arch.kwargs)
    except Exception as error:  # its constructors raise whatever their arguments cause
        raise UsageError(
            f"torchvision cannot build '{name}' with {dict(arch.kwargs)}: {error}", "see the model's torchvision page"
        ) from error


def _foreign(arch: Architecture, shared: Mapping[str, Any]) -> object:
    factory = _load(arch.name)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # some callables written in C have no signature
        return _call(arch.name, factory, {**shared, **arch.kwargs})
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return _call(arch.name, factory, {**shared, **arch.kwargs})
    accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    # What the user asked for by name is never dropped in silence.
    _check_kwargs(arch, accepted - set(shared))
    return _call(arch.name, factory, {k: v for k, v in shared.items() if k in accepted} | dict(arch.kwargs))


def _call(name: str, factory: Callable[..., object], arguments: Mapping[str, Any]) -> object:
    try:
        return factory(**arguments)
    except RpruneError:
        raise
    except Exception as error:
        raise InputError(
            f"'{name}' failed: {type(error).__name__}: {error}", f"it was called with {dict(arguments)}"
        ) from error


def _load(name: str) -> Callable[..., object]:
    """The factory that `package.module:factory` or `path/file.py:factory` names."""
    target, _, attribute = name.rpartition(":")
    if not target or not attribute:
        if "/" in name or name.endswith(".py"):
            raise UsageError(f"'{name}' does not say which factory to call", f"write {name.rstrip(':')}:FACTORY")
        raise unknown_name("architecture", name, names())
    factory = load_object(name)
    if not callable(factory):
        raise InputError(
            f"'{attribute}' of '{target}' cannot be called", "name a callable that returns the model, after the colon"
        )
    result: Callable[..., object] = factory
    return result
