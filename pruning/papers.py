"""Settings of papers that several methods share, for their preset "paper": tables of the stages and of the threat.

Where paper and code differ they are the code's, because the published numbers are.
"""

from __future__ import annotations

from typing import Any

Settings = dict[str, dict[str, Any]]

EPS = {"norm": "linf", "eps": "0.031"}  # 8/255 in HYDRA's and HARP's text
ATTACK = {"steps": 10, "step": 0.0078 / 0.031}


def stages(*, shared: dict[str, Any], prune: dict[str, Any] | None, finetune: dict[str, Any] | None) -> Settings:
    """Tables of train, prune and finetune that share what ``shared`` says; ``None`` leaves a stage to the defaults."""
    found: Settings = {"train": {"epochs": 100, "lr": 0.1, **shared}}
    for kind, table in (("prune", prune), ("finetune", finetune)):
        if table is not None:
            found[kind] = shared | table
    return found


# HYDRA: TRADES, weight decay 1e-4, one rate an epoch; stages hand over their last checkpoint
_HYDRA = {
    "objective": {"name": "trades", "attack": ATTACK},
    "weight_decay": 1e-4,
    "schedule": "cosine-by-epoch",
    "select": "last",
}
HYDRA: Settings = stages(shared=_HYDRA, prune={"lr": 0.1}, finetune={"epochs": 100, "lr": 0.01}) | {"threat": EPS}

# HARP: PGD-AT, weight decay 5e-4, best checkpoints (of a validation split here, of the test set there)
_HARP = {
    "objective": {"name": "pgd-at", "attack": ATTACK},
    "weight_decay": 5e-4,
    "schedule": "cosine-by-epoch",
}
HARP: Settings = stages(shared=_HARP, prune={"lr": 0.1}, finetune={"epochs": 100, "lr": 0.01}) | {"threat": EPS}

# ATMC: no random start (the noise is drawn and thrown away), 7 steps of 1.25 eps / 7, half of the eps of the others
ATMC_SHARED: dict[str, Any] = {
    "objective": {"name": "pgd-at", "attack": {"steps": 7, "step": 1.25 / 7, "start": "none"}},
    "weight_decay": 1e-4,
}
ATMC_SETTINGS: Settings = {
    "threat": {"norm": "linf", "eps": "4/255"},
    "train": ATMC_SHARED | {"epochs": 200, "lr": 0.05, "schedule": "piecewise:0.4,0.6,0.75"},
}
