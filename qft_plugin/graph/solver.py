"""Which per-channel scales are forced to be equal, and which are pinned, while the rules of the operations run.

Every channel of every activation gets a variable: two channels share one where the arithmetic between them forces
their scales to be equal, and a class of them is pinned (factor 1) where it cannot be rescaled. Instead of one channel
map for each operation, an activation carries a *shadow*: an integer tensor of the same shape with the variable of
each element.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from qft_plugin.graph.layer_graph import PINNED, LayerGraph, Op

FREE_ZERO: Final = -1
"""Stands in a shadow where an activation is a constant 0, which any scale represents exactly."""


class Solver:
    """Collects equalities between channel variables (union-find) while the rules of the operations run."""

    def __init__(self, graph: LayerGraph) -> None:
        """Start without any variable."""
        self.graph = graph
        self.shadows: dict[str, Tensor] = {}
        self.calls: dict[str, list[Call]] = {}
        self.other_users: dict[str, str] = {}
        self._parent: list[int] = []
        self._reasons: dict[int, str] = {}  # of the pinned classes, by representative

    def new(self, count: int) -> Tensor:
        """Make `count` new variables."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def find(self, i: int) -> int:
        """Return the representative of a variable's class."""
        root = i
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[i] != root:
            self._parent[i], i = root, self._parent[i]
        return root

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Force the variables of `a` and `b` to be equal, element by element (they broadcast)."""
        shape = np.broadcast_shapes(a.shape, b.shape)
        a, b = _compact(a.expand(shape), b.expand(shape))
        pairs = torch.stack([a.flatten(), b.flatten()])
        pairs = pairs[:, (pairs >= 0).all(0) & (pairs[0] != pairs[1])]
        for i, j in torch.unique(pairs, dim=1).T.tolist():
            kept, gone = self.find(i), self.find(j)
            if kept != gone:
                self._parent[gone] = kept
                reason = self._reasons.pop(gone, None)
                if reason is not None:
                    self._reasons.setdefault(kept, reason)

    def pin(self, ids: Tensor, reason: str) -> None:
        """Forbid that these channels are rescaled."""
        for i in torch.unique(_compact(ids)[0]).tolist():
            if i != FREE_ZERO:
                self._reasons.setdefault(self.find(i), reason)

    def pinned(self, name: str, reason: str) -> None:
        """Give tensor `name` a shadow that can never be rescaled."""
        variable = self.new(1)
        self.pin(variable, reason)
        self.shadows[name] = variable[0].expand(self.graph.shapes[name])

    def per_channel(self, shadow: Tensor, axis: int) -> Tensor:
        """Return one variable per channel after forcing each channel to have one over all other axes."""
        rows = rows_of(shadow, axis)
        channel = rows.amax(1)
        self.tie(rows, channel.unsqueeze(1))
        return channel

    def numbered(self, ids: Tensor, number: Mapping[int, int]) -> Tensor:
        """Replace every variable by the number of its class; a constant 0 counts as pinned."""
        values, inverse = torch.unique(ids, return_inverse=True)
        numbers = [PINNED if i == FREE_ZERO else number.get(self.find(i), PINNED) for i in values.tolist()]
        return torch.tensor(numbers, dtype=torch.int64)[inverse]

    @property
    def pinned_classes(self) -> Mapping[int, str]:
        """Reason by representative of every class that is pinned."""
        return self._reasons

    def reason(self, ids: Tensor) -> str:
        """Return why some of these channels are pinned; empty where none is."""
        for i in torch.unique(ids).tolist():
            if i != FREE_ZERO and self.find(i) in self._reasons:
                return self._reasons[self.find(i)]
        return ""


@dataclass(frozen=True)
class Call:
    """One use of a weight while the graph is walked."""

    op: Op
    kind: str
    bias: str | None
    groups: int
    ins: Tensor
    outs: Tensor
    axis: int


def _compact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Drop the repetitions along axes that are expanded in all tensors: they hold the same elements again."""
    for dim in range(tensors[0].dim()):
        if tensors[0].shape[dim] > 1 and all(t.stride(dim) == 0 for t in tensors):
            tensors = tuple(t.narrow(dim, 0, 1) for t in tensors)
    return tensors


def rows_of(shadow: Tensor, axis: int) -> Tensor:
    """Arrange a shadow as `[channels, everything else]` without repeating elements of expanded axes."""
    for dim in range(shadow.dim()):
        if dim != axis % shadow.dim() and shadow.shape[dim] > 1 and shadow.stride(dim) == 0:
            shadow = shadow.narrow(dim, 0, 1)
    return shadow.movedim(axis, 0).unsqueeze(-1).flatten(1)  # an activation may have no channels at all
