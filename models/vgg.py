"""VGG with batch norm for small images, as used by HYDRA and HARP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rprune.models.sizes import pooled, require_size

# A number is a 3x3 convolution of that many channels, 0 a max-pool.
_LAYERS = {
    "vgg4": (64, 64, 0, 128, 128, 0),
    "vgg16": (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512),
}


class _VGG(nn.Module):
    def __init__(self, name: str, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        layers = _LAYERS[name]
        pools = layers.count(0)
        size = pooled(input_shape[1:], pools)
        require_size(name, input_shape, size, smallest=2**pools)
        channels = input_shape[0]
        features: list[nn.Module] = []
        for out in layers:
            if not out:
                features.append(nn.MaxPool2d(2))
                continue
            features += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        # Never enlarge: on a side of one pixel a 2x2 pool would only hand the linear layer copies.
        height, width = min(2, size[0]), min(2, size[1])
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d((height, width))
        self.classifier = nn.Sequential(
            nn.Linear(channels * height * width, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, num_classes),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What the modules' own initialisation is not."""
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


class VGG4(_VGG):
    """Four 3x3 convolutions (64, 64, pool, 128, 128, pool) and a 256-256 head; 458,944 weights on 3x32x32.

    Maps (B, C, H, W) to logits (B, num_classes). Convolutions are He-initialised (normal, fan-out), linear layers
    have torch's default. Raises InputError for images under 4x4.
    Source: Sehwag et al., "HYDRA", NeurIPS 2020, table 7, with the four convolutions its 0.46M weights allow.
    """

    def __init__(self, num_classes: int = 10, input_shape: tuple[int, int, int] = (3, 32, 32)) -> None:
        super().__init__("vgg4", num_classes, input_shape)


class VGG16(_VGG):
    """Thirteen 3x3 convolutions without bias, four max-pools, a 256-256 head; 15,302,848 weights on 3x32x32.

    Maps (B, C, H, W) to logits (B, num_classes). Convolutions are He-initialised (normal, fan-out), linear layers
    have torch's default. Raises InputError for images under 16x16.
    Source: Simonyan & Zisserman, ICLR 2015, configuration D with batch norm, in the form of HYDRA (NeurIPS 2020)
    and HARP (ICLR 2023).
    """

    def __init__(self, num_classes: int = 10, input_shape: tuple[int, int, int] = (3, 32, 32)) -> None:
        super().__init__("vgg16", num_classes, input_shape)
