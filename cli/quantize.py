from __future__ import annotations

from typing import Annotated

import typer

from rprune.cli import options as o
from rprune.cli.console import ProgressLines
from rprune.cli.launch import launched


def quantize(
    model: o.Model,
    output: o.Output = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="ptq: calibrate; qat: train with the integers; codebook: few floats.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option("--bits", help="2 to 12 for weights and activations; 8 is deployed.")
    ] = None,
    observer: Annotated[
        str | None, typer.Option("--observer", help="Range of the activations: minmax, percentile or mse.")
    ] = None,
    calibration: Annotated[
        int | None, typer.Option("--calibration", help="Training images whose activations set the scales.")
    ] = None,
    portable: Annotated[
        bool | None, typer.Option("--portable/--no-portable", help="Exact on CPUs without VNNI too.")
    ] = None,
    bias_correction: Annotated[
        bool | None,
        typer.Option("--bias-correction/--no-bias-correction", help="Cancel the weights' mean error in the biases."),
    ] = None,
    compact: Annotated[
        bool | None, typer.Option("--compact/--no-compact", help="Remove channels that do nothing first.")
    ] = None,
    data: o.Data = None,
    arch: o.Arch = None,
    objective: o.Objective = None,
    epochs: o.Epochs = None,
    lr: o.LearningRate = None,
    batch_size: o.BatchSize = None,
    eps: o.Eps = None,
    norm: o.Norm = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    gpus: o.Gpus = None,
    settings: o.Set = None,
    download: o.Download = False,
    trust_pickle: o.TrustPickle = False,
    force: o.Force = False,
    resume: o.Resume = True,
    tensorboard: o.TensorBoard = None,
    profile: o.Profile = None,
    dry_run: o.DryRun = False,
    show_config: o.ShowConfig = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Integers in place of floats: int8 weights, uint8 activations, zeros kept."""
    if launched(gpus, device):
        return
    from rprune.cli.work import work
    from rprune.pipeline.recipe import QuantizeStage, validated
    from rprune.pipeline.single import Request, open_model

    table = o.given(
        mode=mode, bits=bits, observer=observer, calibration=calibration, portable=portable,
        bias_correction=bias_correction, compact=compact, objective=objective, epochs=epochs, lr=lr,
        batch_size=batch_size,
    )  # fmt: skip
    stage = validated(QuantizeStage, o.with_settings(table, settings), "options")
    output = output or o.default_output(model, _suffix(stage.mode, stage.bits))
    with ProgressLines(quiet or as_json, tensorboard) as reporter:
        request = Request(
            data=data, arch=arch, norm=norm, eps=eps, seed=seed, device=device, download=download,
            trust_pickle=trust_pickle,
        )  # fmt: skip
        bench, source = open_model(model, request, reporter)
        bench.typed |= o.typed(table)
        step = f"rprune export {output} -o DIR" if stage.bits <= 8 else f"rprune evaluate {output}"
        work(
            bench, stage, source, output, reporter, force=force, resume=resume, profile=profile, dry_run=dry_run,
            show_config=show_config, as_json=as_json, next_step=f"rprune certify {output}, then {step}",
        )  # fmt: skip


def _suffix(mode: str, bits: int) -> str:
    return f"codebook{bits}" if mode == "codebook" else f"int{bits}"
