"""Output of the command line: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rprune.errors import InputError, RpruneError, UsageError, one_line

if TYPE_CHECKING:
    from rprune.pipeline.artifact import Artifact
    from rprune.pipeline.attack_file import Column, Result
    from rprune.pipeline.cost import Cost
    from rprune.pipeline.profiling import Phase
    from rprune.reports.events import Live
    from rprune.reports.schema import Claim, Gate, LineageEntry, Report
    from rprune.training.loop import EpochLog

WIDE = 200  # columns where there is no terminal to ask

stdout = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)
LINE_EVERY = 30.0  # seconds between progress lines when stderr is not a terminal
SHOWN_ROLES = ("onnx", "onnx-int8", "onnx-compact", "packed", "c")
SHOWN = {"loss": "loss", "kept_share": "kept", "validation_accuracy": "clean", "validation_robust": "robust"}


def note(text: str) -> None:
    """A remark for people."""
    stderr.print(Text(one_line(text)))


def print_json(value: Any) -> None:
    """The one JSON document of a command."""
    sys.stdout.write(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def print_error(error: RpruneError) -> None:
    place, where = stderr, ""
    if stderr.quiet:  # one of several processes, of which the first says what all of them find
        if isinstance(error, UsageError | InputError):
            return
        place, where = Console(stderr=True, highlight=False, soft_wrap=True), f"[process {os.environ['RANK']}] "
    place.print(Text.assemble(where, ("error: ", "bold red"), one_line(error.message)))
    if error.hint:
        place.print(Text.assemble(where, ("hint: ", "cyan"), one_line(error.hint)))


def print_smoke(smoke: bool) -> None:
    """Below all results, where it is seen: that they are of a smoke run, if they are."""
    from rprune.reports.text import SMOKE

    if smoke:
        stdout.print(Text(SMOKE, "bold red"))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> None:
    """A table; columns of numbers stand to the right, unless all are ``words``."""
    table = Table(
        title=Text(one_line(title), "table.title"),
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
        show_header=any(columns),
    )
    for index, column in enumerate(columns):
        text = all(not row[index][:1] or row[index][:1].isalpha() or "/" in row[index][1:2] for row in rows)
        table.add_column(column, justify="left" if index == 0 or words or text else "right")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    stdout.print(table)


class ProgressLines:
    """Progress of stages: a bar on a terminal, plain lines elsewhere (each end, and one every 30 seconds).

    ``tensorboard``: a folder for the figures of every epoch as well.
    """

    def __init__(self, quiet: bool = False, tensorboard: Path | None = None) -> None:
        self.quiet = quiet
        self._events: Live | None = None
        if tensorboard is not None:
            from rprune.reports.events import Live

            self._events = Live(tensorboard)
        self._live = stderr.is_terminal and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
        self._started: dict[str, tuple[float, int]] = {}
        self._free = time.monotonic()  # when the last work ended
        self._last = 0.0
        self._bar: Progress | None = None

    def epoch(self, stage: str, log: EpochLog) -> None:
        if self._events is not None:
            self._events.write(stage, log.epoch, log.values)
        values = "  ".join(f"{short} {log.values[name]:.3g}" for name, short in SHOWN.items() if name in log.values)
        self._show(stage, log.epoch, log.epochs, values, (self._free, log.epoch - 1))

    def progress(self, what: str, done: int, good: int | None, total: int) -> None:
        """``good``: how many of those that are done hold, where that is what the work finds out."""
        self._show(what, done, total, "" if good is None else f"holds {good}", (time.monotonic(), done))

    def note(self, text: str) -> None:
        """A remark for people."""
        if not self.quiet:
            self.close()
            note(text)

    def warn(self, text: str) -> None:
        """What nobody may miss, however quiet the command."""
        self.close()
        stderr.print(Text.assemble(("WARNING: ", "bold red"), (text, "red")))

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()
        if self._events is not None:
            self._events.close()

    def close(self) -> None:
        """Leave the terminal as it was, whatever happened."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, what: str, done: int, total: int, values: str, begun: tuple[float, int]) -> None:
        """``begun``: when work on this began, if this is the first word of it, and what had been done before."""
        if self.quiet:
            return
        if self._live:
            self._draw(what, done, total, values)
            return
        now = time.monotonic()
        started, before = self._started.setdefault(what, begun)
        if done == total or now - self._last >= LINE_EVERY:
            self._last = now
            pace = (now - started) / max(done - before, 1)
            left = f" < {pace * (total - done):.0f}s" if before < done < total else ""
            stderr.print(Text(f"{what}  {done}/{total}  {values}  {now - started:.0f}s{left}"))
        if done == total:
            del self._started[what]
            self._free = now

    def _draw(self, what: str, done: int, total: int, values: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"),
                TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn(), console=stderr,
            )  # fmt: skip
            self._bar.start()
            self._bar.add_task(what, total=total, values=values)
        self._bar.update(self._bar.task_ids[0], completed=done, values=values)
        if done == total:
            self.close()


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def interval(claim: Claim) -> str:
    return f"[{100 * claim.interval.lower:.1f}, {100 * claim.interval.upper:.1f}]"


