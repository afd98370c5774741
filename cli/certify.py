from __future__ import annotations

from typing import Annotated

import typer

from rprune.cli import options as o
from rprune.cli.console import ProgressLines, note, percent, print_json, print_table


def certify(
    model: o.Model,
    output: o.Output = None,
    methods: Annotated[str | None, typer.Option("-m", "--method", help="ibp, smoothing, or both with a comma.")] = None,
    eps: o.Eps = None,
    norm: o.Norm = None,
    sigma: Annotated[float | None, typer.Option("--sigma", help="Noise of smoothing, in [0,1] pixel units.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Noise draws a sample.")] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="Failure probability of a smoothing certificate.")
    ] = None,
    limit: o.Limit = None,
    data: o.Data = None,
    arch: o.Arch = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    settings: o.Set = None,
    download: o.Download = False,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Prove robustness bounds: IBP for all inputs in the ball, randomized smoothing with a stated probability."""
    from rprune.evaluation.certificates import SmoothedSet
    from rprune.files import refuse_overwrite, write_json
    from rprune.pipeline.recipe import CertifyStage, validated
    from rprune.pipeline.shipped import SHIPPED, certify_file, open_target
    from rprune.pipeline.single import Request, certificates_beside, open_model
    from rprune.pipeline.stages import certify as run_certify

    shipped = model.suffix in SHIPPED
    methods = methods or ("smoothing" if shipped else None)
    chosen = None if methods is None else [name.strip() for name in methods.split(",")]
    table = o.given(methods=chosen, sigma=sigma, n=n, alpha=alpha, limit=limit, smoothing_limit=limit, eps=eps)
    stage = validated(CertifyStage, o.with_settings(table, settings), "options")
    output = output or certificates_beside(model)
    with ProgressLines(quiet or as_json) as reporter:
        request = Request(data=data, arch=arch, norm=norm, eps=eps, seed=seed, device=device, download=download)
        refuse_overwrite(output, force)
        if shipped:
            found = certify_file(open_target(model, request, reporter), stage)
        else:
            bench, source = open_model(model, request, reporter)
            found = run_certify(bench, source, stage)
    write_json(output, found)
    if as_json:
        print_json(found)
        return
    rows = []
    if ibp := found.get("ibp"):
        for level in ibp["levels"]:
            count = f"{level['correct']}/{ibp['n']}"
            rows.append(["ibp", f"{ibp['norm']} {level['eps']}", percent(level["correct"] / ibp["n"]), count])
    if smooth := found.get("smoothing"):
        samples, size = smooth["samples"], len(smooth["samples"])
        for radius in (0.0, smooth["sigma"], 2 * smooth["sigma"]):
            right = SmoothedSet.from_rows(samples).correct_at(radius)
            rows.append(["smoothing", f"l2 {radius:g}", percent(right / size), f"{right}/{size}"])
    print_table(
        f"certified accuracy of the {found['form']} form -> {output}", ["method", "radius", "certified", "count"], rows
    )
    if not quiet and not shipped:
        note(f"Next: rprune export {model} -o DIR")
