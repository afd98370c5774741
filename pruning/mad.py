"""MAD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from rprune.attacks.base import at_rest, cross_entropy, frozen
from rprune.attacks.noise import Stream
from rprune.attacks.pgd import PGD
from rprune.errors import UsageError
from rprune.models.prunable import prunable
from rprune.pruning.allocation import global_top, uniform
from rprune.pruning.base import METHODS, Context, Method, Moving, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.curvature import damage, recorded
from rprune.pruning.masks import Masks, top_mask
from rprune.pruning.papers import Settings
from rprune.seeds import derive

LOWEST, HIGHEST = math.log(math.expm1(1e-4)), math.log(math.expm1(1.0))  # softplus is 1e-4 and 1 there


def removed(mu: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """1 - softplus(mu), and exactly 0 at the upper bound, where rounding would leave noise to rank weights by."""
    return torch.where(mu < HIGHEST, 1 - nn.functional.softplus(mu), 0.0)


def soft_mask(
    model: nn.Module, x: Float[Tensor, "b c h w"], y: Int64[Tensor, " b"], steps: int, lr: float
) -> dict[str, Tensor]:
    """1 - m of every prunable weight for the mask m in [1e-4, 1] that Adam finds from 1 on, lowering the loss at x.

    The model is in eval mode and its parameters are frozen.
    """
    weights = prunable(model)
    mu = {name: torch.full_like(weight, HIGHEST, requires_grad=True) for name, weight in weights.items()}
    optimizer = torch.optim.Adam(mu.values(), lr)
    for _ in range(steps):
        masked = {name: weight * nn.functional.softplus(mu[name]) for name, weight in weights.items()}
        loss = nn.functional.cross_entropy(functional_call(model, masked, x), y)
        for tensor, gradient in zip(mu.values(), torch.autograd.grad(loss, list(mu.values())), strict=True):
            tensor.grad = gradient
        optimizer.step()
        for tensor in mu.values():
            tensor.data.clamp_(LOWEST, HIGHEST)
    return {name: removed(tensor.detach()) for name, tensor in mu.items()}


def batch_damage(
    model: nn.Module, x: Float[Tensor, "b c h w"], y: Int64[Tensor, " b"], steps: int, lr: float
) -> dict[str, Tensor]:
    """Saliency of every prunable weight at adversarial points x."""
    weights = prunable(model)
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}
    with frozen(model):
        delta = {name: weights[name] * share for name, share in soft_mask(model, x, y, steps, lr).items()}
        masked = {name: (weight - delta[name]).requires_grad_() for name, weight in weights.items()}
        with recorded(layers) as calls:
            loss = nn.functional.cross_entropy(functional_call(model, masked, x), y)
        outputs = [output for made in calls.values() for _, output in made]
        gradients = iter(torch.autograd.grad(loss, outputs, materialize_grads=True))
        found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for name, made in calls.items():
            for a, _ in made:
                found[name] += damage(layers[name], delta[name], a, next(gradients))
    return found


def ranked(scores: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every weight's place in one order of all, by score and among equal scores by magnitude; float64, so exact."""
    flat = torch.cat([scores[name].flatten() for name in weights])
    order = torch.cat([weight.detach().abs().flatten() for weight in weights.values()]).argsort(stable=True)
    order = order[flat[order].argsort(stable=True)]
    place = torch.empty_like(flat, dtype=torch.float64)
    place[order] = torch.arange(len(flat), dtype=torch.float64, device=flat.device)
    parts = torch.split(place, [weight.numel() for weight in weights.values()])
    return {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}


def choose(scores: Mapping[str, Tensor], weights: Mapping[str, Tensor], budget: Budget) -> Masks:
    """The highest scores of all convolutions together; of a linear layer the budget's share, evenly over its rows."""
    places = ranked(scores, weights)
    counts = uniform(weights, budget)
    convolutions = {name: place for name, place in places.items() if place.dim() > 2}
    if convolutions:
        kept = sum(counts[name] for name in convolutions)
        sizes = {name: budget.sizes[name] for name in convolutions}
        counts |= global_top(convolutions, Budget(sizes, kept, budget.floor, budget.dense & frozenset(sizes)))
    for name, place in places.items():
        if name not in convolutions:
            places[name] = place.argsort(1).argsort(1) * float(budget.total) + place  # first by place in the row
    return {name: top_mask(place, counts[name]) for name, place in places.items()}


@METHODS.register("mad")
@dataclass(frozen=True, kw_only=True)
class MAD(Method):
    """Mask adversarial damage: prune what second order says costs least robustness (Lee et al., CVPR 2022, section 3).

    For every batch of adversarial points, ``mask_steps`` 20 of Adam at lr 0.1 find the soft mask m that lowers their
    loss; with K-FAC's factors at the masked net, S = 1/2 G_ii dW_ij (dW A)_ij, dW = W - W m, is averaged over
    ``batches`` (None: all, as the paper's single pass). The lowest go: of all convolutions together, of a linear layer
    at the budget's share in every row. Figures are the authors' code's; its attack has eps 0.03, here the threat's.
    Most S are 0, which their code leaves to the sort: here magnitude decides, and layers keep their floor. Biases are
    neither ranked nor counted. The paper fine-tunes for 60 epochs with MART at beta 0.5; HARP's authors could not
    reproduce its results. Costs 11 + mask_steps + 2 gradients a batch, about 3 epochs of PGD-AT in all.
    """

    epochs: ClassVar[int] = 0
    paper: ClassVar[str] = "Lee et al., CVPR 2022"
    cost: ClassVar[str] = "33 gradients a batch, 1 pass"
    paper_settings: ClassVar[Settings] = {
        "threat": {"norm": "linf", "eps": "0.03"},
        "train": {"objective": "pgd-at", "epochs": 60},
        "finetune": {
            "objective": {"name": "mart", "beta": 0.5, "attack": {"steps": 10, "step": 0.0069 / 0.03}},
            "epochs": 60,
            "lr": 0.1,
            "weight_decay": 2e-4,
            "schedule": "piecewise:0.5,0.75",
        },
    }

    batches: Annotated[int, Field(ge=1)] | None = None
    mask_steps: Annotated[int, Field(ge=1)] = 20
    mask_lr: Annotated[float, Field(gt=0)] = 0.1
    attack: PGD = PGD(steps=10, step=0.23)

    def bind(self, model: nn.Module, budget: Budget, context: Context) -> Pruner:
        if context.threat is None:
            raise UsageError("MAD attacks the model that it prunes", "bind it with a Context that has a threat")
        weights = prunable(model)
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for index, batch in enumerate(islice(context.data(), self.batches)):
            generator = torch.Generator(batch.x.device).manual_seed(derive(context.seed, "score", index))
            goal = cross_entropy(batch.y)
            with at_rest(model, batch.x) as still:
                point = self.attack.training_point(still, batch.x, context.threat, goal, Stream(generator))
            for name, found in batch_damage(model, point, batch.y, self.mask_steps, self.mask_lr).items():
                total[name] += found
        return Moving(model, choose(total, weights, budget))