def print_artifact(artifact: Artifact, where: str) -> None:
    """What a stage changed."""
    lineage = artifact.metadata.lineage
    after = lineage[-1].metrics
    before = next((entry.metrics for entry in reversed(lineage[:-1]) if "validation" in entry.metrics), {})
    rows = []
    for name, label in (("validation_accuracy", "clean accuracy"), ("validation_robust", "robust accuracy")):
        old, new = before.get("validation", {}).get(name), after.get("validation", {}).get(name)
        if new is not None:
            rows.append([f"{label} (validation)", percent(old), percent(new)])
    if "kept" in after:
        total = after.get("total")
        rows.append(["weights kept", f"{total:,}" if total else "", f"{after['kept']:,}"])
    if "parameters" in after:
        rows.append(["parameters", f"{after['parameters']['before']:,}", f"{after['parameters']['after']:,}"])
    if "macs" in after:
        counted = after["macs"]
        if "before" in counted:
            rows.append(["MACs, dense", f"{counted['before']:,}", f"{counted['dense']:,}"])
        rows.append(["MACs, without zeros", f"{counted['dense']:,}", f"{counted['sparse']:,}"])
    if lineage[-1].energy is not None:
        rows.append(["energy", "", _energy(lineage[-1])])
    print_table(f"{lineage[-1].stage} -> {where}", ["", "before", "after"], rows)
    print_smoke(artifact.metadata.smoke)


def print_costs(kinds: Sequence[str], costs: Sequence[Cost]) -> None:
    """What stages will take, from a few of their steps."""
    rows = []
    for kind, cost in zip(kinds, costs, strict=True):
        flops = f"{cost.flops:.2g}" if cost.flops else ""
        time = f"{'at most ' * cost.at_most}{duration(cost.seconds)}"
        rows.append([kind, str(cost.steps or ""), flops, time, f"{cost.memory / 2**30:.1f} GiB"])
    print_table("cost on this machine, from a few steps", ["stage", "steps", "FLOPs", "time", "memory"], rows)


def print_profile(phases: Sequence[Phase], folder: Path) -> None:
    """One training step, the longest phases first."""
    rows = [[phase.name, f"{1e3 * phase.seconds:.1f} ms", str(phase.calls)] for phase in phases]
    print_table("one training step, on the CPU's clock", ["phase", "time", "calls"], rows)
    stdout.print(Text(f"trace  {folder}/trace.json (Perfetto, chrome://tracing)\ntable  {folder}/table.txt"))


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _energy(entry: LineageEntry) -> str:
    """What a stage drew, and which devices were counted."""
    from rprune.reports.energy import counted, intensity, spent

    return "" if entry.energy is None else f"{spent(entry.energy, intensity())} ({counted(entry.energy)})"


def print_stages(artifacts: Sequence[tuple[Artifact, str]]) -> None:
    """One row a stage, with what it reached on the validation split, and what it drew where that is known."""
    rows = []
    drawn = any(artifact.metadata.lineage[-1].energy is not None for artifact, _ in artifacts)
    for artifact, folder in artifacts:
        entry = artifact.metadata.lineage[-1]
        spec = entry.config.get("method") or entry.config.get("objective") or {}
        scores = entry.metrics.get("validation", {})
        rows.append(
            [
                entry.stage,
                str(spec.get("name", "")),
                percent(scores.get("validation_accuracy")),
                percent(scores.get("validation_robust")),
                f"{artifact.metadata.budget:,}" if artifact.metadata.budget else "",
                f"{entry.seconds:.0f} s",
                *([_energy(entry)] if drawn else []),
                folder,
            ]
        )
    energy = ["energy"] if drawn else []
    columns = ["stage", "how", "clean (validation)", "robust (validation)", "kept", "time", *energy, "folder"]
    print_table("stages", columns, rows)


