"""Which tensors of a model may be pruned."""

from __future__ import annotations

from torch import Tensor, nn


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """The weights of every Conv2d and Linear of `model` by name, in the order of `named_modules()`.

    The first convolution, the shortcuts and the classifier are included; biases and batch norm are not (HYDRA,
    NeurIPS 2020). The tensors are the model's own, not copies. A module, or a weight, that is used under several
    names appears once, under its first name.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[f"{name}.weight" if name else "weight"] = module.weight
    return found
