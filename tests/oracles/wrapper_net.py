"""A slow, plain second implementation of HYDRA, HARP, ERK, LAMP, PGD and TRADES to compare the package with.

Written from the formulas alone, in the manner of the papers: every Conv2d and Linear is replaced by a class that
rebuilds its mask on every forward by fully sorting its scores. Nothing here imports the package under test.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALPHA = 0.1  # HARP: the smallest rate a layer may reach is ALPHA * a_t
CLIP = 0.01  # HARP eq. 7: u is clipped to [CLIP, 1 - CLIP] before its logit is taken

Batches = Iterable[tuple[Tensor, Tensor]]


def scaled_initial_scores(weight: Tensor, fan_in: int) -> Tensor:
    """HYDRA score init, HARP eq. 6: s = sqrt(6 / fan_in) * w / max|w|, signed."""
    largest = weight.abs().max()
    if largest == 0:
        raise ValueError("an all-zero weight has no scaled scores")
    return math.sqrt(6 / fan_in) * weight / largest


def harp_initial_r(a_init: float, a_t: float) -> float:
    """HARP eq. 7: the r whose rate is a_init, except that u is clipped to [0.01, 0.99]."""
    a_min = ALPHA * a_t
    u = (a_init - a_min) / (1 - a_min)
    u = min(max(u, CLIP), 1 - CLIP)
    return math.log(u / (1 - u))


def rate(r: Tensor | float, a_t: float) -> Tensor:
    """HARP rate map: a = a_min + (1 - a_min) * sigmoid(r), in float64, differentiable in r."""
    a_min = ALPHA * a_t
    return a_min + (1 - a_min) * torch.sigmoid(torch.as_tensor(r, dtype=torch.float64))


def hardware_loss(rates: Iterable[Tensor], sizes: Sequence[int], a_t: float) -> Tensor:
    """HARP eq. 2 on the differentiable rates: max(sum(N_l * a_l) / (a_t * sum(N_l)) - 1, 0)."""
    kept = torch.zeros((), dtype=torch.float64)
    for size, a in zip(sizes, rates, strict=True):
        kept = kept + size * a
    excess = kept / (a_t * sum(sizes)) - 1
    return torch.maximum(excess, torch.zeros_like(excess))


def gamma_schedule(step: float, hw_losses_at_epoch_end: Sequence[float]) -> list[float]:
    """HARP: gamma = step * (epoch + 1), held for good after the first epoch whose loss rounds (4 places) to 0."""
    gammas: list[float] = []
    frozen: float | None = None
    for epoch, loss in enumerate(hw_losses_at_epoch_end):
        gamma = step * (epoch + 1) if frozen is None else frozen
        gammas.append(gamma)
        if frozen is None and round(loss, 4) == 0:
            frozen = gamma
    return gammas


def reference_lr(lr0: float, E: int, e: int) -> float:
    """HYDRA and HARP: cosine per 0-based epoch e with the papers' off-by-one (epoch 1 is exactly lr0)."""
    return lr0 * 0.5 * (1 + math.cos((e - 1) / E * math.pi))


def uniform_kept(N: int, k: float | str | Fraction) -> int:
    """HYDRA: N - int((1 - k) * N) in exact arithmetic; a float k means the decimal it prints as."""
    return N - math.floor((1 - Fraction(str(k))) * N)


def mask_of(abs_scores: Tensor, n_pruned: int) -> Tensor:
    """HYDRA mask, HARP eq. 3: ascending sort, 0 for the first n_pruned, 1 for the rest (ties: lower index first)."""
    order = abs_scores.reshape(-1).sort(stable=True).indices
    flat = torch.ones_like(abs_scores).reshape(-1)
    flat[order[:n_pruned]] = 0
    return flat.reshape(abs_scores.shape)


class FixedMask(torch.autograd.Function):
    """HYDRA: mask of a given number of pruned entries; the whole gradient goes straight to |s|."""

    @staticmethod
    def forward(ctx: Any, abs_scores: Tensor, n_pruned: int) -> Tensor:  # noqa: ARG004
        return mask_of(abs_scores, n_pruned)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


