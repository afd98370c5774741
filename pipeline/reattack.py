"""What ``rprune verify --level reattack`` adds: attacks, bounds and noise anew, under a seed that nobody knew."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rprune.attacks.base import ATTACKS, Attack
from rprune.attacks.suites import SUITES, suite, with_transfer
from rprune.certification.bounds import METHODS
from rprune.certification.confidence import ABSTAIN, needed_probability
from rprune.certification.smoothing import Smoothing
from rprune.data.loaders import loader
from rprune.evaluation.accuracy import classes_of
from rprune.evaluation.certificates import certify_bounds
from rprune.evaluation.robustness import robustness
from rprune.evaluation.statistics import clopper_pearson
from rprune.pipeline.bench import Reporter, Silent
from rprune.pipeline.shipped import Opened, graph_of, open_target
from rprune.pipeline.single import Request
from rprune.pipeline.targets import CPU
from rprune.reports.evidence import read_samples
from rprune.reports.schema import Claim, Report, read_report
from rprune.reports.text import main_role

Outcome = tuple[bool, str]
NOISY, DRAWS = 20, 1000  # samples of smoothing, and draws of each
CHANCE = 1e-6  # of accusing an honest report of its radii
INSTEAD = "aa-lite"  # of a suite that is not known here


@dataclass(eq=False)
class Reattack:
    """The checks of a bundle whose replay has passed.

    ``limit``: samples of each kind, chosen at random; None: all, of smoothing 20. ``seed``: None draws one.
    """

    folder: Path
    data: str | None = None
    limit: int | None = None
    seed: int | None = None
    reporter: Reporter = field(default_factory=Silent)

    def __post_init__(self) -> None:
        dice = random.SystemRandom()  # not to be foreseen by who made the report
        self.seed = dice.randrange(2**31) if self.seed is None else self.seed
        self._dice = random.Random(self.seed)

    @cached_property
    def report(self) -> Report:
        return read_report(self.folder)

    @cached_property
    def role(self) -> str:
        return main_role(self.report)

    @cached_property
    def opened(self) -> Opened:
        """The main file, with its search net and the float file as a parent."""
        subject = self.report.subject(self.role)
        assert subject is not None
        assert self.seed is not None
        return open_target(self.folder / subject.name, Request(data=self.data, seed=self.seed), self.reporter)

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        return read_samples(self.folder / self.report.evidence.samples)

    @property
    def unchecked(self) -> list[str]:
        """What an attack anew goes without in a bundle that was passed on without its float file."""
        parent = self.report.subject("onnx")
        missing = self.role == "onnx-int8" and parent is not None and not (self.folder / parent.name).exists()
        return ["transfers from the float file"] if missing else []

    def checks(self) -> Iterator[tuple[str, Callable[[], Outcome]]]:
        yield "attacked anew", self.attacked
        if self._claim("certified_accuracy") is not None:
            yield "certified anew", self.certified
        if self._claim("smoothed_certified_accuracy") is not None:
            yield "noise anew", self.noise

    def attacked(self) -> Outcome:
        """The report's own suite on the samples that are said to be robust.

        What it claims is an upper bound, and another seed breaks a few more; a claim is false where what is left lies
        below the interval that the report gives.
        """
        claim = self._need("robust_accuracy")
        robust = [int(row["index"]) for row in self.rows if self._right(row) and not row["attack"]]
        ids = self._some(robust, self.limit)
        name, attacks = self._suite(claim.method)
        opened = self.opened
        found = robustness(
            opened.target, loader(opened.bench.data.test, opened.bench.device), opened.bench.threat, attacks,
            seed=opened.bench.seed, ids=ids, grid=False,
            on_progress=lambda attack, *counts: self.reporter.progress(f"{attack} anew", *counts),
        )  # fmt: skip
        broken, tried = len(found.broken_ids), len(ids)
        # of samples that were not tried, as many break as the tried ones make certain
        share = broken / tried if tried == len(robust) else clopper_pearson(broken, tried)[0]
        most = (claim.correct - len(robust) * share) / claim.n if tried else claim.value
        least = claim.interval.lower
        said = f"{broken} of {tried} robust samples broken by {name}, seed {self.seed}: robust accuracy at most"
        return most >= least, f"{said} {most:.4f}, claimed {claim.value:.4f}, interval from {least:.4f}"

    def certified(self) -> Outcome:
        """Every sample that is said to be certified is proved again, on what was read of the file itself."""
        claim = self._need("certified_accuracy")
        assert claim.threat is not None
        ids = self._some([int(row["index"]) for row in self.rows if row["certified"] == "1"], self.limit)
        if not len(ids):
            return True, "nothing is certified"
        named = claim.method.removesuffix(", float64").split(", ")  # of integers in other words: there are intervals
        methods = tuple(name for name in METHODS if name in named) or ("ibp",)
        test, network = loader(self.opened.bench.data.test, CPU), graph_of(self.opened)
        found = certify_bounds(network, test, claim.threat.model(), methods, falsified=set(), ids=ids)
        said = f"{found.correct} of {len(ids)} certified samples proved by {', '.join(methods)}"
        return found.correct == len(ids), said

    def noise(self) -> Outcome:
        """Fresh draws for samples with a radius: their class is as frequent as the radius needs."""
        from scipy.stats import binom

        claim = self._need("smoothed_certified_accuracy")
        said = claim.settings
        rows = {int(row["index"]): row for row in _numbered(said["samples"]) if row["prediction"] != ABSTAIN}
        ids = self._some(list(rows), self.limit or NOISY)
        if not len(ids):
            return True, "no sample has a radius"
        smoothing = Smoothing(sigma=said["sigma"], noise=said.get("noise", "gauss"))
        batch, bench = loader(self.opened.bench.data.test, CPU).take(ids), self.opened.bench
        counts = smoothing.drawn(
            classes_of(self.opened.target.artifact), batch.x, ids.tolist(), len(bench.data.classes), bench.seed, DRAWS
        )
        false = []
        for i, drawn in zip(ids.tolist(), counts.tolist(), strict=True):
            row = rows[i]
            least = needed_probability(row["radius"], said["sigma"])
            if binom.cdf(drawn[row["prediction"]], DRAWS, least) < CHANCE / len(ids):
                false.append(i)
        found = f"not as their radii say: samples {false[:5]}" if false else "agree with their radii"
        return not false, f"{DRAWS} fresh draws for each of {len(ids)} samples {found}"

    def _claim(self, metric: str) -> Claim | None:
        return self.report.claim(metric, self.role)

    def _need(self, metric: str) -> Claim:
        claim = self._claim(metric)
        if claim is None:
            raise ValueError(f"there is no claim of {metric} for {self.role}")
        return claim

    def _suite(self, name: str) -> tuple[str, tuple[Attack, ...]]:
        """The report's suite; one that is not built in is not run, since its code would be a stranger's."""
        known = all(part.strip() in {**SUITES, **ATTACKS.all()} for part in name.split(","))
        said, used = (name, name) if known else (f"{INSTEAD} (in place of {name})", INSTEAD)
        attacks = suite(used)
        return said, with_transfer(attacks, self.opened.target.parents)

    def _some(self, ids: list[int], count: int | None) -> Tensor:
        chosen = ids if count is None else self._dice.sample(ids, min(count, len(ids)))
        return torch.tensor(sorted(chosen), dtype=torch.int64)

    @staticmethod
    def _right(row: dict[str, str]) -> bool:
        return row["label"] == row["clean_prediction"]


def _numbered(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of reports before certificates named samples are of the first ones, in order."""
    for place, row in enumerate(rows):
        yield {"index": place} | row
