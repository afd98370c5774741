"""The C form of every kind of layer and model, against torch, the 8-bit simulation and ONNX Runtime."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rprune.errors import InputError, WorkError
from rprune.export.c import engine
from rprune.export.c.engine import CClassifier
from rprune.export.c.writer import c_source
from rprune.export.compact import compact
from rprune.export.qdq import qdq_model
from rprune.export.session import OnnxClassifier
from rprune.models.graph import trace
from rprune.quantization.ptq import Settings, quantize, simulated

pytestmark = pytest.mark.usefixtures("c_cache")

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
BUILDS = {
    "native": engine.FLAGS,
    "no vectors": ("-O1", "-fPIC", "-shared", "-DMODEL_SCALAR"),
    "oldest x86-64": ("-O1", "-fPIC", "-shared", "-ffp-contract=off"),
}
# where the processor has what they need
MORE = {
    "AVX2": ("avx2 fma", ("-O2", "-march=x86-64-v3", "-fPIC", "-shared")),
    "AVX2 with VNNI": ("avx2 fma avx_vnni", ("-O2", "-march=x86-64-v3", "-mavxvnni", "-fPIC", "-shared")),
    "AVX-512": ("avx512f avx512bw avx512vl avx512dq", ("-O2", "-march=x86-64-v4", "-fPIC", "-shared")),
    "AVX-512 with VNNI": ("avx512vl avx512_vnni", ("-O2", "-march=x86-64-v4", "-mavx512vnni", "-fPIC", "-shared")),
}
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def nets(load_helper):
    return load_helper("quantization/nets.py")


def written(network: Any, folder: Path, shape: tuple[int, int, int] = SHAPE) -> Path:
    found = c_source(network, shape)
    folder.mkdir(exist_ok=True)
    (folder / "model.h").write_text(found.header)
    (folder / "model.c").write_text(found.source)
    return folder / "model.c"


def wanted(network: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return network(x).numpy()


def check(network: Any, twin: Any, x: Tensor, folder: Path, builds=("native", "no vectors")) -> None:
    """Floats within 1e-4 of the largest logit, integers equal; bytes give what the same pixels as floats give."""
    shape = tuple(x.shape[1:])
    floats, integers = written(network, folder / "float", shape), written(twin, folder / "int8", shape)
    for build in builds:
        logits = wanted(network, x)
        got = CClassifier(floats, BUILDS[build]).logits(x.numpy())
        assert np.abs(got - logits).max() <= 1e-4 * max(1, np.abs(logits).max()), build
        assert np.array_equal(CClassifier(integers, BUILDS[build]).logits(x.numpy()), wanted(twin, x)), build


@pytest.mark.parametrize("keep", [0.3, 0.02])
@pytest.mark.parametrize("case", ["cnn-small", "lenet", "cifar-resnet18 normalised"])
def test_models_equal_their_source(nets, tmp_path: Path, case: str, keep: float) -> None:
    network, _, twin = nets.quantised(nets.make(case, keep))
    check(network, twin, torch.cat([nets.noise(24), nets.digits(8)[0]]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "keep"), [("vgg4", 0.02), ("vgg4", 1.0), ("wrn-28-2", 0.02)])
def test_larger_models_equal_their_source(nets, tmp_path: Path, case: str, keep: float) -> None:
    network, _, twin = nets.quantised(nets.make(case, keep))
    check(network, twin, torch.cat([nets.noise(24), nets.digits(8)[0]]), tmp_path, ("native",))


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_fewer_bits_equal_the_simulation(nets, tmp_path: Path, bits: int) -> None:
    network = trace(nets.make("cifar-resnet18 normalised", 0.1), SHAPE)
    twin = simulated(network, quantize(network, [nets.digits(64)[0]], Settings(bits=bits, observer="mse")))
    x = torch.cat([nets.noise(24), nets.digits(8)[0]])
    path = written(twin, tmp_path)
    for build in ("native", "no vectors"):
        assert np.array_equal(CClassifier(path, BUILDS[build]).logits(x.numpy()), wanted(twin, x)), build


def test_integers_equal_onnx_runtime(nets, tmp_path: Path) -> None:
    _, _, twin = nets.quantised(nets.make("cifar-resnet18", 0.02))
    (tmp_path / "m.onnx").write_bytes(qdq_model(twin, SHAPE, 10).SerializeToString())
    x = nets.noise(1000, seed=3).numpy()
    assert np.array_equal(
        CClassifier(written(twin, tmp_path / "c")).logits(x), OnnxClassifier(tmp_path / "m.onnx").logits(x)
    )


class Body(nn.Module):
    """A stem, the layer under test, and a head."""

    def __init__(self, body: nn.Module, channels: int, sides: tuple[int, int], shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(shape[0], 6, 3, padding=1)
        self.body = body
        self.head = nn.Linear(channels * sides[0] * sides[1], 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(1))


class Residual(nn.Module):
    """A sum of two convolutions, or of one with what went in, in either order."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "convolution second":
            return torch.relu(x + self.a(x))
        if self.kind == "two convolutions":
            return torch.relu(self.a(x) + self.b(x))
        if self.kind == "relu before":
            return torch.relu(self.a(x)) + x
        if self.kind == "itself":
            y = self.a(x)
            return torch.relu(y + y)
        if self.kind == "chain":
            y = torch.relu(self.a(x) + x)
            return self.b(y) + y + x
        return x + torch.relu(x)


