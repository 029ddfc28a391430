"""The network as its host saw it run (`LayerGraph`), and which per-channel scales it allows (`DofMap`, Sec. 3.3)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from qft_plugin.graph.operations import ABSORBS_INPUT, LAYERS
from qft_plugin.tensors.axes import Axes

PINNED: Final = 0
"""The variable of channels that cannot be rescaled."""

MADE_INSIDE: Final = "a tensor made inside the forward"
"""Stands for the name of a constant that is neither a parameter nor a buffer."""


@dataclass(frozen=True)
class Ref:
    """Stands in an operation's arguments for its activation input number `index`."""

    index: int


@dataclass(frozen=True)
class Const:
    """Stands in an operation's arguments for a parameter or buffer of the model."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One call of a torch function.

    Attributes:
        name: unique name of the call, the host's own.
        function: name of the torch function without a trailing underscore: `"conv2d"`, `"add"`, `"flatten"`, ...
        inputs: names of the activation tensors that it reads, in the order of its arguments.
        outputs: names of the tensors that it makes.
        args: positional arguments, tensors replaced by `Ref` and `Const`.
        kwargs: keyword arguments, likewise.
    """

    name: str
    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument, given by position or by name."""
        if len(self.args) > position:
            return self.args[position]
        return (self.kwargs or {}).get(name, default)


@dataclass(frozen=True)
class LayerGraph:
    """A model as its host saw it run.

    Attributes:
        ops: the calls in the order of execution.
        shapes: shape of every activation tensor, batch axis included.
        inputs: tensors that enter the network.
        outputs: tensors that leave it.
        vectors: groups of activation tensors that one quantizer with a scale per channel reads, so that the tensors
            of a group have their channels along one axis and the same scale in each.
    """

    ops: tuple[Op, ...]
    shapes: Mapping[str, tuple[int, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    vectors: tuple[tuple[str, ...], ...] = ()

    def __repr__(self) -> str:
        """Say in one short line what it is."""
        return f"LayerGraph({len(self.ops)} operations, {len(self.inputs)} inputs, {len(self.outputs)} outputs)"


@dataclass(frozen=True)
class Layer:
    """A weight, with everything needed to put scales onto it.

    A function with bounds for each channel is one too: its weight is the upper bound, its bias the lower one.

    Attributes:
        weight: name of the weight.
        bias: name of the bias, if any.
        kind: torch function: `"conv2d"`, `"linear"`, `"layer_norm"`, `"hardtanh"`, ...
        groups: number of groups.
        calls: the operations that use it (more than one where a module is called several times).
        inputs: the activation tensor that each call reads.
        outputs: the activation tensor that each call makes.
        in_index: variable of each input channel, `[in]`.
        out_index: variable of each output channel, `[out]`.
        axis: of the output channels in the activation that it makes, counted from the last one (-1).
    """

    weight: str
    bias: str | None
    kind: str
    groups: int
    calls: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    in_index: Tensor
    out_index: Tensor
    axis: int = -1

    @property
    def axes(self) -> Axes:
        """The meaning of its weight's axes."""
        return Axes(self.kind, self.groups)

    @property
    def is_kernel(self) -> bool:
        """Whether it multiplies its input by a weight: a convolution or linear layer."""
        return is_kernel(self.kind)


def module_of(op: Op) -> str:
    """Return the name of the module in whose forward an operation stands."""
    return op.name.rsplit("/", 2)[0].replace("/", ".") if op.name.count("/") > 1 else ""


def reads(op: Op, weight: str) -> bool:
    """Whether an operation reads a parameter."""
    values = [*op.args, *(op.kwargs or {}).values()]
    values += [v for value in values if isinstance(value, (list, tuple)) for v in value]
    return any(isinstance(v, Const) and v.name == weight for v in values)


def is_kernel(kind: str) -> bool:
    """Whether a torch function multiplies its input by a weight that absorbs scales on both sides."""
    return kind in LAYERS


def absorbs_input(kind: str) -> bool:
    """Whether the weight of a torch function absorbs the scales of its input."""
    return kind in ABSORBS_INPUT


