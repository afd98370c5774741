"""Start, step and projection of a norm ball inside the pixel box [0,1]; the three places where a norm matters."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from rprune.threat import Norm, ThreatModel


def per_sample(values: Shaped[Tensor, " b"], like: Tensor) -> Tensor:
    """Shape ``(b,)`` -> ``(b, 1, 1, ...)`` so that it broadcasts over a batch of images."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def row_sum(values: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """Sum of each sample, the same bits in any batch: torch adds up a single long row in another order."""
    flat = values.flatten(1)
    return flat.sum(1) if len(flat) != 1 else flat.expand(2, -1).contiguous().sum(1)[:1]


def size(delta: Float[Tensor, "b ..."], norm: Norm) -> Float[Tensor, " b"]:
    """Norm of each sample's perturbation."""
    return delta.flatten(1).abs().amax(1) if norm == "linf" else row_sum(delta.square()).sqrt()


def steepest(gradient: Float[Tensor, "b ..."], norm: Norm) -> Float[Tensor, "b ..."]:
    """Direction of steepest ascent of unit size: sign for linf, normalised gradient for l2 (zero stays zero)."""
    if norm == "linf":
        return gradient.sign()
    return gradient / per_sample(size(gradient, norm).clamp_min(1e-12), gradient)


def into_ball(delta: Float[Tensor, "b ..."], threat: ThreatModel) -> Float[Tensor, "b ..."]:
    """The perturbation moved into the ball around 0: clipped for linf, scaled down for l2."""
    if threat.norm == "linf":
        return delta.clamp(-threat.eps, threat.eps)
    return delta * per_sample((threat.eps / size(delta, "l2").clamp_min(1e-12)).clamp_max(1.0), delta)


def project(point: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."], threat: ThreatModel) -> Float[Tensor, "b ..."]:
    """The point moved into the ball around x and into [0,1]. Clamping to the box never leaves the ball: x is in it."""
    return (x + into_ball(point - x, threat)).clamp(0.0, 1.0)


def random_in_ball(unit: Float[Tensor, "b ..."], normal: Float[Tensor, "b ..."], norm: Norm) -> Float[Tensor, "b ..."]:
    """A random point of the unit ball: the cube itself for linf, Gaussian direction scaled by u^(1/d) for l2.

    ``unit`` is uniform in [-1,1], ``normal`` standard Gaussian, both of the images' shape.
    """
    if norm == "linf":
        return unit
    flat = unit.flatten(1)
    radius = ((flat[:, 0] + 1) / 2).pow(1 / flat.shape[1])
    return steepest(normal, "l2") * per_sample(radius, normal)


def within(point: Tensor, x: Tensor, threat: ThreatModel, tolerance: float = 1e-6) -> Tensor:
    """Per sample: inside ball and box, up to float rounding."""
    in_box = (point.flatten(1).amin(1) >= 0) & (point.flatten(1).amax(1) <= 1)
    return in_box & (size(point - x, threat.norm) <= threat.eps + tolerance) & torch.isfinite(point).flatten(1).all(1)
