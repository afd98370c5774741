"""A small VGG for 16x16 images: 809,392 conv and linear weights, most of them, as in VGG16, in the last layers."""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (16, 32, 32, 0, 64, 64, 0, 256, 256, 0)  # 0 is a max-pool


class MiniVGG(nn.Module):
    """Seven 3x3 convolutions with batch norm, the first of stride 2, and one linear layer."""

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels = input_shape[0]
        features: list[nn.Module] = []
        for width in WIDTHS:
            if not width:
                features.append(nn.MaxPool2d(2))
                continue
            stride = 1 if features else 2  # the largest images would cost the most
            features += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*features)
        height, width = (size // 2 ** (1 + WIDTHS.count(0)) for size in input_shape[1:])
        self.classifier = nn.Linear(channels * height * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits
