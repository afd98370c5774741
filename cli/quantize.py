from __future__ import annotations

from typing import Annotated

import typer

from rprune.cli import options as o
from rprune.cli.console import ProgressLines


def quantize(
    model: o.Model,
    output: o.Output = None,
    calibration: Annotated[
        int | None, typer.Option("--calibration", help="Training images whose ranges set the scales.")
    ] = None,
    data: o.Data = None,
    arch: o.Arch = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    settings: o.Set = None,
    download: o.Download = False,
    force: o.Force = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Add the 8-bit form: int8 weights, uint8 activations, zeros kept."""
    from rprune.cli.work import work
    from rprune.pipeline.recipe import QuantizeStage, validated
    from rprune.pipeline.single import Request, open_model

    stage = validated(QuantizeStage, o.with_settings(o.given(calibration=calibration), settings), "options")
    output = output or o.default_output(model, "int8")
    with ProgressLines(quiet or as_json) as reporter:
        request = Request(data=data, arch=arch, seed=seed, device=device, download=download)
        bench, source = open_model(model, request, reporter)
        work(
            bench, stage, source, output, reporter, force=force, resume=False, dry_run=dry_run,
            as_json=as_json, next_step=f"rprune certify {output}, then rprune export {output} -o DIR",
        )  # fmt: skip
