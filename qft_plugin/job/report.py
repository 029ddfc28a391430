"""The report of a job: what became of each layer, how often both networks name one class, and what the job took."""

import contextlib
import fnmatch
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

import torch
from torch import Tensor

import qft_plugin
from qft_plugin.config import QFTConfig
from qft_plugin.graph.layer_graph import MADE_INSIDE, Const, DofMap, LayerGraph, Op, Ref
from qft_plugin.graph.operations import LAYERS
from qft_plugin.graph.placement import Placement, quantizers_before, quantizers_of
from qft_plugin.graph.torch_model import tensors_in
from qft_plugin.job.host import Placed, Problem, Source, Start
from qft_plugin.report.data import Layer, Node, Report
from qft_plugin.training.finetune import Agreement, FinetuneResult
from qft_plugin.training.integers import DeployedWeight
from qft_plugin.training.loss import classes_of
from qft_plugin.training.solve import solve
from qft_plugin.training.student import QUANTIZER_OP

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]

AGREEMENT_BATCH: Final = 64


@dataclass(frozen=True)
class About:
    """What a job itself knows for its report.

    Attributes:
        host: name of the framework.
        model: class of the user's model.
        agreement: see `Report`; where a finetune has not measured it.
        warnings: what was warned of so far.
        seconds: of each phase so far.
    """

    host: str
    model: str
    agreement: float | None
    warnings: Sequence[str]
    seconds: Mapping[str, float]


def layers_of(
    problem: Problem[Source],
    start: Start[Placed],
    deployed: Mapping[str, DeployedWeight],
    config: QFTConfig,
    *,
    host: str,
) -> tuple[Layer, ...]:
    """Describe all convolutions and linear layers, and what else has a quantized weight, in the order of execution.

    Args:
        problem: the network.
        start: the host's quantizers.
        deployed: the quantized weights by name.
        config: the settings.
        host: its name.
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
        bits = deployed[weight].bits if weight in deployed else None
        read = quantizers_before(source.graph, placement, known[weight]) if weight in known else None
        found[name] = Layer(
            name=name,
            weight=weight,
            kind=op.function.partition(" ")[0],
            shape=tuple(source.tensors[weight].shape) if weight in source.tensors else _shape(source, op),
            bits=bits,
            activation_bits=_bits(placement, read) if read else _bits_read(source.graph, placement, op, 0),
            scales=_scales(deployed[weight]) if weight in deployed else 0,
            reason=_why_float(source, op, host) if bits is None else _why_wide(op, weight, bits, config, asked),
        )
    return tuple(found.values())


def names_of_layers(graph: LayerGraph, dof_map: DofMap, deployed: Container[str]) -> dict[str, tuple[str, str]]:
    """Name the layers: every convolution and linear layer, and what else has a quantized weight.

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
        if op.name in found or op.function.partition(" ")[0] not in LAYERS:
            continue
        weight = op.argument(1, "weight")
        if isinstance(weight, Const) and weight.name != MADE_INSIDE:
            found[op.name] = weight.name.removesuffix(".weight"), weight.name
            continue
        taken, name, number = {known for known, _ in found.values()}, place_of(op.name), 1
        while name in taken:
            number += 1
            name = f"{place_of(op.name)} ({number})"
        found[op.name] = name, ""
    return found


def nodes_of(graph: LayerGraph, placement: Placement, named: Mapping[str, tuple[str, str]]) -> tuple[Node, ...]:
    """Describe all operations, in the order of execution; quantizers are no operations of the user's network.

    Args:
        graph: the network.
        placement: its quantizers.
        named: the result of `names_of_layers`.
    """
    makers, nodes = dict[str, str](), list[Node]()
    for op in graph.ops:
        if op.function == QUANTIZER_OP and op.outputs[0] in placement.on_tensor and op.inputs:
            if op.inputs[0] in makers:
                makers[op.outputs[0]] = makers[op.inputs[0]]
            continue
        makers |= dict.fromkeys(op.outputs, op.name)
        bits = [_bits_read(graph, placement, op, index) for index in range(len(op.inputs))]
        whole = [b for b in bits if b is not None]
        nodes.append(
            Node(
                name=op.name,
                function=op.function.partition(" ")[0],
                inputs=tuple(dict.fromkeys(makers[read] for read in op.inputs if read in makers)),
                layer=named.get(op.name, ("", ""))[0],
                bits=max(whole) if whole and len(whole) == len(bits) else None,
            )
        )
    return tuple(nodes)


def place_of(op: str) -> str:
    """Name an operation as its user would: by the module that calls it, or where there is none, by its function."""
    path, _, function = op.lstrip("/").rpartition("/")[0].rpartition("/")
    return path.replace("/", ".") or function or op


def _shape(source: Source, op: Op) -> tuple[int, ...]:
    weight = op.argument(1, "weight")
    if isinstance(weight, Const):
        return weight.shape
    return tuple(source.graph.shapes[op.inputs[weight.index]]) if isinstance(weight, Ref) else ()


def _scales(weight: DeployedWeight) -> int:
    return weight.step.numel() + (0 if weight.step_in is None else weight.step_in.numel())


