"""How a net's forward runs in training: in bfloat16, compiled, or both. Weights and logits stay in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from rprune.errors import WorkError

Precision = Literal["fp32", "bf16"]


class Running(nn.Module):
    """The net under autocast ("bf16": convolutions and linear layers compute in bfloat16), compiled, or both.

    Logits are float32 again, so that losses and penalties lose nothing. bfloat16 is faster on GPUs, and on CPUs with
    AMX in channels_last; slower on CPUs without. A compiled forward is made once for each shape of a batch. Raises
    WorkError where it cannot be made.
    """

    def __init__(self, net: nn.Module, precision: Precision = "fp32", compiled: bool = False) -> None:
        super().__init__()
        self.net, self.precision, self.compiled = net, precision, compiled
        self._call: Callable[[Tensor], Tensor] = _compiled(net) if compiled else net.__call__
        self._last: list[Running] = []  # a list, as a module would become a part of this one
        self.train(net.training)

    def like(self, net: nn.Module) -> Running:
        """Another net that runs the same way; asked again for the same one, the same."""
        if not self._last or self._last[0].net is not net:
            self._last[:] = [Running(net, self.precision, self.compiled)]
        return self._last[0]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext():
            logits = self._call(x)
        return logits.float() if self.precision == "bf16" else logits


def _compiled(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """The net's forward by torch.compile; its weights are read where they lie, at every call."""
    from torch._dynamo.exc import TorchDynamoException

    whole = torch.compile(net.forward, dynamic=False)

    def call(x: Tensor) -> Tensor:
        try:
            found: Tensor = whole(x)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise WorkError(f"the net cannot be compiled: {reason}", "leave out --compile") from None
        return found

    return call
