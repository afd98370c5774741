"""Model files of any kind as what can be evaluated, attacked and certified: ONNX, C, programs, and rprune's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from rprune.attacks.suites import with_transfer
from rprune.data.loaders import loader
from rprune.errors import InputError, UsageError, first_line
from rprune.evaluation.robustness import chosen, robustness
from rprune.evaluation.target import Target
from rprune.export.c.origin import need_origin
from rprune.export.lift import lifted
from rprune.export.session import is_quantized
from rprune.files import digest_of, file_digest, read_json
from rprune.pipeline.bench import Bench, Reporter
from rprune.pipeline.certifying import certificates, said
from rprune.pipeline.programs import is_program, open_program
from rprune.pipeline.recipe import CertifyStage
from rprune.pipeline.single import Request, open_data, open_model
from rprune.pipeline.targets import CPU, PROBES, alike, of_artifact, of_file, sources_of
from rprune.pipeline.verdicts import Part
from rprune.reports.schema import Role

SHIPPED = (".onnx", ".c")


def is_final(path: Path, request: Request) -> bool:
    """Whether a file is one that only answers: it is attacked and certified as it is, and not worked on any more."""
    return path.suffix in SHIPPED or (request.arch is None and is_program(path, request.trust_pickle))


@dataclass(frozen=True, eq=False)
class Opened:
    """A file ready to be attacked.

    ``digest``: of a file's bytes, of an artifact's tensors; ``identity``: of all that decides its answers; ``note``:
    what the user should know of how it is searched.
    """

    path: Path
    bench: Bench
    target: Target
    role: Role
    digest: str
    identity: str
    gradient: str
    verdict: str
    note: str = ""
    ran: bool = False  # code that the file names, or a program that is not bounded, ran


def open_target(
    path: Path, request: Request, reporter: Reporter, parents: Sequence[Path] = (), compiled: bool = False
) -> Opened:
    """A model file of any kind with its data and threat.

    Beside a report (a bundle), an ONNX or C file needs no further word: data, threat and parents are found there.

    Raises:
        InputError: the file cannot be used, does not go with the data, or is code of unknown origin.
        UsageError: no data is named anywhere; a parent for a file of rprune's own.
    """
    if path.suffix in SHIPPED:
        return _open_shipped(path, request, reporter, parents, compiled)
    if is_final(path, request):
        return _open_program(path, request, reporter, parents, compiled)
    if parents:
        raise UsageError("--parent is for ONNX and C files", "rprune's own files hold their float parent")
    bench, artifact = open_model(path, request, reporter)
    form, target = list(of_artifact(artifact, bench.device, compiled).items())[-1]
    gradient = "8-bit simulation (straight-through) and float parent" if form == "8-bit" else "float model, folded"
    if form == "8-bit":
        bench.device = CPU  # where the simulation is exact
    verdict = "the 8-bit simulation" if form == "8-bit" else "torch"
    digests = artifact.digest, artifact.identity
    return Opened(path, bench, target, "weights", *digests, gradient, f"{verdict} on {path.name}")


def _open_shipped(path: Path, request: Request, reporter: Reporter, parents: Sequence[Path], compiled: bool) -> Opened:
    report, smoke = path.with_name("report.json"), False
    if request.arch is not None:
        raise UsageError("--arch is for rprune's own files", "leave it out: the file holds its network")
    if path.suffix == ".c" and not request.trust_c:
        need_origin(path)
    guide, why = sources_of(path)
    quantized = guide is not None and is_quantized(guide)
    if report.is_file():
        table = read_json(report, "report")
        request, smoke = _completed(request, table), isinstance(table, dict) and bool(table.get("smoke"))
        beside = path.with_name("model.onnx")
        if quantized and not parents and beside.is_file() and beside != path:
            parents = (beside,)
    bench = open_data(request, reporter)
    bench.device, bench.smoke = CPU, smoke
    target, none = of_file(path, guide, tuple(parents), compiled)
    why = why or none
    _check_fits(path, target, bench)
    name = "the file's own graph" if guide == path else f"the graph of {guide.name if guide else ''}"
    gradient = f"{name} in torch" + (", straight-through" if quantized else "")
    gradient += f", and {', '.join(parent.name for parent in parents)}" if parents else ""
    note = "" if why is None else f"no gradients: {why}; only attacks without gradients and transfers run"
    role: Role = "c" if path.suffix == ".c" else "onnx-int8" if quantized else "onnx"
    verdict = f"{'compiled C' if role == 'c' else 'ONNX Runtime'} on {path.name}"
    digest = file_digest(path)
    return Opened(path, bench, target, role, digest, digest, gradient if why is None else "none", verdict, note)


def _open_program(path: Path, request: Request, reporter: Reporter, parents: Sequence[Path], compiled: bool) -> Opened:
    if parents:
        raise UsageError("--parent is for ONNX and C files", "a program has gradients of its own")
    program, words, unsafe = open_program(path, request.trust(reporter), request.mean, request.std)
    bench = open_data(request, reporter)
    try:
        net = program.to(bench.device)
    except Exception as error:  # a pickled module's own code
        raise InputError(f"{path} cannot be moved to {bench.device}: {error}", "--device cpu") from None
    search = torch.compile(net) if compiled else net
    target = Target.of(net, search)  # type: ignore[arg-type]  # a module, says its documentation
    _check_fits(path, target, bench)
    digest = file_digest(path)
    scale = [list(request.mean), list(request.std)]
    identity = digest if not request.mean else digest_of({"file": digest, "normalisation": scale})
    return Opened(
        path, bench, target, "program", digest, identity, f"{words} in torch", f"{words} of {path.name}", ran=unsafe
    )


def _completed(request: Request, report: Any) -> Request:
    """What the user did not say, from the report of the bundle that the file lies in."""
    try:
        data, threat = report["data"]["source"], report["threat"]
        said = replace(request, data=request.data or data)
        if request.eps is None and request.norm is None:
            said = replace(said, norm=threat["norm"], eps=threat["eps"])
    except (KeyError, TypeError):
        return request
    return said


def _check_fits(path: Path, target: Target, bench: Bench) -> None:
    """Raises InputError when images and logits of the file are not those of the data."""
    data = bench.data
    batch = loader(data.test, bench.device).take(chosen(len(data.test), 1))
    try:
        classes = target.logits(batch.x).shape[1]
    except Exception as error:  # ONNX Runtime's errors share no base
        raise InputError(
            f"{path} does not take images of {data.shape}: {first_line(error)}", "give the matching --data"
        ) from None
    if classes != len(data.classes):
        raise InputError(
            f"{path} has {classes} classes, {data.source} has {len(data.classes)}", "give the matching --data"
        )


def targets_of(path: Path, request: Request, reporter: Reporter) -> tuple[Bench, dict[str, Target], str]:
    """The forms of a model file by name, float and 8-bit ones of rprune's own, else the file itself; and the note."""
    if path.suffix in SHIPPED:
        opened = _open_shipped(path, request, reporter, (), False)
        return opened.bench, {path.suffix.removeprefix("."): opened.target}, opened.note
    if is_final(path, request):
        opened = _open_program(path, request, reporter, (), False)
        return opened.bench, {"program": opened.target}, opened.note
    bench, artifact = open_model(path, request, reporter)
    return bench, of_artifact(artifact, bench.device), ""


