from __future__ import annotations

from typing import Annotated

import typer

from rprune.cli import options as o
from rprune.cli.console import ProgressLines
from rprune.cli.launch import launched


def finetune(
    model: o.Model,
    output: o.Output = None,
    data: o.Data = None,
    arch: o.Arch = None,
    objective: o.Objective = None,
    epochs: o.Epochs = None,
    lr: o.LearningRate = None,
    batch_size: o.BatchSize = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Model file to learn from, usually the dense one.")
    ] = None,
    preset: o.Preset = None,
    eps: o.Eps = None,
    norm: o.Norm = None,
    mean: o.Mean = None,
    std: o.Std = None,
    arch_arg: o.ArchArg = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    gpus: o.Gpus = None,
    settings: o.Set = None,
    download: o.Download = False,
    trust_pickle: o.TrustPickle = False,
    force: o.Force = False,
    resume: o.Resume = True,
    compiled: o.Compile = False,
    tensorboard: o.TensorBoard = None,
    profile: o.Profile = None,
    dry_run: o.DryRun = False,
    show_config: o.ShowConfig = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Recover accuracy and robustness with the mask held."""
    if launched(gpus, device):
        return
    from rprune.cli.work import work
    from rprune.pipeline.presets import pruned_by
    from rprune.pipeline.recipe import FinetuneStage, validated
    from rprune.pipeline.single import open_model

    table = o.given(
        objective=objective, epochs=epochs, lr=lr, batch_size=batch_size, compile=compiled or None, teacher=teacher
    )
    output = output or o.default_output(model, "finetuned")
    with ProgressLines(quiet or as_json, tensorboard) as reporter:
        request = o.request(
            mean, std, arch_arg, data=data, arch=arch, norm=norm, eps=eps, seed=seed, device=device,
            download=download, trust_pickle=trust_pickle,
        )  # fmt: skip
        bench, source = open_model(model, request, reporter)
        table, _ = o.with_preset(table, "finetune", preset, pruned_by(source.metadata))
        stage = validated(FinetuneStage, o.with_settings(table, settings), "options")
        bench.typed |= o.typed(table)
        work(
            bench, stage, source, output, reporter, force=force, resume=resume, profile=profile, dry_run=dry_run,
            show_config=show_config, as_json=as_json, next_step=f"rprune quantize {output}",
        )  # fmt: skip
