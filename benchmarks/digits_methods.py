"""LWM, HYDRA and HARP on digits at three sparsities and several seeds: clean and PGD-50x5 robust accuracy.

    python benchmarks/digits_methods.py                  # about 10 minutes on two cores; writes the result file
    python benchmarks/digits_methods.py --table          # prints the table of the committed result file

Every model is trained, pruned and fine-tuned as the papers do (PGD-AT; prune 20 epochs at lr 0.1), with 60 epochs of
training and of fine-tuning, and checkpoints selected on the validation split. Accuracies are of the fine-tuned float
model on the test split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "digits_methods.json"
METHODS = ("lwm", "hydra", "harp")
SPARSITIES = (0.9, 0.95, 0.99)
SEEDS = (0, 1, 2)
SUITE = "pgd50x5"


def measure(seeds: tuple[int, ...]) -> dict[str, Any]:
    """Run everything; a few seconds a row."""
    from rprune.pipeline.bench import Bench, architecture
    from rprune.pipeline.environment import environment
    from rprune.pipeline.recipe import DataSection, FinetuneStage, ModelSection, PruneStage, TrainStage
    from rprune.pipeline.shipped import measure as evaluate
    from rprune.pipeline.stages import finetune, prune, train
    from rprune.pipeline.targets import of_artifact

    stages = {
        "train": TrainStage(epochs=60),
        "prune": PruneStage(sparsity=0.9, epochs=20),
        "finetune": FinetuneStage(epochs=60, lr=0.05),
    }
    rows = []
    started = time.monotonic()
    for seed in seeds:
        bench = Bench.open(DataSection(source="digits"), None, seed, "cpu")
        dense = train(bench, architecture(ModelSection(arch="cnn-small"), bench.data), stages["train"])
        rows.append(
            {
                "seed": seed,
                "method": "dense",
                "sparsity": 0.0,
                **counts(evaluate(bench, of_artifact(dense, bench.device), "test", SUITE, None)),
            }
        )
        for method in METHODS:
            for sparsity in SPARSITIES:
                stage = PruneStage(
                    method=method, sparsity=sparsity, epochs=None if method == "lwm" else stages["prune"].epochs
                )
                pruned = prune(bench, dense, stage)
                tuned = finetune(bench, pruned, stages["finetune"])
                found = counts(evaluate(bench, of_artifact(tuned, bench.device), "test", SUITE, None))
                kept = pruned.metadata.budget
                rows.append({"seed": seed, "method": method, "sparsity": sparsity, "kept": kept, **found})
                print(rows[-1], flush=True)
    return {
        "command": "python benchmarks/digits_methods.py",
        "suite": SUITE,
        "threat": "linf 0.1",
        "seeds": list(seeds),
        "stages": {name: stage.model_dump(mode="json") for name, stage in stages.items()},
        "seconds": round(time.monotonic() - started),
        "environment": environment("cpu"),
        "rows": rows,
    }


def counts(found: list[dict[str, Any]]) -> dict[str, int]:
    clean, robust = found
    return {"clean": clean["correct"], "robust": robust["correct"], "n": clean["n"]}


def table(result: dict[str, Any]) -> str:
    """Markdown: clean / robust accuracy in percent, mean and range over seeds."""

    def cell(method: str, sparsity: float) -> str:
        rows = [r for r in result["rows"] if r["method"] == method and r["sparsity"] == sparsity]
        parts = []
        for key in ("clean", "robust"):
            values = [100 * r[key] / r["n"] for r in rows]
            parts.append(f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        return " / ".join(parts)

    lines = [
        "| method | " + " | ".join(f"sparsity {s:g}" for s in SPARSITIES) + " |",
        "|---" * (len(SPARSITIES) + 1) + "|",
    ]
    lines += [f"| {m.upper()} | " + " | ".join(cell(m, s) for s in SPARSITIES) + " |" for m in METHODS]
    return "\n".join([f"Dense: {cell('dense', 0.0)}.", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the committed result file")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not options.table:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(measure(tuple(options.seeds)), indent=1, sort_keys=True) + "\n")
    print(table(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
