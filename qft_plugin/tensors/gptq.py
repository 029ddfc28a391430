"""A better start for the weights: rounding errors that compensate each other, and those of the layers before.

Three known steps, one after the other, for each row of a kernel by itself:

- the target of the row moves, so that on the inputs that the quantized network has, which differ from those of the
  float network, its outputs are those of the float network (asymmetric calibration, GPTAQ, Li et al. 2025, 2504.02692);
- its weights are rounded one after the other, and the error of each is spread over those that are still free, the
  largest inputs first (GPTQ, Frantar et al. 2022, 2210.17323, with its activation order);
- each integer in turn is chosen anew for the others as they are (coordinate descent, QuantEase, Behdin et al. 2023,
  2309.01885).

Departure: the paper (QFT) starts its finetune from weights rounded to the nearest integer. This start takes seconds,
and a finetune from the nearest integers that takes ten times as long does not come as close to the float network.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

DAMPING: Final = 0.03
"""Share of the mean diagonal that is added to it, so that inputs that hardly vary do not decide."""

TARGET_DAMPING: Final = 0.1
"""Likewise, where the target moves: a regression of as many unknowns as there are columns, which must hold for other
images too."""

SWEEPS: Final = 2
"""How often each integer is chosen anew; later ones change next to nothing."""

BLOCK: Final = 32
"""Columns that are rounded before the rest of the row hears of their errors in one matrix product."""

LARGEST: Final = 2304
"""Columns of the largest matrix of moments. Wider rows are cut into parts, whose errors compensate each other inside a
part only: time and memory then grow with the number of columns, and not with its third and second power."""

ELEMENTS: Final = 1 << 21
"""Weights that are rounded at a time; the rows of a kernel are independent."""

OUTERMOST: Final = 0.49
"""How far from its integer, in steps, a weight may start: it must round to it, and the clip still pass its gradient."""


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


def moments_of(rows: Tensor, parts: Parts, others: Tensor | None = None) -> Tensor:
    """Return the second moments of inputs inside each part, sum of y x^T over all rows.

    Args:
        rows: x, `[groups, rows, columns]`.
        parts: how the columns are cut.
        others: y, likewise; `None` where it is x.

    Returns:
        `[groups * parts, size, size]`.
    """
    cut = parts.cut(rows)
    return (cut if others is None else parts.cut(others)).transpose(1, 2) @ cut


def compensated_kernel(
    W: Tensor, step: Tensor, H: Tensor, *, groups: int, high: int, D: Tensor | None = None, sweeps: int = SWEEPS
) -> Tensor:
    """Move the weights of a kernel so that rounding each to the nearest integer gives a small error of the outputs.

    Args:
        W: `[out, in/groups, *k]`, real units.
        step: broadcasts against `W`, real per step.
        H: the moments of the inputs x that the quantized kernel will have, the result of `moments_of`.
        groups: number of groups.
        high: largest integer; the grid is symmetric (narrow range).
        D: likewise the moments of y - x with x, where the float kernel has the inputs y; `None` where both are alike.
        sweeps: how often each integer is chosen anew.

    Returns:
        Of the shape of `W`: for each weight the best value for the integers of the others, at most half a step from the
        integer that was chosen. The sum of  (w y - q x)^2  over all inputs is small.

    Raises:
        RuntimeError: the moments are not positive definite.
    """
    parts = parts_of(W)
    moments = _Moments.of(H, D, parts, groups)
    per_group = W.shape[0] // groups
    some = max(1, ELEMENTS // (groups * parts.columns))
    result = torch.empty_like(W)
    grouped, moved, steps = (torch.unflatten(t, 0, (groups, per_group)) for t in (W, result, step.expand_as(W)))
    for start in range(0, per_group, some):
        rows, scales = (parts.cut(t[:, start : start + some].flatten(2).double()) for t in (grouped, steps))
        found = _rounded(rows, scales.clamp(min=torch.finfo(W.dtype).tiny), moments, high=high, sweeps=sweeps)
        moved[:, start : start + some] = parts.joined(found).reshape(moved[:, start : start + some].shape).to(W)
    return result


@dataclass(frozen=True)
class _Moments:
    """The moments of all parts, with their columns in the order in which they are rounded.

    Attributes:
        order: number of each column, `[groups * parts, size]`.
        H: the damped moments, `[groups * parts, size, size]`.
        U: the Cholesky factor of their inverse, likewise.
        shift: what a row is multiplied by, in its own order, to be its target, likewise; `None` for the row itself.
    """

    order: Tensor
    H: Tensor
    U: Tensor
    shift: Tensor | None

    @classmethod
    def of(cls, H: Tensor, D: Tensor | None, parts: Parts, groups: int) -> "_Moments":
        """Damp and factorize the moments."""
        diagonal = H.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.reshape(groups, -1).sum(1, keepdim=True) / parts.columns
        means = mean.clamp(min=torch.finfo(H.dtype).tiny).repeat_interleave(parts.count, 0)
        order = diagonal.argsort(dim=1, descending=True, stable=True)
        ordered, factors, shifts = [], [], []
        for number, part in enumerate(H):  # one at a time: each needs several matrices of its size
            first = order[number]
            damped = _damped(part, DAMPING * means[number])[first][:, first]
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
            ordered.append(damped)
            factors.append(torch.linalg.cholesky(inverse, upper=True))
            if D is not None:
                factor = torch.linalg.cholesky(_damped(part, TARGET_DAMPING * means[number]))
                shifts.append(torch.cholesky_solve(D[number].T.contiguous(), factor).T)
        shift = None
        if D is not None:
            shift = torch.stack(shifts)
            shift.diagonal(dim1=-2, dim2=-1).add_(1)
        return cls(order, torch.stack(ordered), torch.stack(factors), shift)


def _damped(H: Tensor, damping: Tensor) -> Tensor:
    return H + torch.diag(damping.expand(len(H)))


def _rounded(W: Tensor, step: Tensor, moments: _Moments, *, high: int, sweeps: int) -> Tensor:
    """Round inside each part; the weights and what is returned are `[groups * parts, rows, columns]`."""
    target = W if moments.shift is None else W @ moments.shift
    order = moments.order.unsqueeze(1).expand_as(W)
    # Columns first: each is then read and written in one piece.
    target, step = (t.gather(2, order).transpose(1, 2).contiguous() for t in (target, step))
    moved = _compensated(target.clone(), step, moments.U, high=high)
    if sweeps:
        moved = _descended(target, moved, step, moments.H, high=high, sweeps=sweeps)
    return torch.empty_like(W).scatter_(2, order, moved.transpose(1, 2))


def _compensated(W: Tensor, step: Tensor, U: Tensor, *, high: int) -> Tensor:
    """Spread the errors inside each part (OBQ's update with one order for all rows; GPTQ's Cholesky form).

    Args:
        W: `[groups * parts, columns, rows]`; it is used up.
        step: likewise.
        U: `[groups * parts, columns, columns]`.
        high: largest integer.

    Returns:
        The weights just before each was rounded.
    """
    columns = W.shape[1]
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
    return result


def _descended(target: Tensor, moved: Tensor, step: Tensor, H: Tensor, *, high: int, sweeps: int) -> Tensor:
    """Choose each integer anew for the others as they are, column by column.

    With q at column j, the error  (w - q) H (w - q)^T  is smallest at  q_j + ((w - q) H)_j / H_jj.

    Args:
        target: w, `[groups * parts, columns, rows]`.
        moved: values that round to the first q, likewise.
        step: likewise.
        H: the moments, `[groups * parts, columns, columns]`.
        high: largest integer.
        sweeps: over all columns.

    Returns:
        The best value of each weight, kept next to its integer.
    """
    columns, diagonal = target.shape[1], H.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    Q = (moved / step).round_().clamp_(-high, high).mul_(step)
    R = H @ (target - Q)
    for start in [*range(0, columns, BLOCK)] * sweeps:
        end = min(start + BLOCK, columns)
        changes = torch.zeros_like(Q[:, start:end])
        for j in range(start, end):
            s = step[:, j]
            q = (Q[:, j] + R[:, j] / diagonal[:, j]).div_(s).round_().clamp_(-high, high).mul_(s)
            change = q - Q[:, j]
            Q[:, j], changes[:, j - start] = q, change
            R[:, start:end].addcmul_(change.unsqueeze(1), H[:, j, start:end].unsqueeze(-1), value=-1)
        for rest in (slice(0, start), slice(end, columns)):
            R[:, rest] -= H[:, rest, start:end] @ changes
    limit = OUTERMOST * step
    return Q + torch.minimum(torch.maximum(R / diagonal, -limit), limit)
