"""Prints the first table of docs/networks.md: how much of well-known architectures the DoF map leaves free.

python benchmarks/networks.py > docs/networks.md

The second one follows by python benchmarks/zoo.py --table FILE >> docs/networks.md.
"""

import importlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.layer_graph import PINNED, DofMap, LayerGraph
from qft_plugin.graph.record import record

HEAD: Final = """\
# Which scales of well-known networks are free

A scale per channel on an activation costs nothing at run time where its factors can be folded into the weights on both
sides. This table says for how many activations of well-known architectures that is so. The networks are those of
`integration/structures.py`: narrow and short, with every construct of the real ones, BatchNorms folded as the hosts do.
The table is made by `python benchmarks/networks.py`.

- **layer inputs**: convolutions and linear layers whose weight is a parameter, each counted once however often it is
  called, without those that read the input of the network. Free means that every channel of the input may have a scale
  of its own or one that it shares with others; it is what counts, because these are the activations that integer
  kernels read.
- **all activations**: every tensor that an operation makes, the outputs of the network and integer tensors too, without
  its inputs.
- **why not**: what pins the layer inputs that are not free, most frequent first, with their number.

| network | layer inputs free | share | all activations free | share | why not |
|---|---|---|---|---|---|
"""

TAIL: Final = """
What no rule can free, as long as the factors are folded: the input of a layer after SiLU, GELU, Hardswish or tanh,
since these are not homogeneous, and a residual stream that LayerNorms read, since they mix its channels. The input of a
layer after a LayerNorm is free: its gamma and beta absorb the factor. So is what attention makes: it has the scales of
the values.
An activation that a number or a parameter is added to keeps its scale, because the constant would have to be scaled
with it. Of 9,151 layer inputs of the networks of `benchmarks/zoo.py` this holds for 110, and for 57 of them nothing
else does: the learnable affine blocks of hgnetv2 and the position embeddings of visformer.
`nn.MultiheadAttention` is one operation as torch records it, and its projections are not counted.
With `HardwareSpec(activation_scale="explicit")` layers after SiLU, GELU and Hardswish modules are free too.
"""


@dataclass(frozen=True)
class Shares:
    """What the map of one network leaves free.

    Attributes:
        layers: layers that read something that a layer or an embedding made.
        free_layers: those whose input is free in all channels.
        edges: activations, without the inputs of the network.
        free_edges: those that are free in all channels.
        reasons: what pins the inputs of the other layers, and how many of them.
    """

    layers: int
    free_layers: int
    edges: int
    free_edges: int
    reasons: tuple[tuple[str, int], ...]


def shares(graph: LayerGraph, dof_map: DofMap) -> Shares:
    """Count what is free.

    Args:
        graph: the network.
        dof_map: its map.
    """
    raw = _before_any_layer(graph, dof_map)
    layers = [la for la in dof_map.layers if la.is_kernel and not raw.issuperset(la.inputs)]
    pinned = [la for la in layers if bool((la.in_index == PINNED).any())]
    edges = {e.name: e for e in dof_map.edges if e.name not in graph.inputs}
    why = Counter(edges[la.inputs[0]].reason for la in pinned)
    free = sum(e.free == e.channels for e in edges.values())
    reasons = tuple(sorted(why.items(), key=lambda item: (-item[1], item[0])))
    return Shares(len(layers), len(layers) - len(pinned), len(edges), free, reasons)


def _before_any_layer(graph: LayerGraph, dof_map: DofMap) -> set[str]:
    """List the inputs of the network and what is computed from them without a weight."""
    calls = {call for layer in dof_map.layers for call in layer.calls}
    raw = set(graph.inputs)
    for op in graph.ops:
        if op.name not in calls and op.function != "embedding" and op.inputs and raw.issuperset(op.inputs):
            raw.update(op.outputs)
    return raw


def _row(name: str, found: Shares) -> str:
    why = "; ".join(f"{reason} ({count})" for reason, count in found.reasons)
    pairs = (found.free_layers, found.layers), (found.free_edges, found.edges)
    layers, edges = (f"{100 * free / total:.0f} %" for free, total in pairs)
    return (
        f"| {name} | {found.free_layers} of {found.layers} | {layers} | {found.free_edges} of {found.edges} "
        f"| {edges} | {why} |\n"
    )


def measured(structures: Any) -> dict[str, Shares]:
    """Map every network of the collection.

    Args:
        structures: the module `integration/structures.py`.
    """
    result = {}
    for name in structures.STRUCTURES:
        torch.manual_seed(0)
        model, inputs = structures.folded_norms(name)
        graph = record(model, (inputs, {}))
        result[name] = shares(graph, map_dof(graph))
    return result


def page(found: dict[str, Shares]) -> str:
    """Write the page."""
    return HEAD + "".join(_row(name, s) for name, s in found.items()) + TAIL


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent / "integration"))
    sys.stdout.write(page(measured(importlib.import_module("structures"))))
