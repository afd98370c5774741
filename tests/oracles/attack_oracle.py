"""The oracle of attacks: an adversarially trained net, its images, and what reference AutoAttack made of them."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

FOLDER = Path(__file__).parents[1] / "data" / "attacks-linf"
RESULTS = json.loads((FOLDER / "results.json").read_text())


def load():
    """(net, x, y): colour digits of 3x16x16 in [0,1], linf eps 0.08."""
    layers = [nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 24, 3, 1, 1), nn.BatchNorm2d(24)]
    layers += [nn.ReLU(), nn.Conv2d(24, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)]
    net = nn.Sequential(*layers)
    net.load_state_dict(load_file(FOLDER / "weights.safetensors"))
    images = np.load(FOLDER / "images.npz")
    return net.eval(), torch.from_numpy(images["x"]).float() / 255, torch.from_numpy(images["y"])
