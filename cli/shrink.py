from __future__ import annotations

from rprune.cli import options as o
from rprune.cli.console import ProgressLines


def shrink(
    model: o.Model,
    output: o.Output = None,
    data: o.Data = None,
    arch: o.Arch = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    download: o.Download = False,
    trust_pickle: o.TrustPickle = False,
    force: o.Force = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Remove channels that do nothing: the same outputs from a physically smaller network."""
    from rprune.cli.work import work
    from rprune.pipeline.recipe import ShrinkStage
    from rprune.pipeline.single import Request, open_model

    output = output or o.default_output(model, "small")
    with ProgressLines(quiet or as_json) as reporter:
        request = Request(data=data, arch=arch, seed=seed, device=device, download=download, trust_pickle=trust_pickle)
        bench, source = open_model(model, request, reporter)
        work(
            bench, ShrinkStage(), source, output, reporter, force=force, resume=False, dry_run=dry_run,
            as_json=as_json, next_step=f"rprune quantize {output}",
        )  # fmt: skip
