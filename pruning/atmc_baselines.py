"""The two baselines of ATMC that prune in one shot.

Its third, ALR, keeps the largest singular values of all layers. That has no place among methods with an exact number
of kept weights: the product of two thin factors is dense, and rank one of every layer alone costs more than a budget of
1 % of a small net. A-l0 and ATMC have files of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rprune.pruning.base import METHODS
from rprune.pruning.lwm import LWM
from rprune.pruning.papers import ATMC_SETTINGS, ATMC_SHARED, Settings


@METHODS.register("nap")
@dataclass(frozen=True, kw_only=True)
class NAP(LWM):
    """Non-adversarial pruning: the globally largest magnitudes stay (Gui et al., NeurIPS 2019).

    LWM with one threshold for all layers. NAP and AP choose the same mask; they differ in the objective that the net is
    trained and fine-tuned with, which is the recipe's to say: ``benign`` makes this the paper's NAP. The authors' code
    has no floor and may empty a layer; here each keeps its floor.
    """

    paper: ClassVar[str] = "Gui et al., NeurIPS 2019"
    paper_settings: ClassVar[Settings] = {
        "train": ATMC_SETTINGS["train"] | {"objective": "benign"},
        "finetune": {"objective": "benign", "weight_decay": 1e-4},
    }

    allocation: str = "magnitude"


@METHODS.register("ap")
@dataclass(frozen=True, kw_only=True)
class AP(NAP):
    """Adversarial pruning: NAP's mask, then an adversarial objective (Gui et al., NeurIPS 2019).

    The objective is the recipe's to say; the authors' is the mean of clean and adversarial cross-entropy.
    """

    paper_settings: ClassVar[Settings] = ATMC_SETTINGS | {"finetune": ATMC_SHARED}
