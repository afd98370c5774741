"""Wide residual networks for small images, with the parameter names of the public adversarial-training code."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WideBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions; (B, C, H, W) to (B, out, H/stride, W/stride).

    Where the shape changes the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        # The name is the one that published checkpoints use.
        self.convShortcut = (
            None
            if stride == 1 and in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        out: Tensor = y + (x if self.convShortcut is None else self.convShortcut(activated))
        return out


class WideStage(nn.Module):
    """`count` blocks under the name `layer`; only the first one has the stride."""

    def __init__(self, count: int, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        rest = [WideBlock(out_channels, out_channels, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(WideBlock(in_channels, out_channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-28-`widen`: three stages of four blocks with 16, 32 and 64 times `widen` channels, no dropout.

    Maps (B, C, H, W), any H and W, to logits (B, num_classes). Convolutions are He-initialised (normal, fan-out) and
    the classifier's bias is zero, as in the public code. WRN-28-4 has 5,841,840 weights on 3 channels: the unused
    extra stage that HYDRA's class also builds is left out.
    Source: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016.
    """

    def __init__(self, num_classes: int = 10, input_shape: tuple[int, int, int] = (3, 32, 32), widen: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)
        self.block1 = WideStage(4, 16, 16 * widen, stride=1)
        self.block2 = WideStage(4, 16 * widen, 32 * widen, stride=2)
        self.block3 = WideStage(4, 32 * widen, 64 * widen, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * widen, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What the modules' own initialisation is not."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.avgpool(self.relu(self.bn1(x)))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits
