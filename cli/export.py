from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rprune.cli import options as o
from rprune.cli.console import ProgressLines, note, print_json, print_report
from rprune.cli.launch import launched


def export(
    model: o.Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    formats: o.Formats = None,
    compact: Annotated[
        bool, typer.Option("--compact/--no-compact", help="Remove channels that do nothing first.")
    ] = True,
    bench: Annotated[bool, typer.Option("--bench", help="Measure latencies, too, for the report.")] = False,
    suite: o.Suite = None,
    limit: o.Limit = None,
    health: o.Health = True,
    certificates: Annotated[
        Path | None, typer.Option("--certificates", help="From 'certify'; default: beside the model, if there.")
    ] = None,
    policy: Annotated[Path | None, typer.Option("--policy", help="Gate to judge the report by.")] = None,
    eps: o.Eps = None,
    norm: o.Norm = None,
    data: o.Data = None,
    arch: o.Arch = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    gpus: o.Gpus = None,
    download: o.Download = False,
    trust_pickle: o.TrustPickle = False,
    show_config: o.ShowConfig = False,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write safetensors and ONNX files, check each against its source, attack them, and report."""
    if launched(gpus, device):
        return
    from rprune.cli.work import print_config
    from rprune.export.c.engine import stated
    from rprune.files import refuse_overwrite
    from rprune.pipeline.bundle import Source
    from rprune.pipeline.recipe import ExportStage, validated
    from rprune.pipeline.single import Request, certificates_beside, open_model, read_certificates, run_export
    from rprune.reports.gate import read_policy
    from rprune.reports.text import size

    chosen = None if formats is None else [name.strip() for name in formats.split(",")]
    table = o.given(formats=chosen, compact=compact, bench=bench, suite=suite, limit=limit, health=health)
    stage = validated(ExportStage, table, "options")
    bar = None if policy is None else read_policy(policy)
    output = output.resolve() if not output.name else output  # "." has no name beside which to work
    with ProgressLines(quiet or as_json) as reporter:
        request = Request(
            data=data, arch=arch, norm=norm, eps=eps, seed=seed, device=device, download=download,
            trust_pickle=trust_pickle,
        )  # fmt: skip
        opened, artifact = open_model(model, request, reporter)
        if show_config:
            print_config(opened, stage, as_json)
            return
        refuse_overwrite(output, force)
        beside = certificates_beside(model)
        place = certificates or (beside if beside.exists() else None)
        proofs = None if place is None else read_certificates(place, artifact, opened)
        recipe = {"command": "export", "model": model.name, "stage": stage.model_dump(mode="json"), "seed": seed}
        report = run_export(opened, artifact, stage, output, Source(model.stem, recipe, bar), proofs)
    if as_json:
        print_json(report.to_json())
        return
    print_report(report, str(output))
    if (output / "model.c").exists():
        needs = stated(output / "model.c")
        note(f"model.c needs {size(needs['RAM_VECTOR'])} of RAM; without vectors {size(needs['RAM_SCALAR'])}, "
             f"and {size(needs['TABLES_SCALAR'])} of tables")  # fmt: skip
    if not quiet:
        note(f"Next: rprune verify {output}")
