"""Functions that the adapter can be given: a user's own PGD, and wrong ones."""

import torch
from torch.nn import functional

EPS = 0.03


def my_pgd(logits_fn, x, y):
    """Madry et al.'s attack in linf as anybody would write it."""
    point = x
    for _ in range(4):
        point = point.detach().requires_grad_()
        loss = functional.cross_entropy(logits_fn(point), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point)
        delta = (point.detach() + 0.02 * gradient.sign().nan_to_num(0) - x).clamp(-EPS, EPS)
        point = (x + delta).clamp(0, 1)
    return point


def my_l2_pgd(logits_fn, x, y):
    """The same in l2, with the backward pass of a library, which leaves gradients wherever they are wanted."""
    point = x.clone()
    for _ in range(4):
        point.requires_grad_()
        functional.cross_entropy(logits_fn(point), y, reduction="sum").backward()
        gradient = point.grad / point.grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        delta = (point + 0.2 * gradient - x).detach()
        delta *= (0.5 / delta.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1).view(-1, 1, 1, 1)
        point = (x + delta).clamp(0, 1)
    return point


def random_start(logits_fn, x, y):  # noqa: ARG001
    return (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)


def in_place(logits_fn, x, y):  # noqa: ARG001
    y.zero_()
    return x.mul_(0.999)


def in_float64(logits_fn, x, y):  # noqa: ARG001
    return x.double()


def a_hair_outside(logits_fn, x, y):  # noqa: ARG001
    return x + (EPS + 5e-7)


def too_far(logits_fn, x, y):  # noqa: ARG001
    return (x + 0.04).clamp(0, 1)


def out_of_the_box(logits_fn, x, y):  # noqa: ARG001
    return x - EPS


def not_finite(logits_fn, x, y):  # noqa: ARG001
    return x * torch.nan


def nothing(logits_fn, x, y):  # noqa: ARG001
    return None


def as_numpy(logits_fn, x, y):  # noqa: ARG001
    return x.numpy()


def only_successes(logits_fn, x, y):
    return x[logits_fn(x).argmax(1) != y]


number = 7
