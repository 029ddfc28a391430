"""Differences of two tensors, channel by channel."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

CLOSE: Final = 3e-3
"""Largest difference of a stretch, relative to the largest value of the channel: sums of float32 stay
below 1e-4, a normalisation of little variance at 2e-3; one step of one of 4,608 weights of a channel is 5e-3."""

QUIET: Final = 0.01
"""A channel counts as at least this share of the largest one: float32 rounding is relative to the summands."""

EQUAL: Final = 1e-5
"""Largest relative difference of a constant."""

NEAR: Final = 0.5
"""A tensor whose channels differ by more than this in the median is that of another layer."""

SAMPLED: Final = 6
"""How many places along each axis but that of the channels are looked at first."""


def channel_axis(t: Tensor) -> int:
    """Return the axis of the channels: the first after the images, the last one of tokens."""
    return 1 if t.dim() in (2, 4, 5) else max(t.dim() - 1, 0)


def sampled(t: Tensor, scale: Tensor | None = None) -> tuple[slice, ...]:
    """Return an index of a few places of all channels, and of all that have scales of their own."""
    kept = {channel_axis(t)}
    if scale is not None:
        kept |= {t.dim() - scale.dim() + k for k, size in enumerate(scale.shape) if size > 1}
    steps = [1 if k in kept else max(1, -(-size // SAMPLED)) for k, size in enumerate(t.shape)]
    return tuple(slice(None, None, step) for step in steps)


def channel_errors(expected: Tensor, found: Tensor) -> Tensor:
    """Return the largest difference in each channel, relative to the largest value there, `[channels]`."""
    both = torch.isfinite(expected) & torch.isfinite(found)
    same = (expected == found) | (torch.isnan(expected) & torch.isnan(found))
    gap = torch.where(both, (expected - found).abs(), torch.where(same, 0.0, torch.inf))
    size = torch.where(torch.isfinite(expected), expected.abs(), 0.0)
    axis = channel_axis(expected)
    if expected.dim() > 1:
        gap = gap.movedim(axis, 0).flatten(1).amax(1)
        size = size.movedim(axis, 0).flatten(1).amax(1)
    else:
        gap, size = gap.amax().reshape(1), size.amax().reshape(1)
    return gap / (size + QUIET * size.max()).clamp(min=1e-30)


def channel_fit(expected: Tensor, found: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Fit one factor for each channel; returns the factors and the largest relative difference that is left."""
    e, f = (t.movedim(axis, 0).flatten(1) for t in (expected, found))
    # The squares of what a dead part of a network computes would be 0 in float32.
    e_top, f_top = (t.abs().max().clamp(min=1e-37) for t in (e, f))
    e, f = e / e_top, f / f_top
    ratio = (e * f).sum(1) / (f * f).sum(1).clamp(min=1e-30)
    size = e.abs().amax(1)
    left = (e - ratio.unsqueeze(1) * f).abs().amax(1) / (size + QUIET * size.max()).clamp(min=1e-30)
    return ratio * (e_top / f_top), left


def listed(channels: Sequence[int]) -> str:
    """List the numbers of the first channels, and say how many more there are."""
    return ", ".join(str(c) for c in channels[:5]) + (f" and {len(channels) - 5} more" if len(channels) > 5 else "")


def shown(values: Tensor) -> str:
    """Write the first numbers of a constant."""
    first = ", ".join(f"{float(v):.6g}" for v in values.flatten()[:3])
    return f"{first}, ..." if values.numel() > 3 else first
