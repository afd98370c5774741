"""LeNet for MNIST with a width multiplier, the shape of Ye et al., ICCV 2019 (Robust-ADMM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rprune.models.sizes import pooled, require_size


class LeNet(nn.Module):
    """Two 5x5 convolutions of 2w and 4w channels, each followed by a 2x2 max-pool, then 64w hidden units.

    Maps (B, C, H, W) to logits (B, num_classes). Initialised with torch's defaults.
    Raises InputError for images under 4x4.
    Source: Ye et al., "Adversarial Robustness vs. Model Compression, or Both?", ICCV 2019, where `width` runs 1..16.
    """

    def __init__(self, num_classes: int = 10, input_shape: tuple[int, int, int] = (1, 28, 28), width: int = 16) -> None:
        super().__init__()
        height, breadth = pooled(input_shape[1:], 2)
        require_size("lenet", input_shape, (height, breadth), smallest=4)
        self.conv1 = nn.Conv2d(input_shape[0], 2 * width, 5, padding=2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(2 * width, 4 * width, 5, padding=2)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(4 * width * height * breadth, 64 * width)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(64 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(torch.flatten(x, 1)))
        logits: Tensor = self.fc2(x)
        return logits
