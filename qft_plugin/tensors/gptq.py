"""A better start for the weights: rounding errors that compensate each other, and those of the layers before.

Three known steps, one after the other, for each row of a kernel by itself:

- the target of the row moves, so that on the inputs that the quantized network has, which differ from those of the
  float network, its outputs are those of the float network (asymmetric calibration, GPTAQ, Li et al. 2025, 2504.02692);
- its weights are rounded one after the other, and the error of each is spread over those that are still free, the
  largest inputs first (GPTQ, Frantar et al. 2022, 2210.17323, with its activation order);
- each integer in turn is chosen anew for the others as they are (coordinate descent, QuantEase, Behdin et al. 2023,
  2309.01885).

Departure: the paper (QFT) starts its finetune from weights rounded to the nearest integer. This start takes seconds,
and no finetune that was tried from GPTQ on the inputs of the float network came as close to it (docs/training.md).
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

DAMPING: Final = 0.03
"""Share of the mean diagonal that is added to it, so that inputs that hardly vary do not decide."""

TARGET_DAMPING: Final = 10.0
"""Likewise where the target moves, times columns over rows: a regression with as many unknowns as there are columns
must hold for other images too, and the fewer inputs it sees, the less it is trusted."""

MULTIPLES: Final = (1.0, 0.85, 0.92, 1.08)
"""Steps that are tried, relative to that with the smallest error of the weights."""

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

INWARD: Final = 0.5
"""Share of its way from its integer that a weight keeps. The integers were chosen for each other, but after the whole
way some weights are so near to the next integer that the first steps of a finetune turn them at random."""


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


LEAST_GAIN: Final = 0.8
"""What a target loses by noise is given back up to here: inputs that say less about the float ones are lost."""


@dataclass(frozen=True)
class Moved:
    """Where the inputs of the quantized kernel, x, have moved away from those of the float kernel, y.

    Attributes:
        D: sum of (y - x) x^T over all rows, `[groups * parts, size, size]`.
        S: sum of y y^T, likewise.
        rows: their number.
    """

    D: Tensor
    S: Tensor
    rows: int


class Compensation:
    """Rounds kernels so that errors compensate each other on given inputs.

    Attributes:
        order: number of each column of a part, in the order in which they are rounded, `[groups * parts, size]`.
        H: the damped moments in this order, `[groups * parts, size, size]`.
        U: the Cholesky factor of their inverse, likewise.
        shift: what a row is multiplied by, in its own order, to be its target; `None` for the row itself.
    """

    def __init__(self, W: Tensor, H: Tensor, *, groups: int, moved: Moved | None = None) -> None:
        """Damp and factorize the moments.

        Args:
            W: a kernel, `[out, in/groups, *k]`, for its shape.
            H: the moments of the inputs x that the quantized kernel will have, the result of `moments_of`.
            groups: number of groups.
            moved: where the float kernel has other inputs.

        Raises:
            LinAlgError: the moments are singular, or not positive definite.
        """
        self._parts, self._groups = parts_of(W), groups
        diagonal = H.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.reshape(groups, -1).sum(1, keepdim=True) / self._parts.columns
        means = mean.clamp(min=torch.finfo(H.dtype).tiny).repeat_interleave(self._parts.count, 0)
        self.order = diagonal.argsort(dim=1, descending=True, stable=True)
        ordered, factors, shifts = [], [], []
        for number, part in enumerate(H):  # one at a time: each needs several matrices of its size
            first = self.order[number]
            damped = _damped(part, DAMPING * means[number])[first][:, first]
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
            ordered.append(damped)
            factors.append(torch.linalg.cholesky(inverse, upper=True))
            if moved is not None:
                damping = TARGET_DAMPING * len(part) / moved.rows * means[number]
                factor = torch.linalg.cholesky(_damped(part, damping))
                shifts.append(torch.cholesky_solve(moved.D[number].T.contiguous(), factor).T)
        self.H, self.U = torch.stack(ordered), torch.stack(factors)
        self.shift, self._both = None, None
        if moved is not None:
            self.shift = torch.stack(shifts)
            self.shift.diagonal(dim1=-2, dim2=-1).add_(1)
            self._both = (moved.D + H).transpose(1, 2), moved.S

    def kernel(self, W: Tensor, step: Tensor, *, high: int, sweeps: int = SWEEPS) -> Tensor:
        """Move the weights of a kernel so that rounding each to the nearest integer gives a small error of the outputs.

        Args:
            W: `[out, in/groups, *k]`, real units.
            step: broadcasts against `W`, real per step.
            high: largest integer; the grid is symmetric (narrow range).
            sweeps: how often each integer is chosen anew.

        Returns:
            Of the shape of `W`: for each weight a value between its integer and the one that is best for the integers
            of the others, which is at most half a step away (`INWARD`). The sum of  (w y - q x)^2  over all inputs is
            small.
        """
        per_group = W.shape[0] // self._groups
        some = max(1, ELEMENTS // (self._groups * self._parts.columns))
        result = torch.empty_like(W)
        grouped, moved, steps = (
            torch.unflatten(t, 0, (self._groups, per_group)) for t in (W, result, step.expand_as(W))
        )
        for start in range(0, per_group, some):
            target, scales = self._ordered(grouped[:, start : start + some], steps[:, start : start + some])
            found = _compensated(target.clone(), scales, self.U, high=high)
            if sweeps:
                found = _descended(target, found, scales, self.H, high=high, sweeps=sweeps)
            found = found.transpose(1, 2)
            found = torch.empty_like(found).scatter_(2, self.order.unsqueeze(1).expand_as(found), found)
            part = moved[:, start : start + some]
            part.copy_(self._parts.joined(found).reshape(part.shape))
        return result

    def multiples(self, W: Tensor, step: Tensor, *, high: int, alike: bool) -> Tensor:
        """Choose by what the step should be multiplied for the smallest error after compensation.

        The step with the smallest error of the weights is a little too large: what is clipped can be made up for.

        Args:
            W: as in `kernel`.
            step: likewise.
            high: likewise.
            alike: whether all rows have one step.

        Returns:
            One of `MULTIPLES`, `[]`, or `[out]` where each row has a step of its own.
        """
        per_group = W.shape[0] // self._groups
        target, scales = self._ordered(
            *(torch.unflatten(t, 0, (self._groups, per_group)) for t in (W, step.expand_as(W)))
        )
        errors = []
        for multiple in MULTIPLES:
            scaled = scales * multiple
            error = target - _rounded(_compensated(target.clone(), scaled, self.U, high=high), scaled, high)
            squares = (self.H @ error).mul_(error).sum(1).view(self._groups, self._parts.count, per_group).sum(1)
            errors.append(squares.sum() if alike else squares.flatten())
        best: Tensor = W.new_tensor(MULTIPLES)[torch.stack(errors).argmin(0)]
        return best

    def _ordered(self, W: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Cut rows, `[groups, rows, ...]`, and give back their targets and steps, `[groups * parts, columns, rows]`."""
        tiny = torch.finfo(W.dtype).tiny
        rows, steps = (self._parts.cut(t.flatten(2).double()) for t in (W, step))
        target = rows if self.shift is None else self._moved(rows, rows @ self.shift)
        order = self.order.unsqueeze(1).expand_as(rows)
        # Columns first: each is then read and written in one piece.
        target, steps = (t.gather(2, order).transpose(1, 2).contiguous() for t in (target, steps.clamp(min=tiny)))
        return target, steps

    def _moved(self, rows: Tensor, target: Tensor) -> Tensor:
        """Give targets back what noise has taken off them: their outputs follow the float ones with a slope of 1.

        A regression on noisy inputs makes weights too small. The noise is gone from means over space, the loss is not.

        Args:
            rows: w, `[groups * parts, rows, columns]`.
            target: w', likewise.
        """
        assert self._both is not None
        x_y, y_y = self._both
        shape = (self._groups, self._parts.count, -1)
        found, wanted = (
            ((a @ moments) * rows).sum(2).view(shape).sum(1, keepdim=True)
            for a, moments in ((target, x_y), (rows, y_y))
        )
        slope = torch.where(wanted > 0, found / wanted, 1).clamp(LEAST_GAIN, 1)
        return target / slope.expand(shape).reshape(target.shape[:2]).unsqueeze(2)


def _damped(H: Tensor, damping: Tensor) -> Tensor:
    return H + torch.diag(damping.expand(len(H)))


def _rounded(W: Tensor, step: Tensor, high: int) -> Tensor:
    return (W / step).round_().clamp_(-high, high).mul_(step)


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
        A value of each weight between its integer and the best one (`INWARD`).
    """
    columns, diagonal = target.shape[1], H.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    Q = _rounded(moved, step, high)
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
    return Q + INWARD * torch.minimum(torch.maximum(R / diagonal, -limit), limit)
