"""The one training loop: dense training, pruning and fine-tuning differ in their pruner alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rprune.attacks.noise import Stream
from rprune.data.loaders import Loader
from rprune.data.splits import Augment
from rprune.errors import WorkError
from rprune.objectives.base import Objective
from rprune.pruning.base import Pruner
from rprune.seeds import derive
from rprune.training.schedules import schedule
from rprune.training.state import load_state, save_state


@dataclass(frozen=True)
class Settings:
    """How a stage trains. ``select``: "best" keeps the epoch of the highest validation score, "last" the last one."""

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    select: str = "best"


@dataclass(frozen=True)
class EpochLog:
    """One line of log.jsonl; ``values`` holds losses, train accuracy, validation score and the pruner's figures."""

    epoch: int
    epochs: int
    values: dict[str, float] = field(default_factory=dict)


@dataclass
class FitResult:
    history: list[EpochLog]
    selected_epoch: int | None  # None: no epoch ran, or none met the budget and the last one was taken
    score: float | None


Score = Callable[[nn.Module], dict[str, float]]
"""Validation figures of a model; the one called "score" decides which epoch is selected."""


def fit(
    model: nn.Module,
    pruner: Pruner,
    objective: Objective,
    data: Loader,
    settings: Settings,
    *,
    augment: Augment = "none",
    validate: Score | None = None,
    seed: int = 0,
    on_epoch: Callable[[EpochLog], None] = lambda log: None,
    state_file: Path | None = None,
) -> FitResult:
    """Train what ``pruner`` offers, in place, and leave the model in the state of the selected epoch.

    All randomness of an epoch comes from (seed, epoch), so a run that resumes from ``state_file`` after any finished
    epoch ends with the same weights, bit for bit on a CPU, as one that was never interrupted.

    Raises:
        WorkError: the loss is not finite.
    """
    trained = list(pruner.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(
        trained, settings.lr, settings.momentum, weight_decay=settings.weight_decay, fused=_fusable(trained)
    )
    factor = schedule(settings.schedule)
    run = _Run(model, pruner, optimizer, state_file)
    steps = math.ceil(len(data) / settings.batch_size)
    device = next(model.parameters()).device

    with _private_rng(device):
        for epoch in range(run.start, settings.epochs):
            torch.manual_seed(derive(seed, "dropout", epoch))
            order = torch.Generator().manual_seed(derive(seed, "batches", epoch))
            noise = Stream(torch.Generator(device).manual_seed(derive(seed, "attack", epoch)))
            pruner.before_epoch(epoch)
            model.train()
            meter = _Meter(device)
            for step, batch in enumerate(data.shuffled(settings.batch_size, order, augment)):
                done = step / steps
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * factor(epoch, done, settings.epochs)
                for loss in objective(model, batch.x, batch.y, (epoch + done) / settings.epochs, noise):
                    model.zero_grad(set_to_none=True)
                    optimizer.zero_grad(set_to_none=True)
                    penalty = pruner.penalty()
                    total = loss.value if penalty is None else loss.value + penalty
                    total.backward()  # type: ignore[no-untyped-call]
                    pruner.before_step()
                    optimizer.step()
                    pruner.after_step()
                    meter.add(total.detach(), loss.logits.detach(), batch.y, loss.parts)
            pruner.after_epoch(epoch)
            values = meter.values() | pruner.log()
            if not math.isfinite(values["loss"]):
                raise WorkError(f"the loss is {values['loss']} in epoch {epoch + 1}", "lower the learning rate (lr)")
            if validate is not None:
                values |= validate(model)
            run.finish_epoch(EpochLog(epoch + 1, settings.epochs, values), settings.select)
            on_epoch(run.history[-1])
    return run.restore_selected()


class _Run:
    """History and best state of a stage, and their way to disk and back."""

    def __init__(self, model: nn.Module, pruner: Pruner, optimizer: torch.optim.Optimizer, file: Path | None) -> None:
        self.model, self.pruner, self.optimizer, self.file = model, pruner, optimizer, file
        self.history: list[EpochLog] = []
        self.best: dict[str, Any] | None = None
        self.start = 0
        if file is not None and file.exists():
            state = load_state(file)
            self._load(state["now"])
            optimizer.load_state_dict(state["optimizer"])
            self.best = state["best"]
            self.history = [EpochLog(**entry) for entry in state["history"]]
            self.start = len(self.history)

    def finish_epoch(self, log: EpochLog, select: str) -> None:
        self.history.append(log)
        score = log.values.get("score", 0.0)
        if self.pruner.within_budget() and (select == "last" or self.best is None or score >= self.best["score"]):
            self.best = copy.deepcopy(self._now()) | {"score": score, "epoch": log.epoch}
        if self.file is not None:
            history = [vars(entry) for entry in self.history]
            optimizer = self.optimizer.state_dict()
            save_state(self.file, {"now": self._now(), "best": self.best, "optimizer": optimizer, "history": history})

    def restore_selected(self) -> FitResult:
        if self.best is None:
            return FitResult(self.history, None, None)
        self._load(self.best)
        return FitResult(self.history, self.best["epoch"], self.best["score"])

    def _now(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "pruner": self.pruner.state_dict()}

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.pruner.load_state_dict(state["pruner"])


class _Meter:
    """Sums on the device; one transfer an epoch."""

    def __init__(self, device: torch.device) -> None:
        self.sums: dict[str, Tensor] = {}
        self.zero = torch.zeros((), device=device)

    def add(self, loss: Tensor, logits: Tensor, y: Tensor, parts: dict[str, Tensor]) -> None:
        count = len(y)
        correct = (logits.argmax(1) == y).sum()
        for name, value in {"loss": loss * count, "train_accuracy": correct, "n": self.zero + count}.items():
            self.sums[name] = self.sums.get(name, self.zero) + value
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, self.zero) + value * count

    def values(self) -> dict[str, float]:
        names = list(self.sums)
        numbers = dict(zip(names, torch.stack([self.sums[name] for name in names]).tolist(), strict=True))
        n = numbers.pop("n")
        return {name: value / n for name, value in numbers.items()}


@contextmanager
def _private_rng(device: torch.device) -> Iterator[None]:
    """Dropout draws from the global generator; the caller's state is put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _fusable(parameters: Iterable[Tensor]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
