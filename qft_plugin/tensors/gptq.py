"""A better start for the weights: rounding errors that compensate each other (GPTQ, Frantar et al. 2022, 2210.17323).

Departure: the paper starts its finetune from weights rounded to the nearest integer. Starting where the errors of a row
already cancel on typical inputs needs seconds, and after the same finetune the student is closer to its teacher.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

DAMPING: Final = 0.01
"""Share of the mean diagonal that is added to it, so that inputs that hardly vary do not decide."""

BLOCK: Final = 32
"""Columns that are rounded before the rest of the row hears of their errors in one matrix product."""

LARGEST: Final = 2304
"""Columns of the largest matrix of moments. Wider rows are cut into parts, whose errors compensate each other inside a
part only: time and memory then grow with the number of columns, and not with its third and second power."""

ELEMENTS: Final = 1 << 21
"""Weights that are rounded at a time; the rows of a kernel are independent."""

OUTERMOST: Final = 0.49
"""How far beyond its outermost integer a weight may start: the clip must still pass its gradient."""


@dataclass(frozen=True)
class Parts:
    """How the columns of a kernel are cut: into `count` parts of `size` columns, of which the last ends with zeros.

    Attributes:
        columns: weights of one output.
        count: number of parts.
        size: columns of each; whole input channels of a convolution.
    """

    columns: int
    count: int
    size: int

    def cut(self, rows: Tensor) -> Tensor:
        """Cut `[groups, rows, columns]` into `[groups * count, rows, size]`."""
        padded = functional.pad(rows, (0, self.count * self.size - self.columns))
        return torch.unflatten(padded, 2, (self.count, self.size)).transpose(1, 2).flatten(0, 1)

    def joined(self, parts: Tensor) -> Tensor:
        """Undo `cut`."""
        rows = torch.unflatten(parts, 0, (-1, self.count)).transpose(1, 2).flatten(2)
        return rows[..., : self.columns]


def parts_of(W: Tensor) -> Parts:
    """Cut the columns of a kernel, `[out, in/groups, *k]`, into equal parts of at most about `LARGEST`."""
    columns = W[0].numel()
    channel = columns // W.shape[1]
    count = min(-(-columns // LARGEST), W.shape[1])
    return Parts(columns, count, -(-W.shape[1] // count) * channel)


def moments_of(rows: Tensor, parts: Parts) -> Tensor:
    """Return the second moments of inputs, sum of x x^T, inside each part.

    Args:
        rows: `[groups, rows, columns]`.
        parts: how the columns are cut.

    Returns:
        `[groups * parts, size, size]`.
    """
    cut = parts.cut(rows)
    return cut.transpose(1, 2) @ cut


def compensated_kernel(W: Tensor, step: Tensor, H: Tensor, *, groups: int, high: int) -> Tensor:
    """Move the weights of a kernel so that rounding each to the nearest integer gives a small error of the outputs.

    Column by column the error of rounding is spread over the columns that are still free, so that
    sum_x (w x - q x)^2  stays small (OBQ's update with one order for all rows; GPTQ's Cholesky form).

    Args:
        W: `[out, in/groups, *k]`, real units.
        step: broadcasts against `W`, real per step.
        H: the result of `moments_of`, summed over inputs.
        groups: number of groups.
        high: largest integer; the grid is symmetric (narrow range).

    Returns:
        The weights just before each was rounded, of the shape of `W`.

    Raises:
        RuntimeError: the moments are not positive definite.
    """
    parts = parts_of(W)
    U = _propagation(H, parts, groups)
    per_group = W.shape[0] // groups
    some = max(1, ELEMENTS // (groups * parts.columns))
    result = torch.empty_like(W)
    grouped, moved, steps = (torch.unflatten(t, 0, (groups, per_group)) for t in (W, result, step.expand_as(W)))
    for start in range(0, per_group, some):
        rows, scales = (parts.cut(t[:, start : start + some].flatten(2).double()) for t in (grouped, steps))
        found = _compensated(rows, scales.clamp(min=torch.finfo(W.dtype).tiny), U, high=high)
        moved[:, start : start + some] = parts.joined(found).reshape(moved[:, start : start + some].shape).to(W)
    return result


def _propagation(H: Tensor, parts: Parts, groups: int) -> Tensor:
    """Return the Cholesky factor of the inverse of the damped moments, `[groups * parts, size, size]`."""
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.reshape(groups, -1).sum(1, keepdim=True) / parts.columns
    damping = DAMPING * mean.clamp(min=torch.finfo(H.dtype).tiny).repeat_interleave(parts.count, 0)
    found = []
    for part, extra in zip(H, damping, strict=True):  # one at a time: each needs several matrices of its size
        damped = part + torch.diag(extra.expand(part.shape[0]))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        found.append(torch.linalg.cholesky(inverse, upper=True))
    return torch.stack(found)


def _compensated(W: Tensor, step: Tensor, U: Tensor, *, high: int) -> Tensor:
    """Spread the errors inside each part; all are `[groups * parts, rows, columns]`, U has a square for each part."""
    columns = W.shape[-1]
    # Columns first: each is then read and written in one piece.
    W, step = (t.transpose(1, 2).contiguous() for t in (W, step))
    result = torch.empty_like(W)
    limit = (high + OUTERMOST) * step
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.zeros_like(W[:, start:end])
        for j in range(start, end):
            w = torch.minimum(torch.maximum(W[:, j], -limit[:, j]), limit[:, j])
            s = step[:, j]
            q = (w / s).round().clamp(-high, high) * s
            result[:, j] = w
            error = (W[:, j] - q).div_(U[:, j, j].unsqueeze(-1))
            W[:, j + 1 : end].addcmul_(error.unsqueeze(1), U[:, j, j + 1 : end].unsqueeze(-1), value=-1)
            errors[:, j - start] = error
        W[:, end:] -= U[:, start:end, end:].transpose(1, 2) @ errors
    return result.transpose(1, 2)
