from __future__ import annotations

from typing import Annotated

import typer

from rprune.cli import options as o
from rprune.cli.console import ProgressLines, note, percent, print_json, print_smoke, print_table
from rprune.cli.launch import launched


def evaluate(
    model: o.Model,
    suite: o.Suite = None,
    split: Annotated[str, typer.Option("--split", help="test or validation.")] = "test",
    limit: o.Limit = None,
    eps: o.Eps = None,
    norm: o.Norm = None,
    data: o.Data = None,
    arch: o.Arch = None,
    mean: o.Mean = None,
    std: o.Std = None,
    arch_arg: o.ArchArg = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    gpus: o.Gpus = None,
    download: o.Download = False,
    trust_pickle: o.TrustPickle = False,
    trust_c: o.TrustC = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Clean and robust accuracy of a model file: of its float and its 8-bit form, or of an ONNX, C or .pt2 file."""
    if launched(gpus, device):
        return
    from rprune.errors import unknown_name
    from rprune.evaluation.statistics import clopper_pearson
    from rprune.pipeline.shipped import measure, targets_of

    if split not in ("test", "validation"):
        raise unknown_name("split", split, ["test", "validation"])
    with ProgressLines(quiet or as_json) as reporter:
        request = o.request(
            mean, std, arch_arg, data=data, arch=arch, norm=norm, eps=eps, seed=seed, device=device,
            download=download, trust_pickle=trust_pickle, trust_c=trust_c,
        )  # fmt: skip
        bench, targets, remark = targets_of(model, request, reporter)
        found = measure(bench, targets, split, suite, limit)
    if remark and suite is not None and not quiet:
        note(remark)
    if as_json:
        table = {"model": str(model), "split": split, "threat": str(bench.threat), "results": found}
        print_json(table | ({"smoke": True} if bench.smoke else {}))
        return
    rows = []
    for row in found:
        low, high = clopper_pearson(row["correct"], row["n"])
        interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
        value = percent(row["correct"] / row["n"]) + ("" if row.get("complete", True) else " INCOMPLETE")
        rows.append([row["metric"], row["form"], value, interval, f"{row['correct']}/{row['n']}"])
    print_table(
        f"{model} on {bench.data.source}/{split}, {bench.threat}", ["", "form", "value", "95 % interval", "count"], rows
    )
    print_smoke(bench.smoke)
