"""The scales of activations: where they start, how they train, and how hardware ties them (App. D)."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qft_plugin.graph.placement import ActivationGrid, can_share_zero_point, merged
from qft_plugin.hardware import Elementwise
from qft_plugin.tensors.grid import quantize_factor, round_ste


@dataclass(frozen=True)
class Ties:
    """Groups of activation quantizers whose scales depend on each other, by their names.

    Attributes:
        addends: groups that `HardwareSpec.elementwise_rescale` ties to each other.
        shared: groups that have one scale whatever the hardware can do, because a kernel reads all of a group.
    """

    addends: Sequence[Sequence[str]] = ()
    shared: Sequence[Sequence[str]] = ()


class ActivationScales(nn.Module):
    """The steps and zero points of all activation quantizers. Steps are stored as logarithms.

    Attributes:
        grids: where each quantizer starts, by its name.
        log_s: logarithm of each step that is one of its own, `[]`.
        shift: distance of each zero point that trains from where it started, `[]`, in lengths of its grid.
    """

    def __init__(
        self, grids: Mapping[str, ActivationGrid], ties: Ties, *, kind: Elementwise, like: Tensor, train: bool
    ) -> None:
        """Start every scale and zero point at its initial value.

        Args:
            grids: grid of each activation quantizer, by name.
            ties: which of them depend on each other.
            kind: the relation that addends have.
            like: a tensor of the dtype and on the device of the parameters.
            train: whether they train.
        """
        super().__init__()
        order = list(grids)
        related = merged([*ties.shared, *ties.addends], order)
        self.grids = tied_grids(shared_grids(grids, ties.shared), related, kind)
        self._kind = kind
        self._root = {name: group[0] for group in related for name in group}
        self._shared = {name: tuple(group) for group in ties.shared for name in group}
        self._step_index, own = _numbered(order, related if kind == "none" else merged(ties.shared, order))
        steps = [like.new_tensor(self.grids[name].scale) for name in own]
        self.log_s = nn.ParameterList([nn.Parameter(s.log(), requires_grad=train) for s in steps])
        self._shift_index, moving = _numbered([n for n, g in grids.items() if g.shifts], ties.shared)
        self.shift = nn.ParameterList([nn.Parameter(like.new_zeros(()), requires_grad=train) for _ in moving])

    def steps(self) -> dict[str, Tensor]:
        """Return the step of every activation quantizer by name, `[]`, real (folded) per step."""
        if not len(self.log_s):
            return {}
        own = torch.stack(list(self.log_s)).exp().unbind()
        steps = {name: own[i] for name, i in self._step_index.items()}
        if self._kind == "power_of_two":
            for name, root in self._root.items():
                steps[name] = steps[root] * quantize_factor(steps[name] / steps[root], "power_of_two")
        return steps

    def zero_points(self) -> dict[str, Tensor]:
        """Return the zero point of every activation quantizer that trains one, `[]`, a whole number held in float."""
        found = {}
        for name, i in self._shift_index.items():
            grid = self.grids[name]
            moved = grid.zero_point + (grid.high - grid.low) * self.shift[i]
            found[name] = round_ste(moved.clamp(grid.low, grid.high))
        return found

    def sharing(self, name: str) -> tuple[ActivationGrid, ...]:
        """List the grids of a quantizer and of all that have one scale with it whatever the hardware can do."""
        return tuple(self.grids[n] for n in self._shared.get(name, (name,)))

    def trained(self, quantizers: Collection[str] | None) -> list[Tensor]:
        """List the parameters of some quantizers, steps first.

        A scale that several quantizers share, or are shifts of, trains where all of them do.

        Args:
            quantizers: names of those that train, `None` for all.
        """
        roots = {name: self._root.get(name, name) for name in self._step_index}
        fixed = set() if quantizers is None else {root for name, root in roots.items() if name not in quantizers}
        names = [name for name, root in roots.items() if root not in fixed]
        steps = dict.fromkeys(self._step_index[name] for name in names)
        shifts = dict.fromkeys(i for name, i in self._shift_index.items() if name in names)
        return [*(self.log_s[i] for i in steps), *(self.shift[i] for i in shifts)]


def _numbered(names: Collection[str], groups: Sequence[Sequence[str]]) -> tuple[dict[str, int], list[str]]:
    """Number the trained values, one for each group; returns the number of each name, and a name for each number."""
    first = {name: group[0] for group in groups for name in group}
    own = list(dict.fromkeys(first.get(name, name) for name in names))
    return {name: own.index(first.get(name, name)) for name in names}, own


def tied_grids(
    grids: Mapping[str, ActivationGrid], groups: Sequence[Sequence[str]], kind: Elementwise
) -> dict[str, ActivationGrid]:
    """Start the scales of addends where the hardware's constraint between them holds (App. D).

    Args:
        grids: grid of each activation quantizer by name.
        groups: names of the quantizers that an addition ties to each other.
        kind: `"none"` gives each group its largest scale; `"power_of_two"` rounds the ratio to the group's first.
    """
    tied = dict(grids)
    for group in groups:
        scales = [grids[name].scale for name in group]
        for name, scale in zip(group, scales, strict=True):
            if kind == "none":
                tied[name] = replace(grids[name], scale=max(scales))
            elif kind == "power_of_two":
                tied[name] = replace(grids[name], scale=scales[0] * 2.0 ** round(math.log2(scale / scales[0])))
    return tied


def shared_grids(grids: Mapping[str, ActivationGrid], groups: Sequence[Sequence[str]]) -> dict[str, ActivationGrid]:
    """Start quantizers that have one scale, and one zero point where theirs train, in each group, clipping nothing.

    Args:
        grids: grid of each activation quantizer by name.
        groups: names of the quantizers with one scale.
    """
    shared = dict(grids)
    for group in groups:
        members = [grids[name] for name in group]
        scale = max(grid.scale for grid in members)
        if can_share_zero_point(members):
            low, high = members[0].low, members[0].high
            smallest = min(grid.scale * (grid.low - grid.zero_point) for grid in members)
            largest = max(grid.scale * (grid.high - grid.zero_point) for grid in members)
            scale = (largest - smallest) / (high - low)
            zero_point = min(max(low - round(smallest / scale), low), high)
            shared |= {name: replace(grids[name], scale=scale, zero_point=zero_point) for name in group}
        else:
            shared |= {name: replace(grids[name], scale=scale) for name in group}
    return shared
