"""Claims of accuracy and robustness, reproduced by ONNX Runtime on the data and the witnesses."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rprune.data.splits import Split
from rprune.export.session import OnnxClassifier
from rprune.reports.schema import Claim, Report

BALL_TOLERANCE = 1e-6  # float32 rounding of x + delta
Outcome = tuple[bool, str]


class Replay:
    """The replay checks of one bundle; ``paths`` by file name, ``roles`` by role, ``test`` the report's test split."""

    def __init__(self, report: Report, paths: dict[str, Path], roles: dict[Any, Path], test: Split) -> None:
        self.report, self.paths, self.roles, self.test = report, paths, roles, test
        self.main = "onnx-int8" if "onnx-int8" in roles else "onnx"
        self._sessions: dict[str, OnnxClassifier] = {}

    def checks(self) -> Iterator[tuple[str, Callable[[], Outcome]]]:
        for claim in self.report.claims:
            if claim.metric == "clean_accuracy":
                yield f"replay {claim.id}", lambda claim=claim: self.clean(claim)  # type: ignore[misc]
        yield "witnesses", self.witness_set
        yield "samples", self.samples
        yield "certified", self.certified
        yield "witnesses in ball", self.ball
        yield "witnesses fool", self.fool
        yield "robust count", self.robust

    def session(self, role: str) -> OnnxClassifier:
        if role not in self._sessions:
            self._sessions[role] = OnnxClassifier(self.roles[role])
        return self._sessions[role]

    def predict(self, role: str, n: int) -> NDArray[np.int64]:
        if n > len(self.test):
            raise ValueError(f"{n} samples are claimed, the test split has {len(self.test)}")
        return self.session(role).predict(_unit(self.test.pixels(0, n)))

    def clean(self, claim: Claim) -> Outcome:
        correct = int((self.predict(claim.artifact, claim.n) == self.test.labels[: claim.n]).sum())
        return correct == claim.correct, f"{correct}/{claim.n} right, {self.roles[claim.artifact].name} in ONNX Runtime"

    @cached_property
    def attacked(self) -> Claim:
        """The claim that the witnesses belong to."""
        claim = self.report.claim("robust_accuracy", self.main)
        if claim is None or claim.threat is None:
            raise ValueError(f"there is no claim of robust accuracy for {self.main}")
        return claim

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        return self.predict(self.main, self.attacked.n)

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        with self.paths[self.report.evidence.samples].open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @cached_property
    def witnesses(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        from safetensors.numpy import load_file

        found = load_file(self.paths[self.report.evidence.witnesses])
        index, points = found["index"], found["x"]
        distinct = len(np.unique(index)) == len(index)
        if not distinct or (len(index) and not 0 <= index.min() <= index.max() < self.attacked.n):
            raise ValueError("witness indices repeat or lie outside the samples")
        if points.shape != (len(index), *self.test.shape):
            raise ValueError(f"witnesses have shape {points.shape}")
        return index, points

    @cached_property
    def fooled(self) -> NDArray[np.int64]:
        """What the file calls the witnesses."""
        _, points = self.witnesses
        return self.session(self.main).predict(points) if len(points) else np.zeros(0, np.int64)

    def witness_set(self) -> Outcome:
        """The file has claims of clean and robust accuracy, and each witness belongs to one sample of the latter."""
        index, _ = self.witnesses
        claimed = self.report.claim("clean_accuracy", self.main) is not None
        return claimed, f"{len(index)} witnesses for samples of {self.attacked.id}"

    def samples(self) -> Outcome:
        """Each row against prediction, label and witness."""
        index, _ = self.witnesses
        adversarial = dict(zip(index.tolist(), self.fooled.tolist(), strict=True))
        wanted = [
            (str(i), str(label), str(guess), str(adversarial.get(i, "")), i in adversarial)
            for i, (label, guess) in enumerate(zip(self.test.labels.tolist(), self.predicted.tolist(), strict=False))
        ]
        columns = ("index", "label", "clean_prediction", "adversarial_prediction")
        found = [(*(row[name] for name in columns), bool(row["attack"])) for row in self.rows]
        return found == wanted, f"{len(found)} rows of predictions equal the evidence"

    def certified(self) -> Outcome:
        """Certified samples are right, and none is broken by an attack that the certificate covers."""
        claim = self.report.claim("certified_accuracy", self.main)
        rows = [row for row in self.rows if row["certified"] == "1"]
        if claim is None or claim.threat is None:
            return not rows, "nothing is certified"
        wrong = [row for row in rows if row["label"] != row["clean_prediction"]]
        attacked = self.report.threat
        covers = claim.threat.norm == attacked.norm and claim.threat.eps_float >= attacked.eps_float
        broken = [row for row in rows if row["attack"]] if covers else []
        return (
            len(rows) == claim.correct and not wrong and not broken,
            f"{len(rows)} certified samples, none broken; the bounds themselves are self-attested",
        )

    def ball(self) -> Outcome:
        index, points = self.witnesses
        threat = self.attacked.threat
        assert threat is not None
        clean = [self.test.pixels(i, i + 1)[0] for i in index.tolist()]
        delta = (points - _unit(np.stack(clean)) if clean else points).astype(np.float64)
        axes = (1, 2, 3)
        size = np.abs(delta).max(axes, initial=0) if threat.norm == "linf" else np.sqrt((delta**2).sum(axes))
        inside = bool((size <= threat.eps_float + BALL_TOLERANCE).all() and ((points >= 0) & (points <= 1)).all())
        right = inside and len(index) == self.report.evidence.witness_count
        return right, f"{len(index)} points within {threat.norm} {threat.eps} and [0,1]"

    def fool(self) -> Outcome:
        index, _ = self.witnesses
        wrong = self.fooled != self.test.labels[index]
        return bool(wrong.all()), f"{int(wrong.sum())} of {len(index)} misclassified in ONNX Runtime"

    def robust(self) -> Outcome:
        broken = np.zeros(self.attacked.n, bool)
        broken[self.witnesses[0]] = True
        most = int(((self.predicted == self.test.labels[: self.attacked.n]) & ~broken).sum())
        return most == self.attacked.correct, f"{most} of {self.attacked.n} samples are right and have no witness"


def _unit(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return pixels.astype(np.float32) / np.float32(255)
