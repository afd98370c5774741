"""The processes that train together: PyTorch's collectives over what each of them found for its part of a batch.

Every process holds the whole model and runs the same code on its own rows of every batch. Gradients of the model are
summed before a pruner reads them, so scores, rates and masks are the same everywhere without a method knowing of it.
One sum a step over all gradients is enough here: a step of ten attack steps computes for far longer than it sends
(docs/scaling.md), and, unlike hooks inside backward, it holds for losses with several forwards and for weights that are
perturbed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rprune.errors import WorkError, first_line


@dataclass(frozen=True)
class World:
    """This process among all of a run; alone, every operation does nothing."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def parts(self, count: int = 1) -> list[tuple[int, int]]:
        """Which of all parts of a batch this process computes, one after another, where each computes ``count``."""
        return [(self.rank * count + j, self.size * count) for j in range(count)]

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up each tensor over all processes, in place; one message for each type and device."""
        if self.size == 1:
            return
        groups: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for group in groups.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            with _together():
                dist.all_reduce(flat)
            for tensor, part in zip(group, torch.split(flat, [tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    @torch.no_grad()
    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """The mean of each tensor over all processes, in place."""
        self.sum_(tensors)
        if self.size > 1:
            for tensor in tensors:
                tensor.div_(self.size)

    def shared(self, value: Any) -> Any:
        """What the first process has: plain values and tensors, which come back on the CPU."""
        if self.size == 1:
            return value
        sent: list[Any] = [None]
        if self.first:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            sent = [buffer.getvalue()]
        with _together():
            dist.broadcast_object_list(sent, device=torch.device("cpu"))
        return value if self.first else torch.load(io.BytesIO(sent[0]), map_location="cpu", weights_only=True)

    def gathered(self, text: str) -> list[str]:
        """What every process has, in their order."""
        found: list[Any] = [text] * self.size
        if self.size > 1:
            with _together():
                dist.all_gather_object(found, text)
        return found

    def wait(self) -> None:
        """Until every process is here."""
        self.shared(None)

    def need_same(self, tensors: Sequence[Tensor]) -> None:
        """Raises WorkError where processes hold other bits: their results would be of no one model."""
        if self.size == 1:
            return
        sums = [t.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64).cpu() for t in tensors if t.numel()]
        least = torch.stack(sums)
        most = least.clone()
        with _together():
            dist.all_reduce(least, dist.ReduceOp.MIN)
            dist.all_reduce(most, dist.ReduceOp.MAX)
        if not torch.equal(least, most):
            raise WorkError("processes do not hold the same weights any more", "start anew; please report this")


def world() -> World:
    """The processes of this run: those of torch.distributed, once it is initialised."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextmanager
def _together() -> Iterator[None]:
    """Raises WorkError where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise WorkError(
            f"another process of this run has ended ({first_line(error)})",
            "its own message says why; the same command goes on from the last epoch",
        ) from None
