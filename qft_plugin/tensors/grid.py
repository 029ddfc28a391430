"""Integers that stand for real numbers: grids, rounding onto them, and factors that hardware can multiply by."""

import torch
from torch import Tensor

ZeroPoint = int | Tensor
"""An integer, or one held in a float tensor `[]` that trains."""


def largest_integer(bits: int) -> int:
    """Return the largest integer of a signed grid: 2^(bits - 1) - 1."""
    return (1 << (bits - 1)) - 1


def signed_peak(values: Tensor) -> int:
    """Return the largest number that signed integers must reach to hold these: -128 needs no more than 127."""
    return int(max(float(values.amax()), -float(values.amin()) - 1))


def integer_range(bits: int, *, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """Return the smallest and the largest integer of a grid.

    Args:
        bits: bit width, at least 2 where `narrow`, else at least 1.
        signed: two's complement, else starting at 0.
        narrow: drop the most negative integer, so that the signed grid is symmetric (Eq. 1).
    """
    if not signed:
        return 0, 2**bits - 1
    high = largest_integer(bits)
    return (-high if narrow else -high - 1), high


def to_integer(x: Tensor, scale: Tensor, *, low: int, high: int, zero_point: ZeroPoint = 0) -> Tensor:
    """Quantize to integers held in float.  Eq. (1):  x_int = clip(round(x / scale) + zero_point, low, high).

    Ties round to even, as in torch, NumPy and the CPU runtimes.
    """
    return (x / scale).round_().add_(zero_point).clamp_(low, high)


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer; the straight-through estimator lets the gradient pass unchanged."""
    return x + (x.round() - x).detach()


def quantize_factor(F: Tensor, kind: str | int) -> Tensor:
    """Round a rescale factor to what the hardware can multiply by; the straight-through estimator passes the gradient.

    Args:
        F: any shape, greater than 0, output steps per accumulator step.
        kind: `"float"` keeps it; `"power_of_two"` rounds its logarithm; a number keeps so many significant bits.
    """
    if kind == "float":
        return F
    if kind == "power_of_two":
        return torch.exp2(round_ste(F.log2()))
    unit = torch.exp2(F.detach().log2().floor() + 1 - int(kind))
    return round_ste(F / unit) * unit
