"""Do the int8 kernels of ONNX Runtime add products up without saturating, on the machine at hand? No torch."""

from __future__ import annotations

import numpy as np


def int8_is_exact(precise: bool) -> bool:
    """Whether ONNX Runtime's int8 convolution adds the largest products right.

    ``precise``: with session.x64quantprecision, as rprune asks where there is no VNNI.

    255 * 127 + 255 * 127 exceeds 16 bits, in which kernels for x86 CPUs without VNNI add neighbours up.
    """
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    channels, answer = 64, 200
    scale = 255 * 127 * channels / answer
    arrays = {
        "one": np.float32(1), "low": np.uint8(0), "w": np.full((16, channels, 1, 1), 127, np.int8),
        "mid": np.int8(0), "scale": np.float32(scale),
    }  # fmt: skip
    names = ["x", "one", "low", "w", "one", "mid", "scale", "low"]
    shape = (1, channels, 4, 4)
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", names, ["y"])], "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, (1, 16, 4, 4))],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full(shape, 255, np.uint8)})
    return bool((found == answer).all())
