"""A factor and a shift for each channel: they absorb cross-layer factors on both sides, like a 1x1 depthwise kernel.

A BatchNorm that follows no layer is one. After a function that no scale passes through (SiLU, GELU, ...) one can be
put: then the scale of its output differs by channel, explicitly, at the price of a multiplication that runtimes fuse
into the quantizer after it.
"""

from collections.abc import Callable, Container, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from qft_plugin.graph.batch_norms import NORMS, affine_of
from qft_plugin.graph.channel_clip import channels_read
from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.layer_graph import PINNED, Const, Layer, LayerGraph, Op, Ref, channel_axis, on_axis
from qft_plugin.graph.operations import ADDS, CURVE_MODULES
from qft_plugin.graph.torch_model import Call, replace_modules


@wrap_torch_function(lambda x, *_: (x,))
def channel_affine(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """Multiply every channel by a factor and add a shift; a recorder sees one call.

    Args:
        x: an activation.
        weight: `[channels]`.
        bias: `[channels]`, or `None`.
        axis: of the channels, counted from the last one (-1).
    """
    x = x * on_axis(weight, axis)
    return x if bias is None else x + on_axis(bias, axis)


class ChannelAffine(nn.Module):
    """A BatchNorm in eval mode as a factor and a shift.

    Attributes:
        weight: `[channels]`.
        bias: `[channels]`.
        original: the BatchNorm that it stands for.
    """

    weight: Tensor
    bias: Tensor
    original: nn.Module

    def __init__(self, norm: nn.Module, *, axis: int) -> None:
        """Take factor and shift of a BatchNorm.

        Args:
            norm: it has running statistics.
            axis: of the channels, counted from the last one (-1).
        """
        super().__init__()
        factor, shift = affine_of(norm)
        self.register_buffer("weight", factor)
        self.register_buffer("bias", shift)
        self.axis = axis
        self.__dict__["original"] = norm  # what it stands for is no part of it

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that torch's own modules give it)
        """Scale and shift an activation."""
        return channel_affine(input, self.weight, self.bias, self.axis)


class Rescaled(nn.Module):
    """A function, or an input of an addition, with a factor for each channel after it.

    Attributes:
        function: the function.
        weight: `[channels]`, 1 at the start.
    """

    weight: Tensor

    def __init__(self, function: nn.Module, channels: int, *, axis: int, like: Tensor) -> None:
        """Start with factors of 1.

        Args:
            function: elementwise, or an `Identity`.
            channels: of its output.
            axis: of the channels, counted from the last one (-1).
            like: decides device and dtype.
        """
        super().__init__()
        self.function = function
        self.register_buffer("weight", like.new_ones(channels))
        self.axis = axis

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that torch's own modules give it)
        """Apply the function, then the factors."""
        return channel_affine(self.function(input), self.weight, None, self.axis)


@torch.no_grad()
def free_channels(
    model: nn.Module, call: Call, *, norms: bool, barriers: bool = False, only: Container[str] | None = None
) -> bool:
    """Let modules absorb cross-layer factors that could not before, in place.

    A module that is called with different numbers of channels, or never, stays as it is.

    Args:
        model: a float network in eval mode that may be changed; its function does not.
        call: arguments to run it with.
        norms: those BatchNorms that no layer absorbed; call this after folding. One without statistics or parameters,
            which a state dict would not have, stays as it is.
        barriers: functions that no scale passes through get a factor after them.
        only: names of the modules to replace; `None` for all.

    Returns:
        Whether anything was replaced.
    """
    kinds = (*(NORMS if norms else ()), *(CURVE_MODULES if barriers else ()))
    found = [
        m
        for name, m in model.named_modules()
        if type(m) in kinds and (only is None or name in only) and not _has_no_parameters(m)
    ]
    if not found:
        return False
    replaced: dict[nn.Module, nn.Module] = {}
    like = next(p for p in model.parameters() if p.is_floating_point())
    for module, (axis, channels) in channels_read(model, call, found).items():
        if type(module) in NORMS:
            replaced[module] = ChannelAffine(module, axis=axis)
        else:
            replaced[module] = Rescaled(module, channels, axis=axis, like=like)
    replace_modules(model, replaced)
    return bool(replaced)


def _has_no_parameters(module: nn.Module) -> bool:
    """Whether a BatchNorm has nothing to keep factor and shift in."""
    return isinstance(module, NORMS) and (module.running_var is None or module.weight is None or module.bias is None)


Place = TypeVar("Place", bound=Hashable)
"""The name of an input of an addition."""


@dataclass(frozen=True)
class Addend:
    """An input of an elementwise addition that can have a scale of its own in every channel.

    Attributes:
        addition: name of the operation.
        index: which of its activation inputs it is.
        channels: of the addend.
        axis: of the channels, counted from the last one (-1).
    """

    addition: str
    index: int
    channels: int
    axis: int

    @property
    def factor(self) -> str:
        """Name of the operation that multiplies it."""
        return f"factor of input {self.index} of {self.addition}"


def addends_of(graph: LayerGraph) -> tuple[Addend, ...]:
    """List the inputs of elementwise additions whose channels a factor frees, with the axis of these channels."""
    shapes: dict[tuple[str, int], tuple[int, ...]] = {}
    for op in graph.ops:
        found = {graph.shapes[name] for name in (*op.inputs, *op.outputs)} if op.function in ADDS else set()
        if len(found) == 1 and len(set(op.inputs)) == 2:  # of one shape, and not a tensor to itself
            shapes |= dict.fromkeys([(op.name, 0), (op.name, 1)], found.pop())

    def made(axes: Mapping[tuple[str, int], int]) -> tuple[Addend, ...]:
        return tuple(Addend(*at, shapes[at][axis], axis) for at, axis in axes.items())

    def layers_with(axes: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], Layer]:
        weights = {addend: addend.factor for addend in made(axes)}
        dof_map = map_dof(with_addend_factors(graph, weights))
        return {(a.addition, a.index): dof_map.layer(name) for a, name in weights.items()}

    return made(free_axes(shapes, layers_with))


