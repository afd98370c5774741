"""Soups: several trainings of one network from one start, averaged weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]


def greedy_soup(
    states: Sequence[State], scores: Sequence[float], score: Callable[[State], float]
) -> tuple[State, list[int], float]:
    """The mean of those states that do not lower its score, which of them these are, and its score.

    Greedy soup (Wortsman et al., ICML 2022, recipe 1): from the best state on, each is taken in where the mean with
    it scores at least as much. States that share a mask have a mean with that mask (Zimmer et al., ICLR 2024). Running
    statistics are averaged like weights; integers are the best state's.

    Args:
        states: state_dicts of equal names and shapes.
        scores: of each state, on the samples that ``score`` takes; higher is better.
    """
    order = sorted(range(len(states)), key=lambda i: -scores[i])  # of equal ones the first
    taken, best, mean = order[:1], scores[order[0]], states[order[0]]
    for index in order[1:]:
        tried = averaged([states[i] for i in [*taken, index]])
        found = score(tried)
        if found >= best:
            taken, best, mean = [*taken, index], found, tried
    return mean, taken, best


def averaged(states: Sequence[Mapping[str, Tensor]]) -> State:
    """The mean of every floating-point tensor; others are the first state's."""
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if first.is_floating_point() else first.clone()
        for name, first in states[0].items()
    }
