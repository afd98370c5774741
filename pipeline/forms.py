"""The files that a model ships as, each compared with what it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, fx, nn

import rprune
from rprune.data.loaders import loader
from rprune.errors import InputError, UsageError, WorkError, unknown_name
from rprune.export.c.engine import CClassifier, compiler
from rprune.export.c.writer import c_source
from rprune.export.compact_onnx import expanding
from rprune.export.onnx import float_model, plain_model, stamp
from rprune.export.packed import canonical_form, network_of, pack_float, pack_int8
from rprune.export.qdq import qdq_model
from rprune.export.session import OnnxClassifier
from rprune.export.unpack import Packed, unpack
from rprune.files import atomic, write_text
from rprune.models.flat import canonical
from rprune.models.graph import trace
from rprune.pipeline.artifact import Artifact, save_tensors
from rprune.pipeline.bench import Bench
from rprune.quantization.ptq import Quantization, simulated
from rprune.reports.schema import Fidelity, Role

FORMATS = ("safetensors", "onnx", "onnx-int8", "onnx-compact", "packed", "c")
FILES: dict[str, Role] = {
    "model.safetensors": "weights",
    "masks.safetensors": "masks",
    "model.onnx": "onnx",
    "model.int8.onnx": "onnx-int8",
    "model.compact.onnx": "onnx-compact",
    "model.packed.safetensors": "packed",
    "model.c": "c",
    "model.h": "c-header",
}
CHECK_SAMPLES = 256
TOLERANCE = 1e-4  # of the largest logit: float kernels sum in another order
AGREEMENT = 0.99


@dataclass(frozen=True, eq=False)
class Deployed:
    """An artifact as it ships: the plain model, and what is written of it.

    ``network`` is the folded graph that the integers belong to, None for a model that ``trace`` cannot follow; ``twin``
    computes with the integers, where there are any. All are on the CPU in eval mode.
    """

    artifact: Artifact
    model: nn.Module
    network: fx.GraphModule | None
    quantization: Quantization | None
    twin: fx.GraphModule | None

    @classmethod
    def of(cls, artifact: Artifact) -> Deployed:
        """Raises InputError for integers of a model that cannot be traced, or of another one."""
        model, shape = artifact.model(), artifact.metadata.arch.input_shape
        if artifact.quantization:
            network, found = canonical_form(trace(model, shape), Quantization.from_tensors(artifact.quantization))
            return cls(artifact, model, network, found, simulated(network, found))
        try:
            return cls(artifact, model, canonical(trace(model, shape)), None, None)
        except InputError:
            return cls(artifact, model, None, None, None)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.artifact.metadata.arch.input_shape

    @property
    def main(self) -> str:
        """The ONNX file that stands for the model: the int8 one where there is one."""
        return "model.onnx" if self.twin is None else "model.int8.onnx"

    def metadata(self) -> dict[str, str]:
        """What the ONNX files are stamped with. The report's id is not in it: the report covers these files."""
        metadata = self.artifact.metadata
        return {
            "rprune.version": rprune.__version__,
            "rprune.labels": "\n".join(metadata.data.classes),
            "rprune.input_range": "0..1",
            "rprune.normalisation": "in-graph",
            "rprune.tensors_sha256": self.artifact.digest,
        }


def check_formats(formats: Sequence[str]) -> None:
    """Raises UsageError for a name that is not in FORMATS."""
    for name in formats:
        if name not in FORMATS:
            raise unknown_name("format", name, FORMATS)


