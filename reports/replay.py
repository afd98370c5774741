"""Claims of accuracy and robustness, reproduced by ONNX Runtime on the data and the witnesses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rprune.data.splits import Split
from rprune.export.session import OnnxClassifier
from rprune.reports.evidence import Witnesses, distances, read_samples, read_witnesses, unit
from rprune.reports.schema import Claim, Report
from rprune.reports.text import main_role

BALL_TOLERANCE = 1e-6  # float32 rounding of x + delta
SIZE_TOLERANCE = 1e-4  # of a norm that was summed in float32, relative
COMPARED = 256  # samples on which two files have to give equal logits
Outcome = tuple[bool, str]


class Replay:
    """The replay checks of one bundle; ``paths`` by file name, ``roles`` by role, ``test`` the report's test split.

    ``gone``: roles of files that may be missing, and are.
    """

    def __init__(
        self,
        report: Report,
        paths: dict[str, Path],
        roles: dict[Any, Path],
        test: Split,
        gone: Collection[str] = (),
    ) -> None:
        self.report, self.paths, self.roles, self.test, self.gone = report, paths, roles, test, gone
        self.main = main_role(report)
        self._sessions: dict[str, OnnxClassifier] = {}

    def checks(self) -> Iterator[tuple[str, Callable[[], Outcome]]]:
        for claim in self.report.claims:
            if claim.metric == "clean_accuracy" and claim.artifact not in self.gone:
                yield f"replay {claim.id}", lambda claim=claim: self.clean(claim)  # type: ignore[misc]
        if "onnx-compact" in self.roles:
            yield "replay compact", self.compact
        yield "witnesses", self.witness_set
        yield "samples", self.samples
        yield "certified", self.certified
        yield from (
            (f"samples of {claim.id}", lambda claim=claim: self.smoothed(claim))
            for claim in self.report.claims
            if claim.metric == "smoothed_certified_accuracy"
        )
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
        return self.session(role).predict(unit(self.test.pixels(0, n)))

    def clean(self, claim: Claim) -> Outcome:
        correct = int((self.predict(claim.artifact, claim.n) == self.test.labels[: claim.n]).sum())
        return correct == claim.correct, f"{correct}/{claim.n} right, {self.roles[claim.artifact].name} in ONNX Runtime"

    def compact(self) -> Outcome:
        """The compact file gives the logits of the main one, to the bit."""
        x = unit(self.test.pixels(0, min(len(self.test), COMPARED)))
        same = np.array_equal(self.session(self.main).logits(x), self.session("onnx-compact").logits(x))
        return same, f"{self.roles['onnx-compact'].name} and {self.roles[self.main].name}: logits of {len(x)} samples"

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
        return read_samples(self.paths[self.report.evidence.samples])

    @cached_property
    def witnesses(self) -> Witnesses:
        found = read_witnesses(self.paths[self.report.evidence.witnesses])
        if len(found.index) and not 0 <= found.index[0] <= found.index[-1] < self.attacked.n:
            raise ValueError("witness indices lie outside the samples")
        if found.points.shape[1:] != self.test.shape:
            raise ValueError(f"witnesses have shape {found.points.shape}")
        return found

    @cached_property
    def sizes(self) -> NDArray[np.float64]:
        """Norm of each witness's perturbation, in the norm of the claim."""
        threat, points = self.attacked.threat, self.witnesses.points
        assert threat is not None
        clean = [unit(self.test.pixels(i, i + 1)[0]) for i in self.witnesses.index.tolist()]
        return distances(points - np.stack(clean) if clean else points, threat.norm)

    @cached_property
    def fooled(self) -> NDArray[np.int64]:
        """What the file calls the witnesses."""
        points = self.witnesses.points
        return self.session(self.main).predict(points) if len(points) else np.zeros(0, np.int64)

    def witness_set(self) -> Outcome:
        """The file has claims of clean and robust accuracy, and each witness belongs to one sample of the latter."""
        exact = self.witnesses.exact
        claimed = self.report.claim("clean_accuracy", self.main) is not None
        return claimed, f"{len(exact)} witnesses for samples of {self.attacked.id}, {int(exact.sum())} in 8-bit pixels"

    def samples(self) -> Outcome:
        """Each row against prediction, label and witness; the rows of each attack against what it is said to add."""
        adversarial = dict(zip(self.witnesses.index.tolist(), self.fooled.tolist(), strict=True))
        wanted = [
            (str(i), str(label), str(guess), str(adversarial.get(i, "")), i in adversarial)
            for i, (label, guess) in enumerate(zip(self.test.labels.tolist(), self.predicted.tolist(), strict=False))
        ]
        columns = ("index", "label", "clean_prediction", "adversarial_prediction")
        found = [(*(row[name] for name in columns), bool(row["attack"])) for row in self.rows]
        if found != wanted:
            return False, "rows of predictions differ from what the file says"
        stated = {row.name: row.broken for row in self.attacked.attacks}
        counted = Counter(row["attack"] for row in self.rows if row["attack"])
        if stated and counted != Counter(stated):
            return False, "attacks broke other numbers of samples than the report says"
        return self._witness_columns(), f"{len(found)} rows of predictions equal the evidence"

    def _witness_columns(self) -> bool:
        """Kind and distance of every witness, where the file has these columns."""
        if "witness" not in self.rows[0]:
            return True
        found = self.witnesses
        kinds = dict(zip(found.index.tolist(), np.where(found.exact, "uint8", "float").tolist(), strict=True))
        sizes = dict(zip(found.index.tolist(), self.sizes.tolist(), strict=True))
        same = all(row["witness"] == kinds.get(i, "") for i, row in enumerate(self.rows))
        return same and all(
            math.isclose(float(row["distance"]), sizes[i], rel_tol=SIZE_TOLERANCE, abs_tol=BALL_TOLERANCE)
            if i in sizes
            else row["distance"] == ""
            for i, row in enumerate(self.rows)
        )

    def certified(self) -> Outcome:
        """Certified samples are right, and none is broken by an attack that the certificate covers."""
        claim = self.report.claim("certified_accuracy", self.main)
        rows = [row for row in self.rows if row["certified"] == "1"]
        if claim is None or claim.threat is None:
            return not rows, "nothing is certified"
        wrong = [row for row in rows if row["label"] != row["clean_prediction"]]
        broken = [row for row in rows if row["attack"]] if claim.threat.covers(self.report.threat) else []
        return (
            len(rows) == claim.correct and not wrong and not broken,
            f"{len(rows)} certified samples, none broken; the bounds themselves are self-attested",
        )

    def smoothed(self, claim: Claim) -> Outcome:
        """The first samples of the data, under their own labels."""
        found = [(row["index"], row["label"]) for row in claim.settings["samples"]]
        wanted = list(enumerate(self.test.labels[: claim.n].tolist()))
        return found == wanted, f"{len(found)} samples in order, with their labels; draws are self-attested"

    def ball(self) -> Outcome:
        points, threat = self.witnesses.points, self.attacked.threat
        assert threat is not None
        inside = bool((self.sizes <= threat.eps_float + BALL_TOLERANCE).all() and ((points >= 0) & (points <= 1)).all())
        right = inside and len(points) == self.report.evidence.witness_count
        return right, f"{len(points)} points within {threat.norm} {threat.eps} and [0,1]"

    def fool(self) -> Outcome:
        wrong = self.fooled != self.test.labels[self.witnesses.index]
        return bool(wrong.all()), f"{int(wrong.sum())} of {len(wrong)} misclassified in ONNX Runtime"

    def robust(self) -> Outcome:
        broken = np.zeros(self.attacked.n, bool)
        broken[self.witnesses.index] = True
        most = int(((self.predicted == self.test.labels[: self.attacked.n]) & ~broken).sum())
        return most == self.attacked.correct, f"{most} of {self.attacked.n} samples are right and have no witness"
