"""Arithmetic of feature-map sizes, shared by the architectures whose linear layers depend on the image size."""

from __future__ import annotations

from rprune.errors import InputError


def pooled(size: tuple[int, int], times: int = 1) -> tuple[int, int]:
    """The size (H, W) after `times` 2x2 max-pools of stride 2, which drop an odd last row or column."""
    return size[0] >> times, size[1] >> times


def require_size(architecture: str, input_shape: tuple[int, int, int], size: tuple[int, int], smallest: int) -> None:
    """Raise InputError if the feature map `size` (H, W) that `architecture` is left with is empty."""
    if min(size) < 1:
        _, height, width = input_shape
        raise InputError(
            f"{architecture} cannot take {height}x{width} images: its last feature map would be {size[0]}x{size[1]}",
            f"use images of at least {smallest}x{smallest}, or an architecture that takes any size (cifar-resnet18)",
        )
