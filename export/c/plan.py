"""A network as the steps that a C program takes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from rprune.errors import InputError
from rprune.export.c.layout import place, settle_borders, share_phases
from rprune.export.c.steps import Dequantize, Elementwise, Flatten, Plan, Pool, Product, Step, Sum, Value, reads
from rprune.models.graph import Add, Affine, GlobalAvgPool, layer, note_shapes, output_of, pair, shape_of
from rprune.quantization.simulate import LEVELS, QAdd, QAffine, QAvgPool, QInput, QKeep, QMatmul, QOutput, Scale


def plan_of(network: fx.GraphModule, input_shape: tuple[int, int, int]) -> Plan:
    """The plan of a float network from ``trace`` or ``compact``, or of an 8-bit one from ``simulated``.

    Raises InputError for integers beyond 8 bits, for a result that is no vector, and for a layer with no C form.
    """
    note_shapes(network, input_shape)
    result = shape_of(output_of(network))
    if len(result) != 2:
        raise InputError(f"the model returns images of {result[1:]}, not logits", "end it with nn.Flatten()")
    planner = _Planner(network)
    plan = planner.plan(input_shape)
    _fuse(plan)
    settle_borders(plan)
    share_phases(plan)
    place(plan)
    return plan


class _Planner:
    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.values: dict[fx.Node, Value] = {}
        self.steps: list[Step] = []
        self.integers = any(isinstance(module, QInput) for module in network.modules())

    def plan(self, input_shape: tuple[int, int, int]) -> Plan:
        last = output_of(self.network)
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = image = Value(*input_shape)
            elif node.op == "call_module":
                self.values[node] = self._layer(node, layer(self.network, node))
        return Plan(image, self.values[last], self.steps, self.integers, input_shape)

    def _layer(self, node: fx.Node, module: nn.Module) -> Value:
        given = tuple(self.values[source] for source in node.args if isinstance(source, fx.Node))
        if isinstance(module, QInput):
            return given[0]
        if isinstance(module, nn.Linear) and (given[0].height, given[0].width) != (1, 1):
            raise InputError(f"{node.target}: a linear layer on an image has no C form", "flatten the image before it")
        if isinstance(module, QOutput):
            return self._add(Dequantize(given, self._value(node), module.given.scale))
        make = self._integer_step if self.integers else self._float_step
        return self._add(make(node, module, given))

    def _add(self, step: Step) -> Value:
        self.steps.append(step)
        return step.out

    def _value(self, node: fx.Node, scale: Scale | None = None) -> Value:
        if scale is not None and scale.top > LEVELS:
            raise InputError("integers beyond 8 bits have no C form", "quantize with --bits 8 or less")
        _, channels, height, width = (*shape_of(node), 1, 1)[:4]
        return Value(channels, height, width, *(() if scale is None else (scale.zero_point, scale.top)))

    def _float_step(self, node: fx.Node, module: nn.Module, given: tuple[Value, ...]) -> Step:
        out = self._value(node)
        if isinstance(module, nn.Conv2d | nn.Linear):
            bias = np.zeros(len(module.weight), np.float32) if module.bias is None else _array(module.bias)
            return Product(given, out, _four(_array(module.weight)), bias, relu=False, **_conv_options(module))
        if isinstance(module, Add):
            return Elementwise(given, out, "add", sum=Sum(given[1], relu=False))
        if isinstance(module, Affine):
            size = out.channels
            scale, shift = (np.broadcast_to(_array(v).reshape(-1), size) for v in (module.scale, module.shift))
            return Elementwise(given, out, "affine", scale=scale, shift=shift)
        if isinstance(module, GlobalAvgPool | nn.AvgPool2d):
            kernel, stride = _window(module, given[0])
            return Pool(given, out, "average", kernel, stride, scale=1 / math.prod(kernel))
        return self._keep(module, given, out)

    def _integer_step(self, node: fx.Node, module: nn.Module, given: tuple[Value, ...]) -> Step:
        if isinstance(module, QMatmul):
            out = self._value(node, module.out)
            weight, bias = (_array(v, np.int64) for v in (module.weight, module.bias))
            return Product(
                given, out, _four(weight), bias, module.relu, **_pairs(module.conv or {}),
                scale=_array(module.multiplier()), logits=module.out is None,
            )  # fmt: skip
        if isinstance(module, QAdd):
            out = self._value(node, module.out)
            numbers = module.ra, module.rb, module.offset
            return Elementwise(given, out, "add", sum=Sum(given[1], module.relu, True, *numbers))
        if isinstance(module, QAffine):
            out = self._value(node, module.out)
            size = out.channels
            scale, shift = (np.broadcast_to(_array(v).reshape(-1), size) for v in (module.scale, module.shift))
            return Elementwise(
                given, out, "affine", module.relu, None, scale, shift, module.given.scale, module.out.scale
            )
        if isinstance(module, QAvgPool):
            kernel, stride = _window(module.source, given[0])
            return Pool(
                given, self._value(node, module.out), "average", kernel, stride,
                scale=float(module.multiplier(math.prod(kernel))),
            )  # fmt: skip
        assert isinstance(module, QKeep)
        return self._keep(module.source, given, self._value(node, module.given))

    def _keep(self, module: nn.Module, given: tuple[Value, ...], out: Value) -> Step:
        if isinstance(module, nn.ReLU):
            return Elementwise(given, out, "relu", relu=True)
        if isinstance(module, nn.Flatten):
            return Flatten(given, out)
        if isinstance(module, nn.MaxPool2d):
            kernel, stride = _window(module, given[0])
            return Pool(given, out, "max", kernel, stride, pair(module.padding))
        raise InputError(f"{type(module).__name__} has no C form", "export it as ONNX")


def _fuse(plan: Plan) -> None:
    """Products take in a ReLU, and a residual sum, that nothing else reads their result of."""
    steps = plan.steps
    for step in list(steps):
        if isinstance(step, Elementwise) and step.kind == "relu" and not plan.integers:
            maker = _maker(plan, step.given[0])
            if maker is not None:
                if isinstance(maker, Product) and maker.sum is not None:
                    maker.sum.relu = True
                else:
                    maker.relu = True
                maker.out = step.out
                steps.remove(step)
        elif isinstance(step, Elementwise) and step.kind == "add":
            _fuse_sum(plan, step)


def _fuse_sum(plan: Plan, step: Elementwise) -> None:
    makers = [_maker(plan, value) for value in step.given]
    ready = [made for made in makers if isinstance(made, Product) and made.sum is None and not made.linear]
    ready = [made for made in ready if plan.integers or not made.relu]
    if not ready or step.given[0] is step.given[1]:
        return
    assert step.sum is not None
    maker = max(ready, key=plan.steps.index)
    own_first = maker.out is step.given[0]
    other = step.given[1] if own_first else step.given[0]
    made = [index for index, found in enumerate(plan.steps) if found.out is other]
    if made and made[0] > plan.steps.index(maker):
        return  # the other part is not there yet
    step.sum.other, step.sum.own_first = other, own_first
    maker.own, maker.sum, maker.out = maker.out, step.sum, step.out
    plan.steps.remove(step)


def _maker(plan: Plan, value: Value) -> Any:
    """The product or sum that made ``value`` if one step alone reads it."""
    readers = [step for step in plan.steps for read in reads(step) if read is value]
    if len(readers) != 1 or value is plan.logits:
        return None
    found = [step for step in plan.steps if step.out is value]
    fits = found and (isinstance(found[0], Product) or (isinstance(found[0], Elementwise) and found[0].kind == "add"))
    return found[0] if fits else None


def _window(module: Any, given: Value) -> tuple[tuple[int, int], tuple[int, int]]:
    if module is None or isinstance(module, GlobalAvgPool):
        whole = given.height, given.width
        return whole, whole
    return pair(module.kernel_size), pair(module.stride)


def _conv_options(module: nn.Conv2d | nn.Linear) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups")
    return _pairs({name: getattr(module, name) for name in names}) if isinstance(module, nn.Conv2d) else {}


def _pairs(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value if name == "groups" else pair(value) for name, value in options.items()}


def _four(weight: NDArray[Any]) -> NDArray[Any]:
    return weight.reshape(*weight.shape, *(1,) * (4 - weight.ndim))


def _array(values: Tensor, dtype: Any = np.float32) -> NDArray[Any]:
    return values.detach().cpu().numpy().astype(dtype)