def print_attack(result: Result, where: str) -> None:
    """Worst case first, then what each attack added, and whether the number can be trusted."""
    if len(result.columns) > 1:
        print_columns(result)
    else:
        print_suite(result, result.columns[0])
    for column in result.columns:
        print_health(column.robust)
    stdout.print(Text(f"evidence  {where}"))
    print_smoke(result.opened.bench.smoke)


def print_suite(result: Result, column: Column) -> None:
    from rprune.reports.text import flags

    opened, robust, clean = result.opened, column.robust, column.claims[0]
    rows = [
        [f"{label} accuracy", " ".join([percent(c.value), *flags(c)]), interval(c), f"{c.correct}/{c.n}"]
        for label, c in (("robust", robust), ("clean", clean))
    ]
    where = f"{opened.path} on {opened.bench.data.source}/test, {column.threat}, {column.suite}"
    print_table(where, ["", "value", "95 % interval", "count"], rows)
    parts = [
        [row.name, row.kind, f"{row.tried}", f"{row.broken}", f"{row.misses}", f"{row.queries:,}"]
        for row in robust.attacks
    ]
    columns = ["attack", "kind", "tried", "broken", "search net only", "forward passes"]
    print_table("each attack on what the ones before it left", columns, parts)


def print_columns(result: Result) -> None:
    """A paper's table: one column a suite, one row a threat."""
    names = list(dict.fromkeys(column.name for column in result.columns))
    threats = list(dict.fromkeys(str(column.threat) for column in result.columns))
    value = {(str(c.threat), c.name): percent(c.robust.value) for c in result.columns}
    clean = {str(c.threat): percent(c.claims[0].value) for c in result.columns}
    rows = [[threat, clean[threat], *(value[threat, name] for name in names)] for threat in threats]
    print_table(f"{result.opened.path}, n = {result.columns[0].robust.n}", ["threat", "clean", *names], rows)


def print_health(claim: Claim) -> None:
    """One line: the checks passed, or one for each that did not."""
    if claim.health is None:
        return
    if not claim.health.failed:
        stdout.print(Text(f"attack health: ok, {len(claim.health.checks)} checks"))
    for check in claim.health.failed:
        stdout.print(Text(one_line(f"UNRELIABLE {check.id} {check.name}: {check.detail}"), style="bold red"))


def print_report(report: Report, where: str) -> None:
    from rprune.reports.text import flags

    rows = [
        [
            claim.metric.replace("_", " "),
            claim.artifact,
            " ".join([percent(claim.value), *flags(claim)]),
            interval(claim),
            f"{claim.correct}/{claim.n}",
            f"{claim.threat.norm} {claim.threat.eps}" if claim.threat else "",
            claim.method,
        ]
        for claim in report.claims
    ]
    columns = ["claim", "file", "value", "95 % interval", "count", "threat", "method"]
    print_table(
        f"{report.name}: sparsity {report.sparsity.overall:.4f}, {report.sparsity.kept:,} weights kept", columns, rows
    )
    if report.gate is not None:
        print_gate(report.gate)
    for line in report.warnings:
        note(f"warning: {line}")
    stdout.print(Text(f"report  {where}/report.json\n        {where}/report.html"))
    ratios = {} if report.footprint is None else report.footprint.ratios
    rows = [
        [s.name, s.role, f"{s.bytes:,}", f"÷{ratios[s.name]:.1f}" if s.name in ratios else "", s.sha256[:12]]
        for s in report.subjects
        if s.role in SHOWN_ROLES
    ]
    title = f"files in {where}; bytes, and those of the dense float32 weights over them"
    print_table(title, ["", "form", "bytes", "", "sha256"], rows)
    if report.integers is not None:
        exact = "below 2^24: exact in float32" if report.integers.exact else "beyond 2^24: computed in wider numbers"
        pairs = report.integers.saturating_pairs
        stdout.print(Text(f"{report.integers.bits} bits, sums {exact}; {pairs:,} pairs may saturate without VNNI"))
    print_smoke(report.smoke)


def print_gate(gate: Gate) -> None:
    from rprune.reports.gate_forms import verdict
    from rprune.reports.text import judged

    wide = max(28, *(len(judged(rule)) for rule in gate.rules))
    for rule in gate.rules:
        mark = Text("✓", "green") if rule.passed else Text("✗", "bold red")
        stdout.print(Text.assemble(mark, one_line(f" {judged(rule):<{wide}} {rule.message}  ({rule.artifact})")))
    stdout.print(Text(verdict(gate), "bold green" if gate.result == "passed" else "bold red"))
