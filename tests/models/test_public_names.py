"""Weights of the public CIFAR implementations load strictly."""

from __future__ import annotations

import pytest
import torch

from rprune.models.guess import guess
from rprune.models.registry import Architecture, build


def public_resnet(blocks: tuple[int, ...], bottleneck: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the public CIFAR ResNets: conv1, bn1, layer1.0.conv1, ..., shortcut.0, shortcut.1, linear."""
    norm = ("weight", "bias", "running_mean", "running_var")
    found: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 3, 3)}
    convolutions: list[tuple[str, str, tuple[int, ...]]] = [("conv1", "bn1", (64, 3, 3, 3))]
    inner, expansion = 64, 4 if bottleneck else 1
    for stage, count in enumerate(blocks):
        planes = 64 * 2**stage
        for block in range(count):
            at = f"layer{stage + 1}.{block}."
            sizes = [(planes, inner, 1), (planes, planes, 3), (4 * planes, planes, 1)]
            sizes = sizes if bottleneck else [(planes, inner, 3), (planes, planes, 3)]
            for i, (out, into, side) in enumerate(sizes, 1):
                convolutions.append((f"{at}conv{i}", f"{at}bn{i}", (out, into, side, side)))
            if (stage and not block) or inner != planes * expansion:
                convolutions.append((f"{at}shortcut.0", f"{at}shortcut.1", (planes * expansion, inner, 1, 1)))
            inner = planes * expansion
    for convolution, batch_norm, shape in convolutions:
        found[f"{convolution}.weight"] = shape
        found |= {f"{batch_norm}.{name}": shape[:1] for name in norm} | {f"{batch_norm}.num_batches_tracked": ()}
    return found | {"linear.weight": (10, inner), "linear.bias": (10,)}


@pytest.mark.parametrize(
    ("name", "blocks", "bottleneck"),
    [
        ("cifar-resnet18", (2, 2, 2, 2), False),
        ("cifar-resnet34", (3, 4, 6, 3), False),
        ("cifar-resnet50", (3, 4, 6, 3), True),
    ],
)
def test_public_resnets(name, blocks, bottleneck):
    shapes = public_resnet(blocks, bottleneck)
    assert guess(shapes).name == name
    with torch.device("meta"):
        model = build(Architecture(name, 10, (3, 32, 32)))
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    assert model.load_state_dict(state, strict=True, assign=True).missing_keys == []
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes
