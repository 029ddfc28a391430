"""A kernel of which a part trains, while the rest keeps its integers (EfQAT, arXiv 2411.11038)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qft_plugin.tensors.axes import Axes
from qft_plugin.tensors.fake_quantize import multiplied
from qft_plugin.tensors.partial_gradients import PartialWeight
from qft_plugin.training.rounding import NearestRounding, moved_to


@dataclass
class Held:
    """A kernel of which a part trains; all others keep their integers.

    Attributes:
        integers: of all channels when this was chosen, held in float, of the shape of the kernel.
        trained: which channels train, `[out]`.
        index: the same by number, in rising order, `[rows]`.
        touched: the groups that these are in, in rising order.
        rows: the stored float weight of these channels, `[rows, in/groups, *k]`.
    """

    integers: Tensor
    trained: Tensor
    index: Tensor
    touched: Tensor
    rows: Tensor


def held_part(W: Tensor, integers: Tensor, trained: Tensor, axes: Axes) -> Held:
    """Take the rows that train out of a kernel.

    Args:
        W: the stored float weight.
        integers: those that it rounds to, held in float.
        trained: which channels train, `[out]`.
        axes: the meaning of the kernel's axes.
    """
    index = trained.nonzero().flatten()
    touched = torch.unique_consecutive(torch.div(index, len(trained) // axes.groups, rounding_mode="floor"))
    rows = axes.by_output(W.detach()).index_select(0, index)
    if W.dim() == 4 and W.is_contiguous(memory_format=torch.channels_last):
        rows = rows.contiguous(memory_format=torch.channels_last)
    return Held(integers, trained, index, touched, rows.requires_grad_())


def settled(held: Held, W: Tensor, units: tuple[Tensor, ...], step: Tensor, axes: Axes) -> Tensor:
    """Return the stored float weight of a kernel: its trained rows, and values that round to the integers of the rest.

    Args:
        held: the kernel.
        W: the stored float weight before.
        units: what a stored weight is multiplied by, in this order, to be the folded one.
        step: of the folded kernel, broadcasts against it, real per step.
        axes: the meaning of the kernel's axes.
    """
    moved = moved_to(held.integers, multiplied(W, units), step)
    for unit in reversed(units):
        moved = moved / unit
    return _with_rows(moved, held, held.rows.detach(), axes)


def _with_rows(W: Tensor, held: Held, rows: Tensor, axes: Axes) -> Tensor:
    """Put rows into a kernel that nobody else holds: in place, because a copy would lose its memory format."""
    return axes.from_output(axes.by_output(W).index_copy_(0, held.index, rows))


def _rows(t: Tensor, held: Held, axes: Axes) -> Tensor:
    """Take the rows that train of what broadcasts against the kernel; a scalar stays one."""
    if not t.dim():
        return t
    if not axes.transposed and len(t) == len(held.trained):
        return t.index_select(0, held.index)
    return axes.by_output(t.expand(held.integers.shape)).index_select(0, held.index)


def partly_trained(
    held: Held, units: tuple[Tensor, ...], step: Tensor, scale: Tensor, element: NearestRounding, axes: Axes
) -> tuple[Tensor, PartialWeight | None]:
    """Compute the kernel that the online graph uses.

        W_used[o] = step[o] * clip(round(W[o] / step[o]))   where o trains, else   step[o] * integers[o]

    Args:
        held: the kernel.
        units: what a stored weight is multiplied by, in this order, to be the folded one.
        step: of the folded kernel, broadcasts against it, real per step.
        scale: the part of the step that trains, `[]` or `[out]`.
        element: makes integers of the rows.
        axes: the meaning of the kernel's axes.

    Returns:
        The kernel, an ordinary differentiable tensor, and what its cheaper backward pass needs, `None` where all train.
    """
    gain = scale / scale.detach()
    if not len(held.index):
        W = held.integers * step
        return W, PartialWeight(W, held.rows, held.index, held.touched, gain)
    rows = multiplied(held.rows, (_rows(unit, held, axes) for unit in units))
    used = element(rows, _rows(step, held, axes), 1.0)
    if len(held.index) == len(held.trained):
        return axes.from_output(used), None
    W = _with_rows(held.integers * step, held, used, axes)
    return W, PartialWeight(W, used, held.index, held.touched, gain)
