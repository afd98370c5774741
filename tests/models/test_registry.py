from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rprune.errors import InputError, UsageError
from rprune.models.registry import BUILTIN, Architecture, build, is_trusted, names

OWN = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, outputs, shape):
        super().__init__(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], outputs))

def both(num_classes, input_shape):
    return Net(num_classes, input_shape)

def every(**kwargs):
    net = Net(kwargs["num_classes"], kwargs["input_shape"])
    net.extra = kwargs["extra"]
    return net.double()

def only_kwargs(hidden):
    return Net(hidden, (1, 8, 8))

def not_a_model():
    return 3

def breaks():
    raise RuntimeError("boom")

constant = 1
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


def make(name: str, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    return build(Architecture(name, 5, (1, 8, 8), kwargs or {}))


def test_listing_names_does_not_import_torch() -> None:
    code = "import sys, rprune.models.registry as r; r.names(); r.is_trusted('lenet'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert {*names(), "flat"} == set(BUILTIN)
    assert len(names()) == 11


def test_dict_round_trip_through_json() -> None:
    arch = Architecture("cifar-resnet18", 10, (3, 32, 32), {"width": 8}, (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    again = Architecture.from_dict(json.loads(json.dumps(arch.to_dict())))
    assert again == arch
    assert again.input_shape == (3, 32, 32)
    minimal = Architecture.from_dict({"name": "lenet", "num_classes": 10, "input_shape": [1, 28, 28]})
    assert minimal == Architecture("lenet", 10, (1, 28, 28))
    for broken in ({"name": "lenet"}, {**arch.to_dict(), "colour": 1}):
        with pytest.raises(InputError, match="not an architecture"):
            Architecture.from_dict(broken)


def test_an_architecture_does_not_change_with_the_dict_it_was_made_of() -> None:
    kwargs = {"width": 8}
    arch = Architecture("lenet", 10, (1, 28, 28), kwargs)
    kwargs["width"] = 1
    assert arch.kwargs == {"width": 8}


@pytest.mark.parametrize(
    "fields",
    [
        {"input_shape": (8, 8)},
        {"input_shape": (1, 0, 8)},
        {"num_classes": 0},
        {"mean": (0.5, 0.5), "std": (1.0, 1.0)},
        {"mean": (0.5,)},
    ],
)
def test_unusable_architectures_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Architecture(**{"name": "lenet", "num_classes": 10, "input_shape": (1, 8, 8), **fields})


def test_build_normalises_inside() -> None:
    torch.manual_seed(1)
    plain = build(Architecture("cnn-small", 10, (1, 8, 8)))
    torch.manual_seed(1)
    model = build(Architecture("cnn-small", 10, (1, 8, 8), {}, (0.25,), (0.5,)))
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(model(x), plain((x - 0.25) / 0.5))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_unknown_names_and_arguments_offer_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        make("cifar-resnet81")
    assert "cifar-resnet18" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        make("lenet", {"widht": 2})
    assert "'width'" in caught.value.hint
    with pytest.raises(UsageError):
        make("cifar-resnet18", {"blocks": (1, 1, 1, 1)})
    with pytest.raises(UsageError) as caught:
        make("torchvision:resnet81")
    assert "resnet18" in caught.value.hint
    with pytest.raises(UsageError, match="torchvision cannot build"):
        make("torchvision:resnet18", {"nonsense": 1})


def test_torchvision_models() -> None:
    with torch.device("meta"):
        model = build(Architecture("torchvision:resnet18", 5, (3, 64, 64), {}, (0.5,) * 3, (0.2,) * 3))
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 5)


def test_factories_of_a_file(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 1, 8, 8)
    first, second = make(f"{own}:both"), make(f"{own}:both")
    assert first(x).shape == (2, 5)
    assert type(first) is type(second)
    loose = make(f"{own}:every", {"extra": 4})
    assert loose.extra == 4
    assert loose(x).dtype == torch.float32
    assert make(f"{own}:only_kwargs", {"hidden": 3})(x).shape == (2, 3)
    monkeypatch.chdir(tmp_path)
    assert make("own.py:both")(x).shape == (2, 5)


def test_factories_of_a_module() -> None:
    assert make("rprune.models.lenet:LeNet", {"width": 1})(torch.rand(2, 1, 8, 8)).shape == (2, 5)
    with pytest.raises(InputError, match="no_such_package"):
        make("no_such_package.models:net")


def test_factories_that_cannot_be_used(own: str, tmp_path: Path) -> None:
    for factory, reason in (
        ("not_a_model", "not a torch.nn.Module"),
        ("breaks", "boom"),
        ("constant", "cannot be called"),
        ("absent", "has no"),
    ):
        with pytest.raises(InputError, match=reason):
            make(f"{own}:{factory}")
    with pytest.raises(InputError, match="no file"):
        make(f"{tmp_path}/absent.py:net")
    with pytest.raises(UsageError, match="unknown argument"):
        make(f"{own}:both", {"depth": 3})
    with pytest.raises(UsageError, match="which factory"):
        make(own)
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def (")
    with pytest.raises(InputError, match="SyntaxError"):
        make(f"{wrong}:net")


def test_only_own_and_torchvision_code_is_trusted() -> None:
    assert all(map(is_trusted, names()))
    assert is_trusted("torchvision:resnet18")
    assert not any(map(is_trusted, ("own.py:net", "package.module:net", "lenet:LeNet", "no-such-name")))
