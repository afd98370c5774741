"""Crops of images that are on the device, in integers: the same bits on every device, for every number of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor


def picked(
    images: UInt8[Tensor, "b c h w"], lines: Int64[Tensor, "b m"], columns: Int64[Tensor, "b n"]
) -> UInt8[Tensor, "b c m n"]:
    """Of every image its own lines and columns."""
    batch = torch.arange(len(images), device=images.device)
    # advanced indices around the channel slice put the channels last: (b, h, w, c)
    return images[batch[:, None, None], :, lines[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def enlarged(
    images: UInt8[Tensor, "b c h w"], windows: Int64[Tensor, "b 4"], mirrored: Bool[Tensor, " b"]
) -> UInt8[Tensor, "b c h w"]:
    """The window (top, left, height, width) of every image at the size of the image, bilinear, and mirrored or not."""
    top, left, tall, wide = windows.unbind(1)
    lines, columns = _Line.of(top, tall, images.shape[2]), _Line.of(left, wide, images.shape[3])
    columns = _Line(*(torch.where(mirrored[:, None], part.flip(1), part) for part in columns))
    across, down = columns.way[:, None, None, :].int(), lines.way[:, None, :, None].int()
    above, below = (
        picked(images, line, columns.first).int() * (256 - across) + picked(images, line, columns.second).int() * across
        for line in (lines.first, lines.second)
    )
    return ((above * (256 - down) + below * down + (1 << 15)) >> 16).to(torch.uint8)


class _Line(NamedTuple):
    """Where the pixels of a resized line lie in the old one: between two of its pixels, in 256ths of the way."""

    first: Tensor
    second: Tensor
    way: Tensor

    @classmethod
    def of(cls, start: Tensor, length: Tensor, wanted: int) -> _Line:
        """``length`` (b,) pixels from ``start`` (b,) on become ``wanted``; centres of pixels lie at halves."""
        start, length = start[:, None], length[:, None]
        centres = 2 * torch.arange(wanted, device=start.device) + 1
        place = torch.div(256 * centres * length, 2 * wanted, rounding_mode="floor") - 128
        place = place.clamp(min=0).minimum(256 * (length - 1))
        return cls(start + place // 256, start + (place + 255) // 256, place % 256)
