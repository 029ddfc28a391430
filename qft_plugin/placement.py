"""Where a host put its quantizers, and what that means for the layers around them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor

from qft_plugin.errors import ConfigError
from qft_plugin.graph import ADDS, Layer, LayerGraph, Op
from qft_plugin.quantize import integer_range

KEEPS_GRID: Final = frozenset(
    [
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "flatten",
        "reshape",
        "view",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "__getitem__",
        "narrow",
        "select",
        "chunk",
        "split",
        "unbind",
        "dropout",
        "identity",
        "contiguous",
        "clone",
        "detach",
        "pixel_shuffle",
        "channel_shuffle",
    ]
)
"""The values that come out are among the values that go in, so a quantized input means a quantized output."""

PASSES_TO_OUTPUT: Final = frozenset(
    ["relu", "leaky_relu", "prelu", "relu6", "hardtanh", "dropout", "identity", "contiguous", "clone"]
)
"""What may stand between a layer and the quantizer of its output."""

GLOBAL_POOLS: Final = frozenset(
    [
        "mean",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "amax",
    ]
)


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
    """What a host's quantizer of a weight can express.

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
    """

    activations: Mapping[str, ActivationGrid]
    on_tensor: Mapping[str, str]
    on_input: Mapping[tuple[str, int], str]
    weights: Mapping[str, WeightPlace]


def quantizer_before(graph: LayerGraph, placement: Placement, layer: Layer, *, call: int = 0) -> str | None:
    """Find the quantizer of a layer's input edge, looking back through operations that keep the grid.

    Args:
        graph: the network.
        placement: its quantizers.
        layer: the layer.
        call: which of its calls.
    """
    return _quantizer_of(graph, placement, layer.calls[call], 0, layer.inputs[call])


def _quantizer_of(graph: LayerGraph, placement: Placement, op: str, index: int, tensor: str) -> str | None:
    """Find what quantizes input `index` of an operation, looking back through operations that keep the grid."""
    makers = {name: made_by for made_by in graph.ops for name in made_by.outputs}
    while True:
        found = placement.on_input.get((op, index)) or placement.on_tensor.get(tensor)
        if found is not None:
            return found
        maker = makers.get(tensor)
        if maker is None or maker.function not in KEEPS_GRID or len(maker.inputs) != 1:
            return None
        op, index, tensor = maker.name, 0, maker.inputs[0]


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
        found = [_quantizer_of(graph, placement, op.name, i, name) for i, name in enumerate(op.inputs)]
        quantizers = {name for name in found if name is not None}
        if len(quantizers) < len(set(op.inputs)) and None in found:
            loose.append(op.name)
        touching = [group for group in groups if group & quantizers]
        groups = [group for group in groups if not group & quantizers]
        groups.append(quantizers.union(*touching))
    order = list(placement.activations)
    return tuple(tuple(sorted(g, key=order.index)) for g in groups if len(g) > 1), tuple(loose)


def quantizer_after(graph: LayerGraph, placement: Placement, layer: Layer) -> str | None:
    """Find the quantizer of a layer's output edge, looking forward through its activation function."""
    tensor = layer.outputs[0]
    while True:
        users = [(op, i) for op in graph.ops for i, name in enumerate(op.inputs) if name == tensor]
        found = placement.on_tensor.get(tensor)
        if found is None and users:
            found = placement.on_input.get((users[0][0].name, users[0][1]))
        if found is not None or len(users) != 1 or users[0][0].function not in PASSES_TO_OUTPUT:
            return found
        tensor = users[0][0].outputs[0]


@dataclass(frozen=True)
class ComparedInput:
    """An activation at which teacher and student are compared.

    Attributes:
        op: name of the operation that reads it.
        index: which of its activation inputs it is.
        tensor: name of the activation.
        weight: how much its difference counts in the loss, relative to the others.
        asked: the name that the user gave for it, if any.
        field: the setting that the name stands in.
    """

    op: str
    index: int
    tensor: str
    weight: float = 1.0
    asked: str | None = None
    field: str = "loss_at"


