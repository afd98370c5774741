"""What ships: bytes beside the information bound, fidelity to the bit, and latency beside ONNX Runtime.

    python benchmarks/deployment.py --work DIR   # about an hour on two cores; continues where it stopped
    python benchmarks/deployment.py --table      # prints the tables of the committed result file

CIFAR ResNet-18 and VGG16, trained for a few passes over scikit-learn's digits at 3x32x32, so that their values and
ranges are those of trained nets; accuracy is not the point here. Masks keep the largest weights: uniform, the same
share of each layer; or HARP-like, counts that go with the fourth root of a layer's size, first and last layer four
times as many, as HARP's learned rates do. Then fine-tuning with the mask held, and 8 bits.

Latency is CPU time on one thread, the runtimes in turns; ratios are those of medians in one run, against ONNX Runtime
on the dense net. Where a mask kills channels the files of the pruned net are smaller networks; ONNX Runtime's times on
those are in the result file, too.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "deployment.json"
NETS = {"cifar-resnet18": "ResNet-18", "vgg16": "VGG16"}
MASKS = (("harp", 0.99), ("harp", 0.999), ("uniform", 0.99), ("uniform", 0.999))
SHAPE = (3, 32, 32)
EXPONENT = 0.25  # of a layer's size, for its kept weights
ENDS = 4.0
EPOCHS = {"dense": 2, "sparse": 2}
FORMATS = ("onnx-compact", "packed", "c")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of the committed result file")
    parser.add_argument("--work", type=Path, default=Path("/tmp/rprune-deployment"), help="folder of trained nets")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not options.table:
        from rprune.files import write_json
        from rprune.pipeline.environment import environment

        started = time.monotonic()
        rows = [case(arch, kind, sparsity, options.work) for arch in NETS for kind, sparsity in MASKS]
        result = {
            "command": "python benchmarks/deployment.py",
            "seed": 0,
            "seconds": round(time.monotonic() - started),
            "environment": environment("cpu"),
            "rows": rows,
        }
        write_json(options.output, result)
    print(table(json.loads(options.output.read_text())))


def case(arch: str, kind: str, sparsity: float, work: Path) -> dict[str, Any]:
    """One net under one mask: files, sizes, fidelity, latency."""
    import numpy as np

    from rprune.export.footprint import bound
    from rprune.export.session import stored_weights
    from rprune.export.speed import measured
    from rprune.export.unpack import sizes
    from rprune.quantization.guarantees import exactness, saturating_pairs

    deployed, folder = exported(arch, kind, sparsity, work)
    assert deployed.quantization is not None
    weights = stored_weights(folder / "model.int8.onnx")
    floats = stored_weights(folder / "model.onnx")
    least, packed = bound(weights), sizes((folder / "model.packed.safetensors").read_bytes())
    loads = {name: measured(folder / name).load_ms for name in ("model.packed.safetensors", "model.compact.onnx")}
    row: dict[str, Any] = {
        "arch": arch, "mask": kind, "sparsity": sparsity,
        "kept": sum(int(np.count_nonzero(array)) for array in weights.values()),
        "weights": sum(array.size for array in weights.values()),
        "zeros_lost": sum(int(np.count_nonzero(weights[n][floats[n] == 0])) for n in weights),
        "weights_lost": sum(int(np.count_nonzero(floats[n][weights[n] == 0])) for n in weights),
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.glob("model.*"))},
        "packed": packed, "bound": {"mask": least.mask, "values": least.values}, "load_ms": loads,
        "macs": macs(deployed, weights),
        "exact_in_float32": exactness(deployed.quantization).proved,
        "saturating_pairs": sum(saturating_pairs(deployed.quantization).values()),
        "fidelity": fidelity(deployed, folder),
        "dense_weights": deployed.artifact.metadata.dense_total or sum(array.size for array in weights.values()),
        "latency": speed(folder, baseline(arch, work)),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def macs(deployed: Any, weights: Any) -> dict[str, int]:
    """Multiply-accumulates for an image: of the net before pruning, and of its weights that are not zero."""
    import numpy as np

    from rprune.models.cost import positions, sparse_macs

    places = positions(deployed.model, SHAPE)
    lineage = deployed.artifact.metadata.lineage
    shrunk = [entry.metrics["macs"]["before"] for entry in lineage if entry.stage == "shrink"]
    dense = shrunk[0] if shrunk else sparse_macs(places, {name: array.size for name, array in weights.items()})
    return {"dense": dense, "sparse": sparse_macs(places, {n: int(np.count_nonzero(a)) for n, a in weights.items()})}


def fidelity(deployed: Any, folder: Path) -> dict[str, Any]:
    """Logits of every runtime on 1,000 images, digits and noise: how many are the same bits, and the float's error."""
    import numpy as np
    import torch

    from rprune.export.c.engine import CClassifier
    from rprune.export.session import OnnxClassifier

    noise = torch.rand(1000, *SHAPE, generator=torch.Generator().manual_seed(1))
    x = torch.cat([unseen_images(folder.parent), noise])[:1000]
    with torch.no_grad():
        wanted = torch.cat([deployed.twin(part) for part in x.split(100)]).numpy()
        floats = torch.cat([deployed.model(part) for part in x.split(100)]).numpy()
    files = {
        "onnx": OnnxClassifier(folder / "model.int8.onnx"),
        "compact": OnnxClassifier(folder / "model.compact.onnx"),
        "c": CClassifier(folder / "model.c"),
    }
    same = {name: float((file.logits(x.numpy()) == wanted).mean()) for name, file in files.items()}
    error = np.abs(CClassifier(folder / "float" / "model.c").logits(x.numpy()) - floats).max()
    return {
        "n": len(x),
        "logits_equal_to_torch": same,
        "c_float_error": float(error / max(1.0, np.abs(floats).max())),
        "labels_equal_to_float": float((wanted.argmax(1) == floats.argmax(1)).mean()),
    }


