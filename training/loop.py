"""The one training loop: dense training, pruning and fine-tuning differ in their pruner alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rprune.attacks.noise import Stream
from rprune.data.loaders import Loader, Rows
from rprune.data.splits import Augment
from rprune.errors import WorkError, unknown_name
from rprune.models.running import Precision, Running
from rprune.objectives.base import Loss, Objective, Step
from rprune.phases import phase
from rprune.pruning.base import Pruner
from rprune.seeds import derive
from rprune.training.averaging import Average, Kind, perturbed
from rprune.training.schedules import schedule, warmed_up
from rprune.training.state import load_state, save_state
from rprune.training.world import World, world

OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class Settings:
    """How a stage trains.

    ``select``: "best" keeps the epoch of the highest validation score, "last" the last one. ``warmup``: epochs of
    linear warm-up. ``clip_norm``: gradients of all that is trained are scaled to at most this norm. ``average``: what
    is validated and selected is an average (:class:`Average`). ``awp``: relative radius of the adversarial weight
    perturbation from epoch ``awp_from`` on; 0 for none. ``batch_size``: images of a step, of all processes together;
    ``accumulate``: each process takes its share of them in so many parts, one after another, which saves memory.
    ``precision`` "bf16": the objective's forwards and backwards run in bfloat16 (:class:`Running`); weights, scores,
    losses and validation stay in float32. ``compile``: they are compiled, too.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.0
    clip_norm: float | None = None
    average: Kind = "none"
    average_decay: float = 0.995
    awp: float = 0.0
    awp_from: int = 0
    accumulate: int = 1
    precision: Precision = "fp32"
    compile: bool = False
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
    epoch ends with the same weights, bit for bit on a CPU, as one that was never interrupted. Where several processes
    train (:func:`world`), all call this with equal arguments and end with equal weights; batch norm takes statistics
    of each process's rows in a step, and their mean over processes after an epoch.

    Raises:
        WorkError: the loss or a weight is not finite, and the state of the epoch before is kept; another process has
            ended.
    """
    here = world()
    trained = list(pruner.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
    plain = settings.precision == "fp32" and not settings.compile
    net = model if plain else Running(model, settings.precision, settings.compile)
    optimizer = make_optimizer(settings, trained)
    pruner.attach(optimizer)
    factor = warmed_up(schedule(settings.schedule), settings.warmup)
    average = None
    if settings.average != "none":
        average = Average(settings.average, settings.average_decay, pruner, trained)
    run = _Run(model, pruner, optimizer, average, state_file, here)
    parts, sizes = here.parts(settings.accumulate), data.sizes(settings.batch_size)
    rows = {size: [Rows.of(size, part) for part in parts] for size in set(sizes)}
    device = next(model.parameters()).device

    with _private_rng(device):
        for epoch in range(run.start, settings.epochs):
            torch.manual_seed(derive(seed, "dropout", epoch, *([here.rank] if here.rank else [])))
            feeds, noises = [], []
            for part in parts:
                order = torch.Generator().manual_seed(derive(seed, "batches", epoch))
                feeds.append(data.shuffled(settings.batch_size, order, augment, part))
                noises.append(Stream(torch.Generator(device).manual_seed(derive(seed, "attack", epoch))))
            pruner.before_epoch(epoch)
            radius = max(
                settings.awp if epoch >= settings.awp_from else 0.0,
                pruner.radius if epoch >= pruner.radius_from else 0.0,
            )
            model.train()
            meter = _Meter(device)
            for step, batches in enumerate(zip(*feeds, strict=True)):
                places, done = rows[sizes[step]], step / len(sizes)
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * factor(epoch, done, settings.epochs)
                progress = (epoch + done) / settings.epochs
                runs = [
                    objective(net, batch.x, batch.y, progress, replace(noise, rows=place))
                    for batch, noise, place in zip(batches, noises, places, strict=True)
                ]
                shares = [place.share for place in places]
                for computes in zip(*runs, strict=True):
                    losses, penalty = gradients(model, pruner, optimizer, computes, shares, here)
                    if radius:
                        with perturbed(pruner, trained, radius):
                            gradients(model, pruner, optimizer, computes, shares, here)
                    if settings.clip_norm is not None:
                        nn.utils.clip_grad_norm_(trained, settings.clip_norm)
                    with phase("optimizer"):
                        optimizer.step()
                    with phase("weights from what is learned"):
                        pruner.after_step()
                        if average is not None:
                            average.update(progress)
                    for loss, batch, share in zip(losses, batches, shares, strict=True):
                        meter.add(loss, penalty, batch.y if share else batch.y[:0])
            here.mean_([buffer for buffer in model.buffers() if buffer.is_floating_point()])
            here.need_same([*trained, *model.parameters()])
            pruner.after_epoch(epoch)
            values = meter.values(here) | pruner.log()
            if not math.isfinite(values["loss"]):
                raise run.diverged(f"the loss is {values['loss']}")
            if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
                raise run.diverged("weights are not finite")
            with nullcontext() if average is None else average.applied():
                if validate is not None:
                    values |= validate(model)
                run.select(EpochLog(epoch + 1, settings.epochs, values), settings.select)
            run.save()
            on_epoch(run.history[-1])
    return run.restore_selected()


def make_optimizer(settings: Settings, trained: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The optimizer by name over all tensors in one group. Raises UsageError for an unknown name."""
    check_optimizer(settings.optimizer)
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trained)
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(trained, settings.lr, settings.momentum, weight_decay=decay, fused=fused)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(trained, settings.lr, weight_decay=decay, fused=fused)


