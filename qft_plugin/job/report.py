"""The report of a job: what became of each layer, how often both networks name one class, and what the job took."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

import torch
from torch import Tensor

import qft_plugin
from qft_plugin.config import QFTConfig
from qft_plugin.graph.layer_graph import LayerGraph
from qft_plugin.graph.placement import Placement
from qft_plugin.graph.torch_model import tensors_in
from qft_plugin.job.host import Host, Placed, Problem, Source, Start
from qft_plugin.job.layers import bits_read, function_of, layers_of, names_of_layers, place_of
from qft_plugin.report.data import Node, Report
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
        host: its name, and the user's model.
        agreement: see `Report`; where a finetune has not measured it.
        warnings: what was warned of so far.
        seconds: of each phase so far.
    """

    host: Host[Any, Any]
    agreement: float | None
    warnings: Sequence[str]
    seconds: Mapping[str, float]


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
        bits = [bits_read(graph, placement, op, index) for index in range(len(op.inputs))]
        whole = [b for b in bits if b is not None]
        nodes.append(
            Node(
                name=op.name,
                function=function_of(op),
                inputs=tuple(dict.fromkeys(makers[read] for read in op.inputs if read in makers)),
                layer=named.get(op.name, ("", ""))[0],
                bits=max(whole) if whole and len(whole) == len(bits) else None,
            )
        )
    return tuple(nodes)


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
    layers = layers_of(about.host, problem, start, deployed, config=config)
    listed = {layer.name for layer in layers}  # a module that is not looked into may have no weight
    named = names_of_layers(source.graph, start.dof.map, deployed)
    named = {op: names for op, names in named.items() if names[0] in listed}
    return Report(
        host=about.host.name,
        versions=versions_of(about.host.name),
        model=type(about.host.model).__name__,
        images=inputs.total,
        held_out=inputs.total - inputs.trained_on,
        compared_at=() if result is None else compared_at(problem, config),
        start_loss=None if result is None else result.start_loss,
        final_loss=None if result is None else result.final_loss,
        losses=() if result is None else result.losses,
        agreement=about.agreement if result is None else result.agreement,
        start_agreement=None if result is None else result.start_agreement,
        layers=layers,
        nodes=nodes_of(source.graph, start.placed.placement, named),
        warnings=tuple(about.warnings),
        seconds=dict(about.seconds),
        peak_memory=peak_memory(),
    )
