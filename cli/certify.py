from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from rprune.cli import options as o
from rprune.cli.console import ProgressLines, note, percent, print_json, print_smoke, print_table, stdout
from rprune.cli.launch import launched
from rprune.errors import one_line

if TYPE_CHECKING:
    from rprune.pipeline.single import Request


def certify(
    model: Annotated[
        Path | None,
        typer.Argument(help="A file or stage folder of rprune, anybody's weights, an ONNX file, model.c or .pt2."),
    ] = None,
    output: o.Output = None,
    vnnlib: Annotated[
        Path | None, typer.Option("--vnnlib", help="Also write VNN-LIB files and the float ONNX for other verifiers.")
    ] = None,
    checked: Annotated[
        Path | None, typer.Option("--check", help="Check a certificate instead: bytes, arithmetic, some samples anew.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Samples of each kind that --check computes anew.")
    ] = 5,
    methods: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--method",
            help="Comma-separated: auto (what the form has, from the cheapest on), ibp, crown-ibp, deepz, crown, "
            "alpha-crown; smoothing.",
        ),
    ] = None,
    eps: o.Eps = None,
    norm: o.Norm = None,
    sigma: Annotated[float | None, typer.Option("--sigma", help="Noise of smoothing, in [0,1] pixel units.")] = None,
    radius: Annotated[
        float | None, typer.Option("--radius", help="l2 radius to prove by smoothing; else what covers the threat.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Noise draws a sample, at most.")] = None,
    fixed_n: Annotated[
        int | None,
        typer.Option("--fixed-n", help="As many draws for each sample, as in CERTIFY, instead of stopping early."),
    ] = None,
    n0: Annotated[int | None, typer.Option("--n0", help="Draws that guess the class.")] = None,
    noise: Annotated[
        str | None, typer.Option("--noise", help="gauss, or grid: Gaussian rounded to 8-bit pixels, exact.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="Failure probability of a smoothing certificate.")
    ] = None,
    compat: Annotated[
        str | None, typer.Option("--compat", help="hydra: also count what HYDRA's code would, which is no guarantee.")
    ] = None,
    limit: o.Limit = None,
    shard: o.Shard = None,
    merge: Annotated[
        list[Path] | None, typer.Option("--merge", help="Certificate of another part of this one; repeatable.")
    ] = None,
    data: o.Data = None,
    arch: o.Arch = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    gpus: o.Gpus = None,
    settings: o.Set = None,
    download: o.Download = False,
    trust_pickle: o.TrustPickle = False,
    trust_c: o.TrustC = False,
    resume: o.Resume = True,
    show_config: o.ShowConfig = False,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Prove robustness: bounds for all inputs in the ball, randomized smoothing with a stated probability.

    The certificate is bound to the bytes of model and data; --check CERTIFICATE exits 5 where it does not hold.
    """
    if launched(gpus, device):
        return
    from rprune.cli.work import print_config
    from rprune.errors import UsageError
    from rprune.evaluation.certificates import SmoothedSet
    from rprune.files import refuse_overwrite, write_json
    from rprune.locks import working_on
    from rprune.pipeline.certificate import sealed
    from rprune.pipeline.certifying import CLAIMS, threat_of
    from rprune.pipeline.certifying import certify as run_certify
    from rprune.pipeline.properties import write_properties
    from rprune.pipeline.recipe import CertifyStage, validated
    from rprune.pipeline.shipped import certify_file, is_final, open_target
    from rprune.pipeline.single import Request, certificates_beside, open_model
    from rprune.pipeline.verdicts import Part
    from rprune.training.world import world

    if checked is not None:
        if model is not None:
            raise UsageError("--check takes the certificate alone", "the model is the file that it names, beside it")
        again = Request(
            data=data, arch=arch, device=device, download=download, trust_pickle=trust_pickle, trust_c=trust_c
        )
        _check(checked, again, samples, as_json, quiet)
        return
    if model is None:
        raise UsageError("no model is named", "rprune certify MODEL, or --check CERTIFICATE")
    request = Request(
        data=data, arch=arch, norm=norm, eps=eps, seed=seed, device=device, download=download,
        trust_pickle=trust_pickle, trust_c=trust_c,
    )  # fmt: skip
    shipped = is_final(model, request)
    if vnnlib is not None:
        if shipped:
            raise UsageError("--vnnlib is for rprune's own files", "certify the model that the file was made from")
        refuse_overwrite(vnnlib, force)
    methods = methods or ("smoothing" if shipped and model.suffix != ".onnx" else None)
    chosen = None if methods is None else [name.strip() for name in methods.split(",")]
    if n is not None and fixed_n is not None:
        raise UsageError("--n and --fixed-n are two tests", "give one of them")
    if merge and shard is not None:
        raise UsageError("--shard and --merge are two commands", "merge what the shards wrote without --shard")
    table = o.given(
        methods=chosen, sigma=sigma, radius=radius, n=n or fixed_n, test=None if fixed_n is None else "fixed", n0=n0,
        noise=noise, alpha=alpha, limit=limit, smoothing_limit=limit, eps=eps, compat=compat,
    )  # fmt: skip
    stage = validated(CertifyStage, o.with_settings(table, settings), "options")
    output = output or certificates_beside(model, o.shard(shard))
    part = Part(o.shard(shard), output.with_name(f"{output.name}.verdicts.jsonl"), resume, tuple(merge or ()))
    if show_config:
        with ProgressLines(quiet or as_json) as reporter:
            bench = open_target(model, request, reporter).bench if shipped else open_model(model, request, reporter)[0]
        print_config(bench, stage, as_json)
        return
    refuse_overwrite(output, force)
    with ProgressLines(quiet or as_json) as reporter, working_on(output, world().first):
        if shipped:
            opened = open_target(model, request, reporter)
            found = certify_file(opened, stage, part)
        else:
            bench, source = open_model(model, request, reporter)
            written = 0
            if vnnlib is not None and world().first:
                written = write_properties(bench, source, threat_of(bench, stage), stage.limit, vnnlib)
            found = run_certify(bench, source, stage, part)
        if not world().first:
            return
        found = sealed(found, model)
        write_json(output, found)
        part.done()
    if as_json:
        print_json(found)
        return
    rows = []

    def part_of(count: int, size: int) -> str:
        return percent(count / size if size else None)  # a small shard may have bounds alone

    bounds = found.get("bounds")
    if bounds:
        for level in bounds["levels"]:
            count = f"{level['correct']}/{bounds['n']}"
            name = ", ".join(bounds["methods"]) if level["eps"] == bounds["eps"] else "bounds"
            rows.append([name, f"{bounds['norm']} {level['eps']}", part_of(level["correct"], bounds["n"]), count])
    if smooth := found.get("smoothing"):
        verdicts = SmoothedSet.from_rows(smooth["samples"])
        for at in sorted({0.0, smooth["radius"]}):
            right, size = verdicts.correct_at(at), len(verdicts.labels)
            rows.append(["smoothing", f"l2 {at:.6g}", part_of(right, size), f"{right}/{size}"])
    print_table(
        f"certified accuracy of the {found['form']} form -> {output}", ["method", "radius", "certified", "count"], rows
    )
    print_smoke(found.get("smoke", False))
    if bounds and not quiet:
        note(
            f"At eps {bounds['eps']}: " + ", ".join(f"{count} {name}" for name, count in bounds["counts"].items()) + "."
        )
        note(f"Certified for {CLAIMS[bounds['claim']]}.")
        note(f"Of these {bounds['firm']['correct']} also for {CLAIMS[bounds['firm']['claim']]}.")
        if "as_hydra" in bounds:
            counted = bounds["as_hydra"]
            said = f"HYDRA's code would count {counted['correct']}/{counted['n']} by intervals"
            note(f"{said}: eps {counted['eps']}, and a box within the range of each batch. That is no guarantee.")
    if vnnlib is not None and not quiet:
        note(f"{vnnlib}: properties of {written} samples and the float network, which is what verifiers would check.")
    if not quiet and not shipped:
        note(f"Next: rprune export {model} -o DIR")


def _check(certificate: Path, request: Request, samples: int, as_json: bool, quiet: bool) -> None:
    from rprune.pipeline.certificate import check

    done = []
    with ProgressLines(quiet or as_json) as reporter:
        for name, detail in check(certificate, request, reporter, samples):
            done.append({"name": name, "detail": detail})
            if not as_json:
                stdout.print(Text.assemble(Text("✓", "green"), one_line(f" {name:<14} {detail}")))
    if as_json:
        print_json({"certificate": str(certificate), "holds": True, "checks": done})
    else:
        stdout.print(Text("CERTIFICATE HOLDS", "bold green"))
