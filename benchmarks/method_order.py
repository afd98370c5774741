"""Do the papers' order of methods hold on a CIFAR-10 subset that two cores finish in about an hour?

    python benchmarks/method_order.py --data npz:cifar10.npz        # or cifar10:DIR; writes the result file, resumes
    python benchmarks/method_order.py --table                       # prints the table of the committed result file

LWM, Robust-ADMM, HYDRA, HYDRA+LAMP, Flying Bird and HARP at sparsity 0.99 and 0.999, three seeds. A mini-VGG on 5,000
images averaged to 16x16; PGD-3 adversarial training at 8/255; 16 epochs dense (one-cycle), 5 of pruning, 8 of
fine-tuning; Flying Bird, which starts from scratch, trains for 16 + 5 and is fine-tuned like the others. Checkpoints
are selected on a validation split. Clean and PGD-20 accuracy of the fine-tuned float model on 2,000 test images.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "method_order.json"
METHODS: dict[str, dict[str, Any]] = {
    "LWM": {"method": "lwm", "epochs": 0},
    "Robust-ADMM": {"method": "robust-admm", "epochs": 5, "lr": 0.05},
    "HYDRA": {"method": "hydra", "epochs": 5},
    "HYDRA+LAMP": {"method": {"name": "hydra", "allocation": "lamp"}, "epochs": 5},
    "Flying Bird": {"method": "flying-bird", "epochs": 21},
    "HARP": {"method": "harp", "epochs": 5},
}
SPARSITIES = (0.99, 0.999)
SEEDS = (0, 1, 2)
SUITE = "pgd20"
TRAIN, TEST, SIDE, BATCH = 5_000, 2_000, 16, 64
OBJECTIVE = {"name": "pgd-at", "attack": {"steps": 3}}
# PGD-10 accuracy of HARP (ICLR 2023) tables 2 and 6: ResNet-18 on CIFAR-10, PGD-AT; none for LWM and Flying Bird
PAPERS = {
    "Robust-ADMM": (42.31, 20.62),
    "HYDRA": (45.84, 26.33),
    "HYDRA+LAMP": (50.07, 35.91),
    "HARP": (50.41, 39.26),
}


def prepare(source: str, folder: Path) -> Path:
    """The subset as an npz file: the first images of each split, averaged to 16x16."""
    import numpy as np

    from rprune.data.sources import load_data

    path = folder / "subset.npz"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    data = load_data(source, validation=0.02)
    arrays = {}
    for name, count in (("train", TRAIN), ("test", TEST)):
        split = data.split(name)
        images = split.pixels(0, count).astype(np.float32)
        block = images.shape[-1] // SIDE
        pooled = images.reshape(*images.shape[:2], SIDE, block, SIDE, block).mean((3, 5))
        arrays[f"{name}_images"] = pooled.round().astype(np.uint8).transpose(0, 2, 3, 1)
        arrays[f"{name}_labels"] = split.labels[:count]
    np.savez(path, **arrays)
    return path


def open_bench(seed: int, subset: Path) -> tuple[Any, str]:
    import torch

    from rprune.pipeline.bench import Bench
    from rprune.pipeline.recipe import DataSection, ThreatSection

    torch.set_num_threads(1)
    arch = f"{Path(__file__).parent / 'mini_vgg.py'}:MiniVGG"
    bench = Bench.open(DataSection(source=f"npz:{subset}"), ThreatSection(eps="8/255").model(), seed, "cpu")
    bench.typed = frozenset({arch})
    return bench, arch


def measured(bench: Any, model: Any, started: float, **row: Any) -> dict[str, Any]:
    from rprune.pipeline.single import measure

    clean, robust = measure(bench, model, "test", SUITE, None)
    row |= {"seed": bench.seed, "clean": clean["correct"], "robust": robust["correct"], "n": clean["n"]}
    row["seconds"] = round(time.monotonic() - started)
    print(row, flush=True)
    return row


def run_dense(seed: int, subset: Path, folder: Path) -> dict[str, Any]:
    """Train the dense model of a seed, and keep it for the methods."""
    from rprune.pipeline.artifact import save_artifact
    from rprune.pipeline.bench import architecture
    from rprune.pipeline.recipe import ModelSection, TrainStage
    from rprune.pipeline.stages import train

    bench, arch = open_bench(seed, subset)
    started = time.monotonic()
    stage = TrainStage(objective=OBJECTIVE, epochs=16, batch_size=BATCH, schedule="one-cycle")
    dense = train(bench, architecture(ModelSection(arch=arch), bench.data), stage)
    save_artifact(dense, folder / f"dense-{seed}.pt")
    return measured(bench, dense, started, method="dense", sparsity=0.0)


def run_method(seed: int, name: str, sparsity: float, subset: Path, folder: Path) -> dict[str, Any]:
    """Prune and fine-tune the dense model of a seed."""
    from rprune.pipeline.artifact import load_artifact
    from rprune.pipeline.recipe import FinetuneStage, PruneStage
    from rprune.pipeline.stages import finetune, prune

    bench, arch = open_bench(seed, subset)
    started = time.monotonic()
    dense = load_artifact(folder / f"dense-{seed}.pt", arch)
    pruned = prune(bench, dense, PruneStage(sparsity=sparsity, batch_size=BATCH, **METHODS[name]))
    tuned = finetune(bench, pruned, FinetuneStage(epochs=8, lr=0.05, batch_size=BATCH))
    search = pruned.metadata.lineage[-1].metrics
    more = {"kept": pruned.metadata.budget, "target_met": search.get("target_met")}
    return measured(bench, tuned, started, method=name, sparsity=sparsity, **more)


def finish(tasks: Sequence[tuple[Any, ...]], job: Callable[..., dict[str, Any]], folder: Path, jobs: int) -> None:
    """Run tasks that have no result yet; each result is written down as soon as it is known."""
    left = [task for task in tasks if not result_of(folder, task).exists()]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        waiting = [(task, pool.apply_async(job, (*task, folder / "subset.npz", folder))) for task in left]
        for task, answer in waiting:
            result_of(folder, task).write_text(json.dumps(answer.get()))


def result_of(folder: Path, task: tuple[Any, ...]) -> Path:
    return folder / ("-".join(str(part) for part in task).replace(" ", "_") + ".json")


def measure_all(source: str, folder: Path, jobs: int) -> dict[str, Any]:
    from rprune.pipeline.environment import environment

    prepare(source, folder)
    dense = [(seed,) for seed in SEEDS]
    tasks = [(seed, name, sparsity) for seed in SEEDS for name in METHODS for sparsity in SPARSITIES]
    finish(dense, run_dense, folder, jobs)
    finish(tasks, run_method, folder, jobs)
    rows = [json.loads(result_of(folder, task).read_text()) for task in [*dense, *tasks]]
    return {
        "command": "python benchmarks/method_order.py --data npz:cifar10.npz",
        "data": f"CIFAR-10, first {TRAIN} train images (10 % of them validation) and first {TEST} test images, 16x16",
        "suite": SUITE,
        "threat": "linf 8/255",
        "objective": OBJECTIVE,
        "methods": METHODS,
        "epochs": {"train": 16, "finetune": 8},
        "seeds": list(SEEDS),
        "process_seconds": sum(row["seconds"] for row in rows),
        "environment": environment("cpu"),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: clean / PGD-20 accuracy in percent, mean and range over seeds, beside the papers' PGD-10."""

    def cell(method: str, sparsity: float) -> str:
        rows = [r for r in result["rows"] if r["method"] == method and r["sparsity"] == sparsity]
        parts = []
        for key in ("clean", "robust"):
            values = [100 * r[key] / r["n"] for r in rows]
            parts.append(f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        return " / ".join(parts)

    heads = [f"sparsity {s:g}: clean / PGD-20" for s in SPARSITIES] + [f"paper at {s:g}: PGD-10" for s in SPARSITIES]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for method in METHODS:
        papers = [f"{value:.1f}" for value in PAPERS[method]] if method in PAPERS else ["–"] * len(SPARSITIES)
        lines.append(f"| {method} | " + " | ".join([*(cell(method, s) for s in SPARSITIES), *papers]) + " |")
    return "\n".join([f"Dense: {cell('dense', 0.0)}.", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the committed result file")
    parser.add_argument("--data", help="CIFAR-10: npz:FILE or cifar10:DIR")
    parser.add_argument("--work", type=Path, default=Path("runs/method_order"), help="finished rows lie here")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not options.table:
        if options.data is None:
            parser.error("say where CIFAR-10 lies: --data npz:FILE or cifar10:DIR")
        result = measure_all(options.data, options.work, options.jobs)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(table(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
