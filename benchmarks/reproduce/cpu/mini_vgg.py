"""A small VGG for 16x16 images: 809,392 conv and linear weights, most of them, as in VGG16, in the last layers."""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (16, 0, 32, 32, 0, 64, 64, 0, 256, 256, 0)  # 0 is a max-pool


class MiniVGG(nn.Module):
    """Seven 3x3 convolutions with batch norm, and one linear layer."""

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels = input_shape[0]
        features: list[nn.Module] = []
        for width in WIDTHS:
            if not width:
                features.append(nn.MaxPool2d(2))
                continue
            features += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*features)
        side = input_shape[1] // 2 ** WIDTHS.count(0)
        self.classifier = nn.Linear(channels * side * (input_shape[2] // 2 ** WIDTHS.count(0)), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits
