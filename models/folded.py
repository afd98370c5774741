"""A net in eval mode with batch norm folded into the layers before it, for the many forwards of one step's attack.

The graph is traced once for each net and kept beside it. The folded weights follow from the net's own, which change
with every optimizer step: :func:`folded` computes them anew, once for all steps of an attack. All else is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from rprune.models.graph import batch_norm
from rprune.models.running import Running

CLOSE = 1e-3  # of logits, relative to the largest: folding rounds otherwise
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def folded(net: nn.Module, x: Tensor) -> nn.Module:
    """What gives the net's logits in fewer operations, with its weights of the moment; the net itself where none does.

    ``net`` is in eval mode; ``x``: images that it takes, on which the two are compared once. The result is valid until
    the net's weights change. Gradients flow to the images alone.
    """
    if isinstance(net, Running):
        return net.like(folded(net.net, x)).eval()
    if any(getattr(module, name) for module in net.modules() for name in HOOKS):
        return net  # a hook has to see what it was set up for
    kept = _KEPT.get(net)
    if kept is None or not kept.of(net):
        kept = _KEPT[net] = _Snapshot(net, x)
    if kept.graph is None:
        return net
    kept.refresh()
    return kept.graph


@dataclass(frozen=True, eq=False)
class _Fold:
    """A layer whose weights follow from those of ``source`` and the batch norm behind it."""

    own: Any
    source: Any
    norm: Any

    def refresh(self) -> None:
        scale, shift = batch_norm(self.norm, "")
        weight = self.source.weight
        torch.mul(weight, scale.reshape(-1, *(1,) * (weight.dim() - 1)), out=self.own.weight)
        self.own.bias.copy_(shift if self.source.bias is None else shift + scale * self.source.bias)

    def fits(self) -> bool:
        """Whether the source is still where and what it was."""
        mine, theirs = self.own.weight, self.source.weight
        return bool(mine.device == theirs.device and mine.dtype == theirs.dtype and mine.shape == theirs.shape)


class _Snapshot:
    """The folded graph of a net; None where there is nothing to fold, or its forward is no graph."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self.parts = _parts(net)
        self.folds: list[_Fold] = []
        self.graph = self._traced(net)
        if self.graph is not None:
            self.refresh()
            if not _alike(self.graph, net, x):  # what is drawn or decided in forward is no part of a graph
                self.graph = None

    def of(self, net: nn.Module) -> bool:
        """Whether the net still consists of the modules that were traced."""
        now = _parts(net)
        same = len(now) == len(self.parts) and all(a is b for a, b in zip(now, self.parts, strict=True))
        return same and all(fold.fits() for fold in self.folds)

    @torch.no_grad()
    def refresh(self) -> None:
        for fold in self.folds:
            fold.refresh()

    def _traced(self, net: nn.Module) -> nn.Module | None:
        try:
            graph = fx.Tracer().trace(net)
            shell = fx.GraphModule(net, graph)
        except Exception:  # torch.fx raises many kinds for control flow that it cannot follow
            return None
        calls = [node.target for node in graph.nodes if node.op == "call_module"]
        for node in list(graph.nodes):
            if not _called_once(node, calls) or not _is_norm(norm := shell.get_submodule(node.target)):
                continue
            (before,) = node.all_input_nodes
            if not _called_once(before, calls) or len(before.users) != 1:
                continue
            source = shell.get_submodule(before.target)
            if type(source) not in (nn.Conv2d, nn.Linear):
                continue
            own = _like(source)
            shell.set_submodule(before.target, own)
            self.folds.append(_Fold(own, source, norm))
            node.replace_all_uses_with(before)
            graph.erase_node(node)
        if not self.folds:
            return None
        shell.delete_all_unused_submodules()
        shell.recompile()
        return shell


_KEPT: WeakKeyDictionary[nn.Module, _Snapshot] = WeakKeyDictionary()


def _parts(net: nn.Module) -> list[nn.Module]:
    """Without the net, which would keep itself alive."""
    return list(net.modules())[1:]


def _called_once(node: fx.Node, calls: list[Any]) -> bool:
    return node.op == "call_module" and calls.count(node.target) == 1


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def _like(source: Any) -> nn.Module:
    """A layer of the same geometry with a bias, and weights to be filled in."""
    if isinstance(source, nn.Linear):
        own: Any = nn.Linear(source.in_features, source.out_features, device="meta")
    else:
        own = nn.Conv2d(
            source.in_channels, source.out_channels, source.kernel_size, source.stride, source.padding,
            source.dilation, source.groups, padding_mode=source.padding_mode, device="meta",
        )  # fmt: skip
    weight = source.weight.detach()
    own.weight = nn.Parameter(torch.empty_like(weight), requires_grad=False)
    own.bias = nn.Parameter(weight.new_empty(len(weight)), requires_grad=False)
    own.eval()
    return own  # type: ignore[no-any-return]


@torch.no_grad()
def _alike(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    found, wanted = one(x), other(x)
    return bool(((found - wanted).abs() <= CLOSE * wanted.abs().max()).all()) or not bool(wanted.isfinite().all())