class RateMask(torch.autograd.Function):
    """HARP eq. 5: mask of the layer's own rate; gradient straight to |s|, and its SUM over elements to the rate."""

    @staticmethod
    def forward(ctx: Any, abs_scores: Tensor, a: Tensor) -> Tensor:  # noqa: ARG004
        return mask_of(abs_scores, int((1 - float(a)) * abs_scores.numel()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return grad, grad.double().sum()


class Subnet:
    """What SubnetConv and SubnetLinear share: a frozen weight, its scores and, for HARP, one rate scalar r."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    scores: nn.Parameter
    r: nn.Parameter | None
    n_pruned: int | None
    a_t: float | None

    def begin(
        self, layer: nn.Conv2d | nn.Linear, fan_in: int, n_pruned: int | None, a_t: float | None, r: float | None
    ) -> None:
        """Copy the layer's values, freeze them, and start the scores (and r)."""
        if (n_pruned is None) == (a_t is None) or (a_t is None) != (r is None):
            raise ValueError("give either n_pruned (HYDRA) or both a_t and r (HARP)")
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.scores = nn.Parameter(scaled_initial_scores(self.weight, fan_in))
        self.r = None if r is None else nn.Parameter(torch.tensor(r, dtype=torch.float64))
        self.n_pruned = n_pruned
        self.a_t = a_t

    def layer_rate(self) -> Tensor:
        """HARP rate map: this layer's differentiable kept fraction."""
        if self.r is None or self.a_t is None:
            raise ValueError("a HYDRA layer has no rate")
        return rate(self.r, self.a_t)

    def mask(self) -> Tensor:
        """The 0/1 mask, rebuilt from the scores, with the straight-through gradient."""
        if self.r is None:
            return FixedMask.apply(self.scores.abs(), self.n_pruned)
        return RateMask.apply(self.scores.abs(), self.layer_rate())


class SubnetConv(Subnet, nn.Conv2d):
    """HYDRA/HARP convolution: conv2d with weight * mask."""

    def __init__(
        self, layer: nn.Conv2d, n_pruned: int | None = None, a_t: float | None = None, r: float | None = None
    ) -> None:
        nn.Conv2d.__init__(
            self,
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
        )
        fan_in = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
        self.begin(layer, fan_in, n_pruned, a_t, r)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the masked weight."""
        return self._conv_forward(x, self.weight * self.mask(), self.bias)


class SubnetLinear(Subnet, nn.Linear):
    """HYDRA/HARP dense layer: linear with weight * mask."""

    def __init__(
        self, layer: nn.Linear, n_pruned: int | None = None, a_t: float | None = None, r: float | None = None
    ) -> None:
        nn.Linear.__init__(self, layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.begin(layer, layer.in_features, n_pruned, a_t, r)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the masked weight."""
        return F.linear(x, self.weight * self.mask(), self.bias)


def to_subnet(
    model: nn.Module,
    pruned: dict[str, int] | None = None,
    a_t: float | None = None,
    r: float | dict[str, float] | None = None,
) -> nn.Module:
    """Deep-copy a plain net, then swap every Conv2d and Linear by its Subnet class under the same module name.

    HYDRA: pruned counts by module name. HARP: a_t and r, one value for all layers or one by module name.
    Train or eval mode stays as it was.
    """
    net = copy.deepcopy(model)
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for given in (pruned, r):
        if isinstance(given, dict) and set(given) != set(layers):
            raise ValueError(f"expected one entry for each of {sorted(layers)}, got {sorted(given)}")
    for name, layer in layers.items():
        kind = SubnetConv if isinstance(layer, nn.Conv2d) else SubnetLinear
        layer_r = r[name] if isinstance(r, dict) else r
        subnet = kind(layer, None if pruned is None else pruned[name], a_t, layer_r)
        subnet.train(layer.training)
        if name == "":
            return subnet
        for parent in list(net.modules()):  # a layer that is used under two names is replaced under both
            for child_name, child in list(parent._modules.items()):
                if child is layer:
                    setattr(parent, child_name, subnet)
    return net


def subnet_layers(net: nn.Module) -> dict[str, Subnet]:
    """The Subnet layers by module name, in module order."""
    return {name: module for name, module in net.named_modules() if isinstance(module, Subnet)}


def erk(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """ERK: density_l = eps * sum(dims) / prod(dims); while one exceeds 1, the largest is made dense and eps redone.

    Exact rational arithmetic; a float density means the decimal it prints as.
    """
    sizes = [math.prod(shape) for shape in shapes]
    budget = Fraction(str(density)) * sum(sizes)
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        result = [Fraction(1)] * len(shapes)
        if rest:
            eps = (budget - sum(sizes[i] for i in dense)) / sum(sum(shapes[i]) for i in rest)
            for i in rest:
                result[i] = eps * sum(shapes[i]) / sizes[i]
            largest = max(rest, key=lambda i: result[i])
            if result[largest] > 1:
                dense.add(largest)
                continue
        return [float(d) for d in result]


def lamp_scores(tensor: Tensor) -> Tensor:
    """LAMP: score(w_u) = w_u^2 / sum of w_v^2 over all v with |w_v| >= |w_u|, in float64, by the O(n^2) definition."""
    w = tensor.detach().double().reshape(-1)
    scores = torch.empty_like(w)
    for u in range(w.numel()):
        scores[u] = w[u] ** 2 / (w[w.abs() >= w[u].abs()] ** 2).sum()
    return scores.reshape(tensor.shape)


def kl_per_sample(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) of each row, with the gradient through both."""
    log_p = F.log_softmax(logits_p, dim=1)
    log_q = F.log_softmax(logits_q, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def trades_loss(logits_nat: Tensor, logits_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """TRADES: mean CE(z(x), y) + beta * mean KL(p(x) || p(x')), no detach anywhere."""
    return F.cross_entropy(logits_nat, y) + beta * kl_per_sample(logits_nat, logits_adv).mean()


def _sign_ascent(
    model: nn.Module, x: Tensor, y: Tensor | None, eps: float, step: float, n: int, start: Tensor
) -> Tensor:
    """n sign steps from start up the summed CE against y, or the summed KL(p(x) || p(x')) if y is None.

    Each step: move, project to the eps ball, clip to [0, 1]. Eval mode inside; every module's mode is put back.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    adv = start.detach().clone()
    for _ in range(n):
        adv.requires_grad_(True)
        if y is None:
            with torch.no_grad():
                clean = model(x)
            loss = kl_per_sample(clean, model(adv)).sum()
        else:
            loss = F.cross_entropy(model(adv), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, adv)
        moved = adv.detach() + step * grad.sign()
        moved = torch.minimum(torch.maximum(moved, x - eps), x + eps)
        adv = moved.clamp(0, 1)
    for module, training in modes:
        module.training = training
    return adv


def pgd_linf(model: nn.Module, x: Tensor, y: Tensor, eps: float, step: float, n: int, start: Tensor) -> Tensor:
    """PGD-AT's attack. start is the first x' itself (x + noise), taken as it is: not clamped before the first step."""
    return _sign_ascent(model, x, y, eps, step, n, start)


def trades_attack(model: nn.Module, x: Tensor, eps: float, step: float, n: int, start: Tensor) -> Tensor:
    """TRADES' attack on the summed KL, p(x) recomputed each step; start is the first x' itself (x + 0.001 * noise)."""
    return _sign_ascent(model, x, None, eps, step, n, start)


def _sgd_steps(
    net: nn.Module, a_t: float | None, gamma: float, batches: Batches, lr: float, momentum: float, wd: float
) -> dict[str, Tensor]:
    """One SGD step per batch on the scores and r alone; what they are afterwards, by parameter name."""
    trained = {
        name: p for name, p in net.named_parameters() if name.split(".")[-1] in ("scores", "r") and p.requires_grad
    }
    layers = subnet_layers(net).values()
    optimizer = torch.optim.SGD(list(trained.values()), lr=lr, momentum=momentum, weight_decay=wd)
    for x, y in batches:
        loss = F.cross_entropy(net(x), y)
        if a_t is not None:
            sizes = [layer.weight.numel() for layer in layers]
            loss = loss + gamma * hardware_loss([layer.layer_rate() for layer in layers], sizes, a_t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in trained.items()}


def sgd_steps_hydra(
    model: nn.Module, pruned: dict[str, int], batches: Batches, lr: float, momentum: float, wd: float
) -> dict[str, Tensor]:
    """HYDRA's prune phase with plain CE, in the mode model is in; returns {"<module>.scores": tensor}."""
    return _sgd_steps(to_subnet(model, pruned=pruned), None, 0.0, batches, lr, momentum, wd)


def sgd_steps_harp(
    model: nn.Module,
    a_t: float,
    gamma: float,
    r_init: float | dict[str, float],
    batches: Batches,
    lr: float,
    momentum: float,
    wd: float,
) -> dict[str, Tensor]:
    """HARP's prune phase, CE + gamma * L_hw; returns {"<module>.scores": tensor, "<module>.r": 0-d float64}."""
    return _sgd_steps(to_subnet(model, a_t=a_t, r=r_init), a_t, gamma, batches, lr, momentum, wd)
