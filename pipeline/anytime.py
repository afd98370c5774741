"""A time for a whole run: stages train for fewer epochs, on schedules that are as much shorter; none is cut off."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rprune.files import digest_of, write_json
from rprune.pipeline.cost import Cost
from rprune.pipeline.recipe import PruneStage, Stage, Trained
from rprune.pipeline.stages import epochs_of
from rprune.pruning.base import METHODS
from rprune.training import schedules
from rprune.training.world import World

Kind = TypeVar("Kind", bound=Trained)
FILE = "budget.json"
LEAST = 0.5  # of the budget for training, however long certificates and attacks may take
COUNTED = ("warmup", "awp_from")  # fields of a stage that count its epochs


def fitted(costs: Sequence[Cost], epochs: Sequence[int], seconds: float) -> list[int]:
    """Epochs of each stage, all shortened by one factor, at least 1 where a stage trains at all, to fit ``seconds``.

    ``costs``: of the whole stages. What attacks and certificates may take is kept free, up to half of the time.
    """
    reserved = sum(cost.once for cost in costs if cost.at_most)
    around = sum(cost.once for cost in costs if not cost.at_most)
    training = sum(cost.seconds - cost.once for cost in costs if not cost.at_most)
    room = max(seconds - around - reserved, LEAST * seconds - around)
    share = 1.0 if training <= max(room, 0.0) else max(room, 0.0) / training
    return [max(min(count, 1), math.floor(share * count)) for count in epochs]


class Anytime:
    """The epochs of a run's stages within a budget, decided one after the other by the time that is left.

    What was decided, and what has been spent, lies in the run's folder: the same command goes on with the same epochs.
    Of several processes the first one decides. An interrupted stage's time counts from where it went on.
    """

    def __init__(self, out: Path, seconds: float, stages: Sequence[Stage], key: Any, here: World) -> None:
        self.file, self.seconds, self.stages, self.here = out / FILE, seconds, stages, here
        self.key = digest_of([seconds, key])
        stored = here.shared(self._stored() if here.first else None)
        known = stored is not None and stored.get("key") == self.key
        self.epochs: dict[str, int] = dict(stored["epochs"]) if known else {}
        self.spent = float(stored["spent"]) if known else 0.0
        self._since = time.monotonic()
        self._costs: list[Cost] | None = None

    def known(self, index: int) -> Stage:
        """A stage with the epochs that were decided for it; as it is before that."""
        epochs, stage = self.epochs.get(str(index)), self.stages[index]
        return stage if epochs is None or not isinstance(stage, Trained) else shortened(stage, epochs)

    def decide(self, index: int, costs: Callable[[], list[Cost]]) -> Stage:
        """A stage with its epochs; all processes call this. ``costs``: of every stage, from a trial of each."""
        if epochs_of(self.stages[index]) and str(index) not in self.epochs:
            if self._costs is None:
                self._costs = costs()
            left = self.seconds - self.spent - (time.monotonic() - self._since)
            wanted = [epochs_of(stage) for stage in self.stages[index:]]
            self.epochs[str(index)] = self.here.shared(fitted(self._costs[index:], wanted, left)[0])
            self._write()
        return self.known(index)

    def passed(self) -> None:
        """A stage has ended."""
        now = time.monotonic()
        self.spent, self._since = self.spent + now - self._since, now
        self._write()

    def _write(self) -> None:
        if self.here.first:
            write_json(self.file, {"key": self.key, "budget": self.seconds, "epochs": self.epochs, "spent": self.spent})

    def _stored(self) -> dict[str, Any] | None:
        """What an earlier call wrote; a damaged file counts as none."""
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            return {"key": found["key"], "epochs": dict(found["epochs"]), "spent": float(found["spent"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None


def shortened(stage: Kind, epochs: int) -> Kind:
    """A stage of fewer epochs; what it, its schedule and its method count in epochs shrinks with them."""
    share = epochs / epochs_of(stage)
    changes: dict[str, Any] = {"epochs": epochs}
    for name in COUNTED:
        count = getattr(stage, name)
        changes[name] = type(count)(share * count)
    changes["schedule"] = schedules.shortened(stage.schedule, share)
    if isinstance(stage, PruneStage):
        method = METHODS.build(stage.method)
        counts = {name: getattr(method, name) for name in method.counted if getattr(method, name) is not None}
        fewer = {name: max(min(count, 1), int(share * count)) for name, count in counts.items()}
        if fewer != counts:
            said = {"name": stage.method} if isinstance(stage.method, str) else stage.method
            changes["method"] = said | fewer
    return stage.model_copy(update=changes)
