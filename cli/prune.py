from __future__ import annotations

from typing import Annotated

import typer

from rprune.cli import completion
from rprune.cli import options as o
from rprune.cli.console import ProgressLines
from rprune.cli.launch import launched


def prune(
    model: o.Model,
    sparsity: Annotated[
        float | None, typer.Option("-s", "--sparsity", help="Share of conv and linear weights to remove, 0 to 1.")
    ] = None,
    macs: Annotated[
        float | None,
        typer.Option("--macs", help="Instead of a sparsity: share of the dense multiply-accumulates to keep, 0 to 1."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "-m",
            "--method",
            help="A name of 'rprune list methods', or file.py:Class.",
            autocompletion=completion.methods,
        ),
    ] = "harp",
    output: o.Output = None,
    data: o.Data = None,
    arch: o.Arch = None,
    objective: o.Objective = None,
    initial_scores: o.InitialScores = None,
    macs_weight: Annotated[
        float | None, typer.Option("--macs-weight", help="HARP: press for weights that cost fewer MACs; try 0.1.")
    ] = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    epochs: o.Epochs = None,
    lr: o.LearningRate = None,
    batch_size: o.BatchSize = None,
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
    """Remove weights, to exactly the budget, by any method of 'rprune list methods'."""
    if launched(gpus, device):
        return
    from rprune.cli.work import work
    from rprune.pipeline.recipe import PruneStage, validated
    from rprune.pipeline.single import open_model

    table = o.given(
        method=o.with_options(method, initial_scores=initial_scores, macs_weight=macs_weight),
        sparsity=sparsity, macs=macs, objective=objective, epochs=epochs, lr=lr, batch_size=batch_size,
        compile=compiled or None, include=include, exclude=exclude,
    )  # fmt: skip
    table, threat = o.with_preset(table, "prune", preset, method)
    stage = validated(PruneStage, o.with_settings(table, settings), "options")
    budget = f"macs{stage.macs:g}" if stage.sparsity is None else f"{stage.sparsity:g}"
    output = output or o.default_output(model, f"{method.rpartition(':')[2]}-{budget}")
    with ProgressLines(quiet or as_json, tensorboard) as reporter:
        request = o.request(
            mean,
            std,
            arch_arg,
            data=data,
            arch=arch,
            norm=norm or threat.get("norm"),
            eps=eps or threat.get("eps"),
            seed=seed,
            device=device,
            download=download,
            trust_pickle=trust_pickle,
        )
        bench, source = open_model(model, request, reporter)
        bench.typed |= o.typed(table)
        work(
            bench, stage, source, output, reporter, force=force, resume=resume, profile=profile, dry_run=dry_run,
            show_config=show_config, as_json=as_json, next_step=f"rprune finetune {output}",
        )  # fmt: skip
