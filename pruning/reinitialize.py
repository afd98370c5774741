"""Fresh weights for methods that do not start from the ones they are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from rprune.models.prunable import prunable
from rprune.seeds import derive


def reinitialize(model: nn.Module, seed: int) -> None:
    """Draw every weight again by each module's ``reset_parameters``, in place; running statistics start anew.

    Drawn on the CPU from (seed, module name), so that a GPU starts from the same weights; the global generators are
    left as they were. Inner modules come first: a net that has a ``reset_parameters`` of its own has the last word.
    What no ``reset_parameters`` touches stays as it is.
    """
    fresh = copy.deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]):
        for name, module in reversed(list(fresh.named_modules())):
            reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
            if reset is not None:
                torch.default_generator.manual_seed(derive(seed, "reinitialize", name))
                reset()
    model.load_state_dict(fresh.state_dict())


def scale_to_density(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Divide every prunable tensor by the square root of its kept share, in place.

    Sums over the kept weights then vary as sums over all did; without it a signal fades in nets without batch norm.
    """
    with torch.no_grad():
        for name, weight in prunable(model).items():
            weight.div_((counts[name] / weight.numel()) ** 0.5)
