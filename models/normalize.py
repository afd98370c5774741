"""Normalisation of pixels inside the model, so that attacks and exports see inputs in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rprune.errors import InputError


class Normalize(nn.Module):
    """(x - mean) / std per channel of x (B, C, H, W); the buffers are (1, C, 1, 1) and stay out of the state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(tuple(mean)).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Normalized(nn.Module):
    """Mixin in front of a model's own class: normalises the input, then calls the model's own forward."""

    _base: type[nn.Module]
    _normalize: Normalize

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(self._normalize(x))
        return logits

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so copies and pickles have to name the class it was made from.
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return _blank, (self._base,), state


class _NormalizedSequential(Normalized):
    """The same for nn.Sequential, which runs whatever it iterates over: `_normalize` must not be among it."""

    def __iter__(self) -> Iterator[nn.Module | None]:
        return (child for name, child in self._modules.items() if name != "_normalize")

    def __len__(self) -> int:
        return len(self._modules) - 1


_classes: dict[type[nn.Module], type[Normalized]] = {}


def _class_for(base: type[nn.Module]) -> type[Normalized]:
    if base not in _classes:
        mixin = _NormalizedSequential if issubclass(base, nn.Sequential) else Normalized
        _classes[base] = type(f"Normalized{base.__name__}", (mixin, base), {"_base": base})
    return _classes[base]


def _switch(model: nn.Module, cls: type[nn.Module]) -> None:
    model.__class__ = cls


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = _class_for(base)
    return cls.__new__(cls)


def normalized(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Make `model` normalise its input (B, C, H, W) in [0, 1] itself; returns the same object.

    `mean` and `std` have one value per channel. State dict keys do not change: the model's class is switched to a
    subclass whose forward normalises first, through the child module `_normalize`. A second call replaces the
    values. All-zero means with all-one deviations (or no values at all) mean no normalisation: the model is returned
    as it is, or set back to its own class if it was normalised before.
    Raises InputError for lengths that differ, values that are not finite, a std that is not positive, and models
    whose class cannot be switched (traced or scripted ones).
    """
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    if len(mean) != len(std):
        raise InputError(
            f"normalisation has {len(mean)} mean(s) but {len(std)} std(s)", "give one value per channel in both"
        )
    if not all(map(math.isfinite, mean)) or not all(math.isfinite(s) and s > 0 for s in std):
        raise InputError(
            f"normalisation cannot use mean {mean} with std {std}", "means must be finite, stds finite and above 0"
        )
    if not any(mean) and all(s == 1 for s in std):
        if isinstance(model, Normalized):
            del model._normalize
            _switch(model, model._base)
        return model
    if not isinstance(model, Normalized):
        # Both keep their forward per instance and would silently drop the normalisation when copied or recompiled.
        if isinstance(model, torch.fx.GraphModule | torch.jit.ScriptModule):
            raise InputError(
                f"cannot build normalisation into a {type(model).__name__}",
                "normalise the module before tracing it, or inside its own forward",
            )
        if hasattr(model, "_normalize"):
            raise InputError(
                f"{type(model).__name__} already has an attribute '_normalize'", "rename it, or give no mean and std"
            )
        _switch(model, _class_for(type(model)))
    layer = Normalize(mean, std).train(model.training)
    first = next(model.parameters(), None)
    if first is not None:
        layer = layer.to(device=first.device, dtype=first.dtype if first.is_floating_point() else None)
    model._normalize = layer
    return model