RELU = nn.ReLU()
LAYERS: dict[str, tuple[nn.Module, int, tuple[int, int]]] = {
    "depthwise": (nn.Sequential(RELU, nn.Conv2d(6, 6, 3, padding=1, groups=6)), 6, (8, 8)),
    "grouped, stride 2": (nn.Sequential(RELU, nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), RELU), 8, (4, 4)),
    "dilated": (nn.Conv2d(6, 4, 3, padding=2, dilation=2), 4, (8, 8)),
    "dilated, stride 2": (nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2), 4, (4, 4)),
    "not padded": (nn.Sequential(nn.Conv2d(6, 4, 5), RELU, nn.Conv2d(4, 3, 2)), 3, (3, 3)),
    "padded to grow": (nn.Conv2d(6, 4, 1, padding=2), 4, (12, 12)),
    "even kernel": (nn.Conv2d(6, 4, 2, padding=1), 4, (9, 9)),
    "stride 3": (nn.Conv2d(6, 4, 3, stride=3, padding=1), 4, (3, 3)),
    "stride 4 of a larger kernel": (nn.Conv2d(6, 4, 7, stride=4, padding=3), 4, (2, 2)),
    "1x1, stride 2": (nn.Sequential(nn.Conv2d(6, 12, 1, stride=2, bias=False), RELU), 12, (4, 4)),
    "unequal sides": (nn.Conv2d(6, 4, (3, 1), stride=(1, 2), padding=(1, 0)), 4, (8, 4)),
    "to one pixel": (nn.Sequential(nn.Conv2d(6, 4, 8), RELU, nn.Conv2d(4, 6, 1), RELU, nn.Conv2d(6, 3, 1)), 3, (1, 1)),
    "convolution of one pixel": (nn.Sequential(nn.Conv2d(6, 4, 8), nn.Conv2d(4, 4, 3, padding=1)), 4, (1, 1)),
    "padded max pool": (nn.MaxPool2d(3, 2, 1), 6, (4, 4)),
    "max pools": (nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.MaxPool2d(4)), 6, (1, 1)),
    "overlapping average pool": (nn.AvgPool2d(4, 2), 6, (3, 3)),
    "global average": (nn.Sequential(RELU, nn.AdaptiveAvgPool2d(1)), 6, (1, 1)),
    "relu after pooling": (nn.Sequential(nn.AvgPool2d(2), RELU), 6, (4, 4)),
    "two relus": (nn.Sequential(RELU, nn.MaxPool2d(2), RELU), 6, (4, 4)),
    "batch norm alone": (nn.Sequential(RELU, nn.BatchNorm2d(6), RELU, nn.Conv2d(6, 6, 3, padding=1)), 6, (8, 8)),
} | {
    f"residual, {kind}": (nn.Sequential(RELU, Residual(kind), nn.Conv2d(6, 6, 3, padding=1)), 6, (8, 8))
    for kind in ("convolution first", "convolution second", "two convolutions", "relu before", "itself", "chain")
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_their_source(nets, tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    body, channels, sides = LAYERS[name]
    model = nets.enliven(Body(body, channels, sides, SHAPE))
    network, _, twin = nets.quantised(model, nets.noise(32))
    check(network, twin, nets.noise(16, seed=4), tmp_path)


@pytest.mark.parametrize("shape", [(3, 7, 9), (2, 5, 40), (1, 33, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_odd_sizes_equal_their_source(nets, tmp_path: Path, shape: tuple[int, int, int], stride: int) -> None:
    torch.manual_seed(2)
    body = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 5, 3, stride, 1), nn.ReLU(), nn.Conv2d(5, 4, 5, stride, 2))
    height, width = (math.ceil(math.ceil(side / stride) / stride) for side in shape[1:])
    model = nets.enliven(Body(body, 4, (height, width), shape))
    network, _, twin = nets.quantised(model, nets.noise(32, shape), shape)
    check(network, twin, nets.noise(16, shape, seed=4), tmp_path)


def test_network_that_ends_in_integers(nets, tmp_path: Path) -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))).mean((2, 3))

    torch.manual_seed(0)
    network, _, twin = nets.quantised(Ends().eval(), nets.noise(32))
    check(network, twin, nets.noise(16, seed=4), tmp_path)