def free_axes(
    shapes: Mapping[Place, tuple[int, ...]], layers_with: Callable[[Mapping[Place, int]], Mapping[Place, Layer]]
) -> dict[Place, int]:
    """Choose the axis along which a factor in front of an addition frees most channels; leave out those that free none.

    Args:
        shapes: of each addend.
        layers_with: from the axis of each factor, counted from the last one (-1), to its layer in the DoF map.

    Returns:
        The axis of each factor that frees anything.
    """
    found: dict[Place, tuple[int, int]] = {}
    for candidate in (channel_axis, lambda _: 1, lambda shape: len(shape) - 1):
        axes = {place: candidate(shape) - len(shape) for place, shape in shapes.items() if len(shape) > 1}
        for place, layer in layers_with(axes).items():
            most = max(len(torch.unique(index[index != PINNED])) for index in (layer.in_index, layer.out_index))
            # One variable for all channels is no more than the scale of a tensor.
            if most > found.get(place, (1, 0))[0]:
                found[place] = most, axes[place]
    return {place: axis for place, (_, axis) in found.items()}


def with_addend_factors(graph: LayerGraph, weights: Mapping[Addend, str]) -> LayerGraph:
    """Return the graph of the network that multiplies its addends by a factor for each channel first.

    Args:
        graph: the network.
        weights: name of the factors, `[channels]`, of each addend that gets them.
    """
    at = {(addend.addition, addend.index): (addend, name) for addend, name in weights.items()}
    ops: list[Op] = []
    shapes = dict(graph.shapes)
    for op in graph.ops:
        inputs = list(op.inputs)
        for i, read in enumerate(op.inputs):
            if (op.name, i) in at:
                addend, name = at[op.name, i]
                constant = Const(name, (addend.channels,))
                made = addend.factor
                ops.append(Op(made, channel_affine.__name__, (read,), (made,), (Ref(0), constant, None, addend.axis)))
                shapes[made], inputs[i] = shapes[read], made
        ops.append(replace(op, inputs=tuple(inputs)))
    return replace(graph, ops=tuple(ops), shapes=shapes)
