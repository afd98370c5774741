"""The papers' tables, made again: recipes of a track along its axes, within a time, resumed by the same command.

    python benchmarks/reproduce/run.py cpu --data npz:cifar10.npz             # about two hours on two cores
    python benchmarks/reproduce/run.py paper --data npz:cifar10.npz --only 'HARP-ResNet-18-PGD-AT' --budget 9m

Tracks are the folders beside this file, or one of yours: recipes, and track.toml with what is made of them. Rows that
share their dense start train it once, those of other tracks in the same work folder, too. Each row runs in a process of
its own; what it found is written down when it is whole, and what was interrupted goes on after its last epoch or attack
batch. On another machine ``--keep`` runs no row of a dense start of which the result file has all. 8-bit forms are
attacked on CPUs, where their simulation is exact: ``--forms float`` leaves them for a later call without a GPU.
``--shorten 0.1`` trains for a tenth of the epochs, as the result file then says; ``--table`` prints what the committed
one holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tables
from track import DENSE, FLOAT, HERE, Row, Track, dense_of, digest, make_dense, make_row, recipe_of

from rprune.files import write_text

RESULTS = HERE.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", help="a folder beside this file, for example cpu or paper, or one of your own")
    parser.add_argument("--table", action="store_true", help="print the table of the committed result file, and stop")
    parser.add_argument("--data", help="CIFAR-10: npz:FILE or cifar10:DIR")
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce"), help="where stages and finished rows lie")
    parser.add_argument("--budget", help="stop after this time, for example 9m; the same command goes on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="rows at once, each on one thread; 1 on a GPU")
    parser.add_argument(
        "--forms", nargs="+", help="attack these alone: float, 8-bit, codebook; default: all of the track"
    )
    parser.add_argument("--only", default="", help="rows whose names match this regular expression")
    parser.add_argument("--shorten", type=float, default=1.0, help="train for this share of the recipes' epochs")
    parser.add_argument("--output", type=Path, help="result file; default: benchmarks/results/reproduce_TRACK.json")
    parser.add_argument(
        "--keep", action="store_true", help="run no row of a dense start of which the result file has all"
    )
    parser.add_argument("--plot", type=Path, help="draw accuracy against sparsity into this file, too")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # what a process of its own does
    options = parser.parse_args()
    name = Path(options.track).name
    output = options.output or RESULTS / f"reproduce_{name}.json"
    whole = True
    if not options.table:
        if options.data is None:
            parser.error("say where CIFAR-10 lies: --data npz:FILE or cifar10:DIR")
        track = Track.read(options.track, options.shorten)
        options.forms = [form for form in track.suites if form in (options.forms or track.suites)]
        if options.row is not None:
            try:
                work_on(track, options)
            except KeyboardInterrupt:
                sys.exit(130)
            return
        options.work.mkdir(parents=True, exist_ok=True)
        whole = everything(track, options, kept(track, options, output))
        before = kept(track, options, output)  # again: hours may have passed
        write_text(output, json.dumps(collected(track, options, before), indent=1) + "\n")
    result = json.loads(output.read_text(encoding="utf-8"))
    print(tables.table(result))
    if options.plot is not None:
        tables.plot(result, options.plot)
    if not whole:
        print("The time is up; the same command goes on.", file=sys.stderr)
        sys.exit(130)


def chosen(track: Track, options: argparse.Namespace) -> list[Row]:
    return [row for row in track.rows() if re.search(options.only, row.name)]


def everything(track: Track, options: argparse.Namespace, before: dict[str, Any]) -> bool:
    """Run every row that has no result yet; False where the time was up first."""
    from rprune.cli.options import seconds

    source = subset(track, options.data, options.work)
    deadline = time.monotonic() + (seconds(options.budget) if options.budget else float("inf"))
    names: dict[str, list[str]] = {}  # of rows, by that of their dense start
    for row in chosen(track, options):
        names.setdefault(start_of(track, row, source), []).append(name_of(track, row))

    def start(name: str) -> bool:
        return result_of(options.work, name, before) is not None or in_process(name, options, deadline)

    def row(name: str, after: Future[bool]) -> bool:
        if is_whole(result_of(options.work, name, before), options.forms):
            return True
        return after.result() and in_process(name, options, deadline)

    starts: dict[str, Future[bool]] = {}
    rows: list[Future[bool]] = []
    with ThreadPoolExecutor(options.jobs) as pool:  # first come, first served: what a row waits for has begun
        ahead = iter(names)
        for name in itertools.islice(ahead, options.jobs):
            starts[name] = pool.submit(start, name)
        for first, others in names.items():
            rows += [pool.submit(row, name, starts[first]) for name in others]
            starts |= {name: pool.submit(start, name) for name in itertools.islice(ahead, 1)}
    return all(run.result() for run in (*starts.values(), *rows))  # raises where one failed


def in_process(name: str, options: argparse.Namespace, deadline: float) -> bool:
    """One row in a process, ended when the time is up; False then. Raises SystemExit where it fails."""
    if time.monotonic() > deadline:
        return False
    command = [sys.executable, __file__, options.track, "--row", name, "--data", options.data]
    command += ["--work", str(options.work), "--device", options.device, "--shorten", str(options.shorten)]
    command += ["--forms", *options.forms]
    log = options.work / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {}
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | threads)
        timer = threading.Timer(min(deadline - time.monotonic(), 1e6), process.terminate)
        timer.start()
        code = process.wait()
        timer.cancel()
    if code and time.monotonic() < deadline:
        raise SystemExit(f"{name} failed with {code}; see {log}")
    print(f"{name}: {'done' if not code else 'to be continued'}", flush=True)
    return not code


def work_on(track: Track, options: argparse.Namespace) -> None:
    """What a process does: one row, or the dense start of some."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    import torch

    if options.device == "cpu":
        torch.set_num_threads(1)
    from rprune.pipeline.environment import environment

    source = subset(track, options.data, options.work)
    path, started = path_of(options.work, options.row), time.monotonic()
    clock = path.with_suffix(".seconds")  # of all processes that worked on this row
    before = float(clock.read_text(encoding="utf-8")) if clock.exists() else 0.0
    known, here = result_of(options.work, options.row, {}), environment(options.device)
    row = next((row for row in track.rows() if options.row == name_of(track, row)), None)
    try:
        if row is not None:
            found = make_row(track, row, source, options.work, options.device, options.forms, known)
        else:
            row = next(row for row in track.rows() if options.row == start_of(track, row, source))
            found = make_dense(track, row, source, options.work, options.device)
    finally:
        seconds = before + time.monotonic() - started
        write_text(clock, str(seconds))
    machines = known["environments"] if known else []
    found |= {"environments": machines if here in machines else [*machines, here], "seconds": round(seconds)}
    write_text(path, json.dumps(found, indent=1))