def test_sums_beyond_float32_are_exact(nets, tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(6, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(96, 4, 5, padding=2))  # fmt: skip
    model = Body(body, 4, (8, 8), SHAPE).eval()
    body[2].weight.data.uniform_(0.009, 0.01)
    body[4].weight.data.uniform_(0.005, 0.01)
    network, _, twin = nets.quantised(model, nets.noise(32))
    assert not all(module.exact_float32 for module in twin.modules() if hasattr(module, "exact_float32"))
    assert "#define MODEL_WIDE 1" in c_source(twin, SHAPE).source
    check(network, twin, nets.noise(16, seed=4), tmp_path)


def test_wide_gaps_are_bridged(nets, tmp_path: Path) -> None:
    shape = (1, 20, 20)
    body = nn.Sequential(nn.Conv2d(6, 400, 1), nn.Conv2d(400, 3, 3, padding=1))
    model = Body(body, 3, shape[1:], shape).eval()
    weight = body[1].weight.data
    weight[:, 1:399] = 0
    weight[1] = 0
    network, _, twin = nets.quantised(model, nets.noise(16, shape), shape)
    gaps = re.search(r"uint16_t s2_gap\[\] = \{([^}]*)\}", c_source(network, shape).source)
    assert gaps is not None
    assert gaps[1].count("65535") >= 2
    check(network, twin, nets.noise(8, shape, seed=4), tmp_path)


def test_filters_without_weights(nets, tmp_path: Path) -> None:
    model = nets.make("cnn-small", 0.05)
    model.features[0].weight.data[:] = 0
    model.features[2].weight.data[:20] = 0
    network, _, twin = nets.quantised(model)
    check(network, twin, nets.noise(16), tmp_path)


def test_compacted_network(nets, tmp_path: Path) -> None:
    model = nets.make("cifar-resnet18", 0.004)
    small = compact(model, SHAPE)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in trace(model, SHAPE).parameters())
    x = nets.noise(32)
    path = written(small, tmp_path)
    assert np.abs(CClassifier(path).logits(x.numpy()) - wanted(model, x)).max() < 1e-4


def test_other_instruction_sets_give_the_same_integers(nets, tmp_path: Path) -> None:
    _, _, twin = nets.quantised(nets.make("cifar-resnet18 normalised", 0.05))
    path, x = written(twin, tmp_path), nets.noise(64)
    has = set(engine._processor().split())
    for build in [*BUILDS.values(), *(flags for needs, flags in MORE.values() if has.issuperset(needs.split()))]:
        assert np.array_equal(CClassifier(path, build).logits(x.numpy()), wanted(twin, x)), build


