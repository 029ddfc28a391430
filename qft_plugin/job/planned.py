"""What a start has decided, layer by layer and activation by activation, as plain data."""

from collections.abc import Iterator, Sequence
from dataclasses import fields

from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.graph.layer_graph import Const, LayerGraph, Op
from qft_plugin.graph.layer_graph import Layer as Kernel
from qft_plugin.graph.placement import Placement, quantizers_before
from qft_plugin.job.host import Placed, Source, Start
from qft_plugin.report.inspection import PlannedActivation, PlannedLayer
from qft_plugin.report.record import Layer
from qft_plugin.training.dof import Dof, WeightGrid
from qft_plugin.training.student import QUANTIZER_OP


def planned_layers(
    layers: Sequence[Layer], source: Source, start: Start[Placed], config: QFTConfig
) -> tuple[PlannedLayer, ...]:
    """Say of each layer in what it is expected to run, and for what its weight has scales.

    Args:
        layers: the result of `job.layers.layers_of`.
        source: the network as it was read.
        start: where a finetune starts.
        config: the settings.
    """
    known = {layer.weight: layer for layer in source.dof_map.layers}
    return tuple(
        PlannedLayer(
            **{f.name: getattr(layer, f.name) for f in fields(layer)},
            granularity=_granularity(layer, start.dof.weight_grids.get(layer.weight)),
            not_int8=_why_not_int8(layer, known.get(layer.weight), start, config),
        )
        for layer in layers
    )


def _granularity(layer: Layer, grid: WeightGrid | None) -> str:
    """Say in words for what the weight has scales of its own."""
    if layer.bits is None:
        return ""
    if grid is not None and grid.scale_in is not None:
        return "doubly per channel"
    return "per channel" if layer.scales > 1 else "per tensor"


def _why_not_int8(layer: Layer, known: Kernel | None, start: Start[Placed], config: QFTConfig) -> str:
    """Say why a layer is not expected to run in int8; empty where it is.

    Args:
        layer: the layer.
        known: its calls; `None` where the map of scales has none.
        start: where a finetune starts.
        config: the settings.
    """
    grid = start.dof.weight_grids.get(layer.weight)
    if layer.bits is None:
        return layer.reason
    if known is None or grid is None:
        return "only its weight is quantized, by the host itself"
    if not known.is_kernel:
        return "a normalisation is computed in float"
    if config.hardware.activation_bits is None:
        return "activations are in float (HardwareSpec.activation_bits=None)"
    if layer.activation_bits is None:
        return "it reads values that are not quantized"
    if grid.scale_in is not None:
        return "an integer kernel has no scale per input channel"
    if known.kind.startswith("conv_transpose") and known.groups > 1:
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
        bits = max((placement.activations[name].bits for name in quantizers), default=None)
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
