"""AutoAttack's budget: how strong and how fast ours is.

    python benchmarks/attacks.py                     # about 40 minutes on one idle core; writes the result file
    python benchmarks/attacks.py --only oracle       # one part: oracle, l2, speed, resnet18, libraries
    python benchmarks/attacks.py --table             # prints the tables of the committed result file

oracle: aa-standard and its parts over five seeds on the adversarially trained net of tests/data/attacks-linf (256
images, linf 0.08) beside what reference AutoAttack reached there (results.json; measured once, torch 2.13).
l2: the parts and their union on a net trained with PGD-AT in l2 (digits, eps 0.5, 359 images).
speed: aa-standard on the oracle, as it is against a plain run: no sample leaves before its budget is spent, and the
net is not folded. Gradients and further forward passes are counted a sample, the time is a ratio within one run.
resnet18: the same for a CIFAR ResNet-18 with random weights and a few random images.
libraries: what foolbox, ART and torchattacks have, those that are installed (pip install 'rprune[bench]'), on the same
samples. torchattacks' APGD, APGD-T, FAB-T and Square are AutoAttack's own code; at its budget, which torchattacks does
not use itself, and one after another on what is left, they are the reference: on the oracle and on the l2 net.
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
from functools import cache
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "attacks.json"
ORACLE = Path(__file__).parent.parent / "tests" / "oracles" / "attack_oracle.py"
SEEDS = (0, 1, 2, 3, 4)
REPEATS = 3  # of what is timed, in alternation
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
    """One suite: what is left (``robust``: a bit a sample), seconds, and counts of images per pass."""
    import torch

    from rprune.data.loaders import Resident
    from rprune.evaluation.robustness import robustness
    from rprune.evaluation.target import STEP, Rows, Target, usual_rows

    data = Resident((x * 255).round().to(torch.uint8), y)
    counted = counting(net)
    searched = Rows(counted).eval() if rows else counted
    images = data.take(torch.arange(len(y))).x
    for size in range(STEP, usual_rows(images[:1]) + 1, STEP):
        searched(images[:size])  # with the trials of Rows; not counted
    counted.gradients = counted.forwards = 0
    started = time.process_time()
    found = robustness(Target(searched, searched), data, threat, attacks, seed=seed, grid=False)
    return {
        "correct": found.correct,
        "n": found.clean.n,
        "cpu_seconds": round(time.process_time() - started, 2),
        "gradients": counted.gradients,
        "forwards": counted.forwards,
        "robust": bits(found.robust),
    }


def bits(flags: Any) -> str:
    """Flags as hexadecimal digits."""
    import numpy as np

    return np.packbits(flags.numpy()).tobytes().hex()


def apart(one: str, other: str) -> int:
    """In how many samples two sets of :func:`bits` differ."""
    return (int(one, 16) ^ int(other, 16)).bit_count()


def folded(net: Any, x: Any) -> Any:
    """The form of a net that rprune searches on."""
    from rprune.pipeline.targets import CPU, search_net

    return search_net(net, tuple(x.shape[1:]), CPU)


def oracle_scene() -> tuple[Any, Any, Any, Any]:
    """(net, x, y, threat) of the oracle."""
    from rprune.threat import ThreatModel

    return *oracle_module().load(), ThreatModel.of("linf", "0.08")


@cache
def l2_scene() -> tuple[Any, Any, Any, Any]:
    """(net, x, y, threat): a CNN trained with PGD-AT in l2 on digits, and their test images."""
    import torch

    from rprune.pipeline.bench import Bench, architecture
    from rprune.pipeline.recipe import DataSection, ModelSection, TrainStage
    from rprune.pipeline.stages import train
    from rprune.threat import ThreatModel

    bench = Bench.open(DataSection(source="digits"), ThreatModel.of("l2", "0.5"), 0, "cpu")
    made = train(bench, architecture(ModelSection(arch="cnn-small"), bench.data), TrainStage(epochs=60))
    test = bench.loader("test").take(torch.arange(len(bench.data.test)))
    return made.model().eval(), test.x, test.y, bench.threat


def oracle(seeds: tuple[int, ...]) -> dict[str, Any]:
    """Every part over seeds, beside the reference's robust accuracy."""
    results = oracle_module().RESULTS
    return {"rows": [row | {"reference": results[REFERENCE[row["part"]]]} for row in parts(oracle_scene(), seeds)]}


