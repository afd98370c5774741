"""What each way to attack an 8-bit file finds, and what their union finds: every verdict from ONNX Runtime.

    python benchmarks/attack_int8.py             # about 10 minutes on two cores; writes the result file
    python benchmarks/attack_int8.py --table     # prints the table of the committed result file

The file comes from the chain on digits (recipes/digits.toml: PGD-AT, HARP at 0.9, fine-tuning, 8 bits), for several
seeds. Rows 2 to 7 attack all samples that the file gets right, each on its own; the union is the suite aa-quant, in
which every attack runs on what the ones before it left.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "attack_int8.json"
SEEDS = (0, 1, 2)
ROWS = {
    "clean": "Clean accuracy",
    "rounding": "APGD-CE and APGD-T through the real rounding",
    "transfer-first": "APGD-T on the float parent, first success",
    "transfer": "APGD-CE and APGD-T on the float parent, past the boundary",
    "ste-ce": "APGD-CE, straight-through",
    "ste-t": "APGD-T, straight-through",
    "square": "Square on the file",
    "aa-quant": "Union: aa-quant",
    "float": "The float file under aa-standard",
}


def measure(seeds: tuple[int, ...]) -> dict[str, Any]:
    from rprune.pipeline.environment import environment

    started, rows = time.monotonic(), []
    for seed in seeds:
        rows += one(seed)
    return {
        "command": "python benchmarks/attack_int8.py",
        "seeds": list(seeds),
        "threat": "linf 0.1",
        "seconds": round(time.monotonic() - started),
        "environment": environment("cpu"),
        "rows": rows,
    }


def one(seed: int) -> list[dict[str, Any]]:
    """All rows for the chain of one seed."""
    import torch
    from torch import nn

    from rprune.attacks.suites import CE, SUITES, TARGETED
    from rprune.attacks.transfer import Transfer
    from rprune.evaluation.robustness import robustness
    from rprune.evaluation.target import Target
    from rprune.pipeline.targets import CPU, FileNet, search_net

    class Rounding(nn.Module):
        """The derivative of rounding is zero wherever there is one: the gradient of the true 8-bit function."""

        def __init__(self, twin: nn.Module) -> None:
            super().__init__()
            self.twin = twin

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.twin(x.detach()) + 0 * x.flatten(1).sum(1, keepdim=True)

    class FirstSuccess(Transfer):
        """The weaker transfer: points at which the parent's search stopped."""

        def search(self, net: Any, x: Any, y: Any, threat: Any, noise: Any) -> Any:
            return self.attack.search(net, x, y, threat, noise)

    bench, model, twin, folder = chain(seed)
    parent = search_net(model, bench.data.shape, CPU)
    shipped = FileNet(folder / "model.int8.onnx")
    ste = Target.of(shipped, twin, (parent,))
    floating = Target.of(FileNet(folder / "model.onnx"), parent)
    cases = {
        "rounding": (Target.of(shipped, Rounding(twin)), (CE, TARGETED)),
        "transfer-first": (ste, (FirstSuccess(attack=TARGETED),)),
        "transfer": (ste, (Transfer(attack=CE), Transfer(attack=TARGETED))),
        "ste-ce": (ste, (CE,)),
        "ste-t": (ste, (TARGETED,)),
        "square": (ste, SUITES["square"]),
        "aa-quant": (ste, SUITES["aa-quant"]),
        "float": (floating, SUITES["aa-standard"]),
    }
    rows = []
    for name, (target, attacks) in cases.items():
        data = bench.loader("test")
        found = robustness(target, data, bench.threat, attacks, seed=seed, grid=False)
        if not rows:
            rows.append({"seed": seed, "row": "clean", "correct": found.clean.correct, "n": found.clean.n})
        parts = {tally.name: tally.broken for tally in found.tallies}
        rows.append({"seed": seed, "row": name, "correct": found.correct, "n": found.clean.n, "broken_by": parts})
        print(rows[-1], flush=True)
    return rows


def chain(seed: int) -> tuple[Any, Any, Any, Path]:
    """(bench, float model, 8-bit simulation, folder with both ONNX files) of the digits recipe."""
    from rprune.pipeline.bench import Bench, architecture
    from rprune.pipeline.forms import Deployed, write_models
    from rprune.pipeline.quantizing import quantize
    from rprune.pipeline.recipe import DataSection, FinetuneStage, ModelSection, PruneStage, QuantizeStage, TrainStage
    from rprune.pipeline.stages import finetune, prune, train

    bench = Bench.open(DataSection(source="digits"), None, seed, "cpu")
    made = train(bench, architecture(ModelSection(arch="cnn-small"), bench.data), TrainStage(epochs=60))
    made = prune(bench, made, PruneStage(method="harp", sparsity=0.9, epochs=20))
    made = finetune(bench, made, FinetuneStage(epochs=60, lr=0.05))
    made = quantize(bench, made, QuantizeStage())
    deployed = Deployed.of(made)
    folder = Path(tempfile.mkdtemp(prefix="attack-int8-"))
    write_models(deployed, (), bench, folder)
    return bench, deployed.model, deployed.twin, folder


def table(result: dict[str, Any]) -> str:
    """Markdown: accuracy left in percent, mean and range over seeds, and what only the union's parts found."""
    lines = ["| attack on the int8 file | accuracy left | found in the union |", "|---|---|---|"]
    union = {
        "ste-ce": "apgd-ce",
        "ste-t": "apgd-t",
        "transfer": "transfer ",
        "square": "square",
    }
    whole = [row for row in result["rows"] if row["row"] == "aa-quant"]
    for name, title in ROWS.items():
        values = [100 * row["correct"] / row["n"] for row in result["rows"] if row["row"] == name]
        spread = f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"
        added = ""
        if name in union:
            key = union[name]
            counts = [sum(count for part, count in row["broken_by"].items() if part.startswith(key)) for row in whole]
            added = ", ".join(map(str, counts))
        lines.append(f"| {title} | {spread} | {added} |")
    return "\n".join(lines)


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