def _bits_read(graph: LayerGraph, placement: Placement, op: Op, index: int) -> int | None:
    """Return the bit width of an input of an operation; `None` where a part of it is not quantized."""
    if index >= len(op.inputs):
        return None
    return _bits(placement, quantizers_of(graph, placement, op.name, index, op.inputs[index]))


def _bits(placement: Placement, names: Sequence[str | None]) -> int | None:
    """Return the widest of several quantizers; `None` where one of them is missing."""
    return (
        max((placement.activations[n].bits for n in names if n is not None), default=0) if None not in names else None
    )


def _why_float(source: Source, op: Op, host: str) -> str:
    weight = op.argument(1, "weight")
    if not isinstance(weight, Const):
        return "its weight is computed in the forward"
    if weight.name == MADE_INSIDE:
        return "its weight is a tensor that is made in the forward"
    return source.kept_in_float.get(weight.name) or f"{host} has placed no quantizer on its weight"


def _why_wide(op: Op, weight: str, bits: int, config: QFTConfig, asked: Mapping[str, int]) -> str:
    """Say why a weight has more bits than most; empty where it has not."""
    if bits <= config.weight_bits:
        return ""
    if op.function.partition(" ")[0] not in LAYERS:
        return "the weight of a normalisation, which no kernel multiplies by"
    patterns = [p for p, asked in config.layer_bits.items() if asked == bits and fnmatch.fnmatch(weight, p)]
    if patterns:
        return f"layer_bits: {patterns[-1]!r}"
    if asked[weight] == bits:
        return f"small_layer_share: one of the smallest layers, which have {config.small_layer_bits} bits"
    return f"its quantizer in the model has {bits} bits"


@torch.no_grad()
def agreement_of(start: Start[Placed], problem: Problem[Source]) -> Agreement:
    """Count on which of the images that a state is judged by the student names the class of the float network.

    Both run once on those of this process. Where a finetune compares them, it tells this itself.

    Args:
        start: the student and its degrees of freedom.
        problem: the float network and the images.
    """
    inputs, agreement, solution = problem.inputs, Agreement(), solve(start.dof)
    share, world = inputs.share, inputs.world
    rows = world.row_range(*inputs.judged_on)
    size = share.at_once(AGREEMENT_BATCH)
    # One pass is not worth compiling for.
    with torch.compiler.set_stance("force_eager"):
        for first in range(rows.start, rows.stop, size):
            call = share.batch(slice(first, min(first + size, rows.stop)))
            args, kwargs = call
            agreement.add(start.student(solution, call).classes, _classes(problem.source.model(*args, **kwargs)))
    return agreement


def _classes(result: Any) -> Tensor | None:
    outputs = [t for t in tensors_in(result) if t.is_floating_point()]
    return classes_of(outputs[0]) if len(outputs) == 1 else None


def versions_of(host: str) -> dict[str, str]:
    """Return the versions of the packages that take part in a job, by name.

    Args:
        host: name of the framework.
    """
    found = {"qft_plugin": qft_plugin.__version__, "torch": str(torch.__version__)}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found[host] = metadata.version(host)
    return found


def peak_memory() -> int:
    """Return the most memory that this process has had so far, bytes; 0 where the system does not tell."""
    if resource is None:
        return 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest  # macOS counts bytes, others KiB


def compared_at(problem: Problem[Source], config: QFTConfig) -> tuple[str, ...]:
    """Name what the loss compares.

    Args:
        problem: where the networks are compared.
        config: the settings.
    """
    at = problem.at
    names = [f"the input of {place.asked or place_of(place.op)}" for place in at.inputs[at.blocks :]]
    names += ["the outputs"] if at.outputs else []
    settings = config.finetune
    return (*names, *(["the class probabilities"] if settings is not None and settings.cross_entropy else []))


def report_of_job(
    problem: Problem[Source],
    start: Start[Placed],
    deployed: Mapping[str, DeployedWeight],
    config: QFTConfig,
    result: FinetuneResult | None,
    about: About,
) -> Report:
    """Collect what a job did.

    Args:
        problem: the network and its images.
        start: the degrees of freedom at the end.
        deployed: the quantized weights by name.
        config: the settings.
        result: how the finetune went; `None` without one.
        about: what the job itself knows.
    """
    source, inputs = problem.source, problem.inputs
    named = names_of_layers(source.graph, start.dof.map, deployed)
    return Report(
        host=about.host,
        versions=versions_of(about.host),
        model=about.model,
        images=inputs.total,
        held_out=inputs.total - inputs.trained_on,
        compared_at=() if result is None else compared_at(problem, config),
        start_loss=None if result is None else result.start_loss,
        final_loss=None if result is None else result.final_loss,
        losses=() if result is None else result.losses,
        agreement=about.agreement if result is None else result.agreement,
        start_agreement=None if result is None else result.start_agreement,
        layers=layers_of(problem, start, deployed, config, host=about.host),
        nodes=nodes_of(source.graph, start.placed.placement, named),
        warnings=tuple(about.warnings),
        seconds=dict(about.seconds),
        peak_memory=peak_memory(),
    )