@dataclass(frozen=True)
class Edge:
    """One activation tensor in the DoF map.

    Attributes:
        name: name of the tensor.
        function: the torch function that makes it.
        channels: how many different positions a scale vector over this tensor could have.
        free: how many of them may be rescaled.
        reason: why the others may not; empty where all are free.
    """

    name: str
    function: str
    channels: int
    free: int
    reason: str


@dataclass(frozen=True)
class VectorScale:
    """The scale of a quantizer that differs by channel.

    Attributes:
        axis: the axis of the activation that its channels are on.
        index: variable of each channel, `[channels]`.
    """

    axis: int
    index: Tensor


@dataclass(frozen=True)
class DofMap:
    """Which scales are shared, free, or pinned.

    Attributes:
        layers: every weight layer, in the order of execution.
        edges: every activation tensor, in the order of execution.
        size: number of free variables; they are numbered from 1, 0 is `PINNED`.
        channel_index: per channel the variable of an activation tensor, where it is the same over all other axes.
        vectors: the scale of each group of `LayerGraph.vectors`, by the first tensor of the group.
        channel_axes: the axis that the channels of `channel_index` are on: that of `channel_axis`, else 1 (convolutions
            over sequences) or the last one (images with their channels last).
    """

    layers: tuple[Layer, ...]
    edges: tuple[Edge, ...]
    size: int
    channel_index: Mapping[str, Tensor]
    vectors: Mapping[str, VectorScale] = field(default_factory=dict)
    channel_axes: Mapping[str, int] = field(default_factory=dict)

    def layer(self, weight: str) -> Layer:
        """Return the layer of a weight."""
        for layer in self.layers:
            if layer.weight == weight:
                return layer
        raise KeyError(weight)

    def merged(self, weights: Collection[str]) -> tuple["DofMap", Tensor]:
        """Give each channel one variable on both sides of some layers.

        Args:
            weights: names of these layers' weights.

        Returns:
            The map, whose variables keep their numbers and whose edges are those of this one; and for each variable of
            this map the one that stands for it there, `[1 + size]`.
        """
        root = list(range(self.size + 1))

        def find(i: int) -> int:
            while root[i] != i:
                i = root[i]
            return i

        for layer in self.layers:
            if layer.weight in weights:
                for a, b in zip(layer.in_index.tolist(), layer.out_index.tolist(), strict=True):
                    low, high = sorted((find(a), find(b)))
                    root[high] = low  # a pinned channel, 0, pins the other
        found = torch.tensor([find(i) for i in root])
        merged = replace(
            self,
            layers=tuple(replace(la, in_index=found[la.in_index], out_index=found[la.out_index]) for la in self.layers),
            channel_index={name: found[index] for name, index in self.channel_index.items()},
            vectors={name: replace(v, index=found[v.index]) for name, v in self.vectors.items()},
        )
        return merged, found

    def all_pinned(self, reason: str) -> "DofMap":
        """Return the map of the same network in which no channel may be rescaled."""
        return DofMap(
            tuple(
                replace(la, in_index=torch.zeros_like(la.in_index), out_index=torch.zeros_like(la.out_index))
                for la in self.layers
            ),
            tuple(replace(edge, free=0, reason=reason) for edge in self.edges),
            0,
            {name: torch.zeros_like(index) for name, index in self.channel_index.items()},
            {name: replace(v, index=torch.zeros_like(v.index)) for name, v in self.vectors.items()},
            self.channel_axes,
        )

    def __repr__(self) -> str:
        """Say in one short line what it is; `str` is the whole table."""
        return f"DofMap({len(self.layers)} layers, {len(self.edges)} edges, {self.size} free variables)"

    def __str__(self) -> str:
        """Print the map as a table; each edge that is not free names the reason."""
        rows = [("edge", "made by", "channels", "free", "why not free")]
        rows += [(e.name, e.function, str(e.channels), str(e.free), e.reason) for e in self.edges]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]
        return "\n".join(lines)


def channel_axis(shape: tuple[int, ...]) -> int:
    """Return the axis that holds the channels of an activation: 1 in images, the last one in sequences."""
    return 1 if len(shape) > 3 else len(shape) - 1


def on_axis(v: Tensor, axis: int) -> Tensor:
    """Give a value for each channel, `[channels]`, the axes that follow that of the channels.

    Args:
        v: `[channels]`.
        axis: of the channels, counted from the last one (-1).
    """
    return v.view(-1, *(1,) * (-axis - 1))
