"""Training steps against the papers' layers, which rebuild every mask in every forward: the same gradients, less time.

    python benchmarks/training_step.py --pairs 5
    python benchmarks/training_step.py --only bfloat16
    python benchmarks/training_step.py --table       # prints the table of the committed result file

The reference is written here from the formulas, as the authors' code computes them: each layer sorts its scores and
scatters a mask in each forward, the attack's backward passes compute weight gradients too, TRADES computes its targets
in each step of the attack, and one more forward serves the log. Both sides start from equal weights, scores and points;
before anything is timed the gradients of a whole step, attack included, are compared in float64, where rounding decides
no sign. Steps alternate in one run, on one thread, in float32; ratios are medians of pairs. "plain" is a dense step of
PyTorch as most people write it, without sorting, with weight gradients in the attack.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESULT = Path(__file__).parent / "results" / "training_step.json"
SHAPE, CLASSES, BATCH = (3, 32, 32), 10, 32
EPS, DENSITY, GAMMA, DECAY, LR = 8 / 255, 0.01, 0.01, 5e-4, 0.1
ALPHA = 0.1  # HARP: the smallest rate is ALPHA times the target
CHECKED = 8  # images whose gradients are compared
SAME = 1e-5  # of gradients, relative to the largest of a tensor: rates are float32
CASES: dict[str, tuple[str, str, str, str]] = {
    "HARP prune, PGD-10, ResNet-18": ("cifar-resnet18", "harp", "pgd-at", "papers"),
    "HARP prune, PGD-10, VGG16": ("vgg16", "harp", "pgd-at", "papers"),
    "HARP prune, TRADES-10, ResNet-18": ("cifar-resnet18", "harp", "trades", "papers"),
    "PGD-10 training, ResNet-18": ("cifar-resnet18", "dense", "pgd-at", "papers"),
    "PGD-10 training, ResNet-18, plain": ("cifar-resnet18", "dense", "pgd-at", "plain"),
}
TimedStep = Callable[[Tensor, Tensor, int], None]  # images, labels, seed
ARCHS = ("cifar-resnet18", "vgg16")


# -- as the papers' code computes -------------------------------------------------------------------------------------
class Mask(torch.autograd.Function):
    """0 at the first ``pruned`` of the sorted scores, 1 behind; gradients straight through, to the rate their sum."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, rate: Tensor | None, pruned: int) -> Tensor:  # noqa: ARG004
        mask = scores.clone()
        _, order = scores.flatten().sort()
        flat = mask.flatten()
        flat[order[:pruned]] = 0
        flat[order[pruned:]] = 1
        return flat.view(mask.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        return grad, grad.sum() if ctx.needs_input_grad[1] else None, None


def kept_share(r: Tensor, density: float) -> Tensor:
    lowest = ALPHA * density
    return lowest + (1 - lowest) * torch.sigmoid(r)


class Masked(nn.Module):
    """Convolution or linear layer with scores, and for HARP a rate, in its forward."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, r: float | None, density: float) -> None:
        super().__init__()
        self.layer, self.density = layer, density
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=r is None)
        size = layer.weight[0].numel()
        scores = (6 / size) ** 0.5 * layer.weight.detach() / layer.weight.detach().abs().max()
        self.scores = nn.Parameter(scores, requires_grad=r is not None)
        self.r = None if r is None else nn.Parameter(torch.tensor(r))

    def rate(self) -> Tensor | None:
        return None if self.r is None else kept_share(self.r, self.density)

    def forward(self, x: Tensor) -> Tensor:
        # in float64, where the authors' float32 is off by a weight now and then
        share = 1.0 if self.r is None else float(kept_share(self.r.detach().double(), self.density))
        pruned = int((1 - share) * self.scores.numel())
        weight = self.weight * Mask.apply(self.scores.abs(), self.rate(), pruned)  # type: ignore[no-untyped-call]
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[arg-type]


def masked(net: nn.Module, rates: Iterator[float] | None, density: float) -> nn.Module:
    """Every convolution and linear layer replaced, in place; ``rates``: HARP's r of each."""
    for name, child in list(net.named_children()):
        if isinstance(child, nn.Conv2d | nn.Linear):
            setattr(net, name, Masked(child, None if rates is None else next(rates), density))
        else:
            masked(child, rates, density)
    return net


class Reference:
    """A training step of the papers' code, or a plain one."""

    def __init__(self, net: nn.Module, method: str, objective: str, kind: str, rates: Iterator[float] | None) -> None:
        total = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        self.density = round(DENSITY * total) / total
        self.net = masked(net, rates, self.density) if kind == "papers" else net
        self.objective, self.papers = objective, kind == "papers"
        self.layers = [module for module in self.net.modules() if isinstance(module, Masked)]
        if method == "harp":
            norms = [p for m in self.net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
            self.trained = [p for layer in self.layers for p in (layer.scores, layer.r) if p is not None] + norms
            for layer in self.layers:
                if layer.layer.bias is not None:
                    layer.layer.bias.requires_grad_(False)
        else:
            self.trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, LR, momentum=0.9, weight_decay=DECAY)

    def gradients(self, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        point = self._attack(x, y, start)
        self.net.train()
        self.optimizer.zero_grad()
        logits = self.net(point)
        if self.objective == "trades":
            natural = self.net(x)
            loss = F.cross_entropy(natural, y) + 6.0 * divergence(natural, logits).mean()
        else:
            loss = F.cross_entropy(logits, y)
        rates = [rate for layer in self.layers if (rate := layer.rate()) is not None]
        if rates:
            sizes = [layer.weight.numel() for layer in self.layers]
            kept = sum((size * rate for size, rate in zip(sizes, rates, strict=True)), torch.zeros(()))
            loss = loss + GAMMA * (kept / (self.density * sum(sizes)) - 1).clamp_min(0)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, x: Tensor, y: Tensor, start: Tensor) -> None:
        self.gradients(x, y, start)
        self.optimizer.step()
        if self.papers:
            with torch.no_grad():
                float((self.net(x).argmax(1) == y).float().mean())  # for the log

    def _attack(self, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        self.net.eval()
        point = start
        for _ in range(10):
            point = point.detach().requires_grad_()
            if self.objective == "trades":
                loss = divergence(self.net(x), self.net(point)).sum()
            else:
                loss = F.cross_entropy(self.net(point), y)
            loss.backward()  # type: ignore[no-untyped-call]  # weights get gradients, too
            assert point.grad is not None
            moved = point.detach() + EPS / 4 * point.grad.sign()
            point = torch.minimum(torch.maximum(moved, x - EPS), x + EPS).clamp(0, 1)
        return point.detach()


def divergence(natural: Tensor, adversarial: Tensor) -> Tensor:
    log_p = natural.log_softmax(1)
    return (log_p.exp() * (log_p - adversarial.log_softmax(1))).sum(1)


# -- as rprune does ---------------------------------------------------------------------------------------------------
class Ours:
    """A step of :func:`rprune.training.loop.fit`."""

    def __init__(self, net: nn.Module, method: str, objective: str) -> None:
        from rprune.models.prunable import prunable
        from rprune.objectives.base import OBJECTIVES
        from rprune.pruning.base import METHODS, Context, Pruner
        from rprune.pruning.budget import Budget
        from rprune.threat import ThreatModel
        from rprune.training.loop import Settings, make_optimizer

        self.net, self.pruner = net, Pruner(net)
        self.attacked = net  # or what runs it otherwise
        self.objective: Any = OBJECTIVES.build(objective, threat=ThreatModel("linf", "8/255"))
        if method == "harp":
            sizes = {name: weight.numel() for name, weight in prunable(net).items()}
            budget = Budget(sizes, round(DENSITY * sum(sizes.values())))
            self.pruner = METHODS.build({"name": "harp", "gamma_step": GAMMA}).bind(net, budget, Context())
            self.pruner.before_epoch(0)
        self.trained = list(self.pruner.parameters())
        for parameter in self.trained:
            parameter.requires_grad_()
        self.optimizer = make_optimizer(Settings(1, lr=LR, weight_decay=DECAY), self.trained)
        self.pruner.attach(self.optimizer)

    def gradients(self, x: Tensor, y: Tensor, seed: int) -> None:
        from rprune.attacks.noise import Stream
        from rprune.training.loop import gradients
        from rprune.training.world import World

        self.attacked.train()
        for compute in self.objective(self.attacked, x, y, 0.0, Stream(torch.Generator().manual_seed(seed))):
            gradients(self.net, self.pruner, self.optimizer, [compute], [1.0], World())

    def step(self, x: Tensor, y: Tensor, seed: int) -> None:
        self.gradients(x, y, seed)
        self.optimizer.step()
        self.pruner.after_step()

    def start(self, x: Tensor, seed: int) -> Tensor:
        """Where the attack of a step begins."""
        from rprune.attacks.noise import Stream

        noise = Stream(torch.Generator().manual_seed(seed))
        found: Tensor = self.objective.attack._start(x, self.objective.threat, noise, 0)
        return found


def built(arch: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    from rprune.models.registry import Architecture, build

    torch.manual_seed(0)
    net = build(Architecture(arch, CLASSES, SHAPE)).to(dtype)
    if dtype == torch.float64:  # millions of float32 weights have equal ones, whose order is each side's own
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 1e-9 * torch.randn_like(parameter)
    return net


def learned(ours: Ours) -> list[Tensor]:
    """What the papers' layers learn, in their order: weights, or scores and rates."""
    from rprune.models.prunable import prunable

    pruner: Any = ours.pruner
    return list(pruner.scores.values()) if hasattr(pruner, "scores") else list(prunable(ours.net).values())


def pair(case: str, dtype: torch.dtype = torch.float32) -> tuple[Ours, Reference]:
    """Both sides of a case, at equal weights."""
    arch, method, objective, kind = CASES[case]
    ours = Ours(built(arch, dtype), method, objective)
    rates = iter(ours.pruner.r.tolist()) if method == "harp" else None  # type: ignore[attr-defined]
    return ours, Reference(built(arch, dtype), method, objective, kind, rates)


def data(seed: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, *SHAPE, generator=generator), torch.randint(CLASSES, (batch,), generator=generator)


def largest_difference(name: str) -> float:
    """Of one step's gradients in float64, relative to the largest of each tensor."""
    ours, reference = pair(name, torch.float64)
    x, y = data(0)
    x, y = x[:CHECKED].double(), y[:CHECKED]
    start = ours.start(x, 0)
    ours.gradients(x, y, 0)
    reference.gradients(x, y, start)
    theirs = [layer.scores if layer.r is not None else layer.weight for layer in reference.layers]
    if not theirs:
        theirs = [m.weight for m in reference.net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    pairs = [(mine.grad, their.grad) for mine, their in zip(learned(ours), theirs, strict=True)]
    if rates := [layer.r for layer in reference.layers if layer.r is not None]:
        mine = ours.pruner.r  # type: ignore[attr-defined]
        pairs.append((mine.grad, torch.stack([torch.zeros(()) if r.grad is None else r.grad for r in rates])))
    found = []
    for mine, their in pairs:
        assert mine is not None
        assert their is not None
        found.append((mine - their).abs().max() / their.abs().max())
    return float(torch.stack(found).max())  # NaN where any is


def case(name: str, pairs: int) -> dict[str, Any]:
    difference = largest_difference(name)
    assert difference < SAME, f"{name}: gradients differ by {difference}"
    ours, reference = pair(name)
    starts = {seed: ours.start(data(seed)[0], seed) for seed in range(pairs + 1)}
    times = in_turns(lambda x, y, seed: reference.step(x, y, starts[seed]), ours.step, pairs)
    return summary(times) | {"gradients_differ_by": difference}


def in_turns(first: TimedStep, second: TimedStep, pairs: int) -> list[tuple[float, float]]:
    """Processor seconds of both on the same batch, one after the other, after a pair that warms up."""
    times = []
    for seed in range(pairs + 1):
        x, y = data(seed)
        begun = time.process_time()
        first(x, y, seed)
        between = time.process_time()
        second(x, y, seed)
        times.append((between - begun, time.process_time() - between))
    return times[1:]


def overhead(arch: str, pairs: int) -> dict[str, Any]:
    """Our HARP step over our dense one."""
    harp, dense = (Ours(built(arch), method, "pgd-at") for method in ("harp", "dense"))
    times = in_turns(harp.step, dense.step, pairs)
    return summary([(b, a) for a, b in times]) | {"ratio": statistics.median(a / b for a, b in times)}


def halved(arch: str, pairs: int) -> dict[str, Any]:
    """Our HARP step in float32, and in bfloat16 and channels_last as ``precision = "bf16"`` runs it."""
    from rprune.models.running import Running

    full = Ours(built(arch), "harp", "pgd-at")
    half = Ours(built(arch).to(memory_format=torch.channels_last), "harp", "pgd-at")  # type: ignore[call-overload]
    half.attacked = Running(half.net, "bf16")
    return summary(in_turns(full.step, half.step, pairs))


def compiled(arch: str, pairs: int) -> dict[str, Any]:
    """Our HARP step, and as ``compile`` runs it, in float32."""
    from rprune.models.running import Running

    plain, other = (Ours(built(arch), "harp", "pgd-at") for _ in range(2))
    other.attacked = Running(other.net, compiled=True)
    return summary(in_turns(plain.step, other.step, pairs))


def roofline(arch: str, pairs: int) -> dict[str, Any]:
    """Operations a second of our HARP step, over those of a large matrix product of one thread."""
    from rprune.pipeline.cost import Flops

    ours, size = Ours(built(arch), "harp", "pgd-at"), 2048
    factors = [torch.rand(size, size) for _ in range(2)]
    x, y = data(0)
    ours.step(x, y, 0)
    with Flops() as counter:
        ours.step(x, y, 0)
    rates = []
    for seed in range(pairs):
        begun = time.process_time()
        ours.step(x, y, seed)
        between = time.process_time()
        torch.mm(*factors)
        rates.append((counter.total / (between - begun), 2 * size**3 / (time.process_time() - between)))
    return {
        "ratio": statistics.median(step / product for step, product in rates),
        "flops": counter.total, "flops_per_second": statistics.median(step for step, _ in rates),
        "product_flops_per_second": statistics.median(product for _, product in rates),
    }  # fmt: skip


def selection(pairs: int, size: int = 11_000_000) -> dict[str, Any]:
    """The mask of one percent of the scores: a sort and a scatter, and ours."""
    from rprune.pruning.masks import top_mask

    times = []
    for seed in range(pairs + 1):
        scores = torch.randn(size, generator=torch.Generator().manual_seed(seed)).abs()
        begun = time.process_time()
        _, order = scores.sort()
        mask = torch.ones(size)
        mask[order[: size - size // 100]] = 0
        between = time.process_time()
        mine = top_mask(scores, size // 100)
        times.append((between - begun, time.process_time() - between))
        assert torch.equal(mine, mask.bool())
    return summary(times[1:])


def peak_bytes(arch: str, method: str, batch: int) -> int:
    """What three steps add to a process's memory at most, the net included; measured in a process of its own."""
    command = [sys.executable, __file__, "--peak", arch, method, str(batch)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak(arch: str, method: str, batch: str) -> int:
    torch.set_num_threads(1)
    Ours(built("lenet"), "dense", "pgd-at")  # imports
    before = held("VmRSS")
    ours = Ours(built(arch), method, "pgd-at")
    for seed in range(3):
        ours.step(*data(seed, int(batch)), seed)
    return held("VmHWM") - before


def held(what: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM; getrusage's figure is at least that of the parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def memory(arch: str, batch: int, pairs: int) -> dict[str, Any]:  # noqa: ARG001  three steps in any case
    pruning, dense = (peak_bytes(arch, method, batch) for method in ("harp", "dense"))
    return {"ratio": pruning / dense, "bytes": pruning, "dense_bytes": dense}


def summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    """Of (reference, ours)."""
    theirs, ours = zip(*times, strict=True)
    return {
        "ratio": statistics.median(a / b for a, b in times),
        "reference_seconds": statistics.median(theirs), "seconds": statistics.median(ours),
    }  # fmt: skip


def plan() -> dict[str, Callable[[int], dict[str, Any]]]:
    """What is measured, by name; each takes the number of pairs."""
    rows: dict[str, Callable[[int], dict[str, Any]]] = {name: functools.partial(case, name) for name in CASES}
    for arch in ARCHS:
        rows[f"HARP over dense, {arch}"] = functools.partial(overhead, arch)
        rows[f"bfloat16, {arch}"] = functools.partial(halved, arch)
        rows[f"compiled, {arch}"] = functools.partial(compiled, arch)
        rows[f"roofline, {arch}"] = functools.partial(roofline, arch)
        for batch in (BATCH, 128):
            rows[f"memory, {arch}, batch {batch}"] = functools.partial(memory, arch, batch)
    return rows | {"mask of 11 M scores": selection}


def measure(pairs: int, only: str, before: dict[str, Any]) -> dict[str, Any]:
    """``before``: rows that are not measured anew."""
    from rprune.pipeline.environment import environment

    torch.set_num_threads(1)
    rows = dict(before)
    for name, run in plan().items():
        if only in name:
            rows[name] = run(pairs) | {"pairs": pairs}
            print(name, json.dumps(rows[name]), flush=True)
    return {
        "command": f"python benchmarks/training_step.py --pairs {pairs}",
        "batch": BATCH,
        "rows": {name: rows[name] for name in plan() if name in rows},
        "environment": environment("cpu"),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| step | the papers', s | rprune, s | times faster | |", "|---|---|---|---|---|"]
    rows: dict[str, dict[str, Any]] = result["rows"]
    for name in filter(rows.__contains__, [*CASES, "mask of 11 M scores"]):
        row = rows[name]
        same = "" if "gradients_differ_by" not in row else f"gradients differ by {row['gradients_differ_by']:.0e}"
        times = f"{row['reference_seconds']:.3g} | {row['seconds']:.3g} | {row['ratio']:.1f}"
        lines.append(f"| {name} | {times} | {same} |")
    lines += ["", "| | ResNet-18 | VGG16 |", "|---|---|---|"]
    for title, key in {
        "time of a HARP step over a dense one": "HARP over dense, {}",
        "its memory over that of a dense one, batch 32": "memory, {}, batch 32",
        "its memory over that of a dense one, batch 128": "memory, {}, batch 128",
        "bfloat16 in channels_last (AMX), times faster": "bfloat16, {}",
        "compiled (--compile), times faster": "compiled, {}",
        "operations a second, over those of a large matrix product": "roofline, {}",
    }.items():
        found = [rows.get(key.format(arch), {}).get("ratio") for arch in ARCHS]
        if any(found):
            lines.append(
                f"| {title} | " + " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in found) + " |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the committed result file")
    parser.add_argument("--pairs", type=int, default=5, help="of steps, after one that warms up")
    parser.add_argument("--only", default="", help="rows whose names contain this; the others stay as they are")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--peak", nargs=3, metavar=("ARCH", "METHOD", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(*options.peak))
        return
    if not options.table:
        before = json.loads(options.output.read_text())["rows"] if options.only and options.output.exists() else {}
        found = measure(options.pairs, options.only, before)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(table(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
