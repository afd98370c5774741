from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated

import typer

from rprune.cli import completion
from rprune.cli import options as o
from rprune.cli.console import ProgressLines, note, print_attack, print_json
from rprune.cli.launch import launched


def attack(
    model: Annotated[
        Path,
        typer.Argument(
            help="An ONNX file, model.c, a .pt2 program, or a model file or stage folder as for other commands."
        ),
    ],
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="A name of 'rprune list suites', several with commas, file.py:function, or harp-table; "
            "default: aa-standard, for 8-bit files aa-quant.",
            autocompletion=completion.suites,
        ),
    ] = None,
    limit: o.Limit = None,
    shard: o.Shard = None,
    merge: Annotated[
        list[Path] | None, typer.Option("--merge", help="Folder of another part of this attack; repeatable.")
    ] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Stop after this time: 90s, 10m, 2h.")] = None,
    eps: o.Eps = None,
    norm: o.Norm = None,
    data: o.Data = None,
    parent: Annotated[
        list[Path] | None, typer.Option("--parent", help="ONNX file whose adversarial points may transfer; repeatable.")
    ] = None,
    arch: o.Arch = None,
    mean: o.Mean = None,
    std: o.Std = None,
    arch_arg: o.ArchArg = None,
    batch_size: o.BatchSize = None,
    gpus: o.Gpus = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the search net; pays off in long runs.")] = False,
    health: o.Health = True,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of ledger and evidence; default: MODEL-SUITE.attack.")
    ] = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    download: o.Download = False,
    trust_pickle: o.TrustPickle = False,
    trust_c: o.TrustC = False,
    resume: o.Resume = True,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Robust accuracy under the strongest attacks, of a model file or of the very ONNX file that ships."""
    if launched(gpus, device):
        return
    from rprune.pipeline.attack_file import Plan, attack_file, check_plan, folder_for
    from rprune.pipeline.shipped import open_target

    plan = Plan(
        suite=suite, limit=limit, shard=o.shard(shard), batch_size=batch_size,
        budget=math.inf if budget is None else o.seconds(budget), resume=resume,
        merge=tuple(merge or ()), health=health,
    )  # fmt: skip
    with ProgressLines(quiet or as_json) as reporter:
        request = o.request(
            mean, std, arch_arg, data=data, arch=arch, norm=norm, eps=eps, seed=seed, device=device,
            download=download, trust_pickle=trust_pickle, trust_c=trust_c,
        )  # fmt: skip
        opened = open_target(model, request, reporter, tuple(parent or ()), compiled)
        name = plan.suite_for(opened)
        check_plan(plan, opened)
        output = output or _beside(model, name)
        with folder_for(output, force):
            if opened.note and not quiet:
                note(opened.note)
            result = attack_file(opened, plan, output)
    if as_json:
        print_json(result.to_json())
    else:
        print_attack(result, str(output))


def _beside(model: Path, suite: str) -> Path:
    """model.int8.onnx, aa-quant -> model.int8-aa-quant.attack; model.c keeps its ending: model.onnx lies beside it."""
    name = model.resolve().name if not model.name else model.name
    stem = name if model.is_dir() or model.suffix == ".c" else name.removesuffix(model.suffix)
    return model.with_name(f"{stem}-{re.sub(r'[^A-Za-z0-9.-]+', '-', suite)}.attack")
