"""What is attacked: the artifact that ships, and the nets that guide the search for points that break it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

# Images in every call of a net. On a CPU 32 fill it at 3x32x32; a net of smaller images spends its time on calls.
ROWS, GPU_ROWS = 32, 256
ROWS_BELOW = {512: 512, 2048: 128}  # by values an image
SMALL = max(ROWS_BELOW)
# Samples under attack at a time. Small images and GPUs want many, for each step's calls; a kill costs a batch its work.
BATCH, LARGE_BATCH = 128, 512
STEP, SIZES = 8, 16  # the last call has one of so many sizes, STEP apart or more, where a trial shows rows alike
INVALID = -1  # the class of logits that are not finite: wrong for every label, and no success of an attack either


class Rows(nn.Module):
    """A net that is called with a fixed number of images, the last call filled up with copies.

    Kernels choose their algorithm, and so their rounding, by the shape of the batch. At one shape a row's result does
    not depend on the other rows or on its place (:func:`steady` sees to that), so results are the same bits whatever
    the batches. A last call of few images is filled up to the next of ``SIZES`` sizes only, where that gives the same
    bits: before the first call of a size the net is tried at it, with random images, logits and gradients. They are
    alike as a rule with one thread. A size that never comes is never tried: a trial takes long for large nets.
    """

    def __init__(self, net: nn.Module, rows: int | None = None) -> None:
        """``rows`` None: what suits size and device of the images."""
        super().__init__()
        self.net, self.rows = net, rows
        self._whole: dict[Any, tuple[Tensor, ...]] = {}
        self._alike: dict[Any, bool] = {}

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        rows = self.rows or usual_rows(x[:1])
        last = len(x) % rows
        missing = self._size(x, last, rows) - last
        full = torch.cat([x, x[:1].detach().expand(missing, *x.shape[1:])]) if missing else x
        logits = [self.net(part) for part in torch.split(full, rows)]
        return torch.cat(logits)[: len(x)]

    def _size(self, x: Tensor, last: int, rows: int) -> int:
        """Of a call for the last images."""
        step = max(STEP, rows // SIZES)
        size = -(-last // step) * step
        return size if size == 0 or (size < rows and self._as_whole(x, size, rows)) else rows

    def _as_whole(self, x: Tensor, size: int, rows: int) -> bool:
        """Do so many images like these get the same bits as among ``rows``?"""
        case = x.shape[1:], x.dtype, x.device, torch.get_num_threads()
        if (case, size) not in self._alike:
            images = torch.rand((rows, *x.shape[1:]), generator=torch.Generator().manual_seed(0)).to(x)
            if case not in self._whole:
                self._whole[case] = self._passes(images)
            parts, whole = self._passes(images[-size:]), [found[-size:] for found in self._whole[case]]
            # a net may give gradients in one call and none in another
            self._alike[case, size] = len(parts) == len(whole) and all(map(torch.equal, parts, whole))
        return self._alike[case, size]

    def _passes(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits, and where there is one the gradient of their squares."""
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            logits = self.net(images)
            if not logits.requires_grad:
                return (logits,)
            (gradient,) = torch.autograd.grad(logits.square().sum(), images, materialize_grads=True)
        return logits.detach(), gradient


def usual_rows(image: Float[Tensor, ...]) -> int:
    """Images in a call of a net."""
    if image.is_cuda:
        return GPU_ROWS
    return next((rows for values, rows in ROWS_BELOW.items() if image.numel() < values), ROWS)


def usual_batch(image: Float[Tensor, ...]) -> int:
    """How many samples to attack at a time where nobody says; results do not depend on it."""
    return LARGE_BATCH if image.is_cuda or image.numel() < SMALL else BATCH


def steady_product(x: Float[Tensor, "... k"], y: Float[Tensor, "k n"]) -> Float[Tensor, "... n"]:
    """``x @ y``, both sizes of ``y`` filled up with zeros to multiples of 16.

    At other sizes matrix kernels add up some rows of a batch in another order than others; convolutions do not.
    """
    filled = filled_up(y)
    if filled.shape == y.shape:
        return x @ y
    return (nn.functional.pad(x, (0, len(filled) - len(y))) @ filled)[..., : y.shape[1]]


def filled_up(y: Float[Tensor, "k n"]) -> Float[Tensor, "kk nn"]:
    """With rows and columns of zeros up to multiples of 16."""
    inner, outer = (-size % 16 for size in y.shape)
    return nn.functional.pad(y, (0, outer, 0, inner)) if inner or outer else y


class SteadyLinear(nn.Module):
    """A linear layer that computes every row of a batch in the same order."""

    weight: Tensor

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.inner, self.outer = -source.in_features % 16, source.out_features
        self.register_buffer("weight", filled_up(source.weight.detach().t()).contiguous())
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = nn.functional.pad(x, (0, self.inner)) @ self.weight
        product = product[..., : self.outer]
        return product if self.bias is None else product + self.bias


def steady(net: nn.Module) -> nn.Module:
    """The net, or where it has linear layers of odd sizes a copy, in which a row's bits do not depend on its place."""

    def odd(layer: nn.Module) -> bool:
        return type(layer) is nn.Linear and bool(layer.in_features % 16 or layer.out_features % 16)

    if odd(net):
        assert isinstance(net, nn.Linear)
        return SteadyLinear(net)
    if any(odd(layer) for layer in net.modules()):
        net = copy.deepcopy(net)
        for parent in list(net.modules()):
            for name, layer in parent.named_children():
                if odd(layer):
                    setattr(parent, name, SteadyLinear(layer))  # type: ignore[arg-type]  # odd layers are linear
    return net


@dataclass(frozen=True, eq=False)
class Target:
    """A classifier under attack. All nets map images ``(b, c, h, w)`` in [0,1] to logits, in eval mode.

    artifact: what ships; it alone says whether a point breaks a sample, and attacks without gradients query it.
    search: a differentiable net of the same function (folded, frozen; the straight-through twin of an 8-bit file), or
        None, when only attacks without gradients can run.
    parents: nets that the artifact was made from (the float parent of an 8-bit file), whose points may transfer.
    """

    artifact: nn.Module
    search: nn.Module | None
    parents: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, artifact: nn.Module, search: nn.Module | None = None, parents: tuple[nn.Module, ...] = ()) -> Target:
        """A target in whose nets every row is computed the same way whatever the batch."""
        nets = [None if net is None else Rows(steady(net.eval())).eval() for net in (artifact, search, *parents)]
        assert nets[0] is not None
        return cls(nets[0], nets[1], tuple(net for net in nets[2:] if net is not None))

    def logits(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """The artifact's logits, on the device of ``x``."""
        with torch.no_grad():
            logits: Tensor = self.artifact(x)
        return logits.to(x.device)

    def verdict(self, x: Float[Tensor, "b c h w"]) -> Int64[Tensor, " b"]:
        """The artifact's class of each image, the first of equals; INVALID where a logit is not finite."""
        logits = self.logits(x)
        return logits.argmax(1).masked_fill(~torch.isfinite(logits).all(1), INVALID)
