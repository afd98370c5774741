"""The table of a packed file: its layers, and what of them lies in which stream. No torch.

Every size that the file leads to is computed here with Python's integers, and capped, before anything is allocated.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt

from rprune.errors import InputError
from rprune.export.streams import strict_json
from rprune.registry import first_problem

FORMAT = "rprune.packed/1"
INPUT = "image"  # what ``models.flat`` calls the input of a network
MOST_LEVELS = 255
LARGEST = 1 << 29  # weights of a network, entries of an activation, bytes of all streams
MOST_LAYERS = 4096

Shape: TypeAlias = tuple[int, ...]
Count: TypeAlias = Annotated[StrictInt, Field(ge=1, le=LARGEST)]
Natural: TypeAlias = Annotated[StrictInt, Field(ge=0, le=LARGEST)]
Name: TypeAlias = Annotated[str, Field(pattern=r"^[\w-]+(\.[\w-]+)*$", max_length=256)]
Kind: TypeAlias = Literal["int8", "float32"]
WIDTHS = {"none": 0, "uint8": 1, "uint16": 2, "float16": 2, "float32": 4}  # bytes


def need(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _float32(value: float) -> float:
    need(float(np.float32(value)) == value, "is no float32 number")
    return value


def _utf8(value: str) -> str:
    value.encode()  # JSON can spell halves of characters, which no file of ours can hold
    return value


Text: TypeAlias = Annotated[str, AfterValidator(_utf8)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _One(_Strict):
    """A layer of one input; ``output`` is the shape that it makes of one, without the batch."""

    name: Name
    inputs: tuple[Name]

    def output(self, given: Shape) -> Shape:
        return given


class Conv(_One):
    kind: Literal["conv"]
    in_channels: Count
    out_channels: Count
    kernel_size: tuple[Count, Count]
    stride: tuple[Count, Count]
    padding: tuple[Natural, Natural]
    dilation: tuple[Count, Count]
    groups: Count
    bias: StrictBool

    @property
    def shape(self) -> Shape:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def output(self, given: Shape) -> Shape:
        need(len(given) == 3 and given[0] == self.in_channels, f"takes {self.in_channels} channels, not {given}")
        need(not self.in_channels % self.groups and not self.out_channels % self.groups, "groups divide no channels")
        spans = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(self.dilation, self.kernel_size, strict=True)]
        return self.out_channels, *_slide(given[0], given[1:], spans, self.stride, self.padding)


class Linear(_One):
    kind: Literal["linear"]
    in_features: Count
    out_features: Count
    bias: StrictBool

    @property
    def shape(self) -> Shape:
        return self.out_features, self.in_features

    def output(self, given: Shape) -> Shape:
        need(given == (self.in_features,), f"takes {self.in_features} features, not {given}")
        return (self.out_features,)


class AvgPool(_One):
    kind: Literal["avg_pool"]
    kernel_size: Count | tuple[Count, Count]
    stride: Count | tuple[Count, Count]

    def output(self, given: Shape) -> Shape:
        need(len(given) == 3, f"pools images, not {given}")
        return given[0], *_slide(given[0], given[1:], _pair(self.kernel_size), _pair(self.stride), (0, 0))


class MaxPool(_One):
    kind: Literal["max_pool"]
    kernel_size: Count | tuple[Count, Count]
    stride: Count | tuple[Count, Count]
    padding: Natural | tuple[Natural, Natural]

    def output(self, given: Shape) -> Shape:
        kernel, padding = _pair(self.kernel_size), _pair(self.padding)
        need(len(given) == 3, f"pools images, not {given}")
        need(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)), "padding is over half the kernel")
        return given[0], *_slide(given[0], given[1:], kernel, _pair(self.stride), padding)


class GlobalAvgPool(_One):
    kind: Literal["global_avg_pool"]

    def output(self, given: Shape) -> Shape:
        need(len(given) == 3, f"pools images, not {given}")
        return given[0], 1, 1


class Relu(_One):
    kind: Literal["relu"]


class Flatten(_One):
    kind: Literal["flatten"]

    def output(self, given: Shape) -> Shape:
        return (math.prod(given),)


class Affine(_One):
    kind: Literal["affine"]
    shape: tuple[Count, ...]

    def output(self, given: Shape) -> Shape:
        wanted = (1, given[0], *(1,) * (len(given) - 1))
        need(self.shape == wanted, f"takes factors of shape {wanted}, not {self.shape}")
        return given


class Add(_Strict):
    kind: Literal["add"]
    name: Name
    inputs: tuple[Name, Name]

    def output(self, given: Shape, other: Shape) -> Shape:
        need(given == other, f"adds {given} and {other}")
        return given


Layer: TypeAlias = Annotated[
    Conv | Linear | AvgPool | MaxPool | GlobalAvgPool | Relu | Flatten | Affine | Add, Field(discriminator="kind")
]


class StoredWeight(_Strict):
    """How the weight of one layer lies in the streams.

    ``entries``: of the value stream. ``gaps``: their type; "none" where all weights are entries, zeros among them.
    ``levels``: of the layer's codebook, whose codes the entries are; 0 where they are the weights themselves.
    """

    entries: Natural
    gaps: Literal["none", "uint8", "uint16"]
    levels: Annotated[StrictInt, Field(ge=0, le=MOST_LEVELS)] = 0


class Scale(_Strict):
    """real = scale * (integer - zero_point), integer in 0..``top``."""

    scale: Annotated[float, Field(strict=True, gt=0, lt=2.0**128), AfterValidator(_float32)]
    zero_point: Annotated[StrictInt, Field(ge=0, le=255)]
    top: Annotated[StrictInt, Field(ge=1, le=255)]


class Table(_Strict):
    format: Literal["rprune.packed/1"]
    kind: Kind
    bits: Annotated[StrictInt, Field(ge=2, le=8)] | None  # of the integers
    input_shape: tuple[Count, Count, Count]
    classes: Count
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MOST_LAYERS)]
    weights: tuple[StoredWeight, ...]  # of the convolutions and linear layers, in their order
    scales: Literal["none", "float16", "float32"]  # type of the weight scales
    activations: dict[Name, Scale]
    metadata: Annotated[dict[Text, Text], Field(max_length=64)]

    @property
    def products(self) -> list[Conv | Linear]:
        return [layer for layer in self.layers if isinstance(layer, Conv | Linear)]

    @property
    def affine(self) -> list[Affine]:
        return [layer for layer in self.layers if isinstance(layer, Affine)]

    @property
    def lengths(self) -> dict[str, int]:
        """Bytes of each stream before compression."""
        width = 1 if self.kind == "int8" else 4
        products = list(zip(self.products, self.weights, strict=True))
        values = sum(w.entries + width * w.levels if w.levels else width * w.entries for _, w in products)
        return {
            "gaps": sum(w.entries * WIDTHS[w.gaps] for _, w in products),
            "values": values,
            "scales": WIDTHS[self.scales] * sum(layer.shape[0] for layer, _ in products),
            "biases": 4 * sum(layer.shape[0] for layer, _ in products if self.has_bias(layer)),
            "affine": 4 * sum(2 * math.prod(layer.shape) for layer in self.affine),
        }

    @property
    def types(self) -> dict[str, str]:
        """Of the numbers in the streams that hold nothing else."""
        biases = "uint32" if self.kind == "int8" else "float32"
        return {"scales": "float32" if self.scales == "none" else self.scales, "biases": biases, "affine": "float32"}

    def has_bias(self, layer: Conv | Linear) -> bool:
        """Integer layers always have one."""
        return self.kind == "int8" or layer.bias

    @pydantic.model_validator(mode="after")
    def _check(self) -> Table:
        self._check_names()
        self._check_shapes()
        need(len(self.weights) == len(self.products), "'weights' has not one entry a layer")
        for layer, stored in zip(self.products, self.weights, strict=True):
            size = math.prod(layer.shape)
            right = stored.entries == size if stored.gaps == "none" else stored.entries <= size
            need(right, f"layer '{layer.name}' has {size} weights, not {stored.entries} entries")
            need(stored.levels <= stored.entries, f"layer '{layer.name}' has more levels than entries")
            need(self.kind == "float32" or not stored.levels, f"layer '{layer.name}' has a codebook of integers")
        integers = self.kind == "int8"
        need((self.scales != "none") == integers == (self.bits is not None), f"kind {self.kind} has other scales")
        need(integers or not self.activations, "float32 networks have no activation scales")
        need(sum(self.lengths.values()) <= LARGEST, f"its streams have more than {LARGEST} bytes")
        return self

    def _check_names(self) -> None:
        known = {INPUT}
        for layer in self.layers:
            need(layer.name not in known, f"layer '{layer.name}' appears twice")
            need(known.issuperset(layer.inputs), f"layer '{layer.name}' takes what no earlier layer makes")
            known.add(layer.name)
        parents = {name[:place] for name in known for place, sign in enumerate(name) if sign == "."}
        need(not parents & known, "a layer lies inside another one")
        need(known.issuperset(self.activations), "a scale belongs to no layer")

    def _check_shapes(self) -> None:
        shapes: dict[str, Shape] = {INPUT: self.input_shape}
        total = 0
        need(math.prod(self.input_shape) <= LARGEST, "its image is too large")
        for layer in self.layers:
            try:
                shape = layer.output(*(shapes[name] for name in layer.inputs))
                need(math.prod(shape) <= LARGEST, "its values are too many")
            except ValueError as error:
                raise ValueError(f"layer '{layer.name}': {error}") from None
            shapes[layer.name] = shape
            total += math.prod(layer.shape) if isinstance(layer, Conv | Linear | Affine) else 0
            need(total <= LARGEST, f"it has more than {LARGEST} weights")
        need(shapes[self.layers[-1].name] == (self.classes,), f"its logits are not {self.classes}")


def parse(content: bytes) -> tuple[Table, list[dict[str, Any]]]:
    """The table, and its layers in the form of ``models.flat.describe``. Raises InputError for any mistake in it."""
    found = strict_json(content)
    try:
        return Table.model_validate(found), found["layers"]
    except pydantic.ValidationError as error:
        raise InputError(first_problem(error)) from None


def _slide(channels: int, size: Shape, window: Any, stride: Any, padding: Any) -> Shape:
    """Height and width of what a window sees that slides over a padded image."""
    padded = [side + 2 * edge for side, edge in zip(size, padding, strict=True)]
    need(channels * math.prod(padded) <= LARGEST, "its padded input is too large")
    need(all(p >= w for p, w in zip(padded, window, strict=True)), "the kernel is larger than its input")
    return tuple((p - w) // step + 1 for p, w, step in zip(padded, window, stride, strict=True))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
