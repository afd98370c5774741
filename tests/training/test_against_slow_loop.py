"""The loop against a slow one written from the formulas, over twenty steps: every objective, dense and pruned.

The slow side sorts all scores anew, attacks the net itself in eval mode (its hook keeps it from being folded), takes
gradients of all weights, derives those of scores and rates by hand, and steps each tensor by SGD's formula. Both run in
float64, so that rounding decides no sign of an attack's gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from rprune.attacks.noise import Stream
from rprune.data.loaders import Batch
from rprune.models.prunable import prunable
from rprune.objectives.base import OBJECTIVES
from rprune.pruning.admm import RobustADMM
from rprune.pruning.base import Context, Pruner
from rprune.pruning.budget import Budget
from rprune.pruning.harp import Harp
from rprune.pruning.hydra import Hydra
from rprune.seeds import derive
from rprune.threat import ThreatModel
from rprune.training.loop import Settings, fit

STEPS, SEED, LR, MOMENTUM, DECAY = 20, 3, 0.02, 0.9, 5e-3
GAMMA_STEP, RHO, GROWTH, EVERY = 0.05, 0.2, 1.3, 5
THREAT = ThreatModel.of("linf", "8/255")
OPTIONS = {name: {"attack": {"steps": 3}} for name in ("pgd-at", "trades", "mart", "smoothadv", "mtl-ibp")}
OPTIONS |= {"free-at": {"replays": 1}, "wrm": {"steps": 3}}


@pytest.fixture(scope="module")
def tiny(load_helper):
    return load_helper("pruning/tiny_net.py")


@pytest.fixture(scope="module")
def oracle(load_helper):
    return load_helper("oracles/wrapper_net.py")


@dataclass(frozen=True)
class OneBatch:
    """An epoch is one batch, always the same, in float64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def sizes(self, batch_size: int) -> list[int]:  # noqa: ARG002
        return [len(self.y)]

    def shuffled(
        self,
        batch_size: int,
        generator: torch.Generator,  # noqa: ARG002
        augment: str,  # noqa: ARG002
        part: tuple[int, int] = (0, 1),  # noqa: ARG002
    ) -> Iterator[Batch]:
        yield from self.ordered(batch_size)

    def ordered(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:  # noqa: ARG002
        yield self.take(torch.arange(len(self.y)))

    def take(self, ids: Tensor) -> Batch:
        return Batch(self.x[ids], self.y[ids], ids)


def sizes(net: nn.Module) -> dict[str, int]:
    return {name: weight.numel() for name, weight in prunable(net).items()}


class Slow:
    """What all slow trainers share; this one trains every parameter."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.weights = net, prunable(net)
        self.trained = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        self.momenta: dict[str, Tensor] = {}

    def before_epoch(self, epoch: int) -> None: ...

    def penalty(self) -> float:
        return 0.0

    def write(self) -> None:
        for name, parameter in self.net.named_parameters():
            if name in self.trained:
                parameter.data.copy_(self.trained[name])

    def pulled(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of what is trained from those of the net's parameters."""
        return gradients

    def step(self) -> None:
        gradients = {name: p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}
        for name, gradient in self.pulled(gradients).items():
            change = gradient + DECAY * self.trained[name]
            self.momenta[name] = MOMENTUM * self.momenta[name] + change if name in self.momenta else change
            self.trained[name] -= LR * self.momenta[name]
        self.write()


class SlowHydra(Slow):
    def __init__(self, net: nn.Module, oracle, kept: dict[str, int]) -> None:
        super().__init__(net)
        self.oracle, self.kept = oracle, kept
        self.dense = {name: weight.detach().clone() for name, weight in self.weights.items()}
        norms = {name: value for name, value in self.trained.items() if ".".join(name.split(".")[:-1]).startswith("bn")}
        scores = {
            f"scores/{name}": oracle.scaled_initial_scores(weight, weight[0].numel())
            for name, weight in self.dense.items()
        }
        self.trained = scores | norms
        self.write()

    def pruned(self, name: str) -> int:
        return self.dense[name].numel() - self.kept[name]

    def write(self) -> None:
        super().write()
        for name, weight in self.dense.items():
            mask = self.oracle.mask_of(self.trained[f"scores/{name}"].abs(), self.pruned(name))
            self.weights[name].data.copy_(weight * mask)

    def pulled(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {
            f"scores/{name}": gradients[name] * weight * self.trained[f"scores/{name}"].sign()
            for name, weight in self.dense.items()
        }
        return found | {name: gradient for name, gradient in gradients.items() if name in self.trained}


class SlowHarp(SlowHydra):
    def __init__(self, net: nn.Module, oracle, density: float, start: float) -> None:
        self.density, self.gamma, self.met = density, 0.0, False
        self.r = {name: oracle.harp_initial_r(start, density) for name in prunable(net)}
        super().__init__(net, oracle, {})
        self.trained |= {f"r/{name}": torch.tensor(r, dtype=torch.float64) for name, r in self.r.items()}
        self.write()

    def rate(self, name: str) -> float:
        return float(self.oracle.rate(self.trained.get(f"r/{name}", self.r[name]), self.density))

    def pruned(self, name: str) -> int:
        return int((1 - self.rate(name)) * self.dense[name].numel())

    def excess(self) -> float:
        kept = sum(weight.numel() * self.rate(name) for name, weight in self.dense.items())
        return kept / (self.density * sum(weight.numel() for weight in self.dense.values())) - 1

    def before_epoch(self, epoch: int) -> None:
        self.met = self.met or (epoch > 0 and round(max(self.excess(), 0.0), 4) == 0)
        if not self.met:
            self.gamma = GAMMA_STEP * (epoch + 1)

    def penalty(self) -> float:
        return self.gamma * max(self.excess(), 0.0)

    def pulled(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        found, total = super().pulled(gradients), sum(weight.numel() for weight in self.dense.values())
        for name, weight in self.dense.items():
            least = 0.1 * self.density
            share = (self.rate(name) - least) / (1 - least)
            slope = (1 - least) * share * (1 - share)  # of the rate by r
            by_rate = (gradients[name] * weight).sum()
            if self.excess() > 0:
                by_rate = by_rate + self.gamma * weight.numel() / (self.density * total)
            found[f"r/{name}"] = by_rate * slope
        return found


class SlowAdmm(Slow):
    def __init__(self, net: nn.Module, oracle, kept: dict[str, int]) -> None:
        super().__init__(net)
        self.oracle, self.kept, self.rho = oracle, kept, RHO
        self.sparse = {name: self.projected(name, self.trained[name]) for name in self.weights}
        self.dual = {name: torch.zeros_like(self.trained[name]) for name in self.weights}

    def projected(self, name: str, value: Tensor) -> Tensor:
        return value * self.oracle.mask_of(value.abs(), value.numel() - self.kept[name])

    def before_epoch(self, epoch: int) -> None:
        if epoch and epoch % EVERY == 0:
            self.rho *= GROWTH
            for name in self.weights:
                self.sparse[name] = self.projected(name, self.trained[name] + self.dual[name])
                self.dual[name] = self.dual[name] + self.trained[name] - self.sparse[name]

    def gap(self, name: str) -> Tensor:
        return self.trained[name] - self.sparse[name] + self.dual[name]

    def penalty(self) -> float:
        return self.rho / 2 * sum(float((self.gap(name) ** 2).sum()) for name in self.weights)

    def pulled(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return gradients | {name: gradients[name] + self.rho * self.gap(name) for name in self.weights}


def pair(kind: str, oracle, net: nn.Module) -> tuple[Pruner, Slow, nn.Module]:
    """Both sides over equal nets; the second net is the slow side's."""
    other = copy.deepcopy(net)
    other.register_forward_hook(lambda *_: None)
    budget, context = Budget.of(sizes(net), 0.8), Context(epochs=STEPS)
    if kind == "dense":
        return Pruner(net), Slow(other), other
    if kind == "hydra":
        pruner = Hydra().bind(net, budget, context)
        return pruner, SlowHydra(other, oracle, pruner.counts()), other
    if kind == "harp":
        pruner = Harp(gamma_step=GAMMA_STEP, initial_density=0.5).bind(net, budget, context)
        pruner.r = pruner.r.detach().double()
        pruner._sizes = pruner._sizes.double()
        pruner.refresh()
        slow = SlowHarp(other, oracle, budget.density, 0.5)
        for index, name in enumerate(slow.dense):  # float32 rounded where rates begin, which is no maths
            slow.trained[f"r/{name}"] = pruner.r[index].clone()
        slow.write()
        return pruner, slow, other
    pruner = RobustADMM(rho=RHO, rho_growth=GROWTH, every=EVERY).bind(net, budget, context)
    return pruner, SlowAdmm(other, oracle, pruner.counts), other


@pytest.mark.parametrize("kind", ["dense", "hydra", "harp", "admm"])
@pytest.mark.parametrize("name", OBJECTIVES.all())
def test_twenty_steps(tiny, oracle, name: str, kind: str) -> None:
    objective = OBJECTIVES.build({"name": name, **OPTIONS.get(name, {})}, threat=THREAT)
    net, (x, y) = tiny.net(dtype=torch.float64).train(), tiny.batch(dtype=torch.float64)
    pruner, slow, other = pair(kind, oracle, net)
    settings = Settings(STEPS, len(y), LR, momentum=MOMENTUM, weight_decay=DECAY, schedule="constant", select="last")
    found = fit(net, pruner, objective, OneBatch(x, y), settings, seed=SEED)
    curve = []
    other.train()
    for epoch in range(STEPS):
        noise = Stream(torch.Generator().manual_seed(derive(SEED, "attack", epoch)))
        slow.before_epoch(epoch)
        for compute in objective(other, x, y, epoch / STEPS, noise):
            other.zero_grad()
            loss = compute().value
            loss.backward()
            curve.append(float(loss.detach()) + slow.penalty())
            slow.step()
    assert [log.values["loss"] for log in found.history] == pytest.approx(curve, rel=1e-7)
    assert curve[-1] != pytest.approx(curve[0], rel=1e-2)
    for key, value in slow.net.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=1e-6, atol=1e-8)
