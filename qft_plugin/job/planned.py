"""What a start has decided, layer by layer and activation by activation, as plain data."""

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.graph.layer_graph import MADE_INSIDE, Const, Layer, LayerGraph, Op
from qft_plugin.graph.operations import LAYERS
from qft_plugin.graph.placement import Placement, quantizers_before
from qft_plugin.job.host import Placed, Source, Start
from qft_plugin.report.inspection import PlannedActivation, PlannedLayer
from qft_plugin.training.dof import Dof, WeightGrid
from qft_plugin.training.student import QUANTIZER_OP

FOREIGN: Final = "foreign_quantizer"
"""The operation that stands for a module with quantizers of another kind (Brevitas)."""

WhyFloat = Callable[[LayerGraph, Op], str]
"""Says why a host leaves an operation, whose weight is a parameter, in floating point."""


@dataclass(frozen=True)
class About:
    """What only a host knows of a dry run.

    Attributes:
        host: `"nncf"` or `"brevitas"`.
        why_float: says why it leaves an operation in floating point.
        items: how many items the dataset has; `None` where it does not say.
        own_quantizers: the user's model says its bits itself.
        once: the dataset can be iterated over once only.
    """

    host: str
    why_float: WhyFloat
    items: int | None
    own_quantizers: bool = False
    once: bool = False


def layers_of(
    model: nn.Module, source: Source, start: Start[Placed], config: QFTConfig, *, about: About
) -> tuple[PlannedLayer, ...]:
    """Describe every convolution and linear layer, and what else has a quantized weight.

    Args:
        model: the user's model.
        source: the network as it was read.
        start: where a finetune starts.
        config: the settings.
        about: what only the host knows.
    """
    graph, dof, dof_map = source.graph, start.dof, source.dof_map
    by_call = {call: layer for layer in dof_map.layers for call in layer.calls}
    known: set[str] = set()
    found = []
    for op in graph.ops:
        layer = by_call.get(op.name)
        if layer is None:
            if op.function.partition(" ")[0] in LAYERS:
                found.append(_floating(source, op, about.why_float))
            elif op.function == FOREIGN:
                found += _foreign(model, op)
            continue
        grid = dof.weight_grids.get(layer.weight)
        if layer.weight in known or (grid is None and not layer.is_kernel):
            continue
        known.add(layer.weight)
        if grid is None:
            found.append(_floating(source, op, about.why_float))
            continue
        bits = input_bits(graph, start.placed.placement, layer)
        found.append(
            PlannedLayer(
                name=layer.weight.rpartition(".")[0],
                weight=layer.weight,
                kind=layer.kind,
                shape=tuple(source.tensors[layer.weight].shape),
                bits=grid.bits,
                activation_bits=bits,
                granularity=granularity(grid),
                reason=_why_bits(layer, grid.bits, config, own_quantizers=about.own_quantizers),
                not_int8=_why_not_int8(layer, grid, bits, config),
            )
        )
    return tuple(dict.fromkeys(found))


def _floating(source: Source, op: Op, why_float: WhyFloat) -> PlannedLayer:
    weight = op.argument(1, "weight")
    held = isinstance(weight, Const) and weight.name != MADE_INSIDE
    name = weight.name if held else ""
    reason = why_float(source.graph, op) if held else "its weight is computed in the forward"
    return PlannedLayer(
        name=name.rpartition(".")[0] if held else op.name.strip("/"),
        weight=name,
        kind=op.function,
        shape=tuple(source.tensors[name].shape) if name in source.tensors else (),
        bits=None,
        activation_bits=None,
        granularity="",
        reason=reason,
        not_int8=reason,
    )


def _foreign(model: nn.Module, op: Op) -> list[PlannedLayer]:
    """Describe a module that the job does not look into, where that has a weight."""
    name = op.name.strip("/").rsplit("/", 2)[0].replace("/", ".")
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return []
    reason = "it has a quantizer of another kind, or a forward of its own, and is trained around"
    return [
        PlannedLayer(
            name=name,
            weight=f"{name}.weight",
            kind=type(module).__name__,
            shape=tuple(weight.shape),
            bits=None,
            activation_bits=None,
            granularity="",
            reason=reason,
            not_int8=reason,
        )
    ]


def input_bits(graph: LayerGraph, placement: Placement, layer: Layer) -> int | None:
    """Return the bit width of what a layer reads; `None` where that is not, or not wholly, quantized."""
    names = quantizers_before(graph, placement, layer)
    if not names or None in names:
        return None
    return max(_bits(placement, name) for name in names if name is not None)


def _bits(placement: Placement, quantizer: str) -> int:
    grid = placement.activations[quantizer]
    return (grid.high - grid.low).bit_length()


def granularity(grid: WeightGrid) -> str:
    """Say in words for what the weight has scales of its own."""
    if grid.scale_in is not None:
        return "doubly per channel"
    return "per channel" if grid.scale.dim() else "per tensor"


