"""An ONNX classifier as it ships: run by ONNX Runtime, read by onnx. No torch."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError, first_line
from rprune.export.constants import Constants
from rprune.export.guard import MOST_BYTES, guard

VNNI = ("avx512_vnni", "avx_vnni")


class OnnxClassifier:
    """ONNX Runtime over one file on the CPU: images ``(n, c, h, w)`` float32 in [0,1] to logits ``(n, k)``.

    Raises InputError when the file is not there, not safe to run (``export.guard``), or ONNX Runtime refuses it.
    """

    def __init__(self, path: Path, batch_size: int = 250, threads: int | None = None) -> None:
        import onnxruntime

        self.path = path
        _, data = _guarded(path)  # the very bytes that were checked are run
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if may_saturate():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a family of its own without a common public base
            raise InputError(
                f"ONNX Runtime refuses {path}: {first_line(error, 200)}", "export the model again"
            ) from None
        self._input = self._session.get_inputs()[0]
        self.batch_size = batch_size

    @property
    def input_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self._input.shape
        return channels, height, width

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = [
            self._session.run(None, {self._input.name: images[start : start + self.batch_size]})[0]
            for start in range(0, len(images), self.batch_size)
        ]
        return np.concatenate(parts)

    def predict(self, images: NDArray[np.float32]) -> NDArray[np.int64]:
        """Class of the largest logit, the first of equals; -1, wrong for every label, where logits are not numbers."""
        logits = self.logits(images)
        return np.where(np.isnan(logits).any(1), -1, logits.argmax(1))


def may_saturate() -> bool:
    """Whether ONNX Runtime's int8 kernels may add up products in 16 bits that saturate: other labels, silently.

    So they do on x86 CPUs without VNNI instructions, where its exact kernels are to be asked for; elsewhere those would
    only be slower (3 times, with VNNI).
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]))
    except OSError:
        return True
    return flags.isdisjoint(VNNI)


def load_onnx(path: Path) -> Any:
    """The checked ONNX model of a file. Raises InputError when it is not one, or not safe to run (``export.guard``)."""
    import onnx

    model, _ = _guarded(path)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # checker errors share no base
        raise InputError(
            f"{path} is not a valid ONNX file: {first_line(error, 200)}", "export the model again"
        ) from None
    return model


def stored_weights(path: Path) -> dict[str, NDArray[Any]]:
    """Conv and linear weights of a file by name, as stored in its initializers; those of compact files expanded.

    Raises InputError when the file is damaged.
    """
    constants = Constants(load_onnx(path).graph)
    found: dict[str, NDArray[Any]] = {}
    for name, value in constants.weights().items():
        try:
            found[name] = constants.array(value)
        except Exception as error:  # a file's mistakes show as errors of numpy, which share no base
            raise InputError(
                f"{path}: weight {name!r:.80}: {first_line(error, 200)}", "export the model again"
            ) from None
    return found


def weight_counts(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Conv and linear weights of a file: name -> (shape, non-zero entries)."""
    return {name: (array.shape, int(np.count_nonzero(array))) for name, array in stored_weights(path).items()}


def is_quantized(path: Path) -> bool:
    """Whether an ONNX file stores weights in 8 bits."""
    return any(array.dtype.name in ("int8", "uint8") for array in stored_weights(path).values())


def _guarded(path: Path) -> tuple[Any, bytes]:
    """The model of a file that is safe to run, and its bytes."""
    from onnx import ModelProto

    if not path.is_file():
        raise InputError(f"{path} is not there", "give the path of an .onnx file")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path} is larger than 2 GiB", "give a smaller model")
    data = path.read_bytes()
    try:
        model = ModelProto.FromString(data)
    except Exception as error:  # protobuf's errors share no base
        raise InputError(
            f"{path} is not a valid ONNX file: {first_line(error, 200)}", "export the model again"
        ) from None
    guard(model, path)
    return model, data
