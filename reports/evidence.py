"""Pictures of the evidence: broken samples of a bundle for the HTML report."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from rprune.data.splits import Split
from rprune.reports.html import Sample
from rprune.reports.schema import Report

SHOWN = 8


def broken_samples(folder: Path, report: Report, test: Split) -> list[Sample]:
    """The first broken samples that were right before, clean beside adversarial, from the evidence files."""
    from safetensors.numpy import load_file

    witnesses = load_file(folder / report.evidence.witnesses)
    with (folder / report.evidence.samples).open(newline="") as file:
        rows = {int(row["index"]): row for row in csv.DictReader(file)}
    names = report.data.classes
    samples = []
    for index, point in list(zip(witnesses["index"].tolist(), witnesses["x"], strict=True))[:SHOWN]:
        row = rows[index]
        samples.append(
            Sample(
                index=index,
                label=names[int(row["label"])],
                clean_prediction=names[int(row["clean_prediction"])],
                adversarial_prediction=names[int(row["adversarial_prediction"])],
                clean=test.pixels(index, index + 1)[0].astype(np.float32) / np.float32(255),
                adversarial=point,
            )
        )
    return samples
