"""Which channels of a network are one: what must be removed together for a layer to become physically smaller."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from torch import fx, nn

from rprune.models.graph import Add, layer, shape_of


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that several layers share because their values meet in sums, or in no more than one layer's output.

    Channel c is row c (dimension 0) of every weight in ``producers`` and, for (name, block) in ``consumers``, the
    input channels c * block to (c + 1) * block - 1 (dimension 1) of that weight: a linear layer behind a Flatten reads
    h * w features of each channel. ``values`` are the nodes that carry the channels, with their features a channel.
    """

    size: int
    producers: tuple[str, ...]
    consumers: tuple[tuple[str, int], ...]
    values: tuple[tuple[fx.Node, int], ...]

    @property
    def name(self) -> str:
        """The weight that makes the channels first."""
        return self.producers[0]


def channel_groups(network: fx.GraphModule) -> list[ChannelGroup]:
    """Groups of a network from ``trace``, in the order in which they are computed.

    Weight names are those of ``models.prunable``. Channels of the image and of the logits are in no group, nor are
    those that a grouped convolution reads or makes (its inputs and outputs are tied in blocks), those that a linear
    layer reads from other than (b, features), and those of sums that mix one channel's features with several channels'.
    """
    spaces = _Spaces()
    placed: dict[fx.Node, tuple[int, int]] = {}  # node -> (space, features a channel)
    for node in network.graph.nodes:
        given = [placed[argument] for argument in node.args if isinstance(argument, fx.Node)]
        if node.op == "placeholder":
            placed[node] = spaces.new(frozen=True), 1
        elif node.op == "output":
            spaces.frozen.append(given[0][0])
        else:
            placed[node] = _place(network, node, given, spaces)
    values, producers, consumers = defaultdict(list), defaultdict(list), defaultdict(list)
    for node, (space, block) in placed.items():
        values[spaces.root(space)].append((node, block))
        if mixes_all(network, node):
            source, features = placed[node.all_input_nodes[0]]
            producers[spaces.root(space)].append(f"{node.target}.weight")
            consumers[spaces.root(source)].append((f"{node.target}.weight", features))
    frozen = {spaces.root(space) for space in spaces.frozen}
    return [
        ChannelGroup(
            len(network.get_parameter(producers[root][0])), tuple(producers[root]), tuple(consumers[root]), tuple(found)
        )
        for root, found in values.items()
        if root not in frozen
    ]


def mixes_all(network: fx.GraphModule, node: fx.Node) -> bool:
    """Is the node a layer whose every output channel reads every input channel, dimension 1 of its input?"""
    if node.op != "call_module":
        return False
    module = layer(network, node)
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear) and len(shape_of(node.args[0])) == 2


class _Spaces:
    """Disjoint sets of values whose channels are the same."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.frozen: list[int] = []

    def new(self, frozen: bool = False) -> int:
        self.parents.append(len(self.parents))
        if frozen:
            self.frozen.append(self.parents[-1])
        return self.parents[-1]

    def root(self, space: int) -> int:
        while self.parents[space] != space:
            space = self.parents[space]
        return space

    def tie(self, a: int, b: int) -> None:
        first, second = sorted((self.root(a), self.root(b)))
        self.parents[second] = first


def _place(network: fx.GraphModule, node: fx.Node, given: list[tuple[int, int]], spaces: _Spaces) -> tuple[int, int]:
    module = layer(network, node)
    space, block = given[0]
    if isinstance(module, nn.Conv2d | nn.Linear):
        if mixes_all(network, node):
            return spaces.new(), 1
        spaces.frozen.append(space)
        return spaces.new(frozen=True), 1
    if isinstance(module, nn.Flatten):
        return space, block * math.prod(shape_of(node.args[0])[2:])
    if isinstance(module, Add):
        other, features = given[1]
        spaces.tie(space, other)
        if features != block or shape_of(node.args[0]) != shape_of(node.args[1]):
            spaces.frozen.append(space)
    return space, block
