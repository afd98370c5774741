"""An ONNX classifier as it ships: run by ONNX Runtime, read by onnx. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rprune.errors import InputError


class OnnxClassifier:
    """ONNX Runtime over one file on the CPU: images ``(n, c, h, w)`` float32 in [0,1] to logits ``(n, k)``.

    Raises InputError when the file is not there or ONNX Runtime refuses it.
    """

    def __init__(self, path: Path, batch_size: int = 250, threads: int | None = None) -> None:
        import onnxruntime

        if not path.is_file():
            raise InputError(f"{path} is not there", "give the path of an .onnx file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # x86 CPUs without VNNI add int8 products in 16 bits that saturate, unless this is on: other labels, silently
        options.add_session_config_entry("session.x64quantprecision", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a family of its own without a common public base
            raise InputError(f"ONNX Runtime refuses {path}: {_first_line(error)}", "export the model again") from None
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


def load_onnx(path: Path) -> Any:
    """The checked ONNX model of a file. Raises InputError when it is not one."""
    import onnx

    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model, full_check=True)
    except FileNotFoundError:
        raise InputError(f"{path} is not there", "give the path of an .onnx file") from None
    except Exception as error:  # protobuf and checker errors share no base
        raise InputError(f"{path} is not a valid ONNX file: {_first_line(error)}", "export the model again") from None
    return model


def stored_weights(path: Path) -> dict[str, NDArray[Any]]:
    """Conv and linear weights of a file by name, as stored in its initializers."""
    from onnx import numpy_helper

    model = load_onnx(path)
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    found: dict[str, NDArray[Any]] = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            name = node.input[1]
            while name not in arrays and name in producers:  # int8 weights lie behind a DequantizeLinear
                name = producers[name].input[0]
            if name in arrays:
                found[name] = numpy_helper.to_array(arrays[name])
    return found


def weight_counts(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Conv and linear weights of a file: name -> (shape, non-zero entries)."""
    return {name: (array.shape, int(np.count_nonzero(array))) for name, array in stored_weights(path).items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
