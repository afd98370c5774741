"""What stages cost in operations and bytes, and what ImageNet would take on 1, 8 and 64 GPUs.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --table       # prints the tables of the committed result file

Operations are counted by the product itself (``rprune.pipeline.cost``: what a few steps of a stage execute) on random
images. The rate at which JPEG files become training crops is measured on one core. Hours are projections from these and
from the assumptions below, which no run of ours has checked: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "scaling.json"
IMAGENET, EPOCHS = 1_281_167, 23  # images; epochs of each stage: 90 over 4 replays, as HYDRA's code divides them
PAPER_BATCH = 256  # HYDRA's, of all GPUs
ASSUMED = {
    "flops": 200e12,  # of a GPU's convolutions in bfloat16: an H200 reached 200 to 270e12 in shapes of such nets
    "nvlink": 450e9,  # bytes a second and direction inside a machine of 8 GPUs (H200's data sheet: 900e9 in both)
    "network": 50e9,  # bytes a second of a GPU's share between machines (400 Gbit/s)
    "cores": 16,  # of the CPU for each GPU
}
JPEG = (375, 500)  # pixels, about the mean of ImageNet's images
TRAINING = ("train", "prune (HARP)", "finetune")
AT_MOST = ("attack (aa-lite)", "bounds (ibp)", "smoothing, 10,000 draws")
CASES: dict[str, dict[str, Any]] = {
    "ResNet-18, 3x32x32, PGD-10": {
        "arch": "cifar-resnet18", "classes": 10, "size": 32, "batch": 16, "objective": "pgd-at",
    },
    "ResNet-50, 3x224x224, Free-AT": {
        "arch": "torchvision:resnet50", "classes": 1000, "size": 224, "batch": 4, "objective": "free-at",
    },
}  # fmt: skip


def images(folder: Path, size: int, classes: int) -> str:
    """Random images as a data source."""
    generator = np.random.RandomState(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 40), ("test", 8)):
        arrays[f"{split}_images"] = generator.randint(0, 256, (count, size, size, 3)).astype(np.uint8)
        arrays[f"{split}_labels"] = generator.randint(0, classes, count)
        arrays[f"{split}_labels"][0] = classes - 1
    np.savez(folder / "images.npz", **arrays)
    return f"npz:{folder / 'images.npz'}"


def stages(arch: str, classes: int, size: int, batch: int, objective: str) -> dict[str, Any]:
    """Operations of an image in a step of each stage, and of a sample of attacks and certificates at most."""
    import torch

    from rprune.models.registry import Architecture, build
    from rprune.pipeline.bench import Bench
    from rprune.pipeline.cost import cost
    from rprune.pipeline.recipe import CertifyStage, DataSection, ExportStage, FinetuneStage, PruneStage, TrainStage

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.open(DataSection(source=images(Path(folder), size, classes)), None, 0, "cpu")
        architecture = Architecture(arch, classes, (3, size, size))
        shared: dict[str, Any] = {"objective": objective, "batch_size": batch, "epochs": 1}
        steps = -(-len(bench.data.train) // batch)
        rows: dict[str, Any] = {}

        def add(kind: str, found: Any, count: int) -> None:
            rows[kind] = {
                "flops": found.flops / count,
                "seconds": (found.seconds - found.once * bool(found.steps)) / count,
            }

        found, dense = cost(bench, TrainStage(**shared), None, architecture)
        add(TRAINING[0], found, steps * batch)
        found, pruned = cost(bench, PruneStage(method="harp", sparsity=0.99, **shared), dense)
        add(TRAINING[1], found, steps * batch)
        found, tuned = cost(bench, FinetuneStage(**shared), pruned)
        add(TRAINING[2], found, steps * batch)
        found, _ = cost(bench, ExportStage(suite="aa-lite", limit=1, compact=False), tuned)
        add(AT_MOST[0], found, 1)
        found, _ = cost(bench, CertifyStage(methods=("ibp",), limit=1), tuned)
        add(AT_MOST[1], found, 1)
        found, _ = cost(bench, CertifyStage(methods=("smoothing",), smoothing_limit=1, test="fixed"), tuned)
        add(AT_MOST[2], found, 1)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in build(architecture).parameters())
    return {"rows": rows, "parameters": weights, "batch": batch}


def decoding(count: int = 60) -> float:
    """Milliseconds of one core from a JPEG file to a training crop of 224 pixels, the file in memory already."""
    from PIL import Image

    from rprune.data.crops import NUMBERS
    from rprune.data.places import ImagePlace
    from rprune.data.splits import read_image

    generator = np.random.RandomState(0)
    noise = Image.fromarray(generator.randint(0, 256, (24, 32, 3)).astype(np.uint8))
    content = io.BytesIO()
    noise.resize(JPEG[::-1], Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.jpg"
        path.write_bytes(content.getvalue())
        begun = time.process_time()
        for numbers in generator.random_sample((count, NUMBERS)):
            read_image(ImagePlace(path), (3, 224, 224), numbers)
        return 1e3 * (time.process_time() - begun) / count


def hours(result: dict[str, Any], gpus: int, batch: int) -> dict[str, float]:
    """Of train, prune and finetune on ImageNet together; ``batch``: images of a step, of all GPUs."""
    found = result["cases"]["ResNet-50, 3x224x224, Free-AT"]
    flops = sum(found["rows"][kind]["flops"] for kind in TRAINING)
    images, replays = EPOCHS * IMAGENET, 4
    computing = images * flops / gpus / ASSUMED["flops"]
    message = 4 * found["parameters"] * 2 * (gpus - 1) / gpus  # a ring sends and receives this
    link = ASSUMED["nvlink"] if gpus <= 8 else ASSUMED["network"]
    sending = 3 * images / batch * replays * message / link
    decoding = 3 * images * result["decoding_ms"] / 1e3 / (gpus * ASSUMED["cores"])
    parts = {"computing": computing, "sending": sending, "decoding": decoding}
    return {name: seconds / 3600 for name, seconds in parts.items()} | {
        "total": max(computing + sending, decoding) / 3600  # files are decoded meanwhile
    }


def measure() -> dict[str, Any]:
    import torch

    from rprune.pipeline.environment import environment

    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "command": "python benchmarks/scaling.py",
        "assumed": ASSUMED,
        "decoding_ms": decoding(),
        "cases": {name: stages(**settings) for name, settings in CASES.items()},
        "environment": environment("cpu"),
    }
    rows = []
    for gpus in (1, 8, 64):
        for batch in sorted({PAPER_BATCH, PAPER_BATCH * gpus}):
            rows.append({"gpus": gpus, "batch": batch} | hours(result, gpus, batch))
    return result | {"projected": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    names = list(result["cases"])
    lines = ["| GFLOPs | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for kind in [*TRAINING, *AT_MOST]:
        found = [result["cases"][name]["rows"][kind]["flops"] / 1e9 for name in names]
        cells = [f"{count:,.0f}" if count >= 100 else f"{count:.3g}" for count in found]
        unit = "an image of a step" if kind in TRAINING else "a sample, at most"
        lines.append(f"| {kind}, {unit} | " + " | ".join(cells) + " |")
    lines.append("| bytes sent a step, a GPU | " + " | ".join(
        f"{8 * result['cases'][name]['parameters'] / 1e6:,.0f} MB" for name in names) + " |")  # fmt: skip
    lines += [
        "",
        "| GPUs | batch of all | computing, h | sending, h | decoding, h | hours |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["projected"]:
        cells = [f"{row[name]:.3g}" for name in ("computing", "sending", "decoding", "total")]
        lines.append(f"| {row['gpus']} | {row['batch']:,} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(f"One core makes a crop of a JPEG file of {JPEG[1]}x{JPEG[0]} in {result['decoding_ms']:.1f} ms.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of the committed result file")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not options.table:
        options.output.write_text(json.dumps(measure(), indent=1, sort_keys=True) + "\n")
    print(table(json.loads(options.output.read_text())))


if __name__ == "__main__":
    main()