def test_shortcuts_read_what_the_convolution_before_has_split(nets, tmp_path: Path) -> None:
    """The two read different channels: what is split is what either needs."""

    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.Conv2d(6, 8, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x)) + self.b(x)

    torch.manual_seed(3)
    body = nn.Sequential(nn.ReLU(), Down(), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    model = nets.enliven(Body(body, 4, (4, 4), SHAPE))
    with torch.no_grad():
        body[1].a.weight[:, 3:] = 0
        body[1].b.weight[:, :3] = 0
    network, _, twin = nets.quantised(model, nets.noise(32))
    source = c_source(twin, SHAPE).source
    assert source.count(".ready = 1, .in_place = 0") == 1
    check(network, twin, nets.noise(16, seed=4), tmp_path)


MAIN = r"""
#include <stdio.h>
#include "model.h"
int main(void) {
    static uint8_t image[MODEL_CHANNELS * MODEL_HEIGHT * MODEL_WIDTH];
    static float pixels[sizeof image], logits[MODEL_CLASSES];
    while (fread(image, 1, sizeof image, stdin) == sizeof image) {
        for (int call = 0; call < 2; call++) {
            if (call)
                predict_float(pixels, logits);
            else
                predict(image, logits);
            for (unsigned i = 0; i < sizeof image; i++) pixels[i] = (float)image[i] / 255.0f;
            fwrite(logits, sizeof logits[0], MODEL_CLASSES, stdout);
        }
    }
    return 0;
}
"""


def run(folder: Path, images: Any, command: list[str], emulator: list[str] | None = None, env: Any = None) -> Any:
    """Logits of predict() and of predict_float() from a program that reads bytes."""
    (folder / "main.c").write_text(MAIN)
    subprocess.run([*command, "model.c", "main.c", "-o", "program"], cwd=folder, check=True)
    done = subprocess.run(
        [*(emulator or []), str(folder / "program")], input=images.tobytes(), capture_output=True, check=True, env=env
    )
    return np.frombuffer(done.stdout, np.float32).reshape(len(images), 2, -1)


def bytes_and_pixels(nets, count: int) -> tuple[Any, Tensor]:
    images = (nets.noise(count) * 255).round().to(torch.uint8)
    return images.numpy(), images.float() / 255


FLAGS = {"vectors": [], "this CPU": ["-march=native"], "no vectors": ["-DMODEL_SCALAR"]}


@pytest.mark.parametrize("build", FLAGS)
@pytest.mark.parametrize("form", ["float", "int8"])
@pytest.mark.parametrize("case", ["cifar-resnet18 normalised", "lenet"])
def test_strict_c_under_sanitizers(nets, tmp_path: Path, case: str, form: str, build: str) -> None:
    network, _, twin = nets.quantised(nets.make(case, 0.05))
    chosen = network if form == "float" else twin
    written(chosen, tmp_path)
    images, x = bytes_and_pixels(nets, 8)
    flags = [*STRICT, *FLAGS[build], "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    logits = run(tmp_path, images, ["cc", *flags], env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})
    for call in (0, 1):
        if form == "int8":
            assert np.array_equal(logits[:, call], wanted(chosen, x))
        else:
            assert np.abs(logits[:, call] - wanted(chosen, x)).max() < 1e-4


@pytest.mark.parametrize("build", FLAGS)
@pytest.mark.parametrize("form", ["float", "int8"])
def test_memory_is_what_the_header_says(nets, tmp_path: Path, form: str, build: str) -> None:
    network, _, twin = nets.quantised(nets.make("cifar-resnet18", 0.05))
    written(network if form == "float" else twin, tmp_path)
    flags = [*STRICT, "-O2", "-c", "-fstack-usage", *FLAGS[build]]
    subprocess.run(["cc", *flags, "model.c"], cwd=tmp_path, check=True)
    sections = subprocess.run(
        ["size", "-A", "model.o"], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    sizes = {name: int(count) for name, count in re.findall(r"^(\.\S+)\s+(\d+)", sections, re.MULTILINE)}
    defined = subprocess.run(["cc", *FLAGS[build], "-dM", "-E", "-xc", os.devnull], capture_output=True, text=True)
    bytes_only = form == "int8" and re.search(r"__AVX(512)?VNNI__", defined.stdout)
    kind = "SCALAR" if build == "no vectors" or bytes_only else "VECTOR"
    header = (tmp_path / "model.h").read_text()
    stated = {name: int(re.search(rf"MODEL_{name}_{kind} (\d+)", header)[1]) for name in ("RAM", "TABLES")}
    used = sum(size for name, size in sizes.items() if name.startswith((".bss", ".data")) and ".rel" not in name)
    least = 0.9 if bytes_only and build != "no vectors" else 0.98  # VNNI keeps a tile's sums in registers
    assert least * stated["RAM"] <= used <= stated["RAM"] + 64  # alignment
    constants = sum(size for name, size in sizes.items() if name.startswith(".rodata"))
    assert stated["TABLES"] <= constants <= stated["TABLES"] + 8192  # the layers' own records
    stack = sum(int(line.split("\t")[1]) for line in (tmp_path / "model.su").read_text().splitlines())
    assert stack < 2048  # if every function were on it at once


def test_no_function_of_a_library_is_needed(nets, tmp_path: Path) -> None:
    """But for memset, memcpy and the like, which compilers may call on their own."""
    _, _, twin = nets.quantised(nets.make("cifar-resnet18 normalised", 0.05))
    written(twin, tmp_path)
    for flags in (["-DMODEL_SCALAR"], ["-march=x86-64-v3"] if os.uname().machine == "x86_64" else []):
        subprocess.run(["cc", "-O2", "-c", *flags, "model.c"], cwd=tmp_path, check=True)
        missing = subprocess.run(
            ["nm", "-u", "model.o"], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout
        assert set(re.findall(r"U (\w+)", missing)) <= {"memset", "memcpy", "memmove", "_GLOBAL_OFFSET_TABLE_"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["float", "int8"])
def test_aarch64_under_emulation(nets, tmp_path: Path, form: str) -> None:
    cross, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if cross is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    network, _, twin = nets.quantised(nets.make("cifar-resnet18 normalised", 0.05))
    chosen = network if form == "float" else twin
    written(chosen, tmp_path)
    images, x = bytes_and_pixels(nets, 32)
    logits = run(tmp_path, images, [cross, *STRICT, "-O2", "-static"], [emulator])
    if form == "int8":
        assert np.array_equal(logits[:, 0], wanted(chosen, x))
    else:
        assert np.abs(logits[:, 0] - wanted(chosen, x)).max() < 1e-4


def test_source_is_the_same_each_time(nets) -> None:
    made = [c_source(nets.quantised(nets.make("lenet", 0.1))[2], SHAPE) for _ in range(2)]
    assert made[0] == made[1]


def test_compiled_once(nets, tmp_path: Path, monkeypatch) -> None:
    path = written(nets.quantised(nets.make("lenet", 0.1))[2], tmp_path)
    x = nets.noise(4).numpy()
    first = CClassifier(path).logits(x)
    monkeypatch.setattr(subprocess, "run", None)
    assert np.array_equal(CClassifier(path).logits(x), first)


def test_every_mistake_has_one_line(nets, tmp_path: Path, monkeypatch) -> None:
    path = written(nets.quantised(nets.make("lenet", 0.1))[2], tmp_path)
    with pytest.raises(InputError, match="takes images of"):
        CClassifier(path).logits(np.zeros((1, 3, 8, 8), np.float32))
    source = path.read_text()
    path.write_text(source.replace("static", "statics", 1))
    with pytest.raises(InputError, match=r"does not compile: .*error"):
        CClassifier(path)
    path.write_text(source)
    (tmp_path / "model.h").write_text("#define MODEL_FORMAT 1\n")
    with pytest.raises(InputError, match="no header"):
        CClassifier(path)
    (tmp_path / "model.h").unlink()
    with pytest.raises(InputError, match=r"cannot read .*model\.h"):
        CClassifier(path)
    with pytest.raises(InputError, match="cannot read"):
        CClassifier(tmp_path / "other.c")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorkError, match="no C compiler"):
        engine.compiler()
    monkeypatch.setenv("CC", "/no/such/cc")
    path = written(nets.quantised(nets.make("lenet", 0.2))[2], tmp_path)
    with pytest.raises(WorkError, match="cannot run"):
        CClassifier(path)
