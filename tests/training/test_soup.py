"""The greedy soup against the recipe as its paper writes it, and what it promises."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rprune.training.soup import averaged, greedy_soup


def slow(states, scores, score):
    """Recipe 1 of Wortsman et al., on lists of numbers."""
    order = sorted(range(len(states)), key=lambda i: -scores[i])
    soup, best = [order[0]], scores[order[0]]
    for i in order[1:]:
        mean = [sum(states[j][k] for j in [*soup, i]) / (len(soup) + 1) for k in range(len(states[0]))]
        if score(mean) >= best:
            soup, best = [*soup, i], score(mean)
    return soup, best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-8, 8), min_size=3, max_size=3), min_size=1, max_size=5))
def test_it_is_the_recipe_of_the_paper(numbers):
    def near(values):
        return -sum((value - goal) ** 2 for value, goal in zip(values, (1, 2, -3), strict=True))

    states = [{"w": torch.tensor(values, dtype=torch.float64)} for values in numbers]
    scores = [near(values) for values in numbers]
    mean, taken, best = greedy_soup(states, scores, lambda state: near(state["w"].tolist()))
    wanted, score = slow(numbers, scores, near)
    assert taken == wanted
    assert abs(best - score) < 1e-9
    assert best >= max(scores)
    assert torch.allclose(mean["w"], torch.tensor(numbers, dtype=torch.float64)[taken].mean(0))


def test_a_mask_that_all_share_is_the_means():
    mask = torch.rand(20, 20, generator=torch.Generator().manual_seed(0)) < 0.1
    states = [{"w": torch.randn(20, 20, generator=torch.Generator().manual_seed(i)) * mask} for i in range(3)]
    assert torch.equal(averaged(states)["w"] != 0, mask)


def test_counters_are_the_first_states():
    states = [{"n": torch.tensor(3)}, {"n": torch.tensor(8)}]
    assert averaged(states)["n"].item() == 3
