"""Two reports on the same test samples, compared sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rprune.errors import InputError, IntegrityError
from rprune.evaluation.statistics import drop_interval, mcnemar
from rprune.files import file_digest
from rprune.reports.evidence import read_samples
from rprune.reports.schema import Claim, PairedTest, Report, read_report
from rprune.reports.text import main_role

Row = Mapping[str, str]
RIGHT: dict[str, Callable[[Row], bool]] = {
    "clean_accuracy": lambda row: row["clean_prediction"] == row["label"],
    "robust_accuracy": lambda row: row["clean_prediction"] == row["label"] and not row["attack"],
    "certified_accuracy": lambda row: row["certified"] == "1",
}


@dataclass(frozen=True)
class Source:
    """A report with the rows of its samples.csv, None where that file is not beside it."""

    path: Path
    report: Report
    rows: list[dict[str, str]] | None

    def is_of(self, test_split: str) -> bool:
        """Whether it was measured on the test split of this digest: the same images and labels."""
        return self.report.data.sha256 == test_split

    def right(self, claim: Claim) -> dict[tuple[str, str], bool] | str:
        """Whether each sample counts, by (index, label); or why its rows do not say so.

        Raises InputError when they contradict the claim.
        """
        main = main_role(self.report)
        file = f"{self.report.evidence.samples} of {self.path}"
        if self.rows is None:
            return f"{file} is not there"
        words = ", ".join(name.removesuffix("_accuracy") for name in RIGHT)
        if claim.artifact != main or claim.metric not in RIGHT:
            return f"{file} covers {words} of {main} alone"
        rows = [row for row in self.rows if claim.metric != "certified_accuracy" or row["certified"]]
        found = {(row["index"], row["label"]): RIGHT[claim.metric](row) for row in rows}
        if (sum(found.values()), len(rows)) != (claim.correct, claim.n):
            counts = f"{sum(found.values())} of {len(rows)}, and not the {claim.correct} of {claim.n} of {claim.id}"
            raise InputError(f"{file} says {counts}", "check it with 'rprune verify'")
        return found


def read_source(path: Path) -> Source:
    """The report of a file or folder, and the samples beside it.

    Raises:
        InputError: it is not a report, or its samples cannot be read.
        IntegrityError: the samples are not those that the report names by their sha256.
    """
    report, folder = read_report(path), path if path.is_dir() else path.parent
    file = folder / report.evidence.samples
    promised = next((subject.sha256 for subject in report.subjects if subject.name == report.evidence.samples), None)
    if not file.resolve().is_relative_to(folder.resolve()):
        raise IntegrityError(f"{path} names {report.evidence.samples}, outside its folder", "do not trust this report")
    if not file.is_file() or promised is None:
        return Source(path, report, None)
    if file_digest(file) != promised:
        raise IntegrityError(f"{file} differs from the sha256 in its report", "take both from one bundle")
    try:
        return Source(path, report, read_samples(file))
    except ValueError as error:
        raise InputError(f"cannot read {file}: {error}", "check it with 'rprune verify'") from None


@dataclass(frozen=True)
class Pairs:
    """A baseline and the report that is held against it."""

    before: Source
    after: Source

    @property
    def same_data(self) -> bool:
        """Both were measured on one test split."""
        return self.before.is_of(self.after.report.data.sha256)

    def test(self, metric: str, artifact: str) -> PairedTest | str:
        """A share of a file in both reports, sample by sample; or why it cannot be compared so.

        Raises InputError when evidence contradicts a claim.
        """
        before, after = (source.report.claim(metric, artifact) for source in (self.before, self.after))
        if before is None or after is None:
            return f"the {'report' if after is None else 'baseline'} makes no claim of {metric} for {artifact}"
        if not same_threat(before, after):
            return f"the baseline is for {under(before)}, the report for {under(after)}"
        if not self.same_data:
            return "the test data differ"
        first, second = self.before.right(before), self.after.right(after)
        if isinstance(first, str) or isinstance(second, str):
            return first if isinstance(first, str) else str(second)
        if first.keys() != second.keys():
            return f"{before.n} and {after.n} different samples"
        b = sum(right and not second[sample] for sample, right in first.items())
        c = sum(right and not first[sample] for sample, right in second.items())
        lower, upper = drop_interval(b, c, len(first))
        return PairedTest(
            metric=metric, artifact=artifact, n=len(first), delta=(c - b) / len(first), lower=-upper, upper=-lower,
            b=b, c=c, p=mcnemar(b, c),
        )  # fmt: skip


def same_threat(first: Claim, second: Claim) -> bool:
    if first.threat is None or second.threat is None:
        return first.threat is second.threat
    return first.threat.norm == second.threat.norm and math.isclose(first.threat.eps_float, second.threat.eps_float)


def under(claim: Claim) -> str:
    return "no threat" if claim.threat is None else f"{claim.threat.norm} {claim.threat.eps}"
