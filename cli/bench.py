from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rprune.cli import options as o
from rprune.cli.console import ProgressLines, note, print_json, print_table


def bench(
    artifacts: Annotated[
        list[Path], typer.Argument(help="ONNX files, model.c, packed files, or folders of exports; of one model.")
    ],
    batches: Annotated[str, typer.Option("--batch-size", help="Images a call; several with commas.")] = "1,64",
    threads: Annotated[str, typer.Option("--threads", help="Threads; several with commas, 0 for all cores.")] = "1,0",
    rounds: Annotated[int, typer.Option("--rounds", help="Turns of each file, of five calls each.", min=1)] = 20,
    seed: o.Seed = 0,
    trust_c: o.TrustC = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Size, load time, memory and latency of files side by side, in turns. Zeros are skipped by the C form alone."""
    from rprune.export.speed import core_counts, latencies, measured, runnable, sizes_of, to_json
    from rprune.pipeline.environment import environment
    from rprune.reports.text import size

    sizes, counts = sizes_of(batches, "--batch-size"), core_counts(threads)
    files = runnable(artifacts)
    for path in files:
        if path.suffix == ".c" and not trust_c:
            from rprune.export.c.origin import need_origin  # torch comes with it

            need_origin(path)
    runs = [path for path in files if path.suffix != ".safetensors"]
    with ProgressLines(quiet or as_json) as reporter:
        footprints = [measured(path) for path in files]
        rows = latencies(
            runs, batches=sizes, threads=counts, rounds=rounds, seed=seed,
            on_progress=lambda done, total: reporter.progress("bench", done, None, total),
        )  # fmt: skip
    if as_json:
        print_json(to_json(footprints, rows) | {"environment": environment("cpu"), "rounds": rounds, "seed": seed})
        return
    table = [
        [f.file, size(f.bytes), size(f.zipped), f"{f.load_ms:.1f}", size(f.memory) if f.memory else ""]
        for f in footprints
    ]
    print_table("on disk, and loaded in a fresh process", ["file", "size", "zipped", "load ms", "memory"], table)
    table = [
        [row.file, row.runtime, str(row.batch), str(row.threads), f"{row.p50:.3f}", f"{row.p95:.3f}",
         "" if row.ratio is None else f"{row.ratio:.2f}x"]
        for row in rows
    ]  # fmt: skip
    columns = ["file", "runtime", "batch", "threads", "p50 ms", "p95 ms", "times as fast"]
    if rows:
        print_table("latency; times as fast as ONNX Runtime on the float file", columns, table)
    if not quiet:
        note("ONNX Runtime computes with zeros as with other weights; the C form leaves them out, on one thread.")