@dataclass(frozen=True)
class Comparison:
    """Everything that teacher and student are compared at.

    Attributes:
        inputs: inputs of operations: first those that end a block, with weight 0, then those of the loss.
        outputs: the outputs of the network are compared too, behind the inputs and with weight 1 each.
        blocks: how many of the inputs end a block.
    """

    inputs: tuple[ComparedInput, ...]
    outputs: bool
    blocks: int = 0

    def weights(self, count: int) -> tuple[float, ...]:
        """Return the weight in the loss of each of `count` compared tensors."""
        return (*(at.weight for at in self.inputs), *[1.0] * (count - len(self.inputs)))


def comparison(
    graph: LayerGraph, loss_at: str | Mapping[str, float] | Sequence[str] | None, blocks: Sequence[str] = ()
) -> Comparison:
    """Choose where teacher and student are compared.

    Args:
        graph: the network.
        loss_at: names of modules or operations whose inputs are compared, with their weights if they differ; `None`
            for the output of the backbone.
        blocks: names of modules or operations whose inputs end the blocks.

    Raises:
        ConfigError: a name is none of this network's.
    """
    ends = [named_input(graph, name, weight=0.0, field="blocks") for name in blocks]
    if loss_at is None:
        found = backbone_output(graph)
        return Comparison((*ends, *([] if found is None else [found])), found is None, len(ends))
    names = [loss_at] if isinstance(loss_at, str) else loss_at
    weights = names if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    places = [named_input(graph, name, weight=w) for name, w in weights.items()]
    return Comparison((*ends, *places), False, len(ends))


def named_input(graph: LayerGraph, name: str, *, weight: float = 1.0, field: str = "loss_at") -> ComparedInput:
    """Find the first activation that a module or an operation reads.

    Args:
        graph: the network.
        name: of the module, with dots or slashes, or of the operation.
        weight: how much it counts in the loss.
        field: the setting that the name stands in.

    Raises:
        ConfigError: nothing has this name.
    """
    path = name.replace(".", "/")
    for op in graph.ops:
        called = op.name.lstrip("/")  # NNCF begins with one where no module inside the model makes the call
        if op.inputs and (op.name == name or called in (name, path) or called.startswith(f"{path}/")):
            return ComparedInput(op.name, 0, op.inputs[0], weight, asked=name, field=field)
    raise ConfigError(
        f"FinetuneConfig.{field} should name a module that computes something, or an operation. Found {name!r}; "
        f"operations of this model: {', '.join(op.name for op in graph.ops)}."
    )


def backbone_output(graph: LayerGraph) -> ComparedInput | None:
    """Find the output of the backbone (Sec. 4): the input of the last global pool, else of the last linear layer.

    Returns:
        The input of an operation, or `None` where there is neither.
    """
    for op in reversed(graph.ops):
        if _is_global_pool(graph, op):
            return ComparedInput(op.name, 0, op.inputs[0])
    for op in reversed(graph.ops):
        if op.function == "linear" and op.inputs:
            return ComparedInput(op.name, 0, op.inputs[0])
    return None


def _is_global_pool(graph: LayerGraph, op: Op) -> bool:
    """Whether an operation reduces all positions of an image to one."""
    if op.function not in GLOBAL_POOLS or not op.inputs or not op.outputs:
        return False
    before, after = graph.shapes[op.inputs[0]], graph.shapes[op.outputs[0]]
    if op.function in ("mean", "amax"):
        dims = op.argument(1, "dim")
        dims = range(len(before)) if dims is None else [dims] if isinstance(dims, int) else dims
        if any(d % len(before) < 2 for d in dims):
            return False
    positions = math.prod(before[2:])
    return len(before) > 2 and positions > 1 and math.prod(after) * positions == math.prod(before)
