"""The program of a .pt2 file as a net: its graph run node by node, over operators that only compute."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rprune.errors import InputError, printable
from rprune.evaluation.target import steady_product
from rprune.export.constants import LARGEST
from rprune.pipeline.intake import opened
from rprune.pipeline.pt2 import HINT, SCALARS, Package, read_package
from rprune.pipeline.tensor_entries import of_archive

OPERATORS = frozenset(
    """
    conv2d convolution linear addmm mm bmm matmul baddbmm einsum scaled_dot_product_attention
    batch_norm _native_batch_norm_legit_no_training layer_norm native_layer_norm group_norm native_group_norm
    relu relu6 hardtanh hardswish hardsigmoid silu gelu sigmoid tanh leaky_relu elu mish softplus
    softmax _softmax log_softmax _log_softmax dropout feature_dropout
    max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d
    mean sum amax amin var var_mean linalg_vector_norm norm
    add sub rsub mul div neg pow sqrt rsqrt exp log clamp clamp_min clamp_max maximum minimum abs square addcmul
    where masked_fill gt ge lt le eq ne any all logical_not logical_and logical_or floor ceil round sign
    cumsum tril triu
    flatten unflatten view _unsafe_view reshape permute transpose t squeeze unsqueeze expand expand_as contiguous
    clone alias detach lift_fresh_copy to _to_copy type_as cat stack chunk split split_with_sizes unbind select slice
    narrow index index_select roll pad constant_pad_nd reflection_pad2d replication_pad2d pixel_shuffle
    upsample_bilinear2d upsample_nearest2d channel_shuffle native_channel_shuffle movedim
    zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full arange scalar_tensor fill
    sym_size sym_numel _assert_tensor_metadata
    """.split()  # noqa: SIM905  as words they are easier to read
)
"""Operators of aten that classifiers are made of. None of them draws, reads or writes anything outside its tensors.

dropout does, in training; a program that was exported in eval mode says so in its arguments.
"""

NUMBERS = {f"_operator.{name}": getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "neg", "mod")}
"""What programs compute sizes with."""

FACTORIES = ("zeros", "ones", "full", "scalar_tensor", "arange")  # make tensors out of nothing
FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")


def package_state(path: Path) -> dict[str, Tensor]:
    """The state_dict of a .pt2 file. Raises InputError as :func:`read_package` does."""
    package = read_package(path)
    tensors = _values(package)
    return {name: tensors[name] for name in package.weights}


class Exported(nn.Module):
    """Images (b, c, h, w) to logits (b, k); differentiable in the images.

    A program that was exported for a fixed number of images is called with as many at a time, the last call filled up.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError when the file cannot be read, or is no program of one image batch to one tensor of logits,
        of operators that are known and results of a bounded size."""
        super().__init__()
        self.path = path
        package = read_package(path)
        try:
            self._plan(package)
            self._try()
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = printable(str(error).strip().partition("\n")[0], 160) or type(error).__name__
            raise InputError(f"{path}: its program cannot be run: {reason}", HINT) from None

    def _plan(self, package: Package) -> None:
        graph, signature = package.graph["graph"], package.graph["signature"]
        self.nodes = [(_called(node["target"]), node, dead) for node, dead in _with_dead(graph["nodes"])]
        values = _values(package)
        self.names: dict[str, str] = {}  # value of the graph -> buffer of this module
        images = []
        for place, spec in enumerate(signature["input_specs"]):
            ((kind, entry),) = spec.items()
            if kind == "user_input":
                images.append(entry["arg"]["as_tensor"]["name"])
                continue
            if kind not in ("parameter", "buffer", "tensor_constant"):
                raise ValueError(f"it takes an input of the kind {kind!r:.40}")
            self.names[entry["arg"]["name"]] = f"value{place}"
            self.register_buffer(f"value{place}", values[entry[f"{kind}_name"]])
        outputs = [spec["user_output"]["arg"]["as_tensor"]["name"] for spec in signature["output_specs"]]
        if len(images) != 1 or len(outputs) != 1:
            raise ValueError(f"it takes {len(images)} tensors and gives {len(outputs)}, not images and logits")
        self.image, self.logits = images[0], outputs[0]
        sizes = graph["tensor_values"][self.image]["sizes"]
        self.batch: int | None = sizes[0].get("as_int")
        self.input_shape = tuple(int(size["as_int"]) for size in sizes[1:])
        if len(self.input_shape) != 3 or min(self.input_shape) < 1 or self.batch == 0:
            raise ValueError(f"it takes tensors of {1 + len(self.input_shape)} dimensions, not images (b, c, h, w)")
        if (self.batch or 1) * self.input_shape[0] * self.input_shape[1] * self.input_shape[2] > LARGEST:
            raise ValueError("its images are too large")

    def _try(self) -> None:
        """A run without memory: every result has a size that can be afforded, and no weight is changed."""
        count = self.batch or 2
        weights = {name: value.to("meta") for name, value in self._buffers.items() if value is not None}
        before = {name: value._version for name, value in weights.items()}
        images = torch.empty((count, *self.input_shape), device="meta")
        with torch.no_grad():
            logits = self._run(images, weights, checked=True)
        if logits.dim() != 2 or len(logits) != count:
            raise ValueError(f"it gives a tensor of shape {tuple(logits.shape)}, not logits")
        if any(value._version != before[name] for name, value in weights.items()):
            raise ValueError("it changes its weights as it runs; export it in eval mode")

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: value for name, value in self._buffers.items() if value is not None}
        if self.batch is None:
            return self._run(x, weights)
        full = torch.cat([x, x[:1].detach().expand(-len(x) % self.batch, *x.shape[1:])])
        return torch.cat([self._run(part, weights) for part in torch.split(full, self.batch)])[: len(x)]

    def _run(self, images: Tensor, weights: Mapping[str, Tensor], checked: bool = False) -> Tensor:
        # operators that write into their input must not write into the caller's
        values: dict[str, Any] = {value: weights[name] for value, name in self.names.items()}
        values[self.image] = images.clone()
        for function, node, dead in self.nodes:
            given = [(entry, _argument(entry["arg"], values, images.device)) for entry in node["inputs"]]
            plain = [value for entry, value in given if entry.get("kind") != 2]
            named = {entry["name"]: value for entry, value in given if entry.get("kind") == 2}
            if node["target"].split(".")[-2] in FACTORIES:
                named["device"] = images.device
            result = function(*plain, **named)
            if checked:
                _check(node, result)
            _keep(node["outputs"], result, values)
            for name in dead - {self.logits}:
                values.pop(name, None)
        logits: Tensor = values[self.logits]
        return logits


def _with_dead(nodes: list[Any]) -> list[tuple[Any, set[str]]]:
    """Each node with the values that nothing after it needs."""
    found: list[tuple[Any, set[str]]] = []
    needed: set[str] = set()
    for node in reversed(nodes):
        here = set(_names(node["inputs"])) | set(_names(node["outputs"]))
        found.append((node, here - needed))
        needed |= here
    return found[::-1]


def _names(value: Any) -> Iterator[str]:
    """Every value of the graph that arguments or results name."""
    if isinstance(value, list):
        for entry in value:
            yield from _names(entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key in ("name", "as_name") and isinstance(entry, str):
                yield entry
            elif key != "name":
                yield from _names(entry)


def _called(target: str) -> Callable[..., Any]:
    if target in NUMBERS:
        return lambda *given: _number(NUMBERS[target], given)
    found = ATEN.fullmatch(target)
    if found is None or found[1].removesuffix("_") not in OPERATORS:
        raise ValueError(f"the operator {target!r:.80} is not known")
    if target == "torch.ops.aten.linear.default":
        return _linear
    if found[1] == "_assert_tensor_metadata":
        return lambda *_arguments, **_options: None
    packet = getattr(torch.ops.aten, found[1])
    if found[2] not in packet.overloads():
        raise ValueError(f"the operator {target!r:.80} is not known")
    function: Callable[..., Any] = getattr(packet, found[2])
    return function


def _number(function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    """Of numbers alone, and no larger than a size can be: texts and lists could be multiplied, too."""
    if not all(isinstance(value, int | float) for value in given):
        raise TypeError("it computes sizes with what is no number")
    result = function(*given)
    if abs(result) >= 1 << 63:
        raise ValueError("it computes a size that is too large")
    return result


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Every row of a batch in the same order, so that a sample's logits are the same bits in any batch."""
    product: Tensor = steady_product(input, weight.t())
    return product if bias is None else product + bias


