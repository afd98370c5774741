"""A whole recipe: stages with artifacts between them, each reused when nothing that it depends on has changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rprune.errors import InputError, UsageError
from rprune.files import (
    check_ours,
    digest_of,
    partial_folder,
    partial_of,
    stored_key,
    write_json,
    write_text,
)
from rprune.locks import working_in
from rprune.pipeline.anytime import Anytime, fitted
from rprune.pipeline.artifact import Artifact, load_any, load_artifact, save_folder
from rprune.pipeline.bench import Bench, Reporter, architecture, check_fits
from rprune.pipeline.bundle import Source, export
from rprune.pipeline.certificate import sealed
from rprune.pipeline.certifying import Certificates, certify
from rprune.pipeline.cost import Cost, cost
from rprune.pipeline.environment import named_code, referenced_files, source_digest
from rprune.pipeline.finish import STATE, VERDICTS, publish, tidy
from rprune.pipeline.foreign import Foreign
from rprune.pipeline.importing import imported
from rprune.pipeline.profiling import Phase, profiled
from rprune.pipeline.recipe import (
    CertifyStage,
    ExportStage,
    FinetuneStage,
    Recipe,
    Stage,
)
from rprune.pipeline.stages import DENSE, check_stage, epochs_of, open_teacher, run_stage
from rprune.pipeline.trial import trial
from rprune.pipeline.verdicts import Part
from rprune.reports.gate import Policy, read_policy
from rprune.reports.pairs import Source as Judged
from rprune.reports.pairs import read_source
from rprune.reports.schema import Report, read_report
from rprune.training.world import world


@dataclass(frozen=True)
class Outcome:
    """One stage of a run: where it lies, and whether it was there already."""

    kind: str
    folder: Path
    reused: bool
    artifact: Artifact | None = None
    certificates: Certificates | None = None
    report: Report | None = None


class Runner:
    """Runs the stages of one recipe into ``out``; interrupted at any moment, the same call continues.

    Several processes (:func:`world`) work together; the first one writes.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        out: Path,
        reporter: Reporter,
        device: str = "auto",
        budget: float | None = None,
        trust_pickle: bool = False,
        baseline: Path | None = None,
    ) -> None:
        """``folder``: where the recipe lies; its policy is looked for there. ``budget``: seconds for the whole run,
        into which stages fit by fewer epochs (:class:`Anytime`). ``trust_pickle``: code that the checkpoint names may
        run. ``baseline``: the report, or its folder, that the policy's rules on drops compare with. Nothing is
        written yet.

        Raises:
            UsageError, InputError: anything wrong with the recipe, its names, its policy or its data.
            UsageError: rules on drops without a baseline, or a baseline without such rules.
            InputError, IntegrityError: the baseline cannot be used, or is of other test data.
        """
        self.recipe, self.out, self.here = recipe, out, world()
        self.policy: Policy | None = None
        if recipe.policy is not None:
            self.policy = read_policy(folder / recipe.policy, baseline is not None)
        self.baseline = None if baseline is None else self._compared_with(baseline)
        start: Artifact | Foreign | None = None
        if recipe.checkpoint is not None:
            trust = reporter.warn if trust_pickle else None
            start = load_any(folder / recipe.checkpoint, recipe.model.arch, trust)
        threat = None if recipe.threat is None else recipe.threat.model()
        if isinstance(start, Artifact):
            threat = threat or start.metadata.threat
        self.bench = Bench.open(recipe.data, threat, recipe.seed, device, reporter)
        self.bench.suites = recipe.suites
        self.bench.smoke = recipe.smoke or (isinstance(start, Artifact) and start.metadata.smoke)
        if self.baseline is not None and not self.bench.smoke and not self.baseline.is_of(self.bench.data.test.digest):
            raise InputError(f"{baseline} is of other test data", "a drop is judged on the same samples")
        self.bench.typed = named_code(recipe.model_dump(mode="json"))
        self.arch = architecture(recipe.model, self.bench.data)
        self.start = self._adopted(start)
        self.teacher = self._teacher(folder)
        for stage in recipe.stage:  # find every mistake before hours are spent
            check_stage(stage, self.bench, self.arch, self.start)
        self.stages: list[Stage] = list(recipe.stage)
        self.anytime: Anytime | None = None
        if budget is not None:
            asked = recipe.model_dump(mode="json")
            self.anytime = Anytime(out, budget, recipe.stage, asked, self.here)
            self.stages = [self.anytime.known(index) for index in range(len(recipe.stage))]

    def plan(self) -> list[tuple[str, Path, bool]]:
        """(kind, folder, already done) of each stage, as far as that is known without running the ones before."""
        rows: list[tuple[str, Path, bool]] = []
        parent = self._first_key
        for number, stage in enumerate(self.stages, 1):
            folder = self._folder(number, stage)
            key = self._key(stage, parent)
            rows.append((stage.kind, folder, stored_key(folder) == key))
            parent = key
        return rows

    def costs(self) -> list[Cost]:
        """What every stage will take, done already or not."""
        found: list[Cost] = []
        artifact = dense = self.start
        for stage in self.recipe.stage:
            spent, artifact = cost(self.bench, stage, artifact, self.arch, self._taught_by(stage, dense))
            dense = artifact if stage.kind == "train" else dense
            found.append(spent)
        return found

    def fitted(self, costs: Sequence[Cost]) -> list[int]:
        """Epochs of every stage, were the run to begin now, within its budget."""
        assert self.anytime is not None
        return fitted(costs, [epochs_of(stage) for stage in self.recipe.stage], self.anytime.seconds)

    def profiles(self, folder: Path) -> Iterator[tuple[Path, list[Phase]]]:
        """One step of every stage that trains, as :func:`profiled` has it, each in a folder of its own."""
        artifact = dense = self.start
        for number, stage in enumerate(self.recipe.stage, 1):
            teacher, place = self._taught_by(stage, dense), folder / self._folder(number, stage).name
            if epochs_of(stage):
                phases, artifact = profiled(self.bench, stage, artifact, self.arch, teacher, place)
                yield place, phases
            elif not isinstance(stage, CertifyStage | ExportStage):
                artifact = trial(self.bench, stage, artifact, self.arch, teacher, [None]).made
            dense = artifact if stage.kind == "train" else dense

    def run(
        self,
        announce: Callable[[Outcome], None] = lambda outcome: None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> list[Outcome]:
        """Run what is not done. Returns the outcome of every stage. ``tell``: of stages that a budget shortens.

        Raises UsageError where another process is at work in the folder, or it cannot be written.
        """
        for number, stage in enumerate(self.recipe.stage, 1):
            check_ours(self._folder(number, stage))
        with working_in(self.out, self.here.first):
            return self._run(announce, tell)

    def _run(self, announce: Callable[[Outcome], None], tell: Callable[[str], None]) -> list[Outcome]:
        if self.here.first:
            self._lock()
        outcomes: list[Outcome] = []
        artifact = self.start
        self._dense = self.start
        certificates: Certificates | None = None
        parent = self._first_key
        for number in range(1, len(self.stages) + 1):
            if self.anytime is not None:
                self.stages[number - 1] = self.anytime.decide(number - 1, self.costs)
            stage = self.stages[number - 1]
            epochs, asked = epochs_of(stage), epochs_of(self.recipe.stage[number - 1])
            if epochs < asked:
                tell(f"{stage.kind}: {epochs} of {asked} epochs, to fit the budget")
            folder, key = self._folder(number, stage), self._key(stage, parent)
            reused = self.here.shared(stored_key(folder) == key)
            if not reused:
                self._make(stage, folder, key, artifact, certificates)
            elif self.here.first:
                tidy(folder)
            if self.anytime is not None and not reused:
                self.anytime.passed()
            outcome = self._read(stage, folder, reused)
            artifact = outcome.artifact or artifact
            if stage.kind == "train":
                self._dense = artifact
            certificates = outcome.certificates or certificates
            outcomes.append(outcome)
            announce(outcome)
            parent = key
        return outcomes

    def _adopted(self, start: Artifact | Foreign | None) -> Artifact | None:
        """The checkpoint as an artifact; one of rprune's own says its architecture itself."""
        if start is None:
            return None
        if isinstance(start, Foreign):
            made = imported(start, self.recipe.model, self.bench)
            self.arch = made.metadata.arch
            return made
        arch = start.metadata.arch
        if "arch" in self.recipe.model.model_fields_set and self.arch != arch:
            raise UsageError(f"the checkpoint is a {arch.name}, the recipe says {self.arch.name}", "leave out [model]")
        self.arch = arch
        check_fits(start, self.bench.data)
        return start

    def _compared_with(self, baseline: Path) -> Judged:
        if self.policy is None or not self.policy.needs_baseline:
            raise UsageError("no rule compares with --baseline", "write max_drop into the policy that the recipe names")
        return read_source(baseline)

    def _teacher(self, folder: Path) -> Artifact | None:
        """The model file that a finetune stage names as its teacher."""
        for stage in self.recipe.stage:
            if isinstance(stage, FinetuneStage) and stage.teacher not in (None, DENSE):
                return open_teacher(folder / str(stage.teacher), self.bench, self.arch.name)
        return None

    def _taught_by(self, stage: Stage, dense: Artifact | None) -> Artifact | None:
        """The teacher of a finetune stage that has one; ``dense``: the model before pruning."""
        if not isinstance(stage, FinetuneStage) or stage.teacher is None:
            return None
        return dense if stage.teacher == DENSE else self.teacher

    @property
    def _first_key(self) -> str:
        if self.start is None:
            return ""
        return self.start.identity + ("/loaded_unsafely" if self.start.loaded_unsafely else "")

    def _folder(self, number: int, stage: Stage) -> Path:
        return self.out / ("export" if stage.kind == "export" else f"{number:02d}-{stage.kind}")

    def _key(self, stage: Stage, parent: str) -> str:
        """What a stage's result depends on. The parent's key stands for all that came before."""
        bench = self.bench
        suites = self.recipe.model_dump(mode="json")["suites"]
        return digest_of(
            {
                "stage": stage.model_dump(mode="json"),
                "parent": parent,
                "data": bench.record().model_dump(mode="json"),
                "architecture": self.arch.to_dict(),
                "threat": [bench.threat.norm, bench.threat.text],
                "seed": bench.seed,
                "smoke": bench.smoke,
                "device": bench.device.type,
                "teacher": self.teacher.identity if self.teacher and stage.kind == "finetune" else None,
                "policy": self.policy.sha256 if self.policy and stage.kind == "export" else None,
                "baseline": self.baseline.report.id if self.baseline and stage.kind == "export" else None,
                "suites": [suites, referenced_files(suites)] if stage.kind == "export" else None,
                "name": self.recipe.name if stage.kind == "export" else None,
                "code": [source_digest(), referenced_files([stage.model_dump(mode="json"), self.arch.name])],
            }
        )

    def _make(
        self, stage: Stage, folder: Path, key: str, artifact: Artifact | None, certificates: Certificates | None
    ) -> None:
        """Run a stage beside its final place and move it there when it is whole."""
        partial = partial_folder(folder, key) if self.here.first else partial_of(folder)
        self._work(stage, partial, artifact, certificates)
        if self.here.first:
            publish(partial, folder)
        self.here.wait()

    def _work(self, stage: Stage, partial: Path, artifact: Artifact | None, certificates: Certificates | None) -> None:
        if isinstance(stage, CertifyStage):
            assert artifact is not None
            part = Part(journal=partial / VERDICTS)
            found = certify(self.bench, artifact, stage, part)
            if self.here.first:
                write_json(partial / "certificates.json", sealed(found, None))
            return
        if isinstance(stage, ExportStage):
            assert artifact is not None
            ran = self.recipe.model_copy(update={"stage": tuple(self.stages)})  # with the epochs of a budget
            source = Source(self.recipe.name, ran.model_dump(mode="json"), self.policy, self.baseline)
            export(self.bench, artifact, stage, partial, source, certificates)
            return
        made = run_stage(self.bench, stage, artifact, self.arch, partial / STATE, self._taught_by(stage, self._dense))
        if not self.here.first:
            return
        save_folder(made, partial)
        history = made.metadata.lineage[-1].history
        if history:
            write_text(partial / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def _read(self, stage: Stage, folder: Path, reused: bool) -> Outcome:
        if isinstance(stage, CertifyStage):
            certificates = json.loads((folder / "certificates.json").read_text(encoding="utf-8"))
            return Outcome(stage.kind, folder, reused, certificates=certificates)
        if isinstance(stage, ExportStage):
            return Outcome(stage.kind, folder, reused, report=read_report(folder))
        return Outcome(stage.kind, folder, reused, artifact=load_artifact(folder, self.arch.name))

    def _lock(self) -> None:
        """Write down recipe, policy and baseline before the first stage; an equal lock keeps its time."""
        content: dict[str, Any] = {
            "recipe": self.recipe.model_dump(mode="json"),
            "policy": None if self.policy is None else self.policy.model_dump(mode="json"),
            "policy_sha256": None if self.policy is None else self.policy.sha256,
            "baseline": None if self.baseline is None else self.baseline.report.id,
            "data": self.bench.record().model_dump(mode="json"),
        }
        path = self.out / "recipe.lock.json"
        if path.exists():
            try:
                old = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                old = None
            if not isinstance(old, dict):
                raise InputError(f"{path} is damaged", "delete it, or choose another -o")
            if {key: old.get(key) for key in content} == content:
                return
        write_json(path, content | {"locked_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")})
