"""Random crops of random size and shape: the ImageNet recipe of the field. NumPy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

AREA = (0.08, 1.0)  # of the image
ASPECT = (3 / 4, 4 / 3)  # width by height, uniform in its logarithm
TRIES = 10
NUMBERS = 2 * TRIES + 3
"""Random numbers of an image: area and aspect of every try, place of the crop (2), flip."""

Numbers = NDArray[np.float64]  # (b, NUMBERS) or (NUMBERS,), in [0, 1)


def windows(height: int, width: int, numbers: Numbers) -> NDArray[np.int64]:
    """Crops ``(b, 4)``: top, left, height, width in pixels, of images of one size.

    Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015), section 6, with the ranges, the ten tries and the
    centre crop after them of torchvision's RandomResizedCrop.

    Args:
        numbers: ``(b, NUMBERS)``, uniform in [0, 1).
    """
    areas, aspects = numbers[:, :TRIES], numbers[:, TRIES : 2 * TRIES]
    area = height * width * (AREA[0] + areas * (AREA[1] - AREA[0]))
    low, high = np.log(ASPECT)
    aspect = np.exp(low + aspects * (high - low))
    wide, tall = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    found = fits.any(1)
    row, first = np.arange(len(numbers)), fits.argmax(1)
    h = np.where(found, tall[row, first], min(height, round(width / ASPECT[0])))
    w = np.where(found, wide[row, first], min(width, round(height * ASPECT[1])))
    top, left = numbers[:, -3] * (height - h + 1), numbers[:, -2] * (width - w + 1)
    top, left = np.where(found, top, (height - h) // 2), np.where(found, left, (width - w) // 2)
    return np.stack([np.floor(top), np.floor(left), h, w], 1).astype(np.int64)


def flips(numbers: Numbers) -> NDArray[np.bool_]:
    """Which images are mirrored, ``(b,)``: half of them."""
    return np.asarray(numbers[:, -1] < 0.5)