def measure(
    bench: Bench, targets: dict[str, Target], split: str, suite_name: str | None, limit: int | None
) -> list[dict[str, Any]]:
    """Counts of clean and, with a suite, robust accuracy for each form; "complete" where all its attacks could run."""
    attacks = () if suite_name is None else bench.suite(suite_name)
    rows = []
    for form, target in targets.items():
        data = loader(bench.data.split(split), bench.device if form in ("float", "program") else CPU)
        found = robustness(
            target, data, bench.threat, with_transfer(attacks, target.parents), seed=bench.seed,
            limit=limit, grid=False, together=True,
            on_progress=lambda name, *counts, on=form: bench.reporter.progress(f"{name} on {on}", *counts),
        )  # fmt: skip
        rows.append({"metric": "clean_accuracy", "form": form, "correct": found.clean.correct, "n": found.clean.n})
        if attacks:
            robust = {"metric": "robust_accuracy", "form": form, "correct": found.correct, "n": found.clean.n}
            rows.append(robust | {"suite": suite_name, "complete": found.complete})
    return rows


def certify_file(opened: Opened, stage: CertifyStage, part: Part | None = None) -> dict[str, Any]:
    """Certificates of a file as it ships: bounds of what its graph computes, smoothing of what answers.

    Raises UsageError for bounds of C and of programs, whose graph only their ONNX file tells.
    """
    network = None
    if set(stage.methods) != {"smoothing"}:
        if opened.path.suffix != ".onnx":
            what = "a C source" if opened.path.suffix == ".c" else "a program"
            raise UsageError(f"{what} can be certified by smoothing alone", "--method smoothing; bounds: its ONNX file")
        network = graph_of(opened)
    says = said(opened.role, opened.identity)
    return certificates(opened.bench, network, opened.target.artifact, stage, says, part or Part())


def graph_of(opened: Opened) -> fx.GraphModule:
    """The network of an ONNX file, which gives the file's own answers: the same bits, where integers are summed.

    Raises InputError when it cannot be read, or answers otherwise.
    """
    network = lifted(opened.path)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(PROBES, *opened.bench.data.shape, generator=generator)
    with torch.no_grad():
        wanted, found = opened.target.logits(x), network(x)
    if not alike(found.numpy(), wanted.numpy()):
        raise InputError(
            f"{opened.path}: what was read of its graph does not answer as the file does", "use --method smoothing"
        )
    return network
