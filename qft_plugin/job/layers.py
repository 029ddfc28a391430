"""The layers of a network in a user's words: their names, their bits, and why some stay in floating point."""

import fnmatch
from collections.abc import Container, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.graph.layer_graph import MADE_INSIDE, Const, DofMap, LayerGraph, Op, Ref, module_of
from qft_plugin.graph.operations import LAYERS
from qft_plugin.graph.placement import Placement, quantizers_before, quantizers_of
from qft_plugin.job.host import Host, Placed, Problem, Source, Start
from qft_plugin.report.record import Layer
from qft_plugin.training.integers import DeployedWeight

FOREIGN: Final = "foreign_quantizer"
"""The operation that stands for a module with quantizers of another kind (Brevitas)."""

TABLES: Final = frozenset(["embedding", "embedding_bag"])
"""Functions that look rows of a weight up, and multiply by nothing."""


def layers_of(
    host: Host[Any, Any],
    problem: Problem[Source],
    start: Start[Placed],
    deployed: Mapping[str, DeployedWeight],
    *,
    config: QFTConfig,
) -> tuple[Layer, ...]:
    """Describe the layers that `names_of_layers` names, in the order of execution.

    Args:
        host: its name, and the user's model.
        problem: the network.
        start: the host's quantizers.
        deployed: the quantized weights by name.
        config: the settings.
    """
    source, placement = problem.source, start.placed.placement
    known = {layer.weight: layer for layer in start.dof.map.layers}
    asked = config.weight_bits_of({name: weight.integers.numel() for name, weight in deployed.items()})
    found: dict[str, Layer] = {}
    named = names_of_layers(source.graph, start.dof.map, deployed)
    for op in source.graph.ops:
        name, weight = named.get(op.name, ("", ""))
        if not name or name in found:
            continue
        if op.function == FOREIGN:
            found |= _foreign(name, host.model)
            continue
        bits, scales = _quantized(weight, deployed, placement)
        read = quantizers_before(source.graph, placement, known[weight]) if weight in known else None
        found[name] = Layer(
            name=name,
            weight=weight,
            kind=function_of(op),
            shape=tuple(source.tensors[weight].shape) if weight in source.tensors else _shape(source, op),
            bits=bits,
            activation_bits=widest(placement, read) if read else bits_read(source.graph, placement, op, 0),
            scales=scales,
            reason=_why_float(source, op, weight, host.name)
            if bits is None
            else _why_wide(op, weight, bits, config, asked),
        )
    return tuple(found.values())


def names_of_layers(graph: LayerGraph, dof_map: DofMap, deployed: Container[str]) -> dict[str, tuple[str, str]]:
    """Name the layers: all convolutions, linear layers and tables, and what else has a quantized weight.

    Weights of normalisations are among them only where they are quantized: no host does that to most of them.

    Args:
        graph: the network.
        dof_map: its layers.
        deployed: names of the quantized weights.

    Returns:
        By name of each operation that computes one, the name of the layer, and that of its weight, which is empty
        where it is no parameter.
    """
    found: dict[str, tuple[str, str]] = {}
    for layer in dof_map.layers:
        if layer.is_kernel or layer.weight in deployed:
            found |= dict.fromkeys(layer.calls, (layer.weight.removesuffix(".weight"), layer.weight))
    for op in graph.ops:
        function = function_of(op)
        if op.name in found or (function not in LAYERS | TABLES and function != FOREIGN):
            continue
        if function == FOREIGN:
            found[op.name] = module_of(op), f"{module_of(op)}.weight"
            continue
        weight = weight_of(op)
        if isinstance(weight, Const) and weight.name != MADE_INSIDE:
            found[op.name] = weight.name.removesuffix(".weight"), weight.name
            continue
        taken, name, number = {known for known, _ in found.values()}, place_of(op.name), 1
        while name in taken:
            number += 1
            name = f"{place_of(op.name)} ({number})"
        found[op.name] = name, ""
    return found


def function_of(op: Op) -> str:
    """Name the function of an operation, without what a host writes behind it."""
    return op.function.partition(" ")[0]


def weight_of(op: Op) -> Any:
    """Return the weight of a convolution, a linear layer or a table, as it stands among the arguments."""
    if function_of(op) in TABLES:  # torch.embedding has it in front, torch.nn.functional.embedding behind
        return next((value for value in (*op.args, *(op.kwargs or {}).values()) if isinstance(value, Const)), None)
    return op.argument(1, "weight")


def place_of(op: str) -> str:
    """Name an operation as its user would: by the module that calls it, or where there is none, by its function."""
    path, _, function = op.lstrip("/").rpartition("/")[0].rpartition("/")
    return path.replace("/", ".") or function or op


def bits_read(graph: LayerGraph, placement: Placement, op: Op, index: int) -> int | None:
    """Return the bit width of an input of an operation; `None` where a part of it is not quantized.

    Args:
        graph: the network.
        placement: its quantizers.
        op: the operation.
        index: which of its activation inputs.
    """
    if index >= len(op.inputs):
        return None
    return widest(placement, quantizers_of(graph, placement, op.name, index, op.inputs[index]))


def widest(placement: Placement, names: Sequence[str | None]) -> int | None:
    """Return the most bits of several quantizers; `None` where one of them is missing."""
    bits = [placement.activations[name].bits for name in names if name is not None]
    return max(bits) if bits and len(bits) == len(names) else None


def _quantized(weight: str, deployed: Mapping[str, DeployedWeight], placement: Placement) -> tuple[int | None, int]:
    """Return the bits of a weight, `None` for floats, and how many steps it has."""
    if weight in deployed:
        found = deployed[weight]
        return found.bits, found.step.numel() + (0 if found.step_in is None else found.step_in.numel())
    if weight in placement.untrained:
        return placement.untrained[weight]
    return None, 0


def _foreign(name: str, model: nn.Module) -> dict[str, Layer]:
    """Describe a module that the job does not look into, by its name, where that has a weight."""
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return {}
    layer = Layer(
        name=name,
        weight=f"{name}.weight",
        kind=type(module).__name__,
        shape=tuple(weight.shape),
        bits=None,
        activation_bits=None,
        scales=0,
        reason="it has a quantizer of another kind, or a forward of its own, and is trained around",
    )
    return {name: layer}


def _shape(source: Source, op: Op) -> tuple[int, ...]:
    weight = weight_of(op)
    if isinstance(weight, Const):
        return weight.shape
    return tuple(source.graph.shapes[op.inputs[weight.index]]) if isinstance(weight, Ref) else ()


def _why_float(source: Source, op: Op, weight: str, host: str) -> str:
    if weight:
        return source.kept_in_float.get(weight) or f"{host} has placed no quantizer on its weight"
    made = isinstance(weight_of(op), Const)
    return "its weight is a tensor that is made in the forward" if made else "its weight is computed in the forward"


def _why_wide(op: Op, weight: str, bits: int, config: QFTConfig, asked: Mapping[str, int]) -> str:
    """Say why a weight has more bits than most; empty where it has not."""
    if bits <= config.weight_bits:
        return ""
    if function_of(op) in TABLES:
        return "a table, which no kernel multiplies by"
    if function_of(op) not in LAYERS:
        return "the weight of a normalisation, which no kernel multiplies by"
    if asked.get(weight) != bits:
        return f"its quantizer in the model has {bits} bits"
    patterns = [p for p, wanted in config.layer_bits.items() if wanted == bits and fnmatch.fnmatch(weight, p)]
    if patterns:
        return f"layer_bits: {patterns[-1]!r}"
    return f"small_layer_share: one of the smallest layers, which have {config.small_layer_bits} bits"
