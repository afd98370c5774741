from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rprune.cli import options as o
from rprune.cli.console import ProgressLines
from rprune.cli.launch import launched


def train(
    data: o.Data = None,
    arch: o.Arch = "cnn-small",
    output: Annotated[Path, typer.Option("-o", "--output", help="File or folder to write.")] = Path("model.pt"),
    objective: o.Objective = None,
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
    """Train a robust model, by any objective of 'rprune list objectives'."""
    if launched(gpus, device):
        return
    from rprune.cli.work import work
    from rprune.pipeline.bench import architecture
    from rprune.pipeline.recipe import TrainStage, validated
    from rprune.pipeline.single import open_data

    table = o.given(objective=objective, epochs=epochs, lr=lr, batch_size=batch_size, compile=compiled or None)
    table, threat = o.with_preset(table, "train", preset, None)
    stage = validated(TrainStage, o.with_settings(table, settings), "options")
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
        )
        bench = open_data(request, reporter)
        found = architecture(request.model_section(), bench.data)
        bench.typed |= o.typed(table)
        work(
            bench, stage, None, output, reporter, arch=found, force=force, resume=resume, profile=profile,
            dry_run=dry_run, show_config=show_config, as_json=as_json,
            next_step=f"rprune prune {output} --sparsity 0.99 --method harp",
        )  # fmt: skip
