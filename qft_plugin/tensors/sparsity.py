"""Which weights are zero: masks by magnitude, anywhere or two of every four."""

import functools
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from qft_plugin.config import Sparsity
from qft_plugin.tensors.axes import Axes

FOUR: Final = 4
TWO: Final = 2

Mask = Callable[[Tensor], Tensor]
"""From a weight in units of its step to a boolean tensor of its shape, true where it is kept."""


def smallest_dropped(u: Tensor, *, share: float) -> Tensor:
    """Keep all but a share of the weights, the smallest ones.

    Exactly `round(share * elements)` are dropped, whatever ties there are.

    Args:
        u: a weight in units of its step.
        share: 0 keeps all, 1 none.

    Returns:
        A boolean tensor of the shape of `u`, true where the weight is kept.
    """
    magnitude = u.abs().flatten()
    dropped = magnitude.topk(round(share * u.numel()), largest=False, sorted=False).indices
    return torch.ones_like(magnitude, dtype=torch.bool).index_fill_(0, dropped, False).view(u.shape)


def two_of_four(u: Tensor, axes: Axes) -> Tensor:
    """Keep the two largest of every four weights that stand side by side on the axis of the input channels.

    This is the axis that sparse matrix kernels sum over. Fours are counted inside each group from its first channel,
    at every position of the kernel by itself; of a last three channels two are kept, of two or one all, as if weights
    of 0 followed. Where a group has fewer than four input channels (a depthwise kernel has one, the first layer of an
    image network three) no kernel can use the pattern: `mask_of` leaves such layers dense.

    Args:
        u: a weight in units of its step, in torch order.
        axes: the meaning of its axes.

    Returns:
        A boolean tensor of the shape of `u`, true where the weight is kept.
    """
    grouped = u.abs().reshape(axes.groups if axes.transposed else 1, -1, *u.shape[1:])
    axis = 1 if axes.transposed else 2
    last = grouped.movedim(axis, -1)
    channels = last.shape[-1]
    # What fills up the last four is smaller than any magnitude, so it is dropped first.
    fours = nn.functional.pad(last, (0, -channels % FOUR), value=-1.0).reshape(*last.shape[:-1], -1, FOUR)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.topk(TWO, sorted=False).indices, True)
    return kept.flatten(-2)[..., :channels].movedim(-1, axis).reshape(u.shape)


def mask_of(W: Tensor, axes: Axes, sparsity: Sparsity, *, kept: Tensor | None = None) -> Mask | None:
    """Return the function that chooses the weights that are kept; `None` where all are.

    Weights of normalisations are never dropped, and no layer with fewer than four input channels (in each group) gets
    a 2:4 mask.

    Args:
        W: the weight.
        axes: the meaning of its axes.
        sparsity: the setting.
        kept: true where the weight is not pruned already; `None` where all of it may be any number.
    """
    mask: Mask | None = None
    if sparsity is not None and axes.kind != "layer_norm":
        if sparsity != "2:4":
            mask = functools.partial(smallest_dropped, share=float(sparsity))
        elif axes.channels(W)[0] // axes.groups >= FOUR:
            mask = functools.partial(two_of_four, axes=axes)
    return mask if kept is None else functools.partial(_kept_by_both, kept=kept, mask=mask)


def _kept_by_both(u: Tensor, *, kept: Tensor, mask: Mask | None) -> Tensor:
    return kept if mask is None else kept & mask(u.masked_fill(~kept, 0))


def masked(x: Tensor, kept: Tensor) -> Tensor:
    """Set dropped weights to 0; the gradient passes straight through, so that one can come back.

    Departure: SR-STE (Zhou et al. 2021, 2102.04010) also decays the weights that are dropped, against masks that
    change too often over hundreds of epochs; one short finetune at a small learning rate has no time for that.
    """
    return x - x.masked_fill(kept, 0).detach()
