"""Where the scales of activations start, from what their quantizers see: the same however the images are batched."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from qft_plugin.graph.placement import ActivationGrid
from qft_plugin.graph.torch_model import Call
from qft_plugin.tensors.ranges import range_max, range_mse, shifted_range_max, shifted_range_mse
from qft_plugin.training.data import Inputs
from qft_plugin.training.student import Watcher

BATCH: Final = 64
"""Images that a network is run on at a time, at most, whatever the batches of the dataset are."""

RANGE_IMAGES: Final = 256
"""Images that are looked at."""

RANGE_VALUES: Final = 1 << 17
"""Values of each activation that an "mse" range is searched on."""


@dataclass(frozen=True)
class _Seen:
    """Some values of an activation that stand for `count` of them."""

    values: Tensor
    count: int


def activation_grids(
    grids: Mapping[str, ActivationGrid],
    observe: Callable[[Call, Watcher], None],
    inputs: Inputs,
    kind: Literal["max", "mse"],
) -> dict[str, ActivationGrid]:
    """Choose the scale of each activation quantizer, and the zero point of those that shift, on the first images.

    Args:
        grids: those of the host, by name of the quantizer; one that sees nothing stays as it is.
        observe: runs the float network on a batch and shows what each quantizer would have had as its input.
        inputs: the images.
        kind: `"max"` clips nothing, `"mse"` has the smallest squared error on a sample of the values.
    """
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, list[_Seen]] = {}

    def watch(name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        flat = x.detach().flatten()
        flat = flat if flat.is_floating_point() else flat.float()  # hosts quantize whole numbers too
        kept = torch.stack([flat.amin(), flat.amax()]) if kind == "max" else _sample(flat, RANGE_VALUES, generator)
        seen.setdefault(name, []).append(_Seen(kept, flat.numel()))

    for call in inputs.batches(inputs.at_once(BATCH), at_most=RANGE_IMAGES):
        observe(call, watch)
        if kind == "mse":
            seen = {name: [_merged(parts, generator)] for name, parts in seen.items()}
    chosen = {name: _ranged(grids[name], torch.cat([s.values for s in parts]), kind) for name, parts in seen.items()}
    return {**grids, **chosen}


def _sample(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` random values, or all of them where they are fewer; a copy."""
    if values.numel() <= count:
        return values.clone()
    return values[torch.randint(values.numel(), (count,), generator=generator).to(values.device)]


def _merged(parts: list[_Seen], generator: torch.Generator) -> _Seen:
    """Join samples so that each has the weight of what it stands for."""
    total = sum(part.count for part in parts)
    limit = min(RANGE_VALUES, total)
    shares = [_sample(part.values, -(-limit * part.count // total), generator) for part in parts]
    return _Seen(torch.cat(shares), total)


def _ranged(grid: ActivationGrid, values: Tensor, kind: Literal["max", "mse"]) -> ActivationGrid:
    if grid.shifts:
        choose = shifted_range_max if kind == "max" else shifted_range_mse
        scale, zero_point = choose(values, low=grid.low, high=grid.high)
        return replace(grid, scale=float(scale), zero_point=zero_point)
    search = range_max if kind == "max" else range_mse
    scale = search(values, low=grid.low - grid.zero_point, high=grid.high - grid.zero_point)
    return replace(grid, scale=float(scale))