def _why_bits(layer: Layer, bits: int, config: QFTConfig, *, own_quantizers: bool) -> str:
    """Say why a weight has other bits than most; empty where it has not."""
    if bits == config.weight_bits:
        return ""
    if own_quantizers:
        return "its own quantizer has these bits"
    if layer.kind == "layer_norm":
        return "the weight of a normalisation has 8 bits"
    if any(fnmatch.fnmatch(layer.weight, pattern) for pattern in config.layer_bits):
        return "QFTConfig.layer_bits"
    return "one of the smallest layers (QFTConfig.small_layer_share)"


def _why_not_int8(layer: Layer, grid: WeightGrid, input_bits: int | None, config: QFTConfig) -> str:
    """Say why a quantized layer is not expected to run in int8; empty where it is."""
    if not layer.is_kernel:
        return "a normalisation is computed in float"
    if config.hardware.activation_bits is None:
        return "activations are in float (HardwareSpec.activation_bits=None)"
    if input_bits is None:
        return "it reads values that are not quantized"
    if grid.scale_in is not None:
        return "an integer kernel has no scale per input channel"
    if layer.kind.startswith("conv_transpose") and layer.groups > 1:
        return "OpenVINO has no int8 kernel for a grouped transposed convolution"
    return ""


def activations_of(source: Source, placement: Placement) -> tuple[PlannedActivation, ...]:
    """Describe every activation that is quantized, or that a layer reads in floating point.

    Args:
        source: the network as it was read.
        placement: the host's quantizers, with the bits of the settings.
    """
    graph, dof_map = source.graph, source.dof_map
    quantized: dict[str, dict[str, None]] = {name: {q: None} for name, q in placement.on_tensor.items()}
    for op in graph.ops:
        for index, tensor in enumerate(op.inputs):
            quantizer = placement.on_input.get((op.name, index))
            if quantizer is not None:
                quantized.setdefault(tensor, {})[quantizer] = None
    read: dict[str, dict[str, None]] = {}
    floating: dict[str, dict[str, None]] = {}
    for layer in dof_map.layers:
        if not layer.is_kernel:
            continue
        names = quantizers_before(graph, placement, layer)
        for name in names:
            if name is not None:
                read.setdefault(name, {})[layer.weight] = None
        if None in names:
            for tensor in layer.inputs:
                floating.setdefault(tensor, {})[layer.weight] = None
    made_by = {name: op.function for op in graph.ops for name in op.outputs}
    before = {name: op.inputs[0] for op in graph.ops for name in op.outputs if op.inputs}
    found = []
    for edge in dof_map.edges:
        quantizers = quantized.get(edge.name, {})
        if not quantizers and edge.name not in floating:
            continue
        readers = dict.fromkeys(weight for name in quantizers for weight in read.get(name, {}))
        bits = max((_bits(placement, name) for name in quantizers), default=None)
        name, function = edge.name, edge.function
        if function == QUANTIZER_OP and quantizers:  # a module of its own: what it reads is what the user knows
            name, function = next(iter(quantizers)), made_by.get(before[edge.name], "input")
        found.append(
            PlannedActivation(
                name=name.strip("/"),
                made_by=function,
                bits=bits,
                channels=edge.channels,
                free=edge.free,
                pinned_by=edge.reason,
                layers=tuple({**readers, **floating.get(edge.name, {})}),
            )
        )
    return tuple(found)


def degrees_of(dof: Dof) -> dict[str, int]:
    """Count the numbers that train, by kind; kinds of which there are none are left out.

    Args:
        dof: the degrees of freedom before anything is held.
    """
    layers = dof.quantized()
    kinds: dict[str, list[Tensor | None]] = {
        "weights": [d.W for d in layers],
        "rounding of weights": [p for d in layers if d.element is not None for p in d.element.parameters()],
        "biases": [d.bias for d in layers],
        "rescale factors": [d.log_F for d in layers],
        "scales of input channels": [d.log_L for d in layers],
        "activation scales": list(dof.activations.log_s),
        "zero points": list(dof.activations.shift),
        "cross-layer factors": [dof.log_c],
    }
    counts = {kind: sum(p.numel() for p in found if p is not None and p.requires_grad) for kind, found in kinds.items()}
    return {kind: count for kind, count in counts.items() if count}


def constants_of(graph: LayerGraph) -> dict[str, None]:
    """List the parameters and buffers that the calls of a network read, in their order."""
    return dict.fromkeys(value.name for op in graph.ops for value in _arguments(op) if isinstance(value, Const))


def _arguments(op: Op) -> Iterator[object]:
    for value in (*op.args, *(op.kwargs or {}).values()):
        yield from value if isinstance(value, (list, tuple)) else (value,)


def float_bytes(model: nn.Module) -> int:
    """Return the size of a model's parameters and of its buffers in floating point, bytes."""
    held = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    return sum(t.numel() * t.element_size() for t in held)
