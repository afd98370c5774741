"""One stage on one model file: what a single command runs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rprune.errors import InputError, UsageError
from rprune.files import digest_of, partial_folder, partial_of, read_json, refuse_overwrite, seal_of
from rprune.locks import working_on
from rprune.models.registry import Architecture
from rprune.pipeline.artifact import Artifact, load_any, save_artifact, save_folder
from rprune.pipeline.bench import Bench, Reporter, check_fits
from rprune.pipeline.bundle import Source, export
from rprune.pipeline.certifying import Certificates
from rprune.pipeline.environment import named_code, referenced_files, source_digest
from rprune.pipeline.finish import STATE, give_way, publish
from rprune.pipeline.foreign import Trust
from rprune.pipeline.importing import imported
from rprune.pipeline.recipe import DataSection, ExportStage, FinetuneStage, ModelSection, Section
from rprune.pipeline.stages import DENSE, check_stage, open_teacher, run_stage
from rprune.reports.schema import Report
from rprune.threat import ThreatModel
from rprune.training.world import world


@dataclass(frozen=True)
class Request:
    """What the user said about model, data and threat; None means: as the model's file says."""

    data: str | None = None
    arch: str | None = None
    norm: str | None = None
    eps: str | None = None
    seed: int = 0
    device: str = "auto"
    download: bool = False
    trust_c: bool = False  # compile and run a C source whose origin is not proved
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    trust_pickle: bool = False  # code that a model file names may run

    def model_section(self) -> ModelSection:
        """Its architecture is set where the user named one."""
        section = ModelSection(kwargs=dict(self.kwargs), mean=self.mean, std=self.std)
        return section if self.arch is None else ModelSection(**section.model_dump() | {"arch": self.arch})

    def trust(self, reporter: Reporter) -> Trust | None:
        """Who is told before code of a file runs; None: it never does."""
        return reporter.warn if self.trust_pickle else None


def open_data(request: Request, reporter: Reporter, recorded: Artifact | None = None) -> Bench:
    """The data, threat and device of a request. Raises UsageError when no data is named anywhere."""
    if recorded is None:
        if request.data is None:
            raise UsageError("no data is named", "say which: --data digits")
        section, threat = DataSection(source=request.data, download=request.download), None
    else:
        record, threat = recorded.metadata.data, recorded.metadata.threat
        changed = request.data is not None and request.data != record.source
        section = DataSection(
            source=request.data or record.source,
            validation=record.validation,
            augment=None if changed else record.augment,  # type: ignore[arg-type]  # validated when it was recorded
            pseudo=None if changed else record.pseudo,
            limit=None if changed else record.limit,
            download=request.download,
        )
    bench = Bench.open(section, threat, request.seed, request.device, reporter)
    if request.eps is not None or request.norm is not None:
        if request.eps is None and request.norm != bench.threat.norm:
            raise UsageError(
                f"--norm {request.norm} needs its own radius", "give --eps too: the norms' radii do not compare"
            )
        bench.threat = ThreatModel.of(request.norm or bench.threat.norm, request.eps or bench.threat.text)
    bench.typed = named_code([request.arch])
    bench.smoke = recorded is not None and recorded.metadata.smoke
    return bench


def open_model(path: Path, request: Request, reporter: Reporter) -> tuple[Bench, Artifact]:
    """A model file with the data it goes with.

    Raises:
        InputError: unreadable, or not fitting the architecture or the data.
        UsageError: somebody's weights without --data; arguments of an architecture that is not named.
    """
    found = load_any(path, request.arch, request.trust(reporter))
    if isinstance(found, Artifact):
        name = found.metadata.arch.name
        if request.arch not in (None, name):
            raise UsageError(f"{path} is a {name}, not a {request.arch}", "leave out --arch: the file says what it is")
        bench = open_data(request, reporter, found)
        check_fits(found, bench.data)
        return bench, found
    if request.data is None:
        raise UsageError(f"{path} holds weights alone", "say what data they are for: --data SOURCE")
    bench = open_data(request, reporter)
    return bench, imported(found, request.model_section(), bench)


def prepare(
    bench: Bench, stage: Section, source: Artifact | None, output: Path, *, arch: Architecture | None, force: bool
) -> None:
    """Find every mistake that can be found without running the stage. Writes nothing.

    Raises UsageError or InputError.
    """
    check_stage(stage, bench, arch or (None if source is None else source.metadata.arch), source)
    refuse_overwrite(output, force)
    if output.suffix not in ("", ".pt", ".safetensors"):
        raise UsageError(f"cannot write '{output.suffix}' files", "name a .pt or .safetensors file, or a folder")


