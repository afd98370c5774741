"""HYDRA's table 11 on digits: bits of weights and activations against robust accuracy, dense and at sparsity 0.99.

    python benchmarks/bits.py --limit 150 --work DIR   # "seconds" in the result file; interrupted, it goes on in DIR
    python benchmarks/bits.py --table                  # prints the table of the committed result file

LeNet of width 8, PGD-AT, HARP at 0.99 and fine-tuning, then 12, 8, 6 and 4 bits by calibration (PTQ) and 8, 6 and 4 by
training with the integers (QAT). The verdict is ONNX Runtime's over the int8 file up to 8 bits, the simulation's at 12.
Every attack runs on all samples, with half of aa-quant's steps, 4 of its 9 targets and a fifth of its queries; the
union is what all of them leave.
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

RESULT = Path(__file__).parent / "results" / "bits.json"
SEEDS = (0, 1)
ARCH, WIDTH, SPARSITY = "lenet", 8, 0.99  # 84,000 weights, of which 838 stay
NETS = ("dense", "sparse")
QAT_LR = 0.03
FORMS = [("ptq", 12), ("ptq", 8), ("ptq", 6), ("ptq", 4), ("qat", 8), ("qat", 6), ("qat", 4)]
ATTACKS = {
    "clean": "clean",
    "transfer": "transfer",
    "square": "Square",
    "ste": "straight-through",
    "union": "union",
}


def measure(seeds: tuple[int, ...], epochs: int, work: Path, limit: int | None) -> dict[str, Any]:
    """All rows; those that ``work`` holds already are taken from there."""
    from rprune.pipeline.environment import environment

    rows = []
    for seed in seeds:
        rows += one(seed, epochs, work, limit)
    return {
        "command": "python benchmarks/bits.py" + ("" if limit is None else f" --limit {limit}"),
        "arch": f"{ARCH} of width {WIDTH}",
        "sparsity": SPARSITY,
        "epochs": epochs,
        "seeds": list(seeds),
        "threat": "linf 0.1",
        "seconds": round(sum(row["seconds"] for row in rows)),
        "environment": environment("cpu"),
        "rows": rows,
    }


def one(seed: int, epochs: int, work: Path, limit: int | None) -> list[dict[str, Any]]:
    """All rows of one seed. ``epochs`` train, fine-tune, and train with integers; a third of them prunes."""
    from rprune.pipeline.artifact import load_artifact, save_artifact
    from rprune.pipeline.bench import Bench, architecture
    from rprune.pipeline.quantizing import quantize
    from rprune.pipeline.recipe import DataSection, FinetuneStage, ModelSection, PruneStage, QuantizeStage, TrainStage
    from rprune.pipeline.stages import finetune, prune, train

    bench = Bench.open(DataSection(source="digits"), None, seed, "cpu")
    third = max(1, epochs // 3)

    def cached(name: str, make: Callable[[], Any]) -> Any:
        path = work / f"{ARCH}{WIDTH}-{epochs}-{seed}-{name}.pt"
        if not path.exists():
            save_artifact(make(), path)
        return load_artifact(path)

    arch = architecture(ModelSection(arch=ARCH, kwargs={"width": WIDTH}), bench.data)
    dense = cached("dense", lambda: train(bench, arch, TrainStage(epochs=epochs)))
    pruned = cached("pruned", lambda: prune(bench, dense, PruneStage(method="harp", sparsity=SPARSITY, epochs=third)))
    sparse = cached("sparse", lambda: finetune(bench, pruned, FinetuneStage(epochs=epochs, lr=0.05)))
    rows = []
    for net, source in zip(NETS, (dense, sparse), strict=True):
        for mode, bits in FORMS:
            stage = QuantizeStage(mode="ptq", bits=bits)
            if mode == "qat":
                stage = QuantizeStage(mode="qat", bits=bits, epochs=epochs, lr=QAT_LR)
            done = work / f"{ARCH}{WIDTH}-{epochs}-{seed}-{net}-{mode}{bits}-{limit}.json"
            if not done.exists():
                started = time.monotonic()
                made = quantize(bench, source, stage)
                found = accuracies(bench, source, made, bits, limit)
                lost = made.metadata.lineage[-1].metrics["lost"]
                seconds = round(time.monotonic() - started, 1)
                row = {"seed": seed, "net": net, "mode": mode, "bits": bits, "lost": lost, "seconds": seconds} | found
                done.write_text(json.dumps(row))
            rows.append(json.loads(done.read_text()))
            print(rows[-1], flush=True)
    return rows


def accuracies(bench: Any, source: Any, made: Any, bits: int, limit: int | None) -> dict[str, int]:
    """Samples left by each attack on the integer form of ``made``; transfer comes from the float ``source``."""
    import torch

    from rprune.attacks.apgd import APGD
    from rprune.attacks.square import Square
    from rprune.attacks.transfer import Transfer
    from rprune.evaluation.robustness import robustness
    from rprune.evaluation.target import Target
    from rprune.export.qdq import qdq_model
    from rprune.pipeline.forms import Deployed
    from rprune.pipeline.targets import CPU, FileNet, search_net

    twin = Deployed.of(made).twin
    assert twin is not None
    parent = search_net(source.model(), bench.data.shape, CPU)
    untargeted, targeted = APGD(steps=50), APGD(loss="dlr", targets=4, steps=50)
    suites: dict[str, Any] = {
        "transfer": (Transfer(attack=untargeted), Transfer(attack=targeted)),
        "square": (Square(budget=1000),),
        "ste": (untargeted, targeted),
    }
    with tempfile.TemporaryDirectory(prefix="bits-") as folder:
        shipped: Any = twin
        if bits <= 8:
            file = Path(folder) / "model.int8.onnx"
            file.write_bytes(qdq_model(twin, bench.data.shape, len(bench.data.classes)).SerializeToString())
            shipped = FileNet(file)
        target = Target.of(shipped, twin, (parent,))
        results = {}
        for name, attacks in suites.items():
            data = bench.loader("test")
            results[name] = robustness(target, data, bench.threat, attacks, seed=bench.seed, limit=limit, grid=False)
    clean = results["ste"].clean
    # noise is keyed by sample: what is left by all of them is what one suite of them leaves
    left = torch.stack([found.robust for found in results.values()]).all(0)
    counts = {name: found.correct for name, found in results.items()}
    return counts | {"union": int(left.sum()), "clean": clean.correct, "n": clean.n}


def table(result: dict[str, Any]) -> str:
    """Markdown: accuracy in percent, mean and range over seeds."""
    lines = ["| net | bits | " + " | ".join(ATTACKS.values()) + " |", "|---" * (2 + len(ATTACKS)) + "|"]
    for net in NETS:
        for mode, bits in FORMS:
            rows = [r for r in result["rows"] if (r["net"], r["mode"], r["bits"]) == (net, mode, bits)]
            cells = []
            for name in ATTACKS:
                values = [100 * row[name] / row["n"] for row in rows]
                cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})")
            title = "dense" if net == "dense" else f"{result['sparsity']:g}"
            lines.append(f"| {title} | {bits} {mode.upper()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the committed result file")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--epochs", type=int, default=45, help="of training and of fine-tuning")
    parser.add_argument("--limit", type=int, help="only the first test samples")
    parser.add_argument("--work", type=Path, help="folder for models and rows, so that an interrupted run goes on")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not options.table:
        work = options.work or Path(tempfile.mkdtemp(prefix="bits-work-"))
        work.mkdir(parents=True, exist_ok=True)
        found = measure(tuple(options.seeds), options.epochs, work, options.limit)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(table(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
