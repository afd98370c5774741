"""Commands that are killed at random moments and started again, against the same commands left alone.

    python benchmarks/faults.py --points 200 --seed 0
    python benchmarks/faults.py --table       # prints the table of the committed result file

A point is one ``kill -9``. Half of them come at a change: before the k-th opening for writing, rename, deletion or sync
of the command, k drawn at random, a file that is being synced cut off at a random byte. The others come at any time.
After up to three kills the same command runs to its end; whatever lies in its folder then must be what the command left
alone wrote, byte for byte, except for times and what is computed of them. Anything else is a loss: another exit code,
other bytes, a file too many or too few. On a CPU, in one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "faults.json"
KILLS = 3  # of one folder, at most
ABOUT_TIME = ("seconds", "created", "locked_at", "id", "energy")  # keys; ``id``: a report's, over all of it
DIGEST_OR_TIME = r"\b[0-9a-f]{64}\b|\b[0-9a-f]{8}…[0-9a-f]{4}\b|made [0-9TZ:-]+|\b[0-9.]+\s+s\b|\b\d+:\d\d:\d\d\b"
CHANGING = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
RECIPE = """
rprune = 1
name = "faults"
[data]
source = "digits"
[threat]
eps = "0.03"
[[stage]]
kind = "train"
objective = "benign"
epochs = 3
batch_size = 64
[[stage]]
kind = "prune"
method = "harp"
sparsity = 0.5
epochs = 2
[[stage]]
kind = "finetune"
epochs = 2
[[stage]]
kind = "quantize"
[[stage]]
kind = "certify"
limit = 12
n = 100
smoothing_limit = 4
[[stage]]
kind = "export"
health = false
suite = "pgd10"
limit = 20
"""
# {0}: a finished run of the recipe
COMMANDS: dict[str, str] = {
    "run": "run recipe.toml -o out",
    "attack": "attack {0}/export/model.int8.onnx -d digits --eps 0.03 --suite pgd10,square -n 12 --no-health -o out",
    "certify": "certify {0}/03-finetune -m ibp,crown,smoothing -n 12 --n 100 -o out.json",
    "train": "train -d digits --objective benign --epochs 3 --batch-size 64 -o out.pt",
    "export": "export {0}/04-quantize -o out --suite pgd10 -n 12 --no-health",
}
SHARES = {"run": 6, "attack": 2, "certify": 2, "train": 1, "export": 1}  # of the points


class Saboteur:
    """Counts what a process changes below a folder, and kills it before the change number ``at``.

    ``cut``: bytes to take from the end of a file where that change is a sync.
    """

    def __init__(self, folder: Path, at: int | None, cut: int) -> None:
        self.folder, self.at, self.cut = str(folder.resolve()), at, cut
        self.count = 0
        self._sync = os.fsync

    def install(self) -> None:
        sys.addaudithook(self._heard)
        os.fsync = self._synced

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGING or not isinstance(arguments[0], str | Path):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if os.path.abspath(arguments[0]).startswith(self.folder):  # noqa: PTH100  a Path's would open files
            self._next()

    def _synced(self, handle: int) -> None:
        self._next(handle)
        self._sync(handle)

    def _next(self, handle: int | None = None) -> None:
        self.count += 1
        if self.count == self.at:
            if handle is not None:
                with suppress(OSError):  # a folder, or opened for reading; else as if killed while the end was written
                    os.ftruncate(handle, max(0, os.fstat(handle).st_size - self.cut))
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(
    command: list[str], cwd: Path, at: int | None = None, after: float | None = None, cut: int = 0
) -> tuple[int, int, float, Path]:
    """Run a command in a process of its own: its exit code, or the signal that ended it as a negative number; how
    often it changed something, 0 where it was killed; seconds; and the file of what it said.

    ``at``: the change before which it is killed; ``after``: the seconds after which.
    """
    log = cwd.with_name(cwd.name + ".log")
    counts = cwd.with_name(cwd.name + ".count")
    counts.unlink(missing_ok=True)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(cwd)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            saboteur = Saboteur(cwd, at, cut)
            saboteur.install()
            try:
                from rprune.cli.app import main

                main(command)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            sys.stdout.flush()
            sys.stderr.flush()
            counts.write_text(str(saboteur.count))
        finally:
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if after is not None and time.monotonic() - started >= after:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    changes = int(counts.read_text()) if counts.exists() else 0
    return os.waitstatus_to_exitcode(status), changes, time.monotonic() - started, log


def canonical(path: Path) -> Any:
    """What must be the same in a file of two runs."""
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".html":  # a rendering of report.json, compared above; its times differ in length
        return re.sub(DIGEST_OR_TIME, "", path.read_text(encoding="utf-8"))
    if path.suffix == ".pt":
        import torch

        content = torch.load(path, weights_only=True)
        content["rprune"] = _timeless(json.loads(content["rprune"]))
        return {key: value if key == "rprune" else _bits(value) for key, value in content.items()}
    return path.read_bytes()


def _bits(tensors: Any) -> Any:
    return None if tensors is None else {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items()}


def _timeless(value: Any) -> Any:
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    if not isinstance(value, dict):
        return value
    dropped = (*ABOUT_TIME, "digest") if "seconds" in value else ABOUT_TIME
    return {key: _timeless(item) for key, item in value.items() if key not in dropped}


def content(folder: Path) -> dict[str, Any]:
    return {str(p.relative_to(folder)): canonical(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    missing = [f"{name} is missing" for name in wanted if name not in found]
    extra = [f"{name} is too much" for name in found if name not in wanted]
    return missing + extra + [f"{name} differs" for name in wanted if name in found and wanted[name] != found[name]]


def words(name: str, home: Path) -> list[str]:
    return [*COMMANDS[name].format(home / "run-alone" / "out").split(), "--device", "cpu", "-q"]


def made(folder: Path) -> Path:
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def examine(name: str, home: Path, points: int, draw: random.Random, tell: Callable[[str], None]) -> dict[str, Any]:
    """Kill one command at so many points: how many at writes and at times, how many folders, and every loss."""
    command = words(name, home)

    def fresh(which: str) -> Path:
        return made(home / f"{name}-{which}")

    alone = fresh("alone")
    code, changes, seconds, log = attempt(command, alone)
    assert code == 0, log.read_text()
    wanted = content(alone)
    twin = fresh("twin")
    assert attempt(command, twin)[0] == 0
    assert not (unlike := differences(wanted, content(twin))), f"two runs left alone differ: {unlike}"
    found: dict[str, Any] = {"changes": changes, "at_changes": 0, "at_times": 0, "folders": 0, "losses": []}
    while found["at_changes"] + found["at_times"] < points:
        folder, killed, past, spent = fresh(str(found["folders"])), [], 0, 0.0
        found["folders"] += 1
        for _ in range(min(KILLS, points - found["at_changes"] - found["at_times"])):
            if draw.random() < 0.5:
                at = draw.randint(1, max(1, changes - past))
                past += at
                code, *_ = attempt(command, folder, at=at, cut=draw.randint(0, 200))
                killed.append(f"change {at}")
                kind = "at_changes"
            else:
                after = draw.uniform(0, max(seconds - spent, 0.2))
                spent += after
                code, *_ = attempt(command, folder, after=after)
                killed.append(f"{after:.2f} s")
                kind = "at_times"
            if code != -signal.SIGKILL:
                killed.pop()
                break
            found[kind] += 1
        code, _, _, log = attempt(command, folder)
        whole = code == 2 and "exists" in log.read_text() and name in ("certify", "train", "export")
        lost = differences(wanted, content(folder))
        if whole:  # the kill came after the result: it is there, and the command says so
            lost = [line for line in lost if not line.endswith("is too much")]
            found["after_result"] = found.get("after_result", 0) + 1
        elif code:
            lost.insert(0, f"exit {code}: {log.read_text().strip()[-300:]}")
        if lost:
            found["losses"].append({"killed": killed, "lost": lost})
            tell(f"{name}, killed at {', '.join(killed)}: {lost}")
    tell(f"{name}: {found['at_changes']} kills at changes, {found['at_times']} at times, {len(found['losses'])} losses")
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        "| command | changes | kills at a change | kills at a time | result was there | losses |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["commands"].items():
        cells = [
            name,
            row["changes"],
            row["at_changes"],
            row["at_times"],
            row.get("after_result", 0),
            len(row["losses"]),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(COMMANDS), action="append", default=[])
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULT.read_text())))
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    import onnx
    import onnxruntime
    import sklearn.datasets  # noqa: F401  imported once here, not in every process
    import torch

    import rprune
    import rprune.cli.app
    import rprune.pipeline.attack_file
    import rprune.pipeline.run
    import rprune.pipeline.single

    torch.set_num_threads(1)
    started = time.monotonic()
    names = options.only or list(COMMANDS)
    total = sum(SHARES[name] for name in names)
    commands = {}
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        if "run" not in names and any("{0}" in COMMANDS[name] for name in names):
            code, *_, log = attempt(words("run", home), made(home / "run-alone"))
            assert code == 0, log.read_text()
        for name in names:
            draw = random.Random(f"{options.seed} {name}")
            points = max(1, round(options.points * SHARES[name] / total))
            commands[name] = examine(name, home, points, draw, lambda text: print(text, flush=True))
    result = {
        "command": f"python benchmarks/faults.py --points {options.points} --seed {options.seed}",
        "commands": commands,
        "points": sum(row["at_changes"] + row["at_times"] for row in commands.values()),
        "losses": sum(len(row["losses"]) for row in commands.values()),
        "seconds": round(time.monotonic() - started),
        "versions": {"rprune": rprune.__version__, "python": platform.python_version(), "torch": torch.__version__,
                     "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "kernel": platform.system()},
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
