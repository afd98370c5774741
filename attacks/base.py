"""The contract of an attack.

An attack is a frozen dataclass of its budget; the threat model, the net and the random numbers come with the call. An
author writes :meth:`Attack.search` (evaluation: stop at the first misclassified point of each sample), or
:meth:`Attack.perturb` (training: one point a sample, no bookkeeping), of which a search then follows, or both.

What an attack finds for a sample depends on net, sample, seed and sample id alone, bit for bit, as long as the net's
rows do not depend on their batch (``evaluation.target.Rows``). So an attack may drop samples that are done, computes
row by row, and draws from ``noise`` with a purpose that starts with its :attr:`Attack.label`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from rprune.attacks.noise import Keyed, Noise
from rprune.attacks.norms import within
from rprune.errors import UsageError
from rprune.models.folded import folded
from rprune.phases import phase
from rprune.registry import Configured, Registry
from rprune.threat import ThreatModel

Loss: TypeAlias = Callable[[Float[Tensor, "b k"]], Float[Tensor, " b"]]
"""Per-sample value that the attack drives up, as a function of the logits at the perturbed point."""

State = TypeVar("State")


@dataclass(frozen=True, eq=False)
class Found:
    """What an evaluation attack found: for each sample the point of lowest margin, and the search net's margin there.

    A point counts as broken where the margin is not positive; ``inf`` where nothing was found at all.
    """

    x: Float[Tensor, "b c h w"]
    margin: Float[Tensor, " b"]
    queries: Int64[Tensor, " b"]  # forward passes spent on the sample

    @property
    def broken(self) -> Bool[Tensor, " b"]:
        return self.margin <= 0


class Attack(Configured, ABC):
    """Base of all attacks. Derived classes are frozen dataclasses."""

    needs_gradient: ClassVar[bool] = True
    """False: only the net's logits are used, so that any artifact can be searched itself."""

    @property
    def label(self) -> str:
        """The name of papers and reports, which tells variants apart (apgd-ce, apgd-t)."""
        return ATTACKS.name_of(self)

    def perturb(
        self,
        net: nn.Module,  # noqa: ARG002
        x: Float[Tensor, "b c h w"],  # noqa: ARG002
        threat: ThreatModel,  # noqa: ARG002
        loss: Loss,  # noqa: ARG002
        noise: Noise,  # noqa: ARG002
    ) -> Float[Tensor, "b c h w"]:
        """Points inside ``threat`` around x with high ``loss``. ``net`` is in eval mode with frozen parameters.

        Raises UsageError for attacks that look for misclassified points and know no other loss.
        """
        raise UsageError(f"attack {self.label} cannot drive a training loss", "use pgd, fgsm or apgd there")

    def search(
        self, net: nn.Module, x: Float[Tensor, "b c h w"], y: Int64[Tensor, " b"], threat: ThreatModel, noise: Keyed
    ) -> Found:
        """A point for each sample that the net misclassifies, if one is found."""
        point = self.perturb(net, x, threat, cross_entropy(y), noise)
        with torch.no_grad():
            margins = margin(net(point), y)
        return Found(point, margins, torch.full_like(y, self.queries()))

    @abstractmethod
    def queries(self, classes: int = 10) -> int:
        """Forward passes that one sample costs at most, for a net with that many classes."""

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
    """z_y - max_{j != y} z_j: positive where the net is right and sure of it.

    inf where logits are not numbers: a net that breaks down is a failure of integrity, not a success of the attack.
    """
    right = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return (right - others).nan_to_num(torch.inf, torch.inf, -torch.inf)


def input_gradient(net: nn.Module, x: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the summed loss with respect to x alone, the loss of every sample, and the logits at x.

    Zero where the net cuts its input off from its logits: a health check reports that, no attack stumbles over it.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = net(x)
        values = loss(logits)
        if not values.requires_grad:
            return torch.zeros_like(x), values, logits.detach()
        (gradient,) = torch.autograd.grad(values.sum(), x, materialize_grads=True)
    # in the images' layout: a net in channels_last gives its own, which every sum over a sample would copy anew
    return gradient.contiguous().nan_to_num(0.0), values.detach(), logits.detach()


def worth_compacting(going: Bool[Tensor, " b"], step: int) -> bool:
    """Whether the samples that are done should be dropped at this step (:func:`rows_of`), which gives the same result.

    On a CPU as soon as they are more than one in twenty; on a GPU every tenth step at most, because to ask is to wait.
    """
    if going.device.type != "cpu" and step % 10 != 9:
        return False
    return int(going.sum()) < 0.95 * len(going)


def rows_of(state: State, rows: Tensor) -> State:
    """Those rows (a mask or indices) of every tensor in a dataclass, of those inside it (noise) as well.

    Every tensor has a row for each sample; whatever else there is stays.
    """
    rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
    cut: Any = state
    if isinstance(state, Tensor):
        cut = state.index_select(0, rows.to(state.device))
    elif is_dataclass(state):
        cut = replace(cut, **{field.name: rows_of(getattr(state, field.name), rows) for field in fields(state)})
    return cut  # type: ignore[no-any-return]


@contextmanager
def at_rest(net: nn.Module, x: Float[Tensor, "b c h w"]) -> Iterator[nn.Module]:
    """What an objective attacks: the net is :func:`frozen`, what is yielded gives its logits with batch norm folded.

    x: images that it takes. A net that is made for one step, such as an average over noise, wraps what is yielded.
    """
    with frozen(net), phase("attack"):
        with phase("folding"):
            still = folded(net, x)
        yield still


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
