"""A pruned ResNet-18, as it is exported, in a network that knows nothing of rprune."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

SAMPLES = 20


class Block(nn.Module):
    """The block of the public CIFAR ResNets, by their names."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class PublicResNet18(nn.Module):
    """Four stages of two blocks, average pooling over 4x4, ``linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Block(64, 64, 1), Block(64, 64, 1))
        self.layer2 = nn.Sequential(Block(64, 128, 2), Block(128, 128, 1))
        self.layer3 = nn.Sequential(Block(128, 256, 2), Block(256, 256, 1))
        self.layer4 = nn.Sequential(Block(256, 512, 2), Block(512, 512, 1))
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_an_exported_resnet18_answers_alike_in_a_plain_one(call: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    start = PublicResNet18()
    arrays: dict[str, Any] = {}
    for name in ("train", "test"):
        arrays[f"{name}_images"] = np.random.default_rng(0).integers(0, 256, (SAMPLES, 32, 32, 3), dtype=np.uint8)
        arrays[f"{name}_labels"] = np.arange(SAMPLES) % 10
    np.savez(tmp_path / "images.npz", **arrays)
    x = torch.from_numpy(arrays["test_images"]).permute(0, 3, 1, 2) / 255
    start.train()
    start(x)  # statistics of batch norm that are not those of a fresh net
    torch.save(start.state_dict(), tmp_path / "start.pt")
    options = ("-d", "npz:images.npz", "-m", "lwm", "--set", "method.allocation=lamp", "-s", 0.99)
    pruned = call("prune", "start.pt", *options, "-o", "pruned.pt", cwd=tmp_path)
    assert pruned.code == 0, pruned.err
    options = ("--format", "safetensors,onnx", "--suite", "fgsm", "--no-health")
    out = call("export", "pruned.pt", "-o", "out", *options, cwd=tmp_path)
    assert out.code == 0, out.err

    plain = PublicResNet18()
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    kept = sum(int(m.weight.count_nonzero()) for m in plain.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert kept == 11_164_352 // 100
    with torch.no_grad():
        right = int((plain.eval()(x).argmax(1) == torch.from_numpy(arrays["test_labels"])).sum())
    claims = json.loads((tmp_path / "out" / "report.json").read_text())["claims"]
    clean = next(claim for claim in claims if claim["metric"] == "clean_accuracy")
    assert (right, SAMPLES) == (clean["correct"], clean["n"])
