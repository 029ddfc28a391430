"""Where teacher and student are compared: at named inputs of operations, or at the output of the backbone (Sec. 4)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qft_plugin.errors import ConfigError
from qft_plugin.graph.layer_graph import LayerGraph, Op
from qft_plugin.graph.operations import GLOBAL_POOLS, GLOBAL_REDUCTIONS


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
        outputs: the outputs of the network are compared too, after the inputs and with weight 1 each.
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
    if op.function in GLOBAL_REDUCTIONS:
        dims = op.argument(1, "dim")
        dims = range(len(before)) if dims is None else [dims] if isinstance(dims, int) else dims
        if any(d % len(before) < 2 for d in dims):
            return False
    positions = math.prod(before[2:])
    return len(before) > 2 and positions > 1 and math.prod(after) * positions == math.prod(before)
