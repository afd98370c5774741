"""Attacks of other libraries, or of the user's own, as a function."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rprune.attacks.base import ATTACKS, Attack, Found, margin
from rprune.attacks.noise import Keyed
from rprune.attacks.norms import project, size
from rprune.errors import UsageError
from rprune.registry import load_object
from rprune.seeds import derive
from rprune.threat import ThreatModel

TOLERANCE = 1e-6  # by how much a point may leave ball and box, as rounding does, before that is an error


@ATTACKS.register("adapter")
@dataclass(frozen=True, kw_only=True)
class Adapter(Attack):
    """A function ``(logits_fn, x, y) -> x_adv`` as an attack: one around foolbox or ART, or the user's own.

    ``function`` is ``file.py:name`` or ``pkg.module:name``. ``logits_fn`` is the net, a frozen ``nn.Module`` in eval
    mode that can be differentiated; ``x`` are images in [0,1], ``y`` labels. The function must know norm and eps, and
    return its best point for every image, inside ball and box.

    Numbers from torch's global generator are the same for every batch with the same seed. What else the function does
    with a batch is its own: if its rows depend on each other, so does the result.
    """

    function: Annotated[str, Field(pattern=r"^.+:\w+$")]

    @property
    def label(self) -> str:
        return self.function.rpartition(":")[2]

    def queries(self, classes: int = 10) -> int:  # noqa: ARG002
        return sys.maxsize  # a function does not say

    def search(self, net: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, noise: Keyed) -> Found:
        function = load_object(self.function)
        if not callable(function):
            raise UsageError(f"{self.function} is no function", "name one that takes (logits_fn, x, y)")
        counted = Counted(net).eval()
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(derive(noise.seed, self.label))
            point = self._checked(function(counted, x.clone(), y.clone()), x, threat)
        with torch.no_grad():
            margins = margin(counted(point), y).to(x.dtype)
        return Found(point, margins, torch.full_like(y, counted.calls))

    def _checked(self, point: Any, x: Tensor, threat: ThreatModel) -> Tensor:
        hint = "it must return a tensor like x: one finite image in [0,1] for each, inside the ball"
        if not isinstance(point, Tensor):
            raise UsageError(f"{self.function} returned {type(point).__name__}, not a tensor", hint)
        if point.shape != x.shape:
            raise UsageError(f"{self.function} returned shape {tuple(point.shape)} for {tuple(x.shape)}", hint)
        point = point.detach().to(x)
        if not bool(torch.isfinite(point).all()):
            raise UsageError(f"{self.function} returned images that are not finite", hint)
        outside = float(torch.maximum(-point, point - 1).amax())
        if outside > TOLERANCE:
            raise UsageError(f"{self.function} left [0,1] by {outside:.2g}", hint)
        farthest = float(size(point - x, threat.norm).amax())
        if farthest > threat.eps + TOLERANCE:
            raise UsageError(f"{self.function} went {farthest:.6g} from an image, which {threat} does not allow", hint)
        return project(point, x, threat)


class Counted(nn.Module):
    """The net, and how often it was called."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.net(x)
        return logits