def l2(seeds: tuple[int, ...]) -> dict[str, Any]:
    """As ``oracle``, on a net of our own in l2."""
    return {"rows": parts(l2_scene(), seeds)}


def parts(scene: tuple[Any, Any, Any, Any], seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for every part and seed."""
    from rprune.attacks.suites import suite

    net, x, y, threat = scene
    fast, rows = folded(net, x), []
    for name in PARTS:
        for seed in seeds:
            found = run(fast, x, y, threat, suite(name), seed)
            rows.append({"part": name, "seed": seed, **found})
            print(threat, name, seed, found["correct"] / found["n"], flush=True)
    return rows


def plain(attacks: Any) -> tuple[Any, ...]:
    """The same attacks without early stop: every sample spends the whole budget."""
    return tuple(replace(a, overshoot=math.inf) if hasattr(a, "overshoot") else a for a in attacks)


def speed(net: Any, x: Any, y: Any, threat: Any, repeats: int) -> dict[str, Any]:
    """aa-standard, ours against plain, alternating; ``ratio`` is the median of the plain one's CPU time over ours."""
    from rprune.attacks.suites import suite

    fast = folded(net, x)
    rows: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
    for _ in range(repeats):
        rows["plain"].append(run(net, x, y, threat, plain(suite("aa-standard")), rows=False))
        rows["ours"].append(run(fast, x, y, threat, suite("aa-standard")))
        print({name: found[-1]["cpu_seconds"] for name, found in rows.items()}, flush=True)
    result: dict[str, Any] = {}
    for name, found in rows.items():
        result[name] = found[-1] | {"cpu_seconds": [row["cpu_seconds"] for row in found]}
    pairs = zip(rows["plain"], rows["ours"], strict=True)
    result["ratio"] = round(statistics.median(a["cpu_seconds"] / b["cpu_seconds"] for a, b in pairs), 2)
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
    return speed(net, x, y, ThreatModel.of("linf", "0.001"), repeats=1)


def libraries() -> dict[str, Any]:
    """What others reach, and the median of their CPU time over ours, measured in turns."""
    from rprune.attacks.suites import suite

    scenes = {"oracle": oracle_scene, "l2": l2_scene}
    found: dict[str, Any] = {}
    for name, (package, where, ours, attack) in LIBRARIES.items():
        if importlib.util.find_spec(package) is None:
            continue
        net, x, y, threat = scenes[where]()
        fast, theirs, mine = folded(net, x), [], []
        for _ in range(REPEATS):
            started = time.process_time()
            points = attack(net, x, y, threat)
            theirs.append(time.process_time() - started)
            mine.append(run(fast, x, y, threat, suite(ours)))
        robust = net(points).argmax(1) == y
        times = [row["cpu_seconds"] for row in mine]
        found[name] = {
            "correct": int(robust.sum()), "n": len(y), "robust": bits(robust), "net": where, "ours": ours,
            "ours_correct": mine[0]["correct"], "ours_robust": mine[0]["robust"],
            "cpu_seconds": [round(seconds, 2) for seconds in theirs], "ours_cpu_seconds": times,
            "ratio": round(statistics.median(a / b for a, b in zip(theirs, times, strict=True)), 2),
        }  # fmt: skip
        print(name, found[name], flush=True)
    return found


def _torchattacks(name: str, **options: Any) -> Callable[[Any, Any, Any, Any], Any]:
    def attack(net: Any, x: Any, y: Any, threat: Any) -> Any:
        import torchattacks

        norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
        return getattr(torchattacks, name)(net, norm=norm, eps=threat.eps, **options)(x, y)

    return attack


def _full_autoattack(net: Any, x: Any, y: Any, threat: Any) -> Any:
    """AutoAttack's four parts at its budget, each on what the ones before it left."""
    import torch

    points, left = x.clone(), torch.arange(len(y))
    for attack in (
        _torchattacks("APGD", steps=100),
        _torchattacks("APGDT", steps=100),
        _torchattacks("FAB", steps=100, multi_targeted=True),
        _torchattacks("Square", n_queries=5000, resc_schedule=False),
    ):
        with torch.no_grad():
            left = left[net(points[left]).argmax(1) == y[left]]
        points[left] = attack(net, x[left], y[left], threat)
    return points


def _foolbox_pgd(net: Any, x: Any, y: Any, threat: Any) -> Any:
    import foolbox

    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / 20, steps=20)
    return attack(model, x, y, epsilons=threat.eps)[1]