def speed(folder: Path, dense: Path) -> list[dict[str, Any]]:
    """Rows of every form, ``dense`` (the net before pruning) and the pruned one's."""
    from dataclasses import asdict

    from rprune.export.speed import latencies

    files = {
        "dense-float": dense / "model.onnx", "dense-int8": dense / "model.int8.onnx",
        "float": folder / "model.onnx", "int8": folder / "model.int8.onnx", "compact": folder / "model.compact.onnx",
        "c-float": folder / "float" / "model.c", "c-int8": folder / "model.c",
    }  # fmt: skip
    found = []
    for batch, rounds in ((1, 40), (64, 2)):
        rows = latencies(list(files.values()), batches=(batch,), threads=(1,), rounds=rounds, clock=time.process_time)
        own = [row for row in rows if row.runtime != "OpenVINO"]
        found += [asdict(row) | {"form": form} for form, row in zip(files, own, strict=True)]
    return found


def baseline(arch: str, work: Path) -> Path:
    """The folder of the dense net's ONNX files."""
    from rprune.pipeline.artifact import load_artifact
    from rprune.pipeline.forms import Deployed, write_models
    from rprune.pipeline.quantizing import quantize
    from rprune.pipeline.recipe import QuantizeStage

    folder = work / f"{arch}-dense"
    if not (folder / "model.int8.onnx").exists():
        bench = data_bench(work)
        made = quantize(bench, load_artifact(work / f"{arch}-dense.safetensors"), QuantizeStage(compact=False))
        write_models(Deployed.of(made), (), bench, folder)
    return folder


def exported(arch: str, kind: str, sparsity: float, work: Path) -> tuple[Any, Path]:
    """The artifact as it ships, and the folder of its files; the C form of its float weights lies in ``float``."""
    from rprune.export.c.writer import c_source
    from rprune.files import write_text
    from rprune.pipeline import forms
    from rprune.pipeline.artifact import load_artifact, save_artifact
    from rprune.pipeline.forms import Deployed, write_models

    forms.CHECK_SAMPLES = 16  # fidelity() compares 1,000
    bench = data_bench(work)
    path = work / f"{arch}-{kind}-{sparsity}.safetensors"
    if not path.exists():
        save_artifact(quantized(arch, kind, sparsity, work, bench), path)
    deployed = Deployed.of(load_artifact(path))
    folder = work / path.stem
    if not (folder / "model.c").exists():
        write_models(deployed, FORMATS, bench, folder)
        source = c_source(deployed.network, SHAPE)
        write_text(folder / "float" / "model.h", source.header)
        write_text(folder / "float" / "model.c", source.source)
    return deployed, folder


