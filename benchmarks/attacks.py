"""AutoAttack's budget: how strong and how fast ours is.

    python benchmarks/attacks.py                     # about 40 minutes on two cores; writes the result file
    python benchmarks/attacks.py --only oracle       # one part: oracle, l2, speed, resnet18, libraries
    python benchmarks/attacks.py --table             # prints the tables of the committed result file

oracle: aa-standard and its parts over five seeds on the adversarially trained net of tests/data/attacks-linf (256
images, linf 0.08) beside what reference AutoAttack reached there (results.json; measured once, torch 2.13).
l2: the parts and their union on a net trained with PGD-AT in l2 (digits, eps 0.5, 359 images); there is no reference.
speed: aa-standard on the oracle, as it is against a plain run: no sample leaves before its budget is spent, and the
net is not folded. Gradients and further forward passes are counted a sample, the time is a ratio within one run.
resnet18: the same for a CIFAR ResNet-18 with random weights and a few random images.
libraries: AutoAttack or the nearest thing of foolbox, ART and torchattacks on the oracle, those that are installed
(pip install 'rprune[bench]').
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "attacks.json"
ORACLE = Path(__file__).parent.parent / "tests" / "oracles" / "attack_oracle.py"
SEEDS = (0, 1, 2, 3, 4)
PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "aa-standard")
REFERENCE = {"apgd-ce": "apgd-ce_s0", "apgd-dlr": "apgd-dlr_s0", "apgd-t": "apgd-t_s0", "fab-t": "fab-t_s0",
             "square": "square_s0", "aa-standard": "standard_s0"}  # fmt: skip


def oracle_module() -> Any:
    spec = importlib.util.spec_from_file_location("attack_oracle", ORACLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counting(net: Any) -> Any:
    """A net that counts images: those of passes with a gradient, and of passes without."""
    import torch
    from torch import nn

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.gradients, self.forwards = net, 0, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled() and x.requires_grad:
                self.gradients += len(x)
            else:
                self.forwards += len(x)
            logits: torch.Tensor = self.net(x)
            return logits

    return Counting().eval()


def run(net: Any, x: Any, y: Any, threat: Any, attacks: Any, seed: int = 0, rows: bool = True) -> dict[str, Any]:
    """One suite: what is left, seconds, and counts of images per pass."""
    import torch

    from rprune.data.loaders import Resident
    from rprune.evaluation.robustness import robustness
    from rprune.evaluation.target import Rows, Target

    data = Resident((x * 255).round().to(torch.uint8), y)
    counted = counting(net)
    searched = Rows(counted).eval() if rows else counted
    searched(data.take(torch.arange(len(y))).x)  # with the trial of Rows; not counted
    counted.gradients = counted.forwards = 0
    started = time.process_time()
    found = robustness(Target(searched, searched), data, threat, attacks, seed=seed, grid=False)
    return {
        "correct": found.correct,
        "n": found.clean.n,
        "cpu_seconds": round(time.process_time() - started, 2),
        "gradients": counted.gradients,
        "forwards": counted.forwards,
    }


def oracle(seeds: tuple[int, ...]) -> dict[str, Any]:
    """Robust accuracy of every part over seeds, and how far robust sets of aa-standard are apart."""
    from rprune.attacks.suites import suite
    from rprune.pipeline.targets import CPU, search_net
    from rprune.threat import ThreatModel

    module = oracle_module()
    net, x, y = module.load()
    fast = search_net(net, (3, 16, 16), CPU)
    threat = ThreatModel.of("linf", "0.08")
    rows = []
    for name in PARTS:
        for seed in seeds:
            found = run(fast, x, y, threat, suite(name), seed)
            rows.append({"part": name, "seed": seed, "reference": module.RESULTS[REFERENCE[name]], **found})
            print(name, seed, found["correct"] / found["n"], flush=True)
    return {"rows": rows}


def l2(seeds: tuple[int, ...]) -> dict[str, Any]:
    """As ``oracle``, on a net of our own in l2."""
    import torch

    from rprune.attacks.suites import suite
    from rprune.pipeline.bench import Bench, architecture
    from rprune.pipeline.recipe import DataSection, ModelSection, TrainStage
    from rprune.pipeline.stages import train
    from rprune.pipeline.targets import CPU, search_net
    from rprune.threat import ThreatModel

    bench = Bench.open(DataSection(source="digits"), ThreatModel.of("l2", "0.5"), 0, "cpu")
    made = train(bench, architecture(ModelSection(arch="cnn-small"), bench.data), TrainStage(epochs=60))
    net = search_net(made.model(), bench.data.shape, CPU)
    test = bench.loader("test").take(torch.arange(len(bench.data.test)))
    rows = []
    for name in PARTS:
        for seed in seeds:
            found = run(net, test.x, test.y, bench.threat, suite(name), seed)
            rows.append({"part": name, "seed": seed, **found})
            print("l2", name, seed, found["correct"] / found["n"], flush=True)
    return {"rows": rows}


def plain(attacks: Any) -> tuple[Any, ...]:
    """The same attacks without early stop: every sample spends the whole budget."""
    return tuple(replace(a, overshoot=math.inf) if hasattr(a, "overshoot") else a for a in attacks)


def speed(net: Any, shape: tuple[int, int, int], x: Any, y: Any, threat: Any, repeats: int) -> dict[str, Any]:
    """aa-standard, ours against plain, alternating; medians of CPU seconds."""
    from rprune.attacks.suites import suite
    from rprune.pipeline.targets import CPU, search_net

    fast = search_net(net, shape, CPU)
    rows: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
    for _ in range(repeats):
        rows["plain"].append(run(net, x, y, threat, plain(suite("aa-standard")), rows=False))
        rows["ours"].append(run(fast, x, y, threat, suite("aa-standard")))
        print({name: found[-1]["cpu_seconds"] for name, found in rows.items()}, flush=True)
    result: dict[str, Any] = {}
    for name, found in rows.items():
        result[name] = found[-1] | {"cpu_seconds": statistics.median(f["cpu_seconds"] for f in found)}
    return result


def resnet18() -> dict[str, Any]:
    import torch

    from rprune.models.registry import Architecture, build
    from rprune.threat import ThreatModel

    torch.manual_seed(0)
    net = build(Architecture("cifar-resnet18", 10, (3, 32, 32), {"width": 8})).eval()
    x = torch.randint(0, 256, (32, 3, 32, 32)).float() / 255
    with torch.no_grad():
        net.linear.bias -= net(x).mean(0)  # else all images are of one class
        y = net(x).argmax(1)
    # at this eps about two thirds of the samples take the whole budget
    return speed(net, (3, 32, 32), x, y, ThreatModel.of("linf", "0.001"), repeats=1)


def libraries() -> dict[str, Any]:
    """What others reach on the oracle, and their CPU time over ours for the same kind of attack in the same run."""
    from rprune.attacks.suites import suite
    from rprune.pipeline.targets import CPU, search_net
    from rprune.threat import ThreatModel

    net, x, y = oracle_module().load()
    threat = ThreatModel.of("linf", "0.08")
    fast = search_net(net, (3, 16, 16), CPU)
    found: dict[str, Any] = {}
    for name, (package, ours, attack) in LIBRARIES.items():
        if importlib.util.find_spec(package) is None:
            continue
        started = time.process_time()
        points = attack(net, x, y)
        theirs = time.process_time() - started
        right = int((net(points).argmax(1) == y).sum())
        mine = run(fast, x, y, threat, suite(ours))
        found[name] = {
            "correct": right, "n": len(y), "cpu_seconds": round(theirs, 2), "ours": ours,
            "ours_correct": mine["correct"], "ours_cpu_seconds": mine["cpu_seconds"],
        }  # fmt: skip
        print(name, found[name], flush=True)
    return found


def _torchattacks(name: str, **options: Any) -> Callable[[Any, Any, Any], Any]:
    def attack(net: Any, x: Any, y: Any) -> Any:
        import torchattacks

        return getattr(torchattacks, name)(net, eps=0.08, **options)(x, y)

    return attack


def _foolbox_pgd(net: Any, x: Any, y: Any) -> Any:
    import foolbox

    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / 20, steps=20)
    return attack(model, x, y, epsilons=0.08)[1]


def _art_apgd(net: Any, x: Any, y: Any) -> Any:
    import torch
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    model = PyTorchClassifier(net, torch.nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1), device_type="cpu")
    attack = AutoProjectedGradientDescent(
        model, eps=0.08, eps_step=0.16, max_iter=100, nb_random_init=1, batch_size=256, loss_type="cross_entropy",
        verbose=False,
    )  # fmt: skip
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


LIBRARIES: dict[str, tuple[str, str, Callable[[Any, Any, Any], Any]]] = {
    "torchattacks AutoAttack (10 steps)": ("torchattacks", "aa-torchattacks10", _torchattacks("AutoAttack")),
    "torchattacks APGD-CE, 100 steps": ("torchattacks", "apgd-ce", _torchattacks("APGD", steps=100)),
    "foolbox PGD-20": ("foolbox", "pgd20", _foolbox_pgd),
    "ART AutoPGD-CE, 100 steps": ("art", "apgd-ce", _art_apgd),
}


def measure(only: str | None, seeds: tuple[int, ...], before: dict[str, Any]) -> dict[str, Any]:
    from rprune.pipeline.environment import environment
    from rprune.threat import ThreatModel

    net, x, y = oracle_module().load()
    parts: dict[str, Callable[[], Any]] = {
        "oracle": lambda: oracle(seeds),
        "l2": lambda: l2(seeds[:2]),
        "speed": lambda: speed(net, (3, 16, 16), x, y, ThreatModel.of("linf", "0.08"), repeats=2),
        "resnet18": resnet18,
        "libraries": libraries,
    }
    result = {**before, "command": "python benchmarks/attacks.py", "environment": environment("cpu")}
    for name, part in parts.items():
        if only in (None, name):
            started = time.monotonic()
            result[name] = part() | {"seconds": round(time.monotonic() - started)}
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown: strength beside the reference, and cost beside a plain run."""
    lines = ["| robust accuracy | oracle, linf: ours, 5 seeds | reference AutoAttack | l2 net: ours, 2 seeds |"]
    lines += ["|---|---|---|---|"]
    for name in PARTS:
        cells = []
        for part in ("oracle", "l2"):
            rows = [row for row in result[part]["rows"] if row["part"] == name]
            values = [100 * row["correct"] / row["n"] for row in rows]
            low, high = min(values), max(values)
            cells.append(f"{low:.2f}" if low == high else f"{low:.2f}–{high:.2f}")
        reference = next(row["reference"] for row in result["oracle"]["rows"] if row["part"] == name)
        lines.append(f"| {name} | {cells[0]} | {100 * reference:.2f} | {cells[1]} |")
    lines += ["", "| aa-standard | gradients a sample | other forward passes a sample | CPU time, plain / ours |"]
    lines += ["|---|---|---|---|"]
    titles = {"speed": "oracle net, 256 images", "resnet18": "CIFAR ResNet-18 (width 8, random weights), 32 images"}
    for name, title in titles.items():
        ours, slow = result[name]["ours"], result[name]["plain"]
        ratio = slow["cpu_seconds"] / ours["cpu_seconds"]
        keys = ("gradients", "forwards")
        cells = [f"{ours[key] / ours['n']:,.0f} (plain {slow[key] / slow['n']:,.0f})" for key in keys]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} | {ratio:.1f} |")
    lines += ["", "| library, on the oracle | accuracy left | our suite | accuracy left | CPU time, theirs / ours |"]
    lines += ["|---|---|---|---|---|"]
    for name in LIBRARIES:
        if name not in result["libraries"]:
            continue
        row = result["libraries"][name]
        theirs, ours = 100 * row["correct"] / row["n"], 100 * row["ours_correct"] / row["n"]
        ratio = row["cpu_seconds"] / row["ours_cpu_seconds"]
        lines.append(f"| {name} | {theirs:.2f} | {row['ours']} | {ours:.2f} | {ratio:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of the committed result file")
    parser.add_argument("--only", choices=["oracle", "l2", "speed", "resnet18", "libraries"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not options.table:
        before = json.loads(options.output.read_text()) if options.only and options.output.exists() else {}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        found = measure(options.only, tuple(options.seeds), before)
        options.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(table(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
