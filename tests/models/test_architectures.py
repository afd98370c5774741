from __future__ import annotations

import pytest
import torch
from torch import nn

from rprune.errors import InputError
from rprune.models.prunable import prunable
from rprune.models.registry import Architecture, build, names
from rprune.models.vgg import VGG16


def on_meta(name: str, shape: tuple[int, int, int] = (3, 32, 32), **kwargs: object) -> nn.Module:
    with torch.device("meta"):
        return build(Architecture(name, 10, shape, kwargs))


@pytest.mark.parametrize(
    ("name", "weights", "tensors"),
    [
        ("vgg16", 15_302_848, 16),
        ("cifar-resnet18", 11_164_352, 21),
        ("wrn-28-4", 5_841_840, 29),
        ("vgg4", 458_944, 7),
        ("cnn-small", 768 + 8_192 + 204_800 + 1_000, 4),
        ("cnn-large", 864 + 16_384 + 18_432 + 65_536 + 4_096 * 512 + 512 * 512 + 5_120, 7),
    ],
)
def test_prunable_weights_are_those_of_the_papers(name: str, weights: int, tensors: int) -> None:
    found = prunable(on_meta(name))
    assert sum(t.numel() for t in found.values()) == weights
    assert len(found) == tensors


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cifar-resnet18", 11_173_962),
        ("cifar-resnet34", 21_282_122),
        ("cifar-resnet50", 23_520_842),
        ("wrn-28-2", 1_467_610),
        ("wrn-28-10", 36_479_194),
    ],
)
def test_parameter_totals_are_the_published_ones(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in on_meta(name).parameters()) == parameters


@pytest.mark.parametrize("width", [1, 16])
def test_lenet_follows_its_width(width: int) -> None:
    found = prunable(on_meta("lenet", (1, 28, 28), width=width))
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "conv1.weight": (2 * width, 1, 5, 5),
        "conv2.weight": (4 * width, 2 * width, 5, 5),
        "fc1.weight": (64 * width, 196 * width),
        "fc2.weight": (10, 64 * width),
    }
    default = prunable(on_meta("lenet", (1, 28, 28)))
    assert default["fc1.weight"].shape == (1024, 3136)


def test_resnet18_has_the_public_names_in_the_public_order() -> None:
    def norm(name: str) -> list[str]:
        return [f"{name}.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    expected = ["conv1.weight", *norm("bn1")]
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            expected += [f"{at}.conv1.weight", *norm(f"{at}.bn1"), f"{at}.conv2.weight", *norm(f"{at}.bn2")]
            if stage > 1 and block == 0:
                expected += [f"{at}.shortcut.0.weight", *norm(f"{at}.shortcut.1")]
    expected += ["linear.weight", "linear.bias"]
    model = on_meta("cifar-resnet18")
    assert list(model.state_dict()) == expected
    order = list(prunable(model))
    assert [i for i, name in enumerate(order) if "shortcut" in name] == [7, 12, 17]
    assert order[20] == "linear.weight"


def test_vgg16_has_the_public_names() -> None:
    convs = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
    model = on_meta("vgg16")
    expected = [f"features.{i}.weight" for i in convs] + [f"classifier.{i}.weight" for i in (0, 2, 4)]
    assert list(prunable(model)) == expected
    keys = model.state_dict()
    assert "features.1.running_mean" in keys
    assert "features.0.bias" not in keys
    assert "classifier.4.bias" in keys


def test_wrn_has_the_public_names() -> None:
    order = list(prunable(on_meta("wrn-28-4")))
    assert order[:4] == [
        "conv1.weight",
        "block1.layer.0.conv1.weight",
        "block1.layer.0.conv2.weight",
        "block1.layer.0.convShortcut.weight",
    ]
    assert order[-1] == "fc.weight"


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 17, 23)])
@pytest.mark.parametrize("name", names())
def test_every_architecture_takes_every_shape_its_pools_allow(name: str, shape: tuple[int, int, int]) -> None:
    if name == "vgg16" and min(shape[1:]) < 16:
        with pytest.raises(InputError, match="8x8") as caught:
            on_meta(name, shape)
        assert "16x16" in caught.value.hint
        return
    with torch.device("meta"):
        model = build(Architecture(name, 7, shape))
        # Running the trace checks both: that it can be traced, and the shape.
        assert torch.fx.symbolic_trace(model)(torch.empty(2, *shape)).shape == (2, 7)
    assert not any(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))


@pytest.mark.parametrize("name", ["lenet", "cnn-small", "cnn-large", "vgg4"])
def test_images_too_small_are_refused(name: str) -> None:
    on_meta(name, (1, 4, 4))
    with pytest.raises(InputError, match="3x8") as caught:
        on_meta(name, (1, 3, 8))
    assert "4x4" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("lenet", {}), ("cnn-small", {}), ("vgg4", {}), ("cifar-resnet18", {"width": 4}), ("wrn-28-2", {})],
)
def test_real_models_have_finite_logits_and_gradients(name: str, kwargs: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = build(Architecture(name, 3, (1, 8, 8), kwargs))
    assert model.training
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    logits = model(torch.rand(4, 1, 8, 8))
    logits.logsumexp(1).sum().backward()
    assert torch.isfinite(logits).all()
    assert logits.std(0).min() > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_he_initialisation_of_vgg_convolutions() -> None:
    torch.manual_seed(0)
    weight = VGG16().features[14].weight
    assert isinstance(weight, torch.Tensor)
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)


def test_prunable_lists_shared_layers_once_and_its_own_weight() -> None:
    layer = nn.Linear(2, 2)
    tied = nn.Linear(2, 2)
    tied.weight = layer.weight
    model = nn.Sequential(layer, nn.BatchNorm1d(2), layer, tied, nn.Conv2d(1, 1, 1))
    assert list(prunable(model)) == ["0.weight", "4.weight"]
    assert prunable(model)["0.weight"] is layer.weight
    assert list(prunable(layer)) == ["weight"]
