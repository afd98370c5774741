"""A network as a flat graph of few, known layers: what quantization, bounds and the int8 exporter walk over.

:func:`trace` records any model that torch.fx can follow and rewrites it until every node is a call of one of
``LAYERS``, batch norm is folded, and dropout is gone. Conv and linear layers keep their module names, so
``name + ".weight"`` is the tensor name of masks and budgets.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from rprune.errors import InputError
from rprune.models.normalize import Normalize


class Add(nn.Module):
    """Sum of two tensors of one shape."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Affine(nn.Module):
    """scale * x + shift by channel: input normalisation, and batch norm that no convolution precedes.

    scale and shift have shape (1, c, 1, 1), (1, c) after flattening, or () where all channels share them.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class GlobalAvgPool(nn.Module):
    """Mean over height and width, kept as 1x1."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        return x.mean((2, 3), keepdim=True)


LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Flatten, GlobalAvgPool, Add, Affine,
)  # fmt: skip
REAL = (nn.LeakyReLU,)  # known to bounds, and not to integers
WIDEST = 1000  # ends of clips
LARGEST = torch.finfo(torch.float32).max  # as an end of clips: none
INPLACE = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh)
NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
DROPPED = (nn.Dropout, nn.Dropout2d, nn.Identity)


def trace(model: nn.Module, input_shape: tuple[int, int, int], fold: bool = True, real: bool = False) -> fx.GraphModule:
    """The graph of a model in eval mode, on the CPU, without gradients; the model is not touched.

    ``fold=False`` leaves batch norm as layers of their own; ``real`` takes leaky and clipped ReLUs, too, which have no
    8-bit form here. Raises InputError, naming the node and the operation, for anything else that is not in ``LAYERS``
    after rewriting.
    """
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # torch.fx raises many kinds for control flow that it cannot follow
        raise InputError(
            f"cannot follow the forward pass of {type(model).__name__}: {error}",
            "its forward must not branch on tensor values; training, pruning and attacks work without this",
        ) from None
    network = fx.GraphModule(model, graph)
    note_shapes(network, input_shape)
    for node in list(network.graph.nodes):
        _rewrite(network, node)
    if real:
        _rewrite_real(network)
    if fold:
        _fold_batch_norm(network)
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()
    _check(network, (*LAYERS, *(() if fold else NORMS), *(REAL if real else ())))
    return network


def pair(value: Any) -> tuple[int, int]:
    """Height and width of what a layer holds as one number or as two."""
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def layer(network: fx.GraphModule, node: fx.Node) -> nn.Module:
    """The module that a call_module node calls."""
    assert isinstance(node.target, str)
    return network.get_submodule(node.target)


def output_of(network: fx.GraphModule) -> fx.Node:
    """The node whose value the network returns."""
    (output,) = (node for node in network.graph.nodes if node.op == "output")
    found = output.args[0]
    assert isinstance(found, fx.Node)
    return found


def note_shapes(network: fx.GraphModule, input_shape: tuple[int, int, int]) -> None:
    """Note the shape of every value, for a batch of two, where :func:`shape_of` finds it."""
    dtype = next((parameter.dtype for parameter in network.parameters()), torch.float32)
    fx.passes.shape_prop.ShapeProp(network).propagate(torch.zeros(2, *input_shape, dtype=dtype))


def shape_of(node: Any) -> tuple[int, ...]:
    """The noted shape of a node's value."""
    return tuple(node.meta["tensor_meta"].shape)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, Normalize | Add | Affine | GlobalAvgPool) or super().is_leaf_module(m, qualified_name)


def _rewrite(network: fx.GraphModule, node: fx.Node) -> None:
    if _changes_input(network, node) and len(_inputs(node)[0].users) > 1:
        raise InputError(f"node {node.name}: in-place ReLU of a value that is used again", "write inplace=False")
    if node.op == "call_module":
        module = layer(network, node)
        if isinstance(module, INPLACE):
            module.inplace = False
        elif isinstance(module, DROPPED):
            _bypass(network, node)
        elif isinstance(module, Normalize):
            _replace(network, node, Affine(1 / module.std, -module.mean / module.std))
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            _replace(network, node, _adaptive_pool(module.output_size, shape_of(node.args[0])))
    elif node.op in ("call_function", "call_method"):
        make = _FUNCTIONS.get(node.target)
        new = make(node) if make else None
        if isinstance(new, nn.Identity):
            _bypass(network, node)
        elif new is not None:
            _replace(network, node, new)