def write_models(deployed: Deployed, formats: Sequence[str], bench: Bench, out: Path) -> list[Fidelity]:
    """Write the files of ``formats`` into ``out`` and compare each, as read back, with its source.

    ``safetensors``, ``onnx`` and, where there are integers, ``onnx-int8`` are written always: what is claimed of a
    model is measured on them.

    Raises:
        UsageError: unknown format.
        InputError: a form that this model does not have.
        WorkError: a file disagrees with what it was made from.
    """
    check_formats(formats)
    if deployed.network is None and {"onnx-compact", "packed", "c"}.intersection(formats):
        trace(deployed.model, deployed.shape)  # says why
    if deployed.twin is None and "onnx-int8" in formats and deployed.artifact.metadata.stage == "quantize":
        raise UsageError("the model has no integers", "leave out onnx-int8, or quantize with --mode ptq or qat")
    _write_weights(deployed.artifact, out)
    x = _inputs(bench)
    classes = deployed.artifact.metadata.arch.num_classes
    if deployed.network is None:
        floats = float_model(deployed.model, deployed.shape)
    else:
        floats = plain_model(deployed.network, deployed.shape, classes)
    floats = _save_onnx(floats, deployed, out / "model.onnx")
    fidelity = [_compare(deployed.model, out / "model.onnx", x, "float model")]
    main, name = floats, "float model"
    if deployed.twin is not None:
        name = "8-bit simulation"
        main = _save_onnx(qdq_model(deployed.twin, deployed.shape, classes), deployed, out / "model.int8.onnx")
        fidelity.append(_compare(deployed.twin, out / "model.int8.onnx", x, name))
        fidelity.append(_compare(deployed.model, out / "model.int8.onnx", x[: len(x) // 3], "float model", None))
    if "onnx-compact" in formats:
        _save_onnx(expanding(main), deployed, out / "model.compact.onnx")
        wanted = OnnxClassifier(out / deployed.main).logits(x.numpy())
        fidelity.append(_compared(wanted, OnnxClassifier(out / "model.compact.onnx"), x, deployed.main, 0.0))
    if "packed" in formats:
        fidelity.append(_write_packed(deployed, main, out, len(x)))
    if "c" in formats:
        fidelity += _write_c(deployed, name, x, out)
    return fidelity


def rebuilt(packed: Packed) -> tuple[fx.GraphModule, onnx.ModelProto]:
    """The network of a packed file, and its dense ONNX model: int8, or float32.

    Raises InputError when the content is no network.
    """
    network, quantization = network_of(packed)
    if quantization is None:
        model = plain_model(network, packed.input_shape, packed.classes)
    else:
        network = simulated(network, quantization)
        model = qdq_model(network, packed.input_shape, packed.classes)
    stamp(model, packed.metadata)
    return network, model


def _write_weights(artifact: Artifact, out: Path) -> None:
    save_tensors(out / "model.safetensors", artifact.state)
    if artifact.masks:
        save_tensors(out / "masks.safetensors", artifact.masks)
    for name, source in (("model.safetensors", artifact.state), ("masks.safetensors", artifact.masks)):
        read = load_file(out / name) if source else {}
        if set(read) != set(source) or not all(torch.equal(read[key], source[key]) for key in source):
            raise WorkError(f"{name} does not hold what was written", "check the disk and export again")


def _inputs(bench: Bench) -> Float[Tensor, "n c h w"]:
    x = torch.cat([batch.x.cpu() for batch in loader(bench.data.test, torch.device("cpu")).ordered(128, CHECK_SAMPLES)])
    generator = torch.Generator().manual_seed(0)
    # noise reaches other activations; smoothing feeds pixels outside [0,1]
    noise = torch.rand(x.shape, generator=generator), x + 0.25 * torch.randn(x.shape, generator=generator)
    return torch.cat([x, *noise])


def _save_onnx(model: onnx.ModelProto, deployed: Deployed, path: Path) -> onnx.ModelProto:
    stamp(model, deployed.metadata())
    onnx.checker.check_model(model, full_check=True)
    with atomic(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return model


def _write_packed(deployed: Deployed, main: onnx.ModelProto, out: Path, n: int) -> Fidelity:
    """Unpacked, the file must give the dense one back byte for byte, which says all about its logits."""
    assert deployed.network is not None
    if deployed.quantization is None:
        content = pack_float(deployed.network, deployed.metadata())
    else:
        content = pack_int8(deployed.network, deployed.quantization, deployed.metadata())
    path = out / "model.packed.safetensors"
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    _, again = rebuilt(unpack(path.read_bytes()))
    if again.SerializeToString() != main.SerializeToString():
        raise WorkError(f"{path.name} does not give {deployed.main} back byte for byte", "please report this model")
    return Fidelity(
        source=deployed.main, file=path.name, n=n, top1_agreement=1.0, max_abs_logit_diff=0.0, bit_equal=True
    )


def _write_c(deployed: Deployed, source: str, x: Float[Tensor, "n c h w"], out: Path) -> list[Fidelity]:
    """Compared where there is a compiler; the source does not need one."""
    network = deployed.twin or deployed.network
    assert network is not None
    found = c_source(network, deployed.shape)
    write_text(out / "model.h", found.header)
    write_text(out / "model.c", found.source)
    try:
        compiler()
    except WorkError:
        return []
    wanted = _logits(network, x)
    tolerance = TOLERANCE if deployed.twin is None else 0.0
    return [_compared(wanted, CClassifier(out / "model.c"), x, source, tolerance)]


def _logits(source: nn.Module, x: Float[Tensor, "n c h w"]) -> NDArray[np.float32]:
    with torch.no_grad():
        return torch.cat([source(part) for part in torch.split(x, 128)]).numpy()


def _compare(
    source: nn.Module, path: Path, x: Float[Tensor, "n c h w"], name: str, tolerance: float | None = TOLERANCE
) -> Fidelity:
    return _compared(_logits(source.cpu(), x), OnnxClassifier(path), x, name, tolerance)


def _compared(
    wanted: NDArray[np.float32],
    file: OnnxClassifier | CClassifier,
    x: Float[Tensor, "n c h w"],
    name: str,
    tolerance: float | None,
) -> Fidelity:
    """Logits of a file beside those of its source; with a tolerance, disagreement is an error."""
    got = file.logits(x.numpy())
    difference = float(np.abs(wanted - got).max())
    agreement = float((wanted.argmax(1) == got.argmax(1)).mean())
    if tolerance is not None and (
        difference > tolerance * max(1.0, float(np.abs(wanted).max())) or agreement < AGREEMENT
    ):
        raise WorkError(
            f"{file.path.name} disagrees with the {name}: by {difference:.3g}, same label on {agreement:.1%}",
            "what runs it on this CPU computes something else; please report it with 'rprune --version'",
        )
    return Fidelity(
        source=name,
        file=file.path.name,
        n=len(x),
        top1_agreement=agreement,
        max_abs_logit_diff=difference,
        bit_equal=bool(np.array_equal(wanted, got)),
    )
