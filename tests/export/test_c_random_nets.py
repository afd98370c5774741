"""The C form of random networks: layers of every geometry in any order, against torch and the 8-bit simulation."""

from __future__ import annotations

import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rprune.errors import InputError, WorkError
from rprune.export.c.engine import CClassifier
from rprune.export.c.writer import c_source
from rprune.models.graph import trace

pytestmark = pytest.mark.usefixtures("c_cache")

CLASSES = 5
LARGEST_SIDE = 40
BUILDS = {
    "native": ("-O1", "-march=native", "-fPIC", "-shared"),
    "no vectors": ("-O1", "-fPIC", "-shared", "-DMODEL_SCALAR"),
}
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


class RandomNet(nn.Module):
    """A program of ``length`` random steps or a few more on any values made so far, and a random head."""

    def __init__(self, seed: int, length: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)
        self.layers = nn.ModuleList()
        self.program: list[tuple[int, ...]] = []  # sources of each step; its layer has the same index
        self.shapes = [(self.pick(1, 2, 3), self.pick(1, 3, 6, 9, 13, 20, 36), self.pick(1, 4, 7, 8, 17, 37))]
        self.input_shape = self.shapes[0]
        while len(self.program) < length:
            self.step()
        self.classify()
        del self.rng

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer, sources in zip(self.layers, self.program, strict=True):
            first = values[sources[0]]
            values.append(first + values[sources[1]] if len(sources) == 2 else layer(first))
        return values[-1]

    def pick(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def add(self, layer: nn.Module, *sources: int) -> int:
        shape = self.shapes[sources[0]]
        if len(sources) == 1:
            with torch.no_grad():
                shape = tuple(layer.eval()(torch.zeros(1, *shape)).shape[1:])
        self.layers.append(layer)
        self.program.append(sources)
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def step(self) -> None:
        count = len(self.shapes)
        source = count - 1 if self.rng.random() < 0.6 else int(self.rng.integers(count))
        channels = self.shapes[source][0]
        kind = self.pick("conv", "conv", "conv", "block", "block", "block", "sum", "relu", "norm", "pool", "large")
        if kind == "conv":
            self.conv(source)
        elif kind == "block":
            made = self.same(source)
            if self.rng.random() < 0.3:
                made = self.add(nn.ReLU(), made)
            self.sum(made)
        elif kind == "sum":
            self.sum(source)
        elif kind == "relu":
            self.add(nn.ReLU(), source)
        elif kind == "norm":
            self.add(nn.BatchNorm2d(channels), source)
        elif kind == "pool":
            self.pool(source)
        elif self.rng.random() < 0.4:  # sums beyond 2^24
            wide = self.add(self.weighted(nn.Conv2d(channels, 48, 1)), source)
            layer = nn.Conv2d(48, 2, 5, padding=2)
            layer.weight.data.uniform_(0.0005, 0.001)
            self.add(layer, wide)

    def same(self, source: int) -> int:
        """A convolution to the shape of some value, which it can then be added to."""
        channels, *sides = self.shapes[source]
        alike = [shape[0] for shape in self.shapes if list(shape[1:]) == sides]
        kernel = [self.pick(1, 1, 3, 3, 5, 7) for _ in sides]
        dilation = [self.pick(1, 1, 1, 1, 2, 9, 40) for _ in sides]
        padding = [(k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True)]
        out, groups = (channels, channels) if self.rng.random() < 0.15 else (self.pick(*alike), 1)
        return self.add(self.weighted(nn.Conv2d(channels, out, kernel, 1, padding, dilation, groups)), source)

    def sum(self, source: int) -> None:
        """With any value of the same shape, in either order, and a ReLU or none."""
        alike = [index for index, shape in enumerate(self.shapes) if shape == self.shapes[source]]
        made = self.add(nn.Identity(), *(self.pick(*alike), source)[:: self.pick(1, -1)])
        if self.rng.random() < 0.5:
            self.add(nn.ReLU(), made)

    def conv(self, source: int) -> None:
        channels, *sides = self.shapes[source]
        groups = self.pick(*(g for g in range(1, channels + 1) if channels % g == 0)) if self.rng.random() < 0.3 else 1
        kernel = [self.pick(1, 2, 3, 4, 5, 7) for _ in sides]
        stride = [self.pick(1, 1, 2, 2, 3, 4) for _ in sides]
        dilation = [self.pick(1, 1, 1, 2, 3, 11) for _ in sides]
        padding = [self.pick(0, 0, 1, k // 2, k // 2 * d, k) for k, d in zip(kernel, dilation, strict=True)]
        made = [(s + 2 * p - d * (k - 1) - 1) // t + 1
                for s, p, d, k, t in zip(sides, padding, dilation, kernel, stride, strict=True)]  # fmt: skip
        if min(made) < 1 or max(made) > LARGEST_SIDE:
            return
        out = groups * self.pick(1, 2, 3) if groups > 1 else self.pick(1, 2, 5, 8, 17)
        layer = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=self.pick(True, True, False))
        self.add(self.weighted(layer), source)

    def pool(self, source: int) -> None:
        kernel = [min(side, self.pick(1, 2, 3, 5)) for side in self.shapes[source][1:]]
        stride = [self.pick(1, 2, 3) for _ in kernel]
        if self.rng.random() < 0.3:
            self.add(nn.AdaptiveAvgPool2d(1), source)
        elif self.rng.random() < 0.5:
            self.add(nn.AvgPool2d(kernel, stride), source)
        else:
            self.add(nn.MaxPool2d(kernel, stride, [self.pick(0, k // 2) for k in kernel]), source)

    def classify(self) -> None:
        """The sum of linear layers on every value that nothing reads, and sometimes two layers more."""
        read = {source for sources in self.program for source in sources}
        made = [self.branch(source) for source in range(len(self.shapes)) if source not in read]
        while len(made) > 1:
            made.append(self.add(nn.Identity(), made.pop(0), made.pop(0)))
        if self.rng.random() < 0.5:
            self.add(nn.ReLU(), made[0])
        if self.rng.random() < 0.5:
            self.add(self.weighted(nn.Linear(CLASSES, CLASSES)), len(self.shapes) - 1)

    def branch(self, source: int) -> int:
        at = self.add(nn.Flatten(), source)
        for _ in range(self.pick(0, 0, 1, 2)):
            at = self.add(self.weighted(nn.Linear(self.shapes[at][0], self.pick(4, 12))), at)
            at = self.add(self.pick(nn.ReLU(), nn.BatchNorm1d(self.shapes[at][0])), at)
        return self.add(self.weighted(nn.Linear(self.shapes[at][0], CLASSES)), at)

    def weighted(self, layer: Any) -> Any:
        """Dense, sparse, of single weights, of empty filters, or all zero; outputs stay about as large as inputs."""
        weight = torch.randn(layer.weight.shape)
        kept = self.pick(1.0, 1.0, 0.5, 0.1, 0.1, 0.02, 0.0)
        weight *= torch.rand(layer.weight.shape) < kept
        weight *= (torch.rand(len(weight)) < self.pick(1.0, 0.5)).view(-1, *(1,) * (weight.dim() - 1))
        layer.weight.data = weight / weight.square().flatten(1).sum(1).max().sqrt().clamp_min(0.1)
        if layer.bias is not None:
            layer.bias.data.normal_(0, self.pick(0.1, 0.1, 1.0))
        return layer


def random_case(nets, seed: int, length: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The input's shape, and a random network's float and integer forms."""
    torch.manual_seed(seed)
    model = RandomNet(seed, length)
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]:
        nets.enliven(norm)
    network, _, twin = nets.quantised(model.eval(), nets.noise(32, model.input_shape), model.input_shape)
    return model.input_shape, {"float": network, "int8": twin}


def check(form: str, network: Any, images: Tensor, logits: Any, build: str) -> None:
    with torch.no_grad():
        wanted = network(images).numpy()
    if form == "int8":
        assert np.array_equal(logits, wanted), build
    else:
        assert np.abs(logits - wanted).max() <= 1e-4 * np.abs(wanted).max(), build


def written(network: Any, shape: tuple[int, int, int], folder: Path) -> Path:
    found = c_source(network, shape)
    folder.mkdir(parents=True)
    (folder / "model.h").write_text(found.header)
    (folder / "model.c").write_text(found.source)
    return folder / "model.c"


def check_in_process(folder: Path, shape: tuple[int, int, int], forms: dict[str, Any], images: Tensor) -> None:
    for form, network in forms.items():
        path = written(network, shape, folder / form)
        for build, flags in BUILDS.items():
            check(form, network, images, CClassifier(path, flags).logits(images.numpy()), f"{form}, {build}")


@pytest.mark.parametrize("seed", range(6))
def test_random_nets_equal_their_source(nets, tmp_path: Path, seed: int) -> None:
    shape, forms = random_case(nets, seed, length=20)
    check_in_process(tmp_path, shape, forms, nets.noise(6, shape, seed=1))


def of_one_pixel(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), layer, nn.ReLU(), nn.Flatten())


WIDE = nn.Conv2d(4, 4, 3, padding=40, dilation=40)  # makes the borders of all images of its size 40 wide
CORNERS: dict[str, tuple[nn.Sequential, int, int]] = {
    "groups of one pixel": (of_one_pixel(nn.Conv2d(6, 6, 1, groups=3)), 6, 8),
    "one pixel padded": (of_one_pixel(nn.Conv2d(6, 4, 1, padding=1)), 36, 8),
    "strided to wide borders": (nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), WIDE, nn.Flatten()), 400, 20),
    "shrunk to wide borders": (nn.Sequential(nn.Conv2d(1, 4, 3, 1), nn.ReLU(), WIDE, nn.Flatten()), 400, 12),
    "convolution before the end": (nn.Sequential(nn.Conv2d(1, 6, 5, stride=4), nn.Flatten()), 24, 12),
}  # fmt: skip


@pytest.mark.parametrize("name", CORNERS)
def test_corners_equal_their_source(nets, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    body, features, side = CORNERS[name]
    shape = (1, side, side)
    network, _, twin = nets.quantised(nn.Sequential(body, nn.Linear(features, 5)).eval(), nets.noise(32, shape), shape)
    check_in_process(tmp_path, shape, {"float": network, "int8": twin}, nets.noise(6, shape, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1060))
def test_many_random_nets_equal_their_source(nets, tmp_path: Path, seed: int) -> None:
    shape, forms = random_case(nets, seed, length=(6, 12, 24, 48)[seed % 4])
    check_in_process(tmp_path, shape, forms, nets.noise(6, shape, seed=1))


MAIN = r"""
#include <stdio.h>
#include "model.h"
int main(void) {
    static float pixels[MODEL_CHANNELS * MODEL_HEIGHT * MODEL_WIDTH], logits[MODEL_CLASSES];
    while (fread(pixels, sizeof pixels, 1, stdin)) {
        predict_float(pixels, logits);
        fwrite(logits, sizeof logits, 1, stdout);
    }
    return 0;
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("vectors", [True, False], ids=["vectors", "no vectors"])
@pytest.mark.parametrize("seed", range(2000, 2010))
def test_random_nets_under_sanitizers(nets, tmp_path: Path, seed: int, vectors: bool) -> None:
    shape, forms = random_case(nets, seed, length=20)
    images = nets.noise(3, shape, seed=1)
    for form, network in forms.items():
        folder = written(network, shape, tmp_path / form).parent
        (folder / "main.c").write_text(MAIN)
        command = ["cc", *SANITIZED, *(["-march=native"] if vectors else ["-DMODEL_SCALAR"])]
        subprocess.run([*command, "model.c", "main.c", "-o", "program"], cwd=folder, check=True)
        done = subprocess.run(
            [str(folder / "program")], input=images.numpy().tobytes(), capture_output=True, check=True,
            env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
        )  # fmt: skip
        check(form, network, images, np.frombuffer(done.stdout, np.float32).reshape(len(images), -1), form)


def test_pixels_beyond_the_range(nets, tmp_path: Path) -> None:
    """Integers clip them as the simulation does, and take what is no number for black; nothing of it stays behind."""
    shape, forms = random_case(nets, 3, length=12)
    images = nets.noise(4, shape) * 3 - 1
    images.view(4, -1)[:, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    path = written(forms["int8"], shape, tmp_path / "int8")
    for build, flags in BUILDS.items():
        classifier = CClassifier(path, flags)
        check("int8", forms["int8"], images.nan_to_num(0.0), classifier.logits(images.numpy()), build)
        check("int8", forms["int8"], nets.noise(4, shape), classifier.logits(nets.noise(4, shape).numpy()), build)


def test_classifiers_of_one_file_in_threads(nets, tmp_path: Path) -> None:
    """They share one library, whose memory is static."""
    shape, forms = random_case(nets, 3, length=12)
    path = written(forms["int8"], shape, tmp_path / "int8")
    images = [nets.noise(300, shape, seed=seed).numpy() for seed in range(2)]
    alone = [CClassifier(path).logits(each) for each in images]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda each: CClassifier(path).logits(each), images))
    assert all(np.array_equal(got, wanted) for got, wanted in zip(found, alone, strict=True))


@pytest.mark.parametrize("variable", ["a file", "a folder that may not be written"])
def test_caches_that_cannot_be_used(nets, tmp_path: Path, monkeypatch, variable: str) -> None:
    shape, forms = random_case(nets, 3, length=2)
    path = written(forms["float"], shape, tmp_path / "float")
    if variable == "a file":
        (tmp_path / "taken").write_text("")
    else:
        monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with pytest.raises(WorkError, match="cannot write in"):
        CClassifier(path)


def refuse(**_: Any) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 5, 8)), "returns images of"),
        (nn.Sequential(nn.Linear(8, 4), nn.Flatten(), nn.Linear(32, 5)), "linear layer on an image"),
    ],
)
def test_what_has_no_c_form(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        c_source(trace(model, (1, 8, 8)), (1, 8, 8))