def check_optimizer(name: str) -> None:
    """Raises UsageError for an unknown name."""
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)


def gradients(
    model: nn.Module,
    pruner: Pruner,
    optimizer: torch.optim.Optimizer,
    computes: Sequence[Step],
    shares: Sequence[float],
    here: World,
) -> tuple[list[Loss], Tensor | None]:
    """Fresh gradients of everything that is trained, of losses and the pruner's penalty, which are returned.

    ``computes``: the loss of each part of a batch that this process has; ``shares``: of the whole batch.
    """
    model.zero_grad(set_to_none=True)
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for compute, share in zip(computes, shares, strict=True):
        with phase("loss"):
            loss = compute()
        with phase("backward"):
            (loss.value * share).backward()  # type: ignore[no-untyped-call]
        losses.append(Loss(loss.value.detach(), loss.logits.detach(), loss.parts))
    with phase("sum over processes"):
        here.sum_([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    with phase("gradients of what is learned"):
        penalty = pruner.penalty()
        if penalty is not None and penalty.requires_grad:  # behind the sum: every process has it whole
            penalty.backward()  # type: ignore[no-untyped-call]
            penalty = penalty.detach()
        pruner.before_step()
    return losses, penalty


class _Run:
    """History and best state of a stage, and their way to disk and back."""

    def __init__(
        self,
        model: nn.Module,
        pruner: Pruner,
        optimizer: torch.optim.Optimizer,
        average: Average | None,
        file: Path | None,
        here: World,
    ) -> None:
        self.model, self.pruner, self.optimizer, self.average = model, pruner, optimizer, average
        self.file = file if here.first else None
        self.history: list[EpochLog] = []
        self.best: dict[str, Any] | None = None
        self.start = 0
        stored = None if self.file is None or not self.file.exists() else load_state(self.file)
        state = here.shared(stored)
        if state is None:
            now = here.shared(self._now())  # devices may round what was computed so far otherwise
            if not here.first:
                self._load(now)
        else:
            self._load(state["now"])
            optimizer.load_state_dict(state["optimizer"])
            if average is not None:
                average.load_state_dict(state["average"])
            self.best = state["best"]
            self.history = [EpochLog(**entry) for entry in state["history"]]
            self.start = len(self.history)

    def select(self, log: EpochLog, select: str) -> None:
        """Note the epoch, and the model as it is when it is the best so far."""
        self.history.append(log)
        score = log.values.get("score", 0.0)
        if self.pruner.within_budget() and (select == "last" or self.best is None or score >= self.best["score"]):
            self.best = copy.deepcopy(self._now()) | {"score": score, "epoch": log.epoch}

    def save(self) -> None:
        """Write down what is needed to go on."""
        if self.file is not None:
            state = {
                "now": self._now(),
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "history": [vars(entry) for entry in self.history],
            }
            save_state(self.file, state)

    def diverged(self, what: str) -> WorkError:
        """Nothing of this epoch was saved: what lies on disk is the last good one."""
        message, hint = f"{what} in epoch {len(self.history) + 1}", "lower the learning rate (lr)"
        if self.file is None or not self.history:
            return WorkError(message, hint)
        message += f"; epoch {len(self.history)} is kept in {self.file}"
        if type(self.pruner) is Pruner:  # dense training: its weights are all that there is to go on from
            hint += f", or go on from there: rprune finetune {self.file} --arch NAME --data SOURCE -o OUT"
        return WorkError(message, hint)

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

    def add(self, loss: Loss, penalty: Tensor | None, y: Tensor) -> None:
        count = len(y)
        total = loss.value if penalty is None else loss.value + penalty
        correct = (loss.logits[:count].argmax(1) == y).sum()
        for name, value in {"loss": total * count, "train_accuracy": correct, "n": self.zero + count}.items():
            self.sums[name] = self.sums.get(name, self.zero) + value
        for name, value in loss.parts.items():
            self.sums[name] = self.sums.get(name, self.zero) + value * count

    def values(self, here: World) -> dict[str, float]:
        """Means over all samples of all processes."""
        names = list(self.sums)
        sums = torch.stack([self.sums[name] for name in names])
        here.sum_([sums])
        numbers = dict(zip(names, sums.tolist(), strict=True))
        n = numbers.pop("n")
        return {name: value / n for name, value in numbers.items()}


@contextmanager
def _private_rng(device: torch.device) -> Iterator[None]:
    """Dropout draws from the global generator; the caller's state is put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
