"""One process of several that train together: python processes.py CASE RANK SIZE STORE OUT [STATE]

Writes loss curve, validation-free history, and digests of what it holds at the end. ``STATE``: where the first process
keeps its state. The case "killed" ends the last process in the second epoch as a signal would.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rprune.data.loaders import Resident
from rprune.errors import RpruneError
from rprune.models.prunable import prunable
from rprune.objectives.base import OBJECTIVES
from rprune.pruning.base import METHODS, Context, Pruner
from rprune.pruning.budget import Budget
from rprune.threat import ThreatModel
from rprune.training.loop import FitResult, Settings, fit

THREAT = ThreatModel.of("linf", "8/255")
METHOD: dict[str, Any] = {
    "hydra": "hydra",
    "harp": {"name": "harp", "gamma_step": 0.05, "initial_density": 0.5},
    "robust-admm": {"name": "robust-admm", "rho": 0.2, "every": 1},
    "rigl": "rigl",
}
"""case: method, objective, samples, whether batch norm, settings"""
CASES: dict[str, tuple[str, str, int, bool, dict[str, Any]]] = {
    "dense": ("dense", "pgd-at", 41, False, {}),
    "hydra": ("hydra", "trades", 41, False, {}),
    "harp": ("harp", "pgd-at", 41, False, {}),
    "admm": ("robust-admm", "mart", 41, False, {}),
    "rigl": ("rigl", "smoothadv", 33, False, {}),  # whose last batch is one sample
    "free": ("dense", "free-at", 41, False, {}),
    "perturbed": ("hydra", "pgd-at", 41, False, {"awp": 0.01, "clip_norm": 0.5, "average": "ema"}),
    "accumulated": ("harp", "pgd-at", 41, False, {"accumulate": 2}),
    "batch norm": ("harp", "pgd-at", 41, True, {}),
    "killed": ("dense", "pgd-at", 41, False, {}),
}


class Plain(nn.Module):
    """Without batch norm, whose statistics are those of a process's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(256, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        logits: torch.Tensor = self.fc(x.flatten(1))
        return logits


def tiny() -> Any:
    path = Path(__file__).parent.parent / "pruning" / "tiny_net.py"
    spec = importlib.util.spec_from_file_location("tiny_net", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Doubled:
    """Images in float64, so that sums in another order decide no sign."""

    def __init__(self, data: Resident) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def shuffled(self, *arguments: Any) -> Any:
        for batch in self.data.shuffled(*arguments):
            yield batch._replace(x=batch.x.double())


def train(case: str, state: Path | None = None, rank: int = 0) -> tuple[FitResult, Pruner, nn.Module]:
    method, objective, samples, norm, changes = CASES[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tiny().net(dtype=torch.float64) if norm else Plain().double()
    pruner = Pruner(model)
    if method != "dense":
        budget = Budget.of({name: weight.numel() for name, weight in prunable(model).items()}, 0.8)
        context = Context(epochs=3, steps_per_epoch=3, lr=0.05, input_shape=(3, 8, 8))
        pruner = METHODS.build(METHOD[method]).bind(model, budget, context)

    def on_epoch(log: Any) -> None:
        if case == "killed" and rank and log.epoch == 2 and "RPRUNE_KILL" in os.environ:
            os._exit(9)

    settings = Settings(3, 16, 0.05, select="last", **changes)
    options: dict[str, Any] = {"attack": {"steps": 2}} if objective != "free-at" else {"replays": 2}
    found = fit(
        model, pruner, OBJECTIVES.build({"name": objective, **options}, threat=THREAT), Doubled(tiny().data(samples)),
        settings, augment="crop-flip", seed=1, on_epoch=on_epoch, state_file=state,
    )  # fmt: skip
    return found, pruner, model


def summary(found: FitResult, pruner: Pruner, model: nn.Module) -> dict[str, Any]:
    def digest(tensors: dict[str, torch.Tensor]) -> str:
        sha = hashlib.sha256()
        for name in sorted(tensors):
            sha.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
        return sha.hexdigest()

    return {
        "losses": [log.values["loss"] for log in found.history],
        "accuracy": [log.values["train_accuracy"] for log in found.history],
        "weights": digest(model.state_dict()),
        "masks": digest(pruner.masks()),
        "norms": {name: float(tensor.double().norm()) for name, tensor in model.state_dict().items()},
        "kept": {name: int(mask.sum()) for name, mask in pruner.masks().items()},
    }


def main(case: str, rank: str, size: str, store: str, out: str, state: str | None = None) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=int(rank), world_size=int(size))
    try:
        made = summary(*train(case, None if state is None else Path(state), int(rank)))
    except RpruneError as error:
        made = {"error": error.message, "hint": error.hint, "code": error.exit_code}
    Path(out).write_text(json.dumps(made))
    os._exit(made.get("code", 0))  # a lost partner would be waited for


if __name__ == "__main__":
    main(*sys.argv[1:])
