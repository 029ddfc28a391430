"""Block by block: which degrees of freedom belong to which part of a network (an option of the finetune).

The end of a block is an activation. A tensor belongs to the first block whose end is computed from it or is it, all
others to the last block, which has no end of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qft_plugin.errors import ConfigError
from qft_plugin.graph.comparison import ComparedInput, Comparison
from qft_plugin.graph.layer_graph import DofMap, Layer, LayerGraph
from qft_plugin.graph.placement import Placement


@dataclass(frozen=True)
class Block:
    """The degrees of freedom of one block.

    Attributes:
        layers: weights of its layers; a layer that is called in several blocks belongs to the first.
        quantizers: its activation quantizers, likewise.
        factors: whether all layers that a cross-layer factor is folded into are in this block, `[dof_map.size]`; a
            factor between two blocks belongs to none.
    """

    layers: frozenset[str]
    quantizers: frozenset[str]
    factors: Tensor


def upstream(graph: LayerGraph, tensors: Iterable[str]) -> set[str]:
    """Return everything that some tensors are computed from, themselves included."""
    found = set(tensors)
    for op in reversed(graph.ops):
        if found.intersection(op.outputs):
            found.update(op.inputs)
    return found


def _blocks_of_tensors(graph: LayerGraph, ends: Sequence[ComparedInput]) -> dict[str, int]:
    """Return the number of the block of each tensor; those of the last block are left out."""
    found: dict[str, int] = {}
    for number, end in enumerate(ends):
        for name in upstream(graph, [end.tensor]):
            found.setdefault(name, number)
    return found


def _block_of(tensors: Iterable[str], numbers: Mapping[str, int], last: int) -> int:
    return min(numbers.get(name, last) for name in tensors)


def split(graph: LayerGraph, dof_map: DofMap, placement: Placement, ends: Sequence[ComparedInput]) -> list[Block]:
    """Divide the degrees of freedom of a network into blocks.

    Args:
        graph: the network.
        dof_map: its layers and variables.
        placement: its quantizers.
        ends: where the blocks end, in the order of execution.

    Returns:
        One block more than there are ends.
    """
    numbers, last = _blocks_of_tensors(graph, ends), len(ends)
    layers = {layer.weight: _block_of(layer.outputs, numbers, last) for layer in dof_map.layers}
    quantizers = _quantizers(graph, placement, ends, numbers)
    first = torch.full((dof_map.size + 1,), last)
    final = torch.zeros_like(first)
    for layer in dof_map.layers:
        index = torch.cat([layer.in_index, layer.out_index]).cpu()
        number = torch.tensor(layers[layer.weight])
        first[index], final[index] = torch.minimum(first[index], number), torch.maximum(final[index], number)
    return [
        Block(
            frozenset(name for name, n in layers.items() if n == number),
            frozenset(name for name, n in quantizers.items() if n == number),
            ((first == number) & (final == number))[1:],
        )
        for number in range(last + 1)
    ]


def _quantizers(
    graph: LayerGraph, placement: Placement, ends: Sequence[ComparedInput], numbers: Mapping[str, int]
) -> dict[str, int]:
    """Return the number of the block of each activation quantizer: the first where a value of it is used."""
    last = len(ends)
    outputs = {op.name: op.outputs for op in graph.ops}
    found: dict[str, int] = {}
    for tensor, name in placement.on_tensor.items():
        found[name] = min(found.get(name, last), numbers.get(tensor, last))
    for (op, index), name in placement.on_input.items():
        # The compared value is the one that the operation reads, after the quantizer.
        compared = [n for n, end in enumerate(ends) if (end.op, end.index) == (op, index)]
        found[name] = min(found.get(name, last), _block_of(outputs[op], numbers, last), *compared)
    return found


def check_blocks(graph: LayerGraph, dof_map: DofMap, at: Comparison, *, classes: bool) -> None:
    """Refuse ends between which there is nothing to train.

    Args:
        graph: the network.
        dof_map: its layers.
        at: where it is compared, ends of blocks included.
        classes: its class probabilities are compared too.

    Raises:
        ConfigError: it names the ends.
    """
    ends = at.inputs[: at.blocks]
    numbers = _blocks_of_tensors(graph, ends)
    of_outputs = graph.outputs if at.outputs or classes else ()
    goal = upstream(graph, [*(place.tensor for place in at.inputs[at.blocks :]), *of_outputs])

    def inside(layer: Layer, number: int) -> bool:
        reaches = number < len(ends) or not goal.isdisjoint(layer.outputs)
        return reaches and _block_of(layer.outputs, numbers, len(ends)) == number

    names = ["the input", *(repr(end.asked) for end in ends), "where the loss is taken"]
    for number in range(len(ends) + 1 if ends else 0):
        if not any(inside(layer, number) for layer in dof_map.layers):
            raise ConfigError(
                "FinetuneConfig.blocks should name where blocks end, in the order of execution, with layers before "
                f"each end and after the last. Found no layer between {names[number]} and {names[number + 1]}. "
                "Leave out one of them or change their order."
            )
