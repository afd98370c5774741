"""A small conv-BN-residual net and random data for the tests of pruning, objectives, attacks and training."""

import torch
from torch import nn

from rprune.data.loaders import Resident

CLASSES = 5


class TinyResNet(nn.Module):
    """4,272 prunable weights; every kind of layer that matters: first conv, shortcut, batch norm, linear with bias."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.shortcut = nn.Conv2d(16, 16, 1, stride=2, bias=False)
        self.fc = nn.Linear(256, CLASSES)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = (self.bn2(self.conv2(x)) + self.shortcut(x)).relu()
        return self.fc(x.flatten(1))


def net(seed=0, dtype=torch.float32):
    """Random weights, and batch-norm values that are not the neutral ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyResNet()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.to(dtype)


def data(n=48, seed=0):
    """A loader of random 3x8x8 images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Resident(images, torch.randint(0, CLASSES, (n,), generator=generator))


def batch(n=8, seed=0, dtype=torch.float32):
    """Images in [0, 1], some pixels exactly 0 or 1, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 8, 8, generator=generator, dtype=dtype).mul_(1.2).sub_(0.1).clamp_(0, 1)
    return x, torch.randint(0, CLASSES, (n,), generator=generator)


def same_bits(a, b):
    """Equal keys and equal bytes: also tells -0.0 from 0.0."""
    if list(a) != list(b):
        return False
    as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (*a.values(), *b.values())]
    return all(torch.equal(left, right) for left, right in zip(as_bytes[: len(a)], as_bytes[len(a) :], strict=True))
