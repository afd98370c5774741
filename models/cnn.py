"""The small and the large CNN of verifiable training: strided convolutions, no batch norm, no pooling."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from rprune.models.sizes import require_size


class _CNN(nn.Module):
    """Convolutions (channels, kernel, stride), all with padding 1, then linear layers; ReLU between all of them."""

    def __init__(
        self,
        name: str,
        convolutions: tuple[tuple[int, int, int], ...],
        hidden: tuple[int, ...],
        num_classes: int,
        input_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        features: list[nn.Module] = []
        for out, kernel, stride in convolutions:
            features += [nn.Conv2d(channels, out, kernel, stride, padding=1), nn.ReLU()]
            height, width = ((side + 2 - kernel) // stride + 1 for side in (height, width))
            channels = out
        require_size(name, input_shape, (height, width), smallest=4)
        head: list[nn.Module] = []
        for fan_in, fan_out in pairwise((channels * height * width, *hidden)):
            head += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(*head, nn.Linear(hidden[-1], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


class CNNSmall(_CNN):
    """CNN-small: convolutions 16 and 32 (4x4, stride 2), 100 hidden units; 214,760 weights on 3x32x32.

    Maps (B, C, H, W) to logits (B, num_classes). Initialised with torch's defaults.
    Raises InputError for images under 4x4.
    Source: Sehwag et al., "HYDRA", NeurIPS 2020, table 7 (after Wong et al., NeurIPS 2018).
    """

    def __init__(self, num_classes: int = 10, input_shape: tuple[int, int, int] = (3, 32, 32)) -> None:
        super().__init__("cnn-small", ((16, 4, 2), (32, 4, 2)), (100,), num_classes, input_shape)


class CNNLarge(_CNN):
    """CNN-large: convolutions 32, 32, 64, 64 (3x3 and 4x4 stride 2 in turn), 512 and 512 hidden units.

    Maps (B, C, H, W) to logits (B, num_classes). Initialised with torch's defaults.
    Raises InputError for images under 4x4.
    Source: Sehwag et al., "HYDRA", NeurIPS 2020, table 7 (after Wong et al., NeurIPS 2018).
    """

    def __init__(self, num_classes: int = 10, input_shape: tuple[int, int, int] = (3, 32, 32)) -> None:
        convolutions = ((32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2))
        super().__init__("cnn-large", convolutions, (512, 512), num_classes, input_shape)
