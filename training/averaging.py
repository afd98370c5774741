"""Averages of what is trained: exponential (EMA) and equal (SWA)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rprune.pruning.base import Pruner

Kind = Literal["none", "ema", "swa"]
SWA_START = 0.75  # of the stage, as Izmailov et al. start in their CIFAR recipes


class Average:
    """A running average of what a pruner trains and of the model's running statistics.

    EMA: d a + (1 - d) w after every step, d = min(decay, (1 + n) / (10 + n)) while n steps are few (as Gowal et al.,
    2020, average in robust training). SWA: the equal mean over the last quarter of the stage (Izmailov et al., UAI
    2018; Chen et al., ICLR 2021). What is averaged is what is learned, scores for instance; the model's weights follow
    from it by :meth:`Pruner.refresh`.
    """

    def __init__(self, kind: Literal["ema", "swa"], decay: float, pruner: Pruner, trained: Iterable[Tensor]) -> None:
        self.kind, self.decay, self.pruner = kind, decay, pruner
        statistics = [buffer for buffer in pruner.model.buffers() if buffer.is_floating_point()]
        self.live = [tensor.detach() for tensor in trained] + statistics
        self.mean = [tensor.clone() for tensor in self.live]
        self.steps = 0

    def update(self, progress: float) -> None:
        """After a step at this share of the stage."""
        if self.kind == "swa" and progress < SWA_START:
            weight = 1.0
        else:
            self.steps += 1
            ema = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
            weight = ema if self.kind == "ema" else 1 / self.steps
        torch._foreach_lerp_(self.mean, self.live, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with averaged values inside, as it was outside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for mean, value in zip(self.mean, state["mean"], strict=True):
            mean.copy_(value)

    def _swap(self) -> None:
        with torch.no_grad():
            for mean, live in zip(self.mean, self.live, strict=True):
                held = live.clone()
                live.copy_(mean)
                mean.copy_(held)
        self.pruner.refresh()


@contextmanager
def perturbed(pruner: Pruner, trained: Iterable[Tensor], radius: float) -> Iterator[None]:
    """What is learned, moved along its gradient inside; put back outside.

    Every tensor of more than one dimension moves by radius |p| g / |g|: AWP for weights (Wu et al., NeurIPS 2020, eq.
    10), S2AP for scores (2025). Running statistics do not move inside.
    """
    moved = [tensor for tensor in trained if tensor.dim() > 1 and tensor.grad is not None]
    before = [tensor.detach().clone() for tensor in moved]
    norms = [m for m in pruner.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for tensor in moved:
            assert tensor.grad is not None
            tensor.add_(tensor.grad * (radius * tensor.norm() / tensor.grad.norm().clamp_min(1e-12)))
    pruner.refresh()
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        with torch.no_grad():
            for tensor, value in zip(moved, before, strict=True):
                tensor.copy_(value)
        pruner.refresh()
