"""What external verifiers need to check bounds again: VNN-LIB properties, and the float network as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch

from rprune.certification.ibp import box
from rprune.certification.vnnlib import Version, property_text
from rprune.data.loaders import loader
from rprune.errors import UsageError
from rprune.export.onnx import plain_model
from rprune.files import partial_folder, write_text
from rprune.models.graph import trace
from rprune.pipeline.artifact import Artifact
from rprune.pipeline.bench import Bench
from rprune.pipeline.finish import publish
from rprune.pipeline.forms import Deployed
from rprune.threat import ThreatModel

SECONDS = 300  # that instances.csv gives a verifier for each sample
NETWORK = "model.onnx"


def write_properties(bench: Bench, source: Artifact, threat: ThreatModel, limit: int | None, folder: Path) -> int:
    """One file of each version for each of the first ``limit`` test samples, the float network, and instances.csv as
    VNN-COMP has it, in place of what this wrote there before; returns the number of samples.

    The network is the float one also where integers are certified: verifiers read no quantised graphs.

    Raises UsageError for a norm whose ball is no box.
    """
    if threat.norm != "linf":
        raise UsageError("VNN-LIB files hold boxes: linf alone", "leave out --vnnlib, or certify for linf")
    network = trace(Deployed.of(source).model, bench.data.shape)
    classes = len(bench.data.classes)
    partial = partial_folder(folder, source.identity, resume=False)  # its key file makes the folder ours
    (partial / NETWORK).write_bytes(plain_model(network, bench.data.shape, classes).SerializeToString())
    lines, count = [], 0
    for batch in loader(bench.data.test, torch.device("cpu")).ordered(100, limit):
        lows, highs = (end.numpy() for end in box(batch.x, threat))
        for index, label, low, high in zip(batch.ids.tolist(), batch.y.tolist(), lows, highs, strict=True):
            title = f"test sample {index} of {bench.data.source}, label {label}, {threat}; unsat: certified"
            for version in get_args(Version):
                name = f"sample-{index}.{version[0]}.vnnlib"
                write_text(partial / name, property_text(low, high, label, classes, version, title))
            lines.append(f"{NETWORK},sample-{index}.1.vnnlib,{SECONDS}")
            count += 1
    write_text(partial / "instances.csv", "\n".join(lines) + "\n")
    publish(partial, folder)
    return count
