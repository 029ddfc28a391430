"""Where the scales of activations start, as far as hardware ties them to each other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qft_plugin.config import Elementwise
from qft_plugin.graph.placement import ActivationGrid, can_share_zero_point


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
