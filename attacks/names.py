"""Names of suites and tables, for whoever must not wait for torch."""

from __future__ import annotations

ABOUT = {
    "fgsm": "one step of eps",
    "pgd10": "PGD as the papers' tables",
    "pgd20": "PGD, 20 steps",
    "pgd50x5": "PGD, 5 restarts",
    "pgd50x10": "PGD, 10 restarts",
    "cw20-harp": "HARP's C&W: PGD on the margin, confidence 50",
    "apgd50x5": "HARP's AutoPGD: 50 steps, 5 restarts",
    "apgd-ce": "AutoAttack's first part",
    "apgd-dlr": "untargeted DLR loss",
    "apgd-t": "AutoAttack's second part",
    "fab-t": "AutoAttack's third part",
    "square": "AutoAttack's fourth part, on the artifact itself",
    "aa-lite": "AutoAttack's two APGD parts; about a fifth of its cost",
    "aa-standard": "AutoAttack, its budget exactly",
    "aa-plus": "AutoAttack plus; FAB-T stands for its untargeted FAB too",
    "aa-rand": "AutoAttack for randomised models",
    "aa-quant": "for 8-bit files: straight-through twin, transfer from the float parent, Square on the file",
    "aa-torchattacks10": "what torchattacks >= 3.3 calls AutoAttack: 10 steps",
}
"""What each suite is for, in one line."""

TABLES: dict[str, dict[str, str]] = {
    "harp-table": {
        "FGSM": "fgsm",
        "PGD-10": "pgd10",
        "C&W-20": "cw20-harp",
        "APGD 50x5": "apgd50x5",
        "AA, 10 steps": "aa-torchattacks10",
        "AA": "aa-standard",
    }
}
"""Columns of a paper's table, each a suite of its own on all samples."""
