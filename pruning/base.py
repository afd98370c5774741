"""The contract of a pruning method.

A :class:`Method` is what a recipe says: a frozen dataclass of hyper-parameters. :meth:`Method.bind` gives a
:class:`Pruner`, the running state. The loop drives it like this::

    pruner.attach(optimizer over pruner.parameters())
    for epoch:
        pruner.before_epoch(epoch)
        for batch:
            loss = objective loss + pruner.penalty();  loss.backward();  pruner.before_step()
            optimizer.step();  pruner.after_step()
        pruner.after_epoch(epoch)
    masks = pruner.finish()

The model is always a plain nn.Module that holds the weights it runs with. A method that learns something else than the
weights keeps it outside, pulls the weight gradients to it in ``before_step`` and writes the weights in ``after_step``.
A tensor whose gradient is None after ``before_step`` is not stepped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rprune.data.loaders import Batch
from rprune.errors import UsageError
from rprune.models.prunable import prunable
from rprune.pruning.budget import Budget
from rprune.pruning.masks import Masks, impose
from rprune.registry import Configured, Registry
from rprune.threat import ThreatModel


@dataclass(frozen=True)
class Context:
    """What a method may know of the stage that runs it.

    ``batches()`` goes once over the training data, shuffled by ``seed``, without augmentation; ``loss(net, batch)`` is
    the stage's training objective there. Both serve methods that score before they train (SNIP, MAD).
    ``input_shape`` (c, h, w) serves those that follow the forward pass (structured pruning, HARP's ``macs_weight``).
    """

    epochs: int = 0
    steps_per_epoch: int = 0
    seed: int = 0
    lr: float = 0.1
    threat: ThreatModel | None = None
    input_shape: tuple[int, int, int] | None = None
    batches: Callable[[], Iterator[Batch]] | None = None
    loss: Callable[[nn.Module, Batch], Tensor] | None = None

    def data(self) -> Iterator[Batch]:
        """:attr:`batches`, where there are any. Raises UsageError otherwise."""
        if self.batches is None:
            raise UsageError("this method scores weights on training data", "bind it with a Context that has batches")
        return self.batches()

    def shape(self) -> tuple[int, int, int]:
        """:attr:`input_shape`, where there is one. Raises UsageError otherwise."""
        if self.input_shape is None:
            raise UsageError("this method follows the forward pass", "bind it with a Context's input_shape")
        return self.input_shape


class Pruner:
    """Base: nothing is pruned. Every hook has a default, so that dense training is this class itself.

    ``radius``: relative size of the worst-case perturbation that the loop adds to what is learned, from epoch
    ``radius_from`` on (S2AP); 0 for none.
    """

    radius: float = 0.0
    radius_from: int = 0
    exact: bool = True
    """masks() meets the budget (``Budget.met``); structured pruners keep at most that."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer: torch.optim.Optimizer | None = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer over :meth:`parameters` exists; methods that read or reset momentum keep it."""
        self.optimizer = optimizer

    def parameters(self) -> Iterable[Tensor]:
        """What the optimizer trains."""
        return self.model.parameters()

    def penalty(self) -> Tensor | None:
        """A scalar added to the loss."""
        return None

    def before_epoch(self, epoch: int) -> None: ...

    def before_step(self) -> None:
        """Weight gradients are ready. Called again where the step's gradient is taken again, so it only reads them."""

    def after_step(self) -> None:
        """The optimizer has stepped."""

    def refresh(self) -> None:
        """What is learned was changed from outside: bring the model's weights in line with it."""

    def after_epoch(self, epoch: int) -> None: ...

    def within_budget(self) -> bool:
        """May this epoch's state be selected?"""
        return True

    def masks(self) -> Masks:
        """Entries that are True meet the budget where ``exact``, else cost at most that; empty: nothing is pruned."""
        return {}

    def finish(self) -> Masks:
        """End of the stage: the model holds exactly the weights that the returned :meth:`masks` keep."""
        return self.masks()

    def log(self) -> dict[str, float]:
        """Figures of this epoch worth a line in the log and the report."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class Fixed(Pruner):
    """A mask that is held: fine-tuning. Gradients are masked, so that momentum never revives a weight."""

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        super().__init__(model)
        self._masks = masks
        self._weights = {name: weight for name, weight in prunable(model).items() if name in masks}
        impose(self._weights, masks)

    def before_step(self) -> None:
        for name, weight in self._weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(~self._masks[name], 0.0)

    def after_step(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        impose(self._weights, self._masks)

    def masks(self) -> Masks:
        return self._masks


class Scored(Pruner, ABC):
    """Base of methods that learn a score for every weight and keep the weights themselves (HYDRA and its heirs).

    ``weights`` holds the dense pretrained values. ``effective`` is the differentiable form of the weights in use; its
    gradient is pulled from the model's weight gradients with one backward call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._held = prunable(model)
        self.weights = {name: weight.detach().clone() for name, weight in self._held.items()}
        norms = (
            m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
        )
        self._norms = [p for module in norms for p in module.parameters(recurse=False)]

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Kept weights of each layer now."""

    @abstractmethod
    def current_masks(self) -> Masks:
        """Masks of the search, which may be off the budget while a method still looks for its rates."""

    @abstractmethod
    def effective(self) -> Iterator[tuple[str, Tensor]]:
        """Weights in use by name, as a function of what is learned; those alone that depend on it."""

    def before_step(self) -> None:
        for name, weight in self.effective():  # one layer after another, whose memory is free again for the next
            held = self._held[name]
            if held.grad is not None:
                torch.autograd.backward(weight, held.grad, retain_graph=True)  # rates are shared by layers
                held.grad = None

    def after_step(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        self.write(self.current_masks())

    def finish(self) -> Masks:
        masks = self.masks()
        self.write(masks)  # the final masks may keep weights that the search had out at its selected epoch
        return masks

    def write(self, masks: Masks) -> None:
        """Put the effective weights into the model in place."""
        with torch.no_grad():
            for name, mask in masks.items():
                self._held[name].copy_(self.weights[name]).masked_fill_(~mask, 0.0)


class Moving(Fixed):
    """A mask that changes in training, or that a second look at the data may not find again: part of the state."""

    def state_dict(self) -> dict[str, Any]:
        return {"masks": dict(self._masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._masks = {name: mask.to(self._weights[name].device) for name, mask in state["masks"].items()}
        self.refresh()


def straight_through(x: Tensor) -> Tensor:
    """Value 0, derivative 1: added to a mask it makes dL/dx = dL/dmask (Bengio et al., 2013)."""
    return x - x.detach()


class Method(Configured, ABC):
    """Base of all methods. Derived classes are frozen dataclasses whose docstring is the method card.

    Class variables: ``epochs`` of the pruning step in the paper, 0 for methods that do not train in it, and its ``lr``;
    ``paper``, what it ``learns``, ``cost`` and ``structures`` (of which the first is the default) for ``rprune list
    methods``; ``paper_settings``, what the authors ran, as tables of the stages and the threat (preset "paper");
    ``counted``, options that count epochs, which shrink with a stage that a time budget shortens.
    """

    epochs: ClassVar[int] = 20
    lr: ClassVar[float] = 0.1
    paper_settings: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    paper: ClassVar[str] = ""
    learns: ClassVar[str] = "nothing"
    cost: ClassVar[str] = ""
    structures: ClassVar[tuple[str, ...]] = ("weight",)
    counted: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        """Start pruning ``model`` in place. When this returns, the model holds the weights that it runs with."""

    def takes_costs(self) -> bool:
        """Does it keep to a budget whose weights cost unequally (``Budget.costs``)?"""
        return False


METHODS: Registry[Method] = Registry("method", "rprune.pruning", lambda: Method)


def check_costs(method: Method) -> None:
    """Raises UsageError for a method, or options of one, that cannot keep to a budget of multiply-accumulates."""
    if not method.takes_costs():
        able = [name for name, cls in METHODS.all().items() if cls().takes_costs()]
        raise UsageError(
            f"{METHODS.name_of(method)} with these options has a budget of weights, not of multiply-accumulates",
            f"use a sparsity, or single weights by {', '.join(able)}",
        )
