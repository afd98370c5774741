"""Integer weights: symmetric, one scale an output channel, every scale a float16 number."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from rprune.errors import WorkError

Observer = Literal["minmax", "percentile", "mse"]
BIAS_LIMIT = 1 << 23  # keeps int32 biases and accumulators of dead channels far from overflow
PAIR_LIMIT = 128  # 255 * (w0 + w1) stays within int16 up to here, of either sign
KEEPS = 8  # from this width on a kept weight never becomes zero
SHRUNK = tuple(percent / 100 for percent in range(20, 101, 2))  # parts of the full range that the search tries
LARGEST_HALF = 65504.0


def top_weight(bits: int) -> int:
    """The largest integer of a weight: 2^(bits-1) - 1, so 127 in 8 bits."""
    return (1 << (bits - 1)) - 1


def half_up(values: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """The least float16 number that is positive and not below each value, as float32.

    The product of two of them is exact in float32, and a file may store them in 16 bits. Rounding up keeps the range
    covered. Beyond float16's largest number it is the next power of two, whose products are exact as well. Raises
    WorkError for values that are not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise WorkError("a scale is not finite", "the model has diverged")
    if bool((values > LARGEST_HALF).any()):
        power = torch.exp2(values.double().log2().ceil()).float()
        return torch.where(values > LARGEST_HALF, power, half_up(values.clamp_max(LARGEST_HALF)))
    half = values.half()
    # bits of positive float16 numbers ascend with their values
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where((half.float() < values) | (half == 0), above, half).float()


def full_scale(
    weight: Float[Tensor, "o ..."], bias: Float[Tensor, " o"], given: float, bits: int, observer: Observer = "minmax"
) -> Float[Tensor, " o"]:
    """The scale of each channel: its largest weight is the largest integer.

    A channel without weights takes the largest scale of the others, or 1: its bias then has as few digits as theirs,
    which a packed file stores in fewer bytes. Below 8 bits the observer "mse" clips instead, where that makes the
    squared error of the channel smaller.
    """
    rows = weight.flatten(1)
    scale = rows.abs().amax(1) / top_weight(bits)
    if observer == "mse" and bits < KEEPS:
        scale = _least_error(rows, scale, bits)
    largest = scale.max() if bool(scale.any()) else torch.ones_like(scale[0])
    return half_up(torch.maximum(torch.where(scale > 0, scale, largest), least_scale(bias, given)))


def least_scale(bias: Float[Tensor, " o"], given: float) -> Float[Tensor, " o"]:
    """What holds the bias below 2^23: a dead channel would otherwise overflow its int32 bias."""
    return bias.abs() / (given * BIAS_LIMIT)


def _least_error(rows: Float[Tensor, "o n"], scale: Float[Tensor, " o"], bits: int) -> Float[Tensor, " o"]:
    scale = scale.clamp_min(torch.finfo(torch.float16).tiny)
    errors = []
    for part in SHRUNK:
        steps = (half_up(scale * part))[:, None]
        errors.append((integers(rows, steps, bits) * steps - rows).square().sum(1))
    best = torch.stack(errors).argmin(0)
    return scale * torch.tensor(SHRUNK, device=scale.device)[best]


def integers(
    weight: Float[Tensor, "o ..."], scale: Float[Tensor, "o ..."], bits: int, keep: bool = True
) -> Float[Tensor, "o ..."]:
    """The nearest integers, within +-(2^(bits-1) - 1), as floats; ``scale`` broadcasts to ``weight``.

    With ``keep``, from 8 bits on a weight never becomes zero but +-1, so that the integers have exactly the zeros of
    the float weights; below, the steps are too wide for that. Zero is zero in any width.
    """
    steps = weight / scale
    rounded = steps.round()
    if keep and bits >= KEEPS:
        rounded = torch.where(steps.abs() < 1, steps.sign(), rounded)
    return rounded.clamp(-top_weight(bits), top_weight(bits))


def portable_scale(weight: Float[Tensor, "o ..."], scale: Float[Tensor, " o"], bits: int) -> Float[Tensor, " o"]:
    """Wider scales for the filters in which two weights of one sign may add up to more than 128 in absolute value.

    CPUs without VNNI add two products of uint8 and int8 in int16, with saturation. A filter whose two largest
    integers of either sign add up to at most 128 cannot saturate in whatever order its weights are packed. The others
    get (a + b) / 127 for their two largest a and b: rounding adds at most one to the sum.
    """
    if bits > KEEPS:
        return scale
    rows = weight.flatten(1)
    steps = integers(rows, scale[:, None], bits)
    wanted = scale
    for sign in (1, -1):
        if rows.shape[1] > 1:
            sums = (sign * steps).clamp_min(0).topk(2, 1).values.sum(1)
            pair = (sign * rows).clamp_min(0).topk(2, 1).values.sum(1)
            wanted = torch.where(sums > PAIR_LIMIT, torch.maximum(wanted, pair / (PAIR_LIMIT - 1)), wanted)
    return half_up(wanted)


def stored(
    weight: Float[Tensor, "o ..."],
    bias: Float[Tensor, " o"],
    scale: Float[Tensor, " o"],
    given: float,
    bits: int,
    keep: bool = True,
) -> tuple[Int[Tensor, "o ..."], Int32[Tensor, " o"]]:
    """Weights as int8 (int16 beyond 8 bits), and biases as int32 at the scale of the products."""
    dtype = torch.int8 if bits <= 8 else torch.int16
    numbers = integers(weight, per_channel(scale, weight), bits, keep).to(dtype)
    return numbers, (bias.double() / (scale.double() * given)).round().to(torch.int32)


def per_channel(scale: Float[Tensor, " o"], weight: Float[Tensor, "o ..."]) -> Float[Tensor, "o ..."]:
    """``scale`` in the shape that broadcasts over the output channels of ``weight``."""
    return scale.view(-1, *(1,) * (weight.dim() - 1))


def pairs_above(weight: Int[Tensor, "o ..."]) -> Bool[Tensor, "o m"]:
    """Where two neighbours of one sign, in the order in which kernels pack them, add up to more than 128.

    That order is height, width, channel for a convolution, and the channels of a linear layer; any two neighbours
    count, as a kernel may start to pair at either.
    """
    packed = weight.movedim(1, -1).flatten(1).int()
    return (packed[:, :-1] + packed[:, 1:]).abs() > PAIR_LIMIT
