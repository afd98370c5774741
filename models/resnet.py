"""ResNets for small images: a 3x3 stem without pooling, and parameter names of the public CIFAR implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """The identity (an empty sequence), or a 1x1 convolution with batch norm where the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; (B, C, H, W) to (B, planes, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        # Registered last: layer-wise strategies of the literature list the shortcut after the block's convolutions.
        self.shortcut = _shortcut(in_channels, planes, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; (B, C, H, W) to (B, 4 * planes, H/stride, W/stride)."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * planes
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu3(y + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """A CIFAR ResNet of four stages with `width`, 2, 4 and 8 times `width` planes.

    Maps (B, C, H, W), any H and W, to logits (B, num_classes). Initialised with torch's defaults, as the public
    CIFAR implementations are. Blocks (2, 2, 2, 2) basic make ResNet-18, with 11,164,352 weights on 3 channels;
    (3, 4, 6, 3) make ResNet-34 (basic) and ResNet-50 (bottleneck).
    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, with the CIFAR stem that HYDRA
    and HARP use; `width` = 4w is the width multiplier of Ye et al., ICCV 2019.
    """

    def __init__(
        self,
        num_classes: int = 10,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        width: int = 64,
        block: Literal["basic", "bottleneck"] = "basic",
        blocks: Sequence[int] = (2, 2, 2, 2),
    ) -> None:
        super().__init__()
        kind = BasicBlock if block == "basic" else Bottleneck
        self.conv1 = nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        channels = width
        stages: list[nn.Sequential] = []
        for index, count in enumerate(blocks):
            planes = width * 2**index
            stage: list[nn.Module] = []
            for position in range(count):
                stage.append(kind(channels, planes, stride=2 if index and not position else 1))
                channels = planes * kind.expansion
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(torch.flatten(self.avgpool(x), 1))
        return logits
