"""The contract of an attack.

An attack is a frozen dataclass of its budget; the threat model, the net and the random numbers come with the call. An
author writes :meth:`Attack.perturb` (training: one point a sample, no bookkeeping) and, where it can do better than
"run perturb and look", :meth:`Attack.search` (evaluation: stop at the first misclassified point of each sample).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from rprune.attacks.noise import Keyed, Noise
from rprune.attacks.norms import within
from rprune.registry import Configured, Registry
from rprune.threat import ThreatModel

Loss: TypeAlias = Callable[[Float[Tensor, "b k"]], Float[Tensor, " b"]]
"""Per-sample value that the attack drives up, as a function of the logits at the perturbed point."""


@dataclass(frozen=True, eq=False)
class Found:
    """What an evaluation attack found: for each sample its worst point, and whether the search net is wrong there."""

    x: Float[Tensor, "b c h w"]
    broken: Bool[Tensor, " b"]
    queries: Int64[Tensor, " b"]  # forward passes spent on the sample


class Attack(Configured, ABC):
    """Base of all attacks. Derived classes are frozen dataclasses."""

    @abstractmethod
    def perturb(
        self, net: nn.Module, x: Float[Tensor, "b c h w"], threat: ThreatModel, loss: Loss, noise: Noise
    ) -> Float[Tensor, "b c h w"]:
        """Points inside ``threat`` around x with high ``loss``. ``net`` is in eval mode with frozen parameters."""

    def search(
        self, net: nn.Module, x: Float[Tensor, "b c h w"], y: Int64[Tensor, " b"], threat: ThreatModel, noise: Keyed
    ) -> Found:
        """A point for each sample that the net misclassifies, if one is found."""
        point = self.perturb(net, x, threat, cross_entropy(y), noise)
        with torch.no_grad():
            broken = margin(net(point), y) <= 0
        return Found(point, broken, torch.full_like(y, self.queries()))

    @abstractmethod
    def queries(self) -> int:
        """Forward passes that one sample costs at most."""

    def for_transfer(self) -> Attack:
        """The form that finds points for another net than the one it searches on: it must not stop at the boundary."""
        return self

    def training_point(
        self, net: nn.Module, x: Float[Tensor, "b c h w"], threat: ThreatModel, loss: Loss, noise: Noise
    ) -> Float[Tensor, "b c h w"]:
        """:meth:`perturb` on the frozen net in eval mode; leaves no trace in the net and checks nothing (no sync)."""
        with frozen(net):
            return self.perturb(net, x, threat, loss, noise).detach()

    def evaluate(
        self, net: nn.Module, x: Float[Tensor, "b c h w"], y: Int64[Tensor, " b"], threat: ThreatModel, noise: Keyed
    ) -> Found:
        """:meth:`search` on the frozen net, with the result checked: every point lies in ball and box."""
        with frozen(net):
            found = self.search(net, x, y, threat, noise)
        assert bool(within(found.x, x, threat).all()), f"{self} left the ball {threat}"
        return found


ATTACKS: Registry[Attack] = Registry("attack", "rprune.attacks", lambda: Attack)


def cross_entropy(y: Int64[Tensor, " b"]) -> Loss:
    return lambda logits: nn.functional.cross_entropy(logits, y, reduction="none")


def margin(logits: Float[Tensor, "b k"], y: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
    """z_y - max_{j != y} z_j: positive where the net is right and sure of it, -inf where logits are not numbers."""
    right = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return (right - others).nan_to_num(-torch.inf, torch.inf, -torch.inf)


def input_gradient(net: nn.Module, x: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Gradient of the summed loss with respect to x alone, and the logits at x."""
    x = x.detach().requires_grad_()
    logits = net(x)
    (gradient,) = torch.autograd.grad(loss(logits).sum(), x)
    return gradient.nan_to_num(0.0), logits.detach()


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; every module and parameter as before outside."""
    modes = [(module, module.training) for module in net.modules()]
    wanted = [parameter for parameter in net.parameters() if parameter.requires_grad]
    net.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in wanted:
            parameter.requires_grad_(True)
