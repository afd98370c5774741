"""Certificates: what each bound proves and costs, and how many draws smoothing needs.

    python benchmarks/certify.py --work DIR   # "seconds" in the result file
    python benchmarks/certify.py --table      # prints the tables of the committed result file

Bounds: HYDRA's CNN-small on digits, trained plainly, with PGD and with CROWN-IBP, each bound for all samples by
itself, on one thread; verified accuracy beside PGD's (40 steps, 3 restarts), above which none may lie. Then seconds a
sample on HYDRA's CNN-large for images of 3x32x32, untrained, at an eps that leaves some neurons unstable.

Smoothing: CNN-small trained with noise of 0.25; certified accuracy and network evaluations for each image by the
sequential test and by CERTIFY with N = 10,000, same noise scheme and alpha = 0.001.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "certify.json"
NETS = {
    "plain": {"objective": "benign", "epochs": 40, "lr": 0.05},
    "PGD-AT": {"objective": "pgd-at", "epochs": 40, "lr": 0.05},
    "CROWN-IBP": {"objective": "crown-ibp", "epochs": 80, "lr": 0.002, "optimizer": "adam", "select": "last"},
}
EPS = {"plain": "0.01", "PGD-AT": "0.05", "CROWN-IBP": "0.05"}
TRAINED_FOR = "0.05"
NOISE = {"objective": {"name": "gaussian", "sigma": 0.25}, "epochs": 60, "lr": 0.05, "select": "last"}
TESTS: dict[str, dict[str, Any]] = {
    "fixed": {"test": "fixed", "n": 10_000}, "sequential": {"n": 10_000}, "sequential, up to 30,000": {"n": 30_000},
    "sequential, up to 100,000": {"n": 100_000},
}  # fmt: skip
RADII = (0.25, 0.4, 0.6)
LARGE = (3, 32, 32)
LARGE_IMAGES = {"ibp": 20, "crown-ibp": 10, "deepz": 2, "crown": 2, "alpha-crown": 2}
LARGE_EPS = "0.001"


def measure(work: Path, limit: int | None) -> dict[str, Any]:
    import torch

    from rprune.pipeline.environment import environment

    torch.set_num_threads(1)
    started = time.monotonic()
    return {
        "command": "python benchmarks/certify.py" + ("" if limit is None else f" --limit {limit}"),
        "seed": 0,
        "bounds": [bounds(name, work, limit) for name in NETS],
        "large": large(),
        "smoothing": smoothing(work, limit),
        "seconds": round(time.monotonic() - started),
        "environment": environment("cpu"),
    }


def trained(name: str, stage: dict[str, Any], work: Path) -> tuple[Any, Any]:
    """The bench and the artifact of a net; it is trained once for a folder."""
    from rprune.pipeline.artifact import load_artifact, save_artifact
    from rprune.pipeline.bench import Bench, architecture
    from rprune.pipeline.recipe import DataSection, ModelSection, TrainStage
    from rprune.pipeline.stages import train
    from rprune.threat import ThreatModel

    bench = Bench.open(DataSection(source="digits"), ThreatModel.of("linf", TRAINED_FOR), 0, "cpu")
    path = work / f"cnn-small-{name}.pt"
    if not path.exists():
        arch = architecture(ModelSection(arch="cnn-small"), bench.data)
        save_artifact(train(bench, arch, TrainStage(**stage)), path)
    return bench, load_artifact(path)


def bounds(name: str, work: Path, limit: int | None) -> dict[str, Any]:
    """Each bound by itself on one net: samples proved, seconds a sample, and the smallest gap to what PGD reached."""
    import torch

    from rprune.attacks.noise import Keyed
    from rprune.attacks.pgd import PGD
    from rprune.certification.bounds import METHODS, lower_margins, smallest, together
    from rprune.certification.ibp import proved
    from rprune.data.loaders import loader
    from rprune.models.graph import trace
    from rprune.threat import ThreatModel

    bench, artifact = trained(name, NETS[name], work)
    threat = ThreatModel.of("linf", EPS[name])
    network = trace(artifact.model(), bench.data.shape).double()
    batch = next(iter(loader(bench.data.test, torch.device("cpu")).ordered(limit or len(bench.data.test), limit)))
    x, y = batch.x, batch.y
    right = network(x.double()).argmax(1) == y
    attack = PGD(steps=40, restarts=3, loss="margin", overshoot=torch.inf)
    point = attack.evaluate(network, x.double(), y, threat, Keyed(0, batch.ids)).x
    with torch.no_grad():
        logits = network(point)
    worst = smallest(logits.gather(1, y[:, None]) - logits, y)
    counts = {"n": len(y), "clean": int(right.sum()), "pgd": int((worst > 0).sum())}
    row: dict[str, Any] = {"net": name, "eps": EPS[name], "methods": {}} | counts
    for method in METHODS:
        lower_margins(network, x[:1], y[:1], threat, method)  # what is done once is not a sample's
        started, found = time.process_time(), []
        for section in torch.arange(len(y)).split(together(network, method)):
            found.append(lower_margins(network, x[section], y[section], threat, method))
        spent = time.process_time() - started
        lower = torch.cat(found)
        gap = float((worst - smallest(lower, y)).min())
        assert gap >= -1e-9, f"{method} lies above what an attack reached"
        row["methods"][method] = {"proved": int(proved(lower, y).sum()), "seconds": spent / len(y), "gap": gap}
    print(json.dumps(row), flush=True)
    return row


def large() -> dict[str, float]:
    """Seconds a sample on CNN-large."""
    import torch

    from rprune.certification.bounds import lower_margins, together
    from rprune.models.graph import trace
    from rprune.models.registry import Architecture, build
    from rprune.threat import ThreatModel

    torch.manual_seed(0)
    network = trace(build(Architecture("cnn-large", 10, LARGE)), LARGE).double()
    threat, found = ThreatModel.of("linf", LARGE_EPS), {}
    for method, count in LARGE_IMAGES.items():
        x = torch.rand(count, *LARGE, generator=torch.Generator().manual_seed(0))
        y = network(x.double()).argmax(1)
        lower_margins(network, x[:1], y[:1], threat, method)  # type: ignore[arg-type]
        started = time.process_time()
        for section in torch.arange(count).split(together(network, method)):  # type: ignore[arg-type]
            lower_margins(network, x[section], y[section], threat, method)  # type: ignore[arg-type]
        found[method] = (time.process_time() - started) / count
    print(json.dumps(found), flush=True)
    return found


def smoothing(work: Path, limit: int | None) -> list[dict[str, Any]]:
    """Sequential and fixed test at equal radius."""
    import torch

    from rprune.certification.smoothing import Smoothing
    from rprune.data.loaders import loader
    from rprune.evaluation.accuracy import classes_of
    from rprune.evaluation.certificates import certify_smoothing

    bench, artifact = trained("noise", NOISE, work)
    net = artifact.model().eval()
    rows = []
    for radius in RADII:
        row: dict[str, Any] = {"radius": radius}
        for name, chosen in TESTS.items():
            settings = Smoothing(**chosen)
            started = time.process_time()
            data = loader(bench.data.test, torch.device("cpu"))
            found = certify_smoothing(classes_of(net), data, 10, settings, target=radius, limit=limit)
            draws = [settings.n0 + verdict.n for verdict in found.verdicts]
            row[name] = {
                "correct": found.correct_at(radius), "n": len(draws), "draws": sum(draws) / len(draws),
                "seconds": (time.process_time() - started) / len(draws),
            }  # fmt: skip
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown: bounds, then smoothing."""
    lines = ["| net, eps | clean | PGD | " + " | ".join(METHOD_NAMES) + " |", "|---" * (3 + len(METHOD_NAMES)) + "|"]
    for row in result["bounds"]:
        cells = [f"{row['net']}, {row['eps']}", percent(row["clean"], row["n"]), percent(row["pgd"], row["n"])]
        for found in (row["methods"][name] for name in METHOD_NAMES):
            cells.append(f"{percent(found['proved'], row['n'])} ({milliseconds(found['seconds'])})")
        lines.append("| " + " | ".join(cells) + " |")
    cells = ["CNN-large, 3x32x32", "", ""]
    cells += [milliseconds(result["large"][name]) if name in result["large"] else "" for name in METHOD_NAMES]
    lines.append("| " + " | ".join(cells) + " |")
    names = list(TESTS)
    lines += ["", "| l2 radius | " + " | ".join(f"{name}: certified | draws | ms" for name in names) + " |"]
    lines.append("|---" * (1 + 3 * len(names)) + "|")
    for row in result["smoothing"]:
        cells = [f"{row['radius']:g}"]
        for name in names:
            found = row[name]
            cells += [percent(found["correct"], found["n"]), f"{found['draws']:,.0f}", f"{1000 * found['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


METHOD_NAMES = ("ibp", "crown-ibp", "deepz", "crown", "alpha-crown")


def percent(count: int, n: int) -> str:
    return f"{100 * count / n:.1f}"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of the committed result file")
    parser.add_argument("--limit", type=int, help="only the first test samples")
    parser.add_argument("--work", type=Path, help="folder for models, so that they are trained once")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not options.table:
        work = options.work or Path(tempfile.mkdtemp(prefix="certify-"))
        work.mkdir(parents=True, exist_ok=True)
        found = measure(work, options.limit)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(table(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
