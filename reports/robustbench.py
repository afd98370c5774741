"""The report in the fields of RobustBench's model_info files. https://github.com/RobustBench/robustbench"""

from __future__ import annotations

from typing import Any

from rprune.reports.schema import Report
from rprune.reports.text import SMOKE, architecture, data_name, doubts, file_of, main_role, number

AUTOATTACK = "aa-standard"  # the one suite that is AutoAttack at its budget
NORMS = {"linf": "Linf", "l2": "L2"}


def robustbench(report: Report) -> dict[str, Any]:
    """One model: the int8 file where there is one. Accuracies in percent, as text.

    None is what the field asks for and the report does not know. ``autoattack_acc`` is there for the suite
    ``aa-standard`` alone, ``reported`` for any; ``unreliable`` is also true of what is incomplete or was not examined,
    and ``footnote`` says which, and how many images were looked at.
    """
    main = main_role(report)
    clean, robust = report.claim("clean_accuracy", main), report.claim("robust_accuracy", main)
    threat = robust.threat if robust and robust.threat else report.threat
    table: dict[str, Any] = {
        "link": None,
        "name": report.name,
        "authors": None,
        "venue": None,
        "additional_data": _additional_data(report),
        "number_forward_passes": 1,
        "dataset": data_name(report),
        "threat_model": NORMS[threat.norm],
        "architecture": architecture(report),
        "eps": threat.eps,
    }
    if clean is not None:
        table["clean_acc"] = f"{100 * clean.value:.2f}"
    if robust is not None:
        of = f"{number(robust.n)} of {number(report.data.samples)} test images"
        said = [f"{file_of(robust, report)}, sha256 {robust.sha256}; {robust.method}, {of}", *doubts(robust)]
        said += [SMOKE] if report.smoke else []
        table |= {"reported": f"{100 * robust.value:.2f}", "unreliable": report.smoke or bool(doubts(robust))}
        table |= {"autoattack_acc": table["reported"]} if robust.method == AUTOATTACK else {}
        table["footnote"] = "; ".join(said)
    return table


def _additional_data(report: Report) -> bool | None:
    """Whether training saw more than the data set; None where the recipe does not tell where the weights come from."""
    data, stages = report.recipe.get("data"), report.recipe.get("stage")
    if not isinstance(data, dict) or not isinstance(stages, list):
        return None
    if data.get("pseudo"):
        return True
    taught = any(not isinstance(stage, dict) or stage.get("teacher") for stage in stages)
    begun = bool(report.lineage) and report.lineage[0].stage == "train"
    return False if begun and not taught and not report.recipe.get("checkpoint") else None