def _argument(arg: Mapping[str, Any], values: Mapping[str, Any], device: torch.device) -> Any:
    ((kind, value),) = arg.items()
    match kind:
        case "as_tensor":
            return values[value["name"]]
        case "as_tensors" | "as_optional_tensors":
            return [_argument(part if "name" not in part else {"as_tensor": part}, values, device) for part in value]
        case "as_int" | "as_ints" | "as_bool" | "as_bools" | "as_string":
            return value
        case "as_float":
            return float(value)
        case "as_floats":
            return [float(number) for number in value]
        case "as_none":
            return None
        case "as_sym_int" | "as_sym_float" | "as_sym_bool":
            return values[value["as_name"]] if "as_name" in value else next(iter(value.values()))
        case "as_sym_ints":
            return [_argument({"as_sym_int": part}, values, device) for part in value]
        case "as_scalar_type":
            return getattr(torch, SCALARS[value])
        case "as_memory_format":
            return FORMATS[value]
        case "as_layout":
            return torch.strided
        case "as_device":
            return device
    raise ValueError(f"an argument of the kind {kind!r:.40} is not known")


def _keep(outputs: list[Any], result: Any, values: dict[str, Any]) -> None:
    results = list(result) if isinstance(result, tuple | list) and len(outputs) > 1 else [result] * len(outputs)
    for output, value in zip(outputs, results, strict=True):
        ((kind, entry),) = output.items()
        if kind == "as_tensor":
            values[entry["name"]] = value
        elif kind == "as_tensors":
            values |= {part["name"]: one for part, one in zip(entry, value, strict=True)}
        elif kind.startswith("as_sym_"):
            values[entry["as_name"]] = value
        elif kind != "as_none":
            raise ValueError(f"a result of the kind {kind!r:.40} is not known")


def _check(node: Mapping[str, Any], result: Any) -> None:
    for value in result if isinstance(result, tuple | list) else [result]:
        if isinstance(value, Tensor) and value.numel() > LARGEST:
            raise ValueError(f"the result of {node['target']!r:.80} is too large")


def _values(package: Package) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with opened(package.path) as archive:
        for name, stored in package.tensors.items():
            array = of_archive(archive, "", stored).copy()
            tensor = torch.from_numpy(array)
            found[name] = tensor.view(torch.bfloat16) if stored.dtype == "bfloat16" else tensor
    return found
