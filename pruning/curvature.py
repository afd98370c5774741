"""K-FAC's second-order estimate of what removing weights costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call


@contextmanager
def recorded(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """(input, output) of every call of these modules inside."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ARG001
            calls[name].append((inputs[0].detach(), output))
            return output.clone()  # what follows may work in place

        return record

    handles = [layer.register_forward_hook(recorder(name)) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def damage(
    layer: nn.Module, delta: Float[Tensor, "out ..."], a: Float[Tensor, "b ..."], g: Float[Tensor, "b ..."]
) -> Float[Tensor, "out ..."]:
    """S = 1/2 G_ii delta_ij (delta A)_ij (MAD, section 3.3), for a conv or linear layer of input a.

    g is the gradient of the batch's mean loss at the layer's output. A = E[a a^T] over patches and the diagonal of G =
    E[g g^T] are K-FAC's factors. delta A is the gradient of 1/2 E|layer(a; delta)|^2, so that no patch matrix and no
    square one is formed. A row of S sums to 1/2 delta^T H delta.
    """
    rows = g.movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1)
    batch = len(a)
    places = rows.shape[1] / batch
    factor = rows.square().sum(1) * batch / places
    with torch.enable_grad():
        delta = delta.detach().requires_grad_()
        replaced = {"weight": delta}
        if layer.bias is not None:
            replaced["bias"] = torch.zeros_like(factor)
        quadratic = functional_call(layer, replaced, a).square().sum() / (2 * batch)
        (gradient,) = torch.autograd.grad(quadratic, delta)
    scores: Tensor = delta.detach() * gradient * factor.view(-1, *[1] * (delta.dim() - 1)) / 2
    return scores
