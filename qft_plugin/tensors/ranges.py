"""Scales and zero points from the range of observed values."""

from typing import Final

import torch
from torch import Tensor

from qft_plugin.tensors.grid import to_integer

SMALLEST_SCALE: Final = 1e-12
"""Keeps the scale of an all-zero slice positive; its integers are 0 whatever the scale is."""

MSE_CANDIDATES: Final = 80


def range_max(x: Tensor, *, low: int, high: int) -> Tensor:
    """Choose the smallest scale that clips nothing (naive max).

    Args:
        x: observed values, any shape, real units.
        low: smallest integer of the grid, at most 0.
        high: largest integer of the grid.

    Returns:
        The scale, `[]`, real per step.
    """
    scale = x.amax() / high if high > 0 else x.new_zeros(())
    if low < 0:
        scale = torch.maximum(scale, x.amin() / low)
    return scale.clamp(min=SMALLEST_SCALE)


def range_mse(x: Tensor, *, low: int, high: int) -> Tensor:
    """Choose the scale with the smallest squared error of Eq. (1), by search below the naive maximum.

    Args:
        x: observed values, any shape, real units.
        low: smallest integer of the grid, at most 0.
        high: largest integer of the grid.

    Returns:
        The scale, `[]`, real per step.
    """
    scales = range_max(x, low=low, high=high) * _shrinks(x)
    return scales[_best(x, [(s, 0) for s in scales], low=low, high=high)]


def shifted_range_max(x: Tensor, *, low: int, high: int) -> tuple[Tensor, int]:
    """Choose the smallest scale that clips nothing, and the integer of the real 0.

    Args:
        x: observed values, any shape, real units.
        low: smallest integer of the grid.
        high: largest integer of the grid.

    Returns:
        The scale, `[]`, real per step, and the zero point.
    """
    return _shifted(*_ends(x), low=low, high=high)


def shifted_range_mse(x: Tensor, *, low: int, high: int) -> tuple[Tensor, int]:
    """Choose the scale and the zero point with the smallest squared error, by search inside the extremes.

    First both ends shrink together, then each alone.

    Args:
        x: observed values, any shape, real units.
        low: smallest integer of the grid.
        high: largest integer of the grid.

    Returns:
        The scale, `[]`, real per step, and the zero point.
    """
    smallest, largest = _ends(x)

    def best(ends: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return ends[_best(x, [_shifted(*pair, low=low, high=high) for pair in ends], low=low, high=high)]

    shrinks = _shrinks(x)
    a, b = best([(smallest * r, largest * r) for r in shrinks])
    a, b = best([(a, b), *((smallest * r, b) for r in shrinks)])
    a, b = best([(a, b), *((a, largest * r) for r in shrinks)])
    return _shifted(a, b, low=low, high=high)


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of a range that holds 0."""
    return x.amin().clamp(max=0), x.amax().clamp(min=0)


def _shifted(smallest: Tensor, largest: Tensor, *, low: int, high: int) -> tuple[Tensor, int]:
    """Return the scale of a grid over a range, and the integer of the real 0."""
    scale = ((largest - smallest) / (high - low)).clamp(min=SMALLEST_SCALE)
    return scale, int((low - smallest / scale).round().clamp(low, high))


def _shrinks(x: Tensor) -> Tensor:
    return torch.linspace(0.1, 1, MSE_CANDIDATES, dtype=x.dtype, device=x.device)


def _best(x: Tensor, grids: list[tuple[Tensor, int]], *, low: int, high: int) -> int:
    """Return the position of the scale and zero point with the smallest squared error."""
    errors = [(to_integer(x, s, low=low - z, high=high - z) * s - x).square().sum() for s, z in grids]
    return int(torch.stack(errors).argmin())
