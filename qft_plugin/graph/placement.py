"""Where a host put its quantizers, and which of them each layer reads and feeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from qft_plugin.graph.layer_graph import Layer, LayerGraph, Op, Ref
from qft_plugin.graph.operations import ADDS, DIVIDES, JOINS, KEEPS_GRID, PASSES_TO_OUTPUT
from qft_plugin.tensors.grid import integer_range


@dataclass(frozen=True)
class ActivationGrid:
    """The integers of one activation quantizer and where its scale starts.

    Attributes:
        scale: initial step, real per step.
        low: smallest integer.
        high: largest integer.
        zero_point: the integer of the real 0.
        shifts: whether the zero point trains with the scale.
    """

    scale: float
    low: int
    high: int
    zero_point: int = 0
    shifts: bool = False

    @property
    def bits(self) -> int:
        """Its bit width."""
        return (self.high - self.low).bit_length()

    def with_bits(self, bits: int) -> "ActivationGrid":
        """Return the grid of another bit width over the same range."""
        low, high = self.low, self.high
        if (high - low).bit_length() == bits:
            return self
        narrow = low < 0 and low + high == 0
        low, high = integer_range(bits, signed=low < 0, narrow=narrow)
        ratio = (self.high - self.low) / (high - low)
        zero_point = min(max(round((self.zero_point - self.low) / ratio) + low, low), high)
        return replace(self, scale=self.scale * ratio, low=low, high=high, zero_point=zero_point)


@dataclass(frozen=True)
class WeightPlace:
    """The granularity that a host's quantizer of a weight can have.

    Attributes:
        per_channel: its scale may differ by output channel.
        doubly: its scale may differ by input channel too, independently of the scale of the activation.
        scale: where its scale starts, `[out]` or `[]`, real per step; `None` to choose the MMSE scale.
        scale_in: likewise, relative to `scale`, `[in]`; `None` where it does not differ by input channel.
    """

    per_channel: bool
    doubly: bool = False
    scale: Tensor | None = None
    scale_in: Tensor | None = None


@dataclass(frozen=True)
class Placement:
    """The quantizers of a host, by their names.

    Attributes:
        activations: grid of each activation quantizer.
        on_tensor: quantizer of everything that reads a tensor, by name of the tensor.
        on_input: quantizer of one input of one operation, by operation and number of the input.
        weights: the quantizer of each weight.
        untrained: bits, and number of scales, of each weight that the host quantizes by itself (an embedding's), by
            its name.
        multiplied: inputs of operations that a host multiplies by a factor for each channel before it quantizes them.
    """

    activations: Mapping[str, ActivationGrid]
    on_tensor: Mapping[str, str]
    on_input: Mapping[tuple[str, int], str]
    weights: Mapping[str, WeightPlace]
    untrained: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    multiplied: frozenset[tuple[str, int]] = frozenset()


def quantizers_before(
    graph: LayerGraph, placement: Placement, layer: Layer, *, call: int | None = None
) -> tuple[str | None, ...]:
    """List the quantizers of the values that a layer reads, looking back through operations that keep the grid.

    Args:
        graph: the network.
        placement: its quantizers.
        layer: the layer.
        call: which of its calls; `None` for all of them.

    Returns:
        Each quantizer once: several where the calls read different ones, or where the parts of a concatenation have
        different ones. `None` stands for values that are not quantized.
    """
    calls = range(len(layer.calls)) if call is None else [call]
    found = [quantizers_of(graph, placement, layer.calls[i], 0, layer.inputs[i]) for i in calls]
    return tuple(dict.fromkeys(name for names in found for name in names))


def quantizers_of(graph: LayerGraph, placement: Placement, op: str, index: int, tensor: str) -> tuple[str | None, ...]:
    """List the quantizers of input `index` of an operation, looking back through operations that keep the grid.

    Args:
        graph: the network.
        placement: its quantizers.
        op: name of the operation.
        index: which of its activation inputs.
        tensor: name of the activation that it is.

    Returns:
        As `quantizers_before`.
    """
    makers = {name: made_by for made_by in graph.ops for name in made_by.outputs}
    found: dict[str | None, None] = {}
    ahead, known = [(op, index, tensor)], {(op, index)}
    while ahead:
        op, index, tensor = ahead.pop()
        name = placement.on_input.get((op, index)) or placement.on_tensor.get(tensor)
        maker = makers.get(tensor)
        parts = () if name is not None or maker is None else _parts(maker)
        if not parts:
            found[name] = None
        for part in reversed(parts):
            if maker is not None and (maker.name, part) not in known:
                known.add((maker.name, part))
                ahead.append((maker.name, part, maker.inputs[part]))
    return tuple(found)


def _parts(op: Op) -> tuple[int, ...]:
    """List the inputs whose values an operation passes on unchanged; none where it makes new values."""
    if _keeps_grid(op) and op.function not in JOINS:
        return (0,) if op.argument(0, "input") == Ref(0) else ()
    joined = op.argument(0, "tensors") if op.function in JOINS else None
    if not isinstance(joined, (list, tuple)) or not all(isinstance(part, Ref) for part in joined):
        return ()
    return tuple(part.index for part in joined)


def _keeps_grid(op: Op) -> bool:
    """Whether the values that an operation makes are among those that it reads, or 0, which is on every grid."""
    if op.function == "pad":
        return op.argument(2, "mode", "constant") != "constant" or op.argument(3, "value") in (None, 0, 0.0)
    return op.function in KEEPS_GRID


def is_division(op: Op) -> bool:
    """Whether an operation divides one activation by another, which no integer kernel does."""
    operands = [op.argument(0, "input"), op.argument(1, "other")]
    return op.function in DIVIDES and all(isinstance(operand, Ref) for operand in operands)


def only_divided(graph: LayerGraph, tensor: str) -> bool:
    """Whether the values of a tensor, wherever they are moved, only divide others or are divided by others."""
    ahead, known = [tensor], {tensor}
    while ahead:
        name = ahead.pop()
        readers = [(op, i) for op in graph.ops for i, read in enumerate(op.inputs) if read == name]
        if name in graph.outputs or not readers:
            return False
        for op, index in readers:
            if is_division(op):
                continue
            if index not in _parts(op):
                return False
            ahead += [made for made in op.outputs if made not in known]
            known |= set(op.outputs)
    return True


def joined(graph: LayerGraph, placement: Placement, layers: Sequence[Layer]) -> tuple[tuple[str, ...], ...]:
    """Find the activation quantizers that should have one scale because one kernel multiplies values of several.

    Args:
        graph: the network.
        placement: its quantizers.
        layers: the layers whose accumulators have one scale.

    Returns:
        Groups of quantizers that can have one scale and one zero point, each at least two; no quantizer is in two.
    """
    groups = []
    for layer in layers:
        found = quantizers_before(graph, placement, layer)
        names = [name for name in found if name is not None]
        grids = [placement.activations[name] for name in names]
        centred = all(grid.zero_point == 0 and not grid.shifts for grid in grids)
        if None not in found and (centred or can_share_zero_point(grids)):
            groups.append(names)
    return merged(groups, list(placement.activations))


def can_share_zero_point(grids: Sequence[ActivationGrid]) -> bool:
    """Whether quantizers have zero points that train and the same integers around them."""
    return all(grid.shifts and (grid.low, grid.high) == (grids[0].low, grids[0].high) for grid in grids)


def merged(groups: Iterable[Iterable[str]], order: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Join groups that have a member in common.

    Args:
        groups: names.
        order: all names, in the order that they have in a group.

    Returns:
        Groups of at least two names, of which no two have one in common.
    """
    found: list[set[str]] = []
    for group in groups:
        names = set(group)
        touching = [other for other in found if other & names]
        found = [other for other in found if not other & names]
        found.append(names.union(*touching))
    return tuple(tuple(sorted(group, key=order.index)) for group in found if len(group) > 1)


def addends(graph: LayerGraph, placement: Placement) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Find the activation quantizers that elementwise additions tie to each other (App. D).

    Args:
        graph: the network.
        placement: its quantizers.

    Returns:
        Groups of quantizers, each at least two, and the names of the additions of which an input is not quantized.
    """
    groups: list[set[str]] = []
    loose = []
    for op in graph.ops:
        if op.function not in ADDS or len(op.inputs) < 2:
            continue
        found = [quantizers_of(graph, placement, op.name, i, name) for i, name in enumerate(op.inputs)]
        groups.append({name for names in found for name in names if name is not None})
        # A tensor that is added to itself needs no tie.
        whole = {tensor for tensor, names in zip(op.inputs, found, strict=True) if None not in names}
        if whole != set(op.inputs):
            loose.append(op.name)
    return merged(groups, list(placement.activations)), tuple(loose)


def quantizer_after(graph: LayerGraph, placement: Placement, layer: Layer) -> str | None:
    """Find the quantizer of a layer's output edge, looking forward through its activation function.

    Rounding changes places with functions that keep the grid: the largest of quantized values is the quantized
    largest value. A factor between layer and quantizer is in float: it is no part of the layer's rescale factor.
    """
    tensor = layer.outputs[0]
    while True:
        users = [(op, i) for op in graph.ops for i, name in enumerate(op.inputs) if name == tensor]
        found = placement.on_tensor.get(tensor)
        if found is None and users:
            read = users[0][0].name, users[0][1]
            found = None if read in placement.multiplied else placement.on_input.get(read)
        passed = len(users) == 1 and (users[0][0].function in PASSES_TO_OUTPUT or _keeps_grid(users[0][0]))
        if found is not None or not passed or len(users[0][0].outputs) != 1:
            return found
        tensor = users[0][0].outputs[0]