def name_of(track: Track, row: Row) -> str:
    return f"{track.name}/{row.name}"


def start_of(track: Track, row: Row, source: str) -> str:
    """Of its dense start: the net is any track's, what is measured of it this one's."""
    return f"{track.name}/{DENSE}-{digest(dense_of(track, row, source))}"


def path_of(work: Path, name: str) -> Path:
    return work / f"{name}.json"


def result_of(work: Path, name: str, before: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of a row, or of a dense start: from before, or else found here."""
    path = path_of(work, name)
    if name in before or not path.exists():
        return before.get(name)
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def is_whole(result: dict[str, Any] | None, forms: Iterable[str]) -> bool:
    """Whether a row has figures of every one of these forms."""
    return result is not None and set(forms) <= result["counts"].keys()


def kept(track: Track, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Rows of the result file by name that --keep leaves as they are; none without it.

    All rows of a dense start, or none: what is compared starts from one net. Only those whose recipe is today's, with
    every default. Raises SystemExit where there is no file, or it is of other images or suites.
    """
    if not options.keep:
        return {}
    if not output.exists():
        raise SystemExit(f"--keep: there is no {output}; leave it away to start anew")
    result = json.loads(output.read_text(encoding="utf-8"))
    for key in ("subset", "suites"):
        if result["track"].get(key) != track.table.get(key):
            raise SystemExit(f"--keep: {output} has another [{key}] than track.toml; leave it away to start anew")
    for row in result["rows"]:
        row["environments"] = [result["environments"][n] for n in row["environments"]]
    known = {(row["method"], row["recipe"], *(row[a] for a in track.axes if a in row)): row for row in result["rows"]}
    source = subset(track, options.data, options.work)
    starts: dict[str, dict[str, Any]] = {}
    for row in track.rows():
        name, recipe = start_of(track, row, source), digest(dense_of(track, row, row.data))
        rows = starts.setdefault(name, {name: known.get((DENSE, recipe, *track.of_start(row).values()))})
        recipe = digest(recipe_of(track, row, row.data))
        rows[name_of(track, row)] = known.get((row.method, recipe, *row.places.values()))
    whole = [
        rows
        for start, rows in starts.items()
        if all(is_whole(row, [FLOAT] if name == start else track.suites) for name, row in rows.items())
    ]
    left = len(result["rows"]) - sum(map(len, whole))
    if left:
        print(
            f"--keep: {left} rows of {output} are not kept: other recipes, or not all of a dense start", file=sys.stderr
        )
    return {name: row for rows in whole for name, row in rows.items()}


def collected(track: Track, options: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    """The result file: every row that is finished, the names of others, and what they were made with."""
    source = subset(track, options.data, options.work)
    rows = list(track.rows()) if options.keep else chosen(track, options)
    commands: dict[str, str] = {}
    for row in rows:  # a dense start has the command of the first row that shares it
        commands.setdefault(start_of(track, row, source), row.command)
    forms = {name: [FLOAT] for name in commands}
    commands |= {name_of(track, row): row.command for row in rows}
    forms |= {name_of(track, row): list(track.suites) for row in rows}
    results = {name: result_of(options.work, name, before) for name in forms}
    found = [row | {"command": commands[name]} for name, row in results.items() if row]
    machines: list[dict[str, Any]] = []
    for row in found:
        machines += [each for each in row["environments"] if each not in machines]
        row["environments"] = [machines.index(each) for each in row["environments"]]
    only = "" if options.keep else options.only
    more = f" --only {shlex.quote(only)}" if only else ""
    more += f" --shorten {options.shorten:g}" if options.shorten != 1 else ""
    return {
        "command": f"python benchmarks/reproduce/run.py {options.track} --data npz:cifar10.npz{more}",
        "track": track.table,
        "share_of_epochs": track.share,
        "environments": machines,
        "process_seconds": sum(row["seconds"] for row in found),
        "rows": found,
        "unfinished": [name for name, row in results.items() if not is_whole(row, forms[name])],
    }


def subset(track: Track, source: str, work: Path) -> str:
    """The data that the track takes: all, or the first images of each split, averaged to fewer pixels."""
    wanted = track.table.get("subset")
    if wanted is None:
        return source
    path = work / "subset-{train}-{test}-{side}.npz".format(**wanted)
    if not path.exists():
        import numpy as np

        from rprune.data.sources import load_data

        data = load_data(source, validation=1e-4)
        arrays = {}
        for name in ("train", "test"):
            split, count, side = data.split(name), wanted[name], wanted["side"]
            images = split.pixels(0, count).astype(np.float32)
            block = images.shape[-1] // side
            pooled = images.reshape(*images.shape[:2], side, block, side, block).mean((3, 5))
            arrays[f"{name}_images"] = pooled.round().astype(np.uint8).transpose(0, 2, 3, 1)
            arrays[f"{name}_labels"] = split.labels[:count]
        np.savez(path, **arrays)
    return f"npz:{path}"


if __name__ == "__main__":
    main()
