"""HYDRA's tables 4b and 4c on digits: pruning for verified accuracy, by magnitude and by learned scores.

    python benchmarks/certified_pruning.py --work DIR   # about half an hour on one core; continues where it stopped
    python benchmarks/certified_pruning.py --table      # prints the table of the committed result file

HYDRA's CNN-small, IBP at linf 0.1: 80 epochs dense, then for each sparsity 20 of pruning and 40 of fine-tuning at full
eps, and 8 bits. Verified accuracy is that of intervals: float64 for the float net, exact integers for the 8-bit file.

Then HYDRA's section 5: nets trained without certification, plainly and with PGD. HYDRA's scores, trained on the
stability loss with the weights frozen, find a sub-network of half the weights that randomized smoothing certifies
(l2 0.25 at sigma 0.25, sequential test, alpha 0.001). Nothing is fine-tuned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "certified_pruning.json"
SEEDS = (0, 1, 2)
SPARSITIES = (0.9, 0.95, 0.99)
METHODS = ("lwm", "hydra")
EPS = "0.1"
INSIDE = {"benign": "plain", "pgd-at": "PGD-AT"}  # objective, and the name of its net
HALF, SIGMA, RADIUS = 0.5, 0.25, 0.25
IBP: dict[str, Any] = {"objective": {"name": "ibp", "ramp": 0.0}, "optimizer": "adam", "select": "last"}
EPOCHS = {"train": 80, "prune": 20, "finetune": 40, "inside": 60}
LR = {"train": 0.002, "prune": 0.01, "finetune": 0.02}


def measure(seeds: tuple[int, ...], work: Path) -> dict[str, Any]:
    from rprune.pipeline.environment import environment

    rows = [row for seed in seeds for row in one(seed, work)]
    return {
        "command": "python benchmarks/certified_pruning.py",
        "seeds": list(seeds),
        "eps": EPS,
        "epochs": EPOCHS,
        "seconds": round(sum(row["seconds"] for row in rows)),
        "environment": environment("cpu"),
        "rows": rows,
    }


def verified(bench: Any, artifact: Any) -> dict[str, int]:
    """Clean and verified counts of the float net and of its 8-bit form."""
    import torch

    from rprune.data.loaders import loader
    from rprune.evaluation.certificates import certify_bounds
    from rprune.pipeline.certifying import certified_network
    from rprune.pipeline.quantizing import quantize
    from rprune.pipeline.recipe import QuantizeStage

    found = {}
    for form, source in (("float", artifact), ("int8", quantize(bench, artifact, QuantizeStage()))):
        data = loader(bench.data.test, torch.device("cpu"))
        result = certify_bounds(certified_network(source, bench), data, bench.threat, ("ibp",))
        found |= {f"{form}_clean": result.clean.correct, f"{form}_verified": result.correct, "n": result.clean.n}
    return found


def smoothed(bench: Any, artifact: Any) -> dict[str, int]:
    """Samples right by the smoothed classifier, and those certified at the radius, of the float net."""
    import torch

    from rprune.certification.smoothing import Smoothing
    from rprune.data.loaders import loader
    from rprune.evaluation.accuracy import classes_of
    from rprune.evaluation.certificates import certify_smoothing

    data = loader(bench.data.test, torch.device("cpu"))
    settings, predict = Smoothing(sigma=SIGMA), classes_of(artifact.model().eval())
    found = certify_smoothing(predict, data, len(bench.data.classes), settings, target=RADIUS)
    return {"smoothed": found.correct_at(0.0), "certified": found.correct_at(RADIUS), "n": len(found.labels)}


Counts = Callable[[Any, Any], dict[str, int]]


def one(seed: int, work: Path) -> list[dict[str, Any]]:
    """All rows of one seed; those that ``work`` holds already are taken from there."""
    from rprune.pipeline.artifact import load_artifact, save_artifact
    from rprune.pipeline.bench import Bench, architecture
    from rprune.pipeline.recipe import DataSection, FinetuneStage, ModelSection, PruneStage, TrainStage
    from rprune.pipeline.stages import finetune, prune, train
    from rprune.threat import ThreatModel

    bench = Bench.open(DataSection(source="digits"), ThreatModel.of("linf", EPS), seed, "cpu")
    arch = architecture(ModelSection(arch="cnn-small"), bench.data)

    def made(name: str, make: Callable[[], Any]) -> Any:
        path = work / f"{seed}-{name}.pt"
        if not path.exists():
            save_artifact(make(), path)
        return load_artifact(path)

    def row(net: str, sparsity: float, make: Callable[[], Any], count: Counts = verified) -> dict[str, Any]:
        path = work / f"{seed}-{net}-{sparsity}.json"
        if not path.exists():
            started = time.monotonic()
            found = {"seed": seed, "net": net, "sparsity": sparsity} | count(bench, make())
            path.write_text(json.dumps(found | {"seconds": round(time.monotonic() - started, 1)}))
        found = json.loads(path.read_text())
        print(found, flush=True)
        return dict(found)

    ramped = IBP | {"objective": {"name": "ibp", "ramp": 0.5}}
    dense = made("dense", lambda: train(bench, arch, TrainStage(**ramped, epochs=EPOCHS["train"], lr=LR["train"])))
    rows = [row("dense", 0.0, lambda: dense)]
    for sparsity in SPARSITIES:
        for method in METHODS:

            def pruned(method: str = method, sparsity: float = sparsity) -> Any:
                stage = PruneStage(**IBP, method=method, sparsity=sparsity, epochs=EPOCHS["prune"], lr=LR["prune"])
                tuned = FinetuneStage(**IBP, epochs=EPOCHS["finetune"], lr=LR["finetune"])
                return finetune(bench, prune(bench, dense, stage), tuned)

            rows.append(row(method, sparsity, pruned))

    stability = PruneStage(
        objective={"name": "stability", "sigma": SIGMA}, method="hydra", sparsity=HALF, epochs=EPOCHS["inside"],
        select="last",
    )  # type: ignore[arg-type]  # fmt: skip
    for objective, name in INSIDE.items():
        stage = TrainStage(objective=objective, epochs=60, lr=0.05)  # type: ignore[arg-type]
        whole = made(objective, lambda stage=stage: train(bench, arch, stage))
        rows.append(row(name, 0.0, lambda whole=whole: whole, smoothed))
        rows.append(row(name, HALF, lambda whole=whole: prune(bench, whole, stability), smoothed))
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown: percent, mean and range over seeds."""
    return "\n\n".join(
        "\n".join(
            ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *lines(result["rows"], tuple(heads.values()))]
        )
        for heads in HEADS
    )


HEADS = (
    {"net": "net", "sparsity": "sparsity", "clean": "float_clean", "verified": "float_verified",
     "clean, int8": "int8_clean", "verified, int8": "int8_verified"},
    {"net": "net", "sparsity": "sparsity", "right with noise": "smoothed", "certified": "certified"},
)  # fmt: skip


def lines(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    """A line for each net and sparsity that has these columns."""
    grouped: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        if columns[-1] in row:
            grouped.setdefault((row["net"], row["sparsity"]), []).append(row)
    found = []
    for (net, sparsity), of_seeds in grouped.items():
        cells = [TITLES.get(net, net), f"{sparsity:g}"]
        for column in columns[2:]:
            values = [100 * row[column] / row["n"] for row in of_seeds]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        found.append("| " + " | ".join(cells) + " |")
    return found


TITLES = {"dense": "IBP, dense", "lwm": "LWM", "hydra": "HYDRA"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the committed result file")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--work", type=Path, help="folder for models and rows, so that an interrupted run goes on")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not options.table:
        work = options.work or Path(tempfile.mkdtemp(prefix="certified-pruning-"))
        work.mkdir(parents=True, exist_ok=True)
        found = measure(tuple(options.seeds), work)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(table(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
