from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from rprune.errors import InputError
from rprune.models.cnn import CNNSmall
from rprune.models.normalize import Normalized, normalized
from rprune.models.prunable import prunable

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def by_hand(x: torch.Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> torch.Tensor:
    return torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(x.shape[1])], dim=1)


def test_values_keys_and_identity() -> None:
    plain = CNNSmall(10, (3, 8, 8)).eval()
    model = copy.deepcopy(plain)
    same = normalized(model, MEAN, STD)
    x = torch.rand(4, 3, 8, 8)
    assert same is model
    assert isinstance(model, CNNSmall)
    assert isinstance(model, Normalized)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(prunable(model)) == list(prunable(plain))
    assert not model._normalize.training
    torch.testing.assert_close(model(x), plain(by_hand(x)))
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert type(plain) is CNNSmall


def test_copies_traces_pickles_and_casts() -> None:
    model = normalized(CNNSmall(10, (3, 8, 8)), MEAN, STD).eval()
    x = torch.rand(4, 3, 8, 8)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert next(twin.parameters()) is not next(model.parameters())
    for other in (twin, torch.fx.symbolic_trace(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), expected)
    normalized(twin, (0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    torch.testing.assert_close(model(x), expected)
    assert model.double()(x.double()).dtype == torch.float64
    assert model.to("meta")(x.double().to("meta")).device.type == "meta"


def test_a_second_call_replaces_and_identity_takes_away() -> None:
    plain = CNNSmall(10, (3, 8, 8))
    model = normalized(normalized(copy.deepcopy(plain), (0.1, 0.1, 0.1), (9, 9, 9)), MEAN, STD)
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(model(x), plain(by_hand(x)))
    normalized(model, (0, 0, 0), (1, 1, 1))
    assert type(model) is CNNSmall
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize(("mean", "std"), [((0, 0, 0), (1, 1, 1)), ((), ())])
def test_nothing_to_normalise_leaves_the_model_alone(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    model = CNNSmall()
    assert type(normalized(model, mean, std)) is CNNSmall
    assert not hasattr(model, "_normalize")


def test_sequential_models_normalise_once() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(32, 2))
    model = normalized(copy.deepcopy(plain), MEAN, STD)
    x = torch.rand(5, 3, 4, 4)
    assert isinstance(model, nn.Sequential)
    assert len(model) == 3
    assert isinstance(model[-1], nn.Linear)
    for other in (model, copy.deepcopy(model), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(other(x), plain(by_hand(x)))


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (1, 1)), ((), (1,)), ((0.5,), (0,)), ((0.5,), (-1,)), ((float("nan"),), (1,)), ((0,), (float("inf"),))],
)
def test_bad_values_are_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    model = CNNSmall()
    with pytest.raises(InputError):
        normalized(model, mean, std)
    assert type(model) is CNNSmall


def test_models_that_cannot_carry_it_are_refused() -> None:
    class Own(CNNSmall):
        _normalize = True

    for model in (torch.fx.symbolic_trace(CNNSmall()), Own()):
        with pytest.raises(InputError):
            normalized(model, MEAN, STD)