def teacher_of(bench: Bench, stage: Section, source: Artifact | None) -> Artifact | None:
    """The model that a finetune stage learns from, where it names one. Raises UsageError, InputError."""
    if not isinstance(stage, FinetuneStage) or stage.teacher is None:
        return None
    if stage.teacher == DENSE:
        raise UsageError("teacher 'dense' is for recipes", "name the dense model's file: --teacher FILE")
    return open_teacher(Path(stage.teacher), bench, None if source is None else source.metadata.arch.name)


def run_single(
    bench: Bench,
    stage: Section,
    source: Artifact | None,
    output: Path,
    *,
    arch: Architecture | None = None,
    resume: bool = True,
) -> Artifact:
    """Run one prepared stage and write its artifact. Interrupted, the same call continues.

    Of several processes (:func:`world`) all run the stage, and the first one writes. Raises UsageError where another
    command makes the same output, or it cannot be written.
    """
    here, teacher = world(), teacher_of(bench, stage, source)
    key = digest_of(
        {
            "stage": stage.model_dump(mode="json"),
            "teacher": None if teacher is None else teacher.identity,
            "source": None if source is None else source.identity,
            "arch": None if arch is None else arch.to_dict(),
            "bench": [bench.record().model_dump(mode="json"), str(bench.threat), bench.seed, bench.device.type],
            "code": [source_digest(), referenced_files([stage.model_dump(mode="json"), arch and arch.name])],
        }
    )
    with working_on(output, here.first):
        partial = partial_folder(output, key, resume) if here.first else partial_of(output)
        made = run_stage(bench, stage, source, arch, partial / STATE, teacher)
        if here.first and output.suffix:
            give_way(output, partial)
            save_artifact(made, output)
            shutil.rmtree(partial)
        elif here.first:
            save_folder(made, partial)
            publish(partial, output)
        here.wait()
    return made


def run_export(
    bench: Bench,
    artifact: Artifact,
    stage: ExportStage,
    output: Path,
    source: Source,
    certificates: Certificates | None,
) -> Report:
    """Export a model file into a folder. Interrupted, the same call continues.

    Of several processes (:func:`world`) all attack, and the first one writes. Raises UsageError as :func:`run_single`.
    """
    check_stage(stage, bench, artifact.metadata.arch, artifact)
    here = world()
    key = digest_of(
        {
            "recipe": source.recipe,
            "policy": None if source.policy is None else source.policy.sha256,
            "source": artifact.identity,
            "certificates": certificates,
            "bench": [bench.record().model_dump(mode="json"), str(bench.threat), bench.seed, bench.device.type],
            "code": [source_digest(), referenced_files(stage.model_dump(mode="json"))],
        }
    )
    with working_on(output, here.first):
        partial = partial_folder(output, key) if here.first else partial_of(output)
        report = export(bench, artifact, stage, partial, source, certificates)
        if here.first:
            publish(partial, output)
        here.wait()
    return report


def certificates_beside(model: Path, shard: tuple[int, int] = (0, 1)) -> Path:
    """Where ``certify`` writes, a shard to a file of its own, and, beside a file of rprune's own, ``export`` looks."""
    stem = model.stem if model.suffix in (".pt", ".pth", ".safetensors") else model.name
    part = "" if shard == (0, 1) else f".{shard[0] + 1}of{shard[1]}"
    return model.with_name(f"{stem}{part}.certificates.json")


def read_certificates(path: Path, artifact: Artifact, bench: Bench) -> dict[str, Any]:
    """Raises InputError when the certificates were issued for other weights or data."""
    found = read_json(path, "certificates")
    if not isinstance(found, dict) or not {"identity", "form", "data", "seed"} <= set(found):
        raise InputError(f"{path} holds no certificates", "run 'rprune certify' again")
    if found.get("digest") != seal_of(found):
        raise InputError(f"{path} was changed after it was issued", "run 'rprune certify' again")
    if "shard" in found:
        raise InputError(f"{path} covers shard {found['shard']} alone", "merge all: rprune certify MODEL --merge FILE")
    if found["identity"] != artifact.identity or found["form"] != ("onnx-int8" if artifact.quantization else "onnx"):
        raise InputError(f"{path} certifies another model", "run 'rprune certify' on this one")
    if found["data"]["sha256"] != bench.data.test.digest:
        raise InputError(
            f"{path} certifies on other data ({found['data']['source']})", "run 'rprune certify' on this data"
        )
    return found