def _changes_input(network: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = layer(network, node)
        return isinstance(module, INPLACE) and bool(module.inplace)
    places: dict[Any, int] = {F.relu: 1, F.relu6: 1, F.leaky_relu: 2, F.hardtanh: 3}  # of the argument
    place = places.get(node.target)
    return node.target in ("relu_", torch.relu_) or (
        place is not None and bool(_argument(node, place, "inplace", False))
    )


def _rewrite_real(network: fx.GraphModule) -> None:
    for node in list(network.graph.nodes):
        if node.op == "call_module" and isinstance(module := layer(network, node), nn.Hardtanh):  # ReLU6, too
            _replace(network, node, clipped(module.min_val, module.max_val))
        elif node.target is F.hardtanh:
            _replace(network, node, clipped(_argument(node, 1, "min_val", -1.0), _argument(node, 2, "max_val", 1.0)))
        elif node.target is F.relu6:
            _replace(network, node, clipped(0, 6))
        elif node.target is F.leaky_relu:
            _replace(network, node, nn.LeakyReLU(_argument(node, 1, "negative_slope", 0.01)))


def clipped(low: float, high: float) -> nn.Sequential:
    """Clipping to [low, high] by a ReLU for each end that float32 has: high - relu(high - low - relu(x - low)).

    Raises InputError for an end so far out that the value would be lost in rounding.
    """
    ends = [end for end in (low, high) if abs(end) < LARGEST]
    if not low <= high or any(abs(end) > WIDEST for end in ends):
        raise InputError(
            f"it clips to [{low:g}, {high:g}]", f"ends beyond {WIDEST} would swallow the value in rounding"
        )
    if low >= LARGEST or high <= -LARGEST:
        raise InputError(f"it clips to [{low:g}, {high:g}]", "such a layer gives one value alone")

    def affine(scale: float, shift: float) -> Affine:
        return Affine(*(torch.tensor(number, dtype=torch.float64) for number in (scale, shift)))

    steps: list[nn.Module] = []
    base = low if abs(low) < LARGEST else 0.0
    if base:
        steps.append(affine(1, -base))
    if abs(low) < LARGEST:
        steps.append(nn.ReLU())
    if abs(high) < LARGEST:
        steps += [affine(-1, high - base), nn.ReLU(), affine(-1, high)]
    elif base:
        steps.append(affine(1, base))
    return nn.Sequential(*steps)


def _adaptive_pool(wanted: Any, shape: tuple[int, ...]) -> nn.Module | None:
    """Adaptive pooling to (h, w) is plain average pooling wherever the sides divide."""
    height, width = shape[2:]
    goal = (
        (wanted, wanted) if isinstance(wanted, int) else tuple(w or s for w, s in zip(wanted, shape[2:], strict=True))
    )
    if goal == (height, width):
        return nn.Identity()
    if goal == (1, 1):
        return GlobalAvgPool()
    if height % goal[0] or width % goal[1]:
        return None
    return nn.AvgPool2d((height // goal[0], width // goal[1]))


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _max_pool(node: fx.Node) -> nn.Module:
    kernel, stride, padding, dilation = _arguments(
        node, {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1}
    )
    ceil, indices = _argument(node, 5, "ceil_mode", False), _argument(node, 6, "return_indices", False)
    return nn.MaxPool2d(kernel, stride, padding, dilation, indices, ceil)


POOL = {"kernel_size": None, "stride": None, "padding": 0, "ceil_mode": False}


def _arguments(node: fx.Node, defaults: dict[str, Any]) -> list[Any]:
    """Arguments of a call after its first, by position or keyword, in the order of ``defaults``."""
    return [_argument(node, place, name, default) for place, (name, default) in enumerate(defaults.items(), 1)]


def _mean(node: fx.Node) -> nn.Module | None:
    wanted = _argument(node, 1, "dim", ())
    axes = {d % 4 for d in ((wanted,) if isinstance(wanted, int) else wanted)}
    if axes != {2, 3} or len(shape_of(node.args[0])) != 4:
        return None
    return GlobalAvgPool() if _argument(node, 2, "keepdim", False) else nn.Sequential(GlobalAvgPool(), nn.Flatten())


def _flatten(node: fx.Node) -> nn.Module | None:
    """flatten, view and reshape are all Flatten when they turn (b, ...) into (b, rest)."""
    before, after = shape_of(node.args[0]), shape_of(node)
    return nn.Flatten() if len(after) == 2 and after[0] == before[0] else None


def _add(node: fx.Node) -> nn.Module | None:
    a, b = node.args[:2]
    both = isinstance(a, fx.Node) and isinstance(b, fx.Node) and shape_of(a) == shape_of(b)
    return Add() if both and not node.kwargs else None


_FUNCTIONS: dict[Any, Callable[[fx.Node], nn.Module | None]] = {
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    F.relu: lambda _: nn.ReLU(),
    torch.relu: lambda _: nn.ReLU(),
    "relu": lambda _: nn.ReLU(),
    F.dropout: lambda _: nn.Identity(),
    torch.flatten: _flatten,
    "flatten": _flatten,
    "view": _flatten,
    "reshape": _flatten,
    torch.mean: _mean,
    "mean": _mean,
    F.adaptive_avg_pool2d: lambda n: _adaptive_pool(_argument(n, 1, "output_size", None), shape_of(n.args[0])),
    F.avg_pool2d: lambda n: nn.AvgPool2d(*_arguments(n, POOL | {"count_include_pad": True, "divisor_override": None})),
    F.max_pool2d: _max_pool,
}


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.args if isinstance(argument, fx.Node)]


def _bypass(network: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(_inputs(node)[0])
    network.graph.erase_node(node)


def _replace(network: fx.GraphModule, node: fx.Node, module: nn.Module | None) -> None:
    if module is None:
        return None
    steps = list(module) if isinstance(module, nn.Sequential) else [module]
    if not steps or isinstance(module, nn.Identity):
        return _bypass(network, node)
    inputs = tuple(_inputs(node)[: 2 if isinstance(module, Add) else 1])
    for place, step in enumerate(steps):
        name = f"{type(step).__name__.lower()}_{node.name}" + (f"_{place}" if place else "")
        network.add_submodule(name, step)
        with network.graph.inserting_before(node):
            new = network.graph.call_module(name, inputs)
        new.meta = dict(node.meta)
        inputs = (new,)
    node.replace_all_uses_with(new)
    network.graph.erase_node(node)
    return None


def _fold_batch_norm(network: fx.GraphModule) -> None:
    for node in list(network.graph.nodes):
        if node.op != "call_module" or not isinstance(norm := layer(network, node), NORMS):
            continue
        scale, shift = batch_norm(norm, node.name)
        (before,) = _inputs(node)
        source = layer(network, before) if before.op == "call_module" else None
        if isinstance(source, nn.Conv2d | nn.Linear) and len(before.users) == 1:
            fuse: Any = fuse_conv_bn_eval if isinstance(source, nn.Conv2d) else fuse_linear_bn_eval
            folded = fuse(source, norm)
            # a zero weight times a negative factor is -0.0, which costs bytes and breaks hashes
            folded.weight.data.add_(0.0)
            network.set_submodule(str(before.target), folded)
            _bypass(network, node)
        else:
            shape = (1, -1, *(1,) * (len(shape_of(node)) - 2))
            _replace(network, node, Affine(scale.view(shape), shift.view(shape)))


def batch_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, name: str) -> tuple[Tensor, Tensor]:
    """(scale, shift) of each channel by the running statistics: batch norm in eval mode. InputError without them."""
    if norm.running_mean is None or norm.running_var is None:
        raise InputError(f"node {name}: batch norm without running statistics", "track_running_stats=True")
    scale = torch.rsqrt(norm.running_var + norm.eps) * (1.0 if norm.weight is None else norm.weight)
    return scale, (0.0 if norm.bias is None else norm.bias) - norm.running_mean * scale


def _check(network: fx.GraphModule, known: tuple[type[nn.Module], ...]) -> None:
    seen: set[str] = set()
    for node in network.graph.nodes:
        if node.op == "output" and not isinstance(node.args[0], fx.Node):
            raise InputError("the model returns more than one tensor", "return the logits alone")
        if node.op in ("placeholder", "output"):
            continue
        what = type(layer(network, node)).__name__ if node.op == "call_module" else str(node.target)
        if node.op != "call_module" or not isinstance(layer(network, node), known):
            raise InputError(
                f"node {node.name}: operation {what} is not supported here",
                "supported: Conv2d, Linear, BatchNorm, ReLU, max/average pooling, residual sums, Flatten",
            )
        module = layer(network, node)
        problem = _limit(module)
        if problem:
            raise InputError(f"node {node.name}: {problem}", "use the plain form of the layer")
        if isinstance(module, nn.Conv2d | nn.Linear):
            if str(node.target) in seen:
                raise InputError(f"node {node.name}: layer {node.target} is used twice", "give each use its own layer")
            seen.add(str(node.target))


def _limit(module: nn.Module) -> str:
    if isinstance(module, nn.LeakyReLU) and not 0 <= module.negative_slope <= 1:
        return f"LeakyReLU with slope {module.negative_slope:g}, which is not in [0, 1]"
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return f"Conv2d with padding {module.padding_mode}/{module.padding}"
    if isinstance(module, nn.MaxPool2d) and (module.dilation != 1 or module.ceil_mode or module.return_indices):
        return "MaxPool2d with dilation, ceil_mode or indices"
    if isinstance(module, nn.AvgPool2d) and (
        module.ceil_mode or module.padding not in (0, (0, 0)) or module.divisor_override
    ):
        return "AvgPool2d with padding, ceil_mode or divisor"
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        return "Flatten of other than all dimensions after the batch"
    return ""