def quantized(arch: str, kind: str, sparsity: float, work: Path, bench: Any) -> Any:
    """The dense net, once for all masks; the mask; fine-tuning; 8 bits."""
    from rprune.pipeline.artifact import load_artifact, save_artifact
    from rprune.pipeline.bench import architecture
    from rprune.pipeline.quantizing import quantize
    from rprune.pipeline.recipe import FinetuneStage, ModelSection, QuantizeStage, TrainStage
    from rprune.pipeline.stages import finetune, train

    dense = work / f"{arch}-dense.safetensors"
    if not dense.exists():
        stage = TrainStage(objective="benign", epochs=EPOCHS["dense"], lr=0.05, batch_size=64)
        save_artifact(train(bench, architecture(ModelSection(arch=arch), bench.data), stage), dense)
    made = masked(load_artifact(dense), kind, sparsity)
    stage = FinetuneStage(objective="benign", epochs=EPOCHS["sparse"], lr=0.05, batch_size=64)
    return quantize(bench, finetune(bench, made, stage), QuantizeStage())


def masked(artifact: Any, kind: str, sparsity: float) -> Any:
    """The largest weights of each layer, as many as the rule gives it."""
    from dataclasses import replace

    from rprune.models.prunable import prunable
    from rprune.pruning.budget import Budget, apportion
    from rprune.pruning.masks import top_mask

    weights = {name: weight.detach() for name, weight in prunable(artifact.model()).items()}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    shares = {name: float(size) if kind == "uniform" else size**EXPONENT for name, size in sizes.items()}
    if kind == "harp":
        for name in (next(iter(shares)), list(shares)[-1]):
            shares[name] *= ENDS
    budget = Budget.of(sizes, sparsity)
    masks = {name: top_mask(weights[name].abs(), count) for name, count in apportion(shares, budget).items()}
    state = {name: tensor * masks[name] if name in masks else tensor for name, tensor in artifact.state.items()}
    made = replace(artifact, state=state, masks=masks)
    return made.with_metadata(sparsity=sparsity, budget=budget.kept)


def data_bench(work: Path) -> Any:
    """Digits at 3x32x32, written once as an .npz file."""
    import numpy as np
    from sklearn.datasets import load_digits

    from rprune.pipeline.bench import Bench
    from rprune.pipeline.recipe import DataSection

    path = work / "digits32.npz"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        found = load_digits()
        images = np.rint(found.images * (255 / 16)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
        images = np.repeat(images[..., None], 3, axis=3)
        cut = 1400
        np.savez(
            path, train_images=images[:cut], train_labels=found.target[:cut],
            test_images=images[cut:], test_labels=found.target[cut:],
        )  # fmt: skip
    return Bench.open(DataSection(source=f"npz:{path}", augment="none"), None, 0, "cpu")


def unseen_images(work: Path) -> Any:
    import torch

    split = data_bench(work).data.test
    return torch.from_numpy(split.pixels(0, len(split))).float() / 255


def table(result: dict[str, Any]) -> str:
    """Markdown: bytes, then times."""
    rows = result["rows"]
    lines = [
        "| net, mask, sparsity | dense float32 | packed | of it weights / bound | compact ONNX | int8 ONNX | unpack |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size, packed = row["bytes"], row["packed"]
        coded = (packed["gaps"] + packed["values"]) / (row["bound"]["mask"] + row["bound"]["values"])
        lines.append(
            f"| {title(row)} | {4e-6 * row['dense_weights']:.1f} MB | {kilobytes(packed['total'])} | {coded:.3f} | "
            f"{kilobytes(size['model.compact.onnx'])} | {kilobytes(size['model.int8.onnx'])} | "
            f"{row['load_ms']['model.packed.safetensors']:.0f} ms |"
        )
    lines += [
        "",
        "| net, mask, sparsity | MACs left | ONNX Runtime float / int8, dense | C float | over them | C int8 "
        "| over them | equal logits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spent = {found["form"]: found["p50"] for found in row["latency"] if found["batch"] == 1}
        alike = min(row["fidelity"]["logits_equal_to_torch"].values())
        dense = spent["dense-float"], spent["dense-int8"]
        cells = [title(row), f"{100 * row['macs']['sparse'] / row['macs']['dense']:.1f} %"]
        cells.append(" / ".join(f"{time:.2f} ms" for time in dense))
        for name in ("c-float", "c-int8"):
            cells += [f"{spent[name]:.2f} ms", " / ".join(f"**{time / spent[name]:.1f}x**" for time in dense)]
        lines.append("| " + " | ".join([*cells, f"{100 * alike:g} %"]) + " |")
    return "\n".join(lines)


def title(row: dict[str, Any]) -> str:
    return f"{NETS[row['arch']]}, {'HARP-like' if row['mask'] == 'harp' else 'uniform'}, {row['sparsity']}"


def kilobytes(count: int) -> str:
    return f"{count / 1000:.0f} KB" if count >= 100_000 else f"{count / 1000:.1f} KB"


if __name__ == "__main__":
    main()