def _art_apgd(net: Any, x: Any, y: Any, threat: Any) -> Any:
    import torch
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    model = PyTorchClassifier(net, torch.nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1), device_type="cpu")
    attack = AutoProjectedGradientDescent(
        model, eps=threat.eps, eps_step=2 * threat.eps, max_iter=100, nb_random_init=1, batch_size=256,
        loss_type="cross_entropy", verbose=False,
    )  # fmt: skip
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


LIBRARIES: dict[str, tuple[str, str, str, Callable[[Any, Any, Any, Any], Any]]] = {
    "AutoAttack's code in torchattacks, full budget": ("torchattacks", "oracle", "aa-standard", _full_autoattack),
    "the same in l2": ("torchattacks", "l2", "aa-standard", _full_autoattack),
    "torchattacks AutoAttack (10 steps)": ("torchattacks", "oracle", "aa-torchattacks10", _torchattacks("AutoAttack")),
    "torchattacks APGD-CE, 100 steps": ("torchattacks", "oracle", "apgd-ce", _torchattacks("APGD", steps=100)),
    "foolbox PGD-20": ("foolbox", "oracle", "pgd20", _foolbox_pgd),
    "ART AutoPGD-CE, 100 steps": ("art", "oracle", "apgd-ce", _art_apgd),
}


SECTIONS: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "oracle": oracle,
    "l2": lambda seeds: l2(seeds[:2]),
    "speed": lambda _: speed(*oracle_scene(), repeats=REPEATS),
    "resnet18": lambda _: resnet18(),
    "libraries": lambda _: libraries(),
}


def measure(only: str | None, seeds: tuple[int, ...], before: dict[str, Any]) -> dict[str, Any]:
    import torch

    from rprune.pipeline.environment import environment

    torch.set_num_threads(1)  # CPU times are compared, and threads that wait count too
    result = {**before, "command": "python benchmarks/attacks.py", "environment": environment("cpu")}
    for name, section in SECTIONS.items():
        if only in (None, name):
            started = time.monotonic()
            result[name] = section(seeds) | {"seconds": round(time.monotonic() - started)}
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
        keys = ("gradients", "forwards")
        cells = [f"{ours[key] / ours['n']:,.0f} (plain {slow[key] / slow['n']:,.0f})" for key in keys]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} | {result[name]['ratio']:.1f} |")
    columns = ("library", "accuracy left", "our suite", "accuracy left", "samples judged otherwise",
               "CPU time, theirs / ours")  # fmt: skip
    lines += ["", f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|"]
    for name in LIBRARIES:
        if name not in result["libraries"]:
            continue
        row = result["libraries"][name]
        theirs, ours = 100 * row["correct"] / row["n"], 100 * row["ours_correct"] / row["n"]
        other = apart(row["robust"], row["ours_robust"])
        lines.append(f"| {name} | {theirs:.2f} | {row['ours']} | {ours:.2f} | {other} | {row['ratio']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of the committed result file")
    parser.add_argument("--only", choices=list(SECTIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not options.table:
        before = json.loads(options.output.read_text()) if options.only and options.output.exists() else {}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        found = measure(options.only, tuple(options.seeds), before)
        options.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    result = json.loads(options.output.read_text())
    if result.keys() >= SECTIONS.keys():
        print(table(result))


if __name__ == "__main__":
    main()
