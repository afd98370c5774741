"""What the scores of HYDRA and its heirs start from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import init

from rprune.errors import unknown_name
from rprune.seeds import derive

InitialScores: TypeAlias = Literal[
    "scaled", "xavier-normal", "xavier-uniform", "kaiming-normal", "kaiming-uniform", "orthogonal", "dirac"
]
"""The initialisations that HYDRA compares (NeurIPS 2020, section 4). All but ``scaled`` ignore the weights."""

Fill: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]


def scaled_initial_scores(weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
    """sqrt(6 / fan_in) w / max|w| (HYDRA's scaled initialisation). An all-zero tensor gets all-zero scores."""
    fan_in = weight[0].numel()
    largest = weight.detach().abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
    scores: Tensor = (6 / fan_in) ** 0.5 * weight.detach() / largest
    return scores


def _dirac(scores: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001  it draws nothing
    """The identity over channels; a linear layer is a 1x1 convolution. Scores of 0 have no gradient and never move."""
    init.dirac_(scores.view(*scores.shape[:2], *(scores.shape[2:] or (1, 1))))
    return scores


RANDOM: dict[str, Fill] = {
    "xavier-normal": lambda scores, generator: init.xavier_normal_(scores, generator=generator),
    "xavier-uniform": lambda scores, generator: init.xavier_uniform_(scores, generator=generator),
    "kaiming-normal": lambda scores, generator: init.kaiming_normal_(scores, generator=generator),
    # a = sqrt(5) as in edge-popup's code, HYDRA's fallback and torch's own layers
    "kaiming-uniform": lambda scores, generator: init.kaiming_uniform_(scores, a=math.sqrt(5), generator=generator),
    "orthogonal": lambda scores, generator: init.orthogonal_(scores, generator=generator),
    "dirac": _dirac,
}


def initial_scores(name: str, weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Scores of every tensor, of its shape, dtype, device and memory layout.

    Drawn on the CPU from (seed, tensor name) alone. Raises UsageError for an unknown ``name``.
    """
    if name == "scaled":
        return {layer: scaled_initial_scores(weight) for layer, weight in weights.items()}
    if name not in RANDOM:
        raise unknown_name("initialisation of scores", name, ["scaled", *RANDOM])
    scores = {}
    for layer, weight in weights.items():
        generator = torch.Generator().manual_seed(derive(seed, "scores", layer))
        drawn = RANDOM[name](torch.empty(weight.shape, dtype=weight.dtype), generator)
        scores[layer] = torch.empty_like(weight).copy_(drawn).detach()
    return scores
