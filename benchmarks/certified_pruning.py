"""HYDRA's tables 4b and 4c on digits: pruning for verified accuracy, by magnitude and by learned scores.

    python benchmarks/certified_pruning.py --work DIR   # about half an hour on one core; continues where it stopped
    python benchmarks/certified_pruning.py --table      # prints the table of the committed result file

HYDRA's CNN-small, IBP at linf 0.1: 80 epochs dense, then for each sparsity 20 of pruning and 40 of fine-tuning at full
eps, and 8 bits. Verified accuracy is that of intervals: float64 for the float net, exact integers for the 8-bit file.

"inside": HYDRA's section 5. The dense net is trained with PGD, without certification; HYDRA's scores, trained on IBP's
loss with the weights frozen, find a sub-network of half the weights that intervals verify. Nothing is fine-tuned.
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
INSIDE = 0.5
IBP: dict[str, Any] = {"objective": {"name": "ibp", "ramp": 0.0}, "optimizer": "adam", "select": "last"}
EPOCHS = {"train": 80, "prune": 20, "finetune": 40, "inside": 40}
LR = {"train": 0.002, "prune": 0.01, "finetune": 0.001}


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

    def row(net: str, sparsity: float, make: Callable[[], Any]) -> dict[str, Any]:
        path = work / f"{seed}-{net}-{sparsity}.json"
        if not path.exists():
            started = time.monotonic()
            found = {"seed": seed, "net": net, "sparsity": sparsity} | verified(bench, make())
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

    def inside() -> Any:
        plain = made("pgd", lambda: train(bench, arch, TrainStage(objective="pgd-at", epochs=60, lr=0.05)))
        rows.append(row("PGD-AT, dense", 0.0, lambda: plain))
        scores = PruneStage(**ramped, method="hydra", sparsity=INSIDE, epochs=EPOCHS["inside"], lr=LR["prune"])
        return prune(bench, plain, scores)

    rows.append(row("inside", INSIDE, inside))
    return rows


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


def table(result: dict[str, Any]) -> str:
    """Markdown: percent, mean and range over seeds."""
    lines = ["| net | sparsity | clean | verified | clean, int8 | verified, int8 |", "|---|---|---|---|---|---|"]
    seen: list[tuple[str, float]] = []
    for row in result["rows"]:
        if (row["net"], row["sparsity"]) not in seen:
            seen.append((row["net"], row["sparsity"]))
    for net, sparsity in seen:
        rows = [row for row in result["rows"] if (row["net"], row["sparsity"]) == (net, sparsity)]
        cells = [TITLES.get(net, net), f"{sparsity:g}"]
        for form in ("float", "int8"):
            for what in ("clean", "verified"):
                values = [100 * row[f"{form}_{what}"] / row["n"] for row in rows]
                cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TITLES = {"dense": "IBP, dense", "lwm": "LWM", "hydra": "HYDRA", "inside": "sub-network of it, by HYDRA's scores"}


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
