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

BLOCK: Final = 16
"""Columns that are rounded before their neighbours hear of their errors in one matrix product."""

BLOCKS: Final = 4
"""Such groups of columns, before the rest of the row hears of the errors of all of them."""

LARGEST: Final = 2304
"""Columns of the largest matrix of moments. Wider rows are cut into parts, whose errors compensate each other inside a
part only: time and memory then grow with the number of columns, and not with its third and second power."""

ROWS_EACH: Final = 4
"""Rows of inputs for each column of a part where a kernel has more columns than there are rows. Weights that make up
for each other on few inputs do so for these alone: on 1,000 images that were not seen, a layer with 25,088 inputs had a
relative error of 0.121 in parts of `LARGEST` columns, of 0.133 as a whole and of 0.113 in parts of 250 (0.153 by
rounding to nearest; features of MobileNetV2, 1,000 images seen)."""

SYMMETRIC: Final = 256
"""Rows of a matrix of moments that are computed at a time, from their diagonal on."""

ELEMENTS: Final = 1 << 22
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
        if self.count == 1:
            return rows  # padding would copy it
        padded = functional.pad(rows, (0, self.count * self.size - self.columns))
        return torch.unflatten(padded, 2, (self.count, self.size)).transpose(1, 2).flatten(0, 1)

    def joined(self, parts: Tensor) -> Tensor:
        """Undo `cut`."""
        rows = torch.unflatten(parts, 0, (-1, self.count)).transpose(1, 2).flatten(2)
        return rows[..., : self.columns]


def parts_of(W: Tensor, rows: int) -> Parts:
    """Cut the columns of a kernel into equal parts of at most about `LARGEST`, and of fewer where rows are few.

    Args:
        W: `[out, in/groups, *k]`.
        rows: of inputs that its errors compensate each other on.
    """
    columns = W[0].numel()
    channel = columns // W.shape[1]
    largest = LARGEST if rows >= columns else min(LARGEST, max(1, rows // ROWS_EACH))
    count = min(-(-columns // largest), W.shape[1])
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
    if others is not None:
        return parts.cut(others).transpose(1, 2) @ cut
    moments = cut.new_empty(len(cut), parts.size, parts.size)
    for start in range(0, parts.size, SYMMETRIC):  # what stands below the diagonal has been computed above it
        some = slice(start, start + SYMMETRIC)
        moments[:, some, start:] = cut[..., some].transpose(1, 2) @ cut[..., start:]
        moments[:, start + SYMMETRIC :, some] = moments[:, some, start + SYMMETRIC :].transpose(1, 2)
    return moments


LEAST_GAIN: Final = 0.8
"""What a target loses by noise is given back up to here: inputs that say less about the float ones are lost."""


SLOPE_ROWS: Final = 4096
"""Rows, at most about, on which it is looked at what a target has lost: a number for each output needs no more."""


@dataclass(frozen=True)
class Moved:
    """Where the inputs of the quantized kernel, x, have moved away from those of the float kernel, y.

    Attributes:
        D: sum of (y - x) x^T over all rows, `[groups * parts, size, size]`.
        x: some rows, `[groups, some, columns]`.
        y: the same ones, likewise.
        rows: the number of all.
    """

    D: Tensor
    x: Tensor
    y: Tensor
    rows: int


def moved_between(x: Tensor, y: Tensor, parts: Parts) -> Moved:
    """Compare the inputs of a kernel, x, with those of the float kernel, y.

    Args:
        x: `[groups, rows, columns]`.
        y: likewise.
        parts: how the columns are cut.
    """
    some = slice(None, None, -(-x.shape[1] // SLOPE_ROWS))
    return Moved(moments_of(x, parts, y - x), x[:, some], y[:, some], rows=x.shape[1])


class Compensation:
    """Rounds kernels so that errors compensate each other on given inputs.

    Attributes:
        order: number of each column of a part, in the order in which they are rounded, `[groups * parts, size]`.
        H: the damped moments in this order, each row divided by its diagonal, `[groups * parts, size, size]`.
        U: the Cholesky factor of their inverse, likewise.
        L: the Cholesky factor of the moments that the targets are solved with, in their own order, likewise; `None`
            where the target of a row is the row itself.
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
        self._parts, self._groups = Parts(W[0].numel(), len(H) // groups, H.shape[-1]), groups
        diagonal = H.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.reshape(groups, -1).sum(1, keepdim=True) / self._parts.columns
        means = mean.clamp(min=torch.finfo(H.dtype).tiny).repeat_interleave(self._parts.count, 0)
        self.order = diagonal.argsort(dim=1, descending=True, stable=True)
        self._dtype, self._moved = torch.promote_types(W.dtype, torch.float32), moved
        self._diagonal = W.new_empty(*H.shape[:2], 1, dtype=self._dtype)
        self.H, self.U = (W.new_empty(H.shape, dtype=self._dtype) for _ in range(2))
        self.L = None if moved is None else torch.empty_like(self.H)
        self._products: tuple[Tensor, Tensor] | None = None
        if moved is not None and W.shape[0] > groups * self._parts.size:
            # Of many outputs it is cheaper to look at the moments of each part, x y^T and y y^T, than at all rows.
            both = moments_of(moved.y, self._parts, moved.x), moments_of(moved.y, self._parts)
            self._products = both[0].to(self._dtype), both[1].to(self._dtype)
        for number, part in enumerate(H):  # one at a time: each needs several matrices of its size
            first, part = self.order[number], part.double()
            damped = _damped(part, DAMPING * means[number])[first][:, first]
            diagonal = damped.diagonal().unsqueeze(1)
            self._diagonal[number] = diagonal
            self.H[number] = damped / diagonal
            U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
            self.U[number] = U.div_(U.diagonal().unsqueeze(1).clone())
            if self.L is not None and moved is not None:
                damping = TARGET_DAMPING * len(part) / moved.rows * means[number]
                self.L[number] = torch.linalg.cholesky(_damped(part, damping))

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
        count = len(MULTIPLES)
        scaled = torch.cat([scales * multiple for multiple in MULTIPLES], 2)
        found = _compensated(target.repeat(1, 1, count), scaled, self.U, high=high)
        error = target.repeat(1, 1, count).sub_(_rounded(found, scaled, high))
        squares = (self.H @ error).mul_(error).mul_(self._diagonal).sum(1)
        errors = squares.view(self._groups, self._parts.count, count, per_group).sum(1).transpose(0, 1).flatten(1)
        best: Tensor = W.new_tensor(MULTIPLES)[(errors.sum(1) if alike else errors).argmin(0)]
        return best

    def _ordered(self, W: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Cut rows, `[groups, rows, ...]`, and give back their targets and steps, `[groups * parts, columns, rows]`."""
        rows = self._parts.cut(W.flatten(2).to(self._dtype))
        order = self.order.unsqueeze(1).expand_as(rows)

        def in_order(t: Tensor) -> Tensor:
            """Put columns first: each is then read and written in one piece."""
            return t.gather(2, order).transpose(1, 2).contiguous()

        steps, tiny = step.flatten(2), torch.finfo(W.dtype).tiny
        alike = steps.stride(2) == 0  # one step for each row is the rule
        steps = (steps[..., :1] if alike else steps).to(self._dtype)
        if not alike:
            return in_order(self._target(rows)), in_order(self._parts.cut(steps).clamp(min=tiny))
        steps = steps.clamp(min=tiny).transpose(1, 2).repeat_interleave(self._parts.count, 0)
        return in_order(self._target(rows)), steps.contiguous().expand(-1, self._parts.size, -1)

    def _target(self, rows: Tensor) -> Tensor:
        """Return the weights that follow the float outputs on the inputs that the quantized kernel has.

        They are  w' = w + w D H^-1,  which is a regression, and one on noisy inputs makes weights too small. The noise
        is gone from means over space, the loss is not. So they are given back what noise has taken off them: their
        outputs follow the float ones with a slope of 1.

        Args:
            rows: w, `[groups * parts, rows, columns]`.
        """
        if self._moved is None or self.L is None:
            return rows
        change = rows @ self._moved.D.to(self._dtype)
        target = rows + torch.cholesky_solve(change.transpose(1, 2), self.L).transpose(1, 2)
        if self._products is None:
            found = self._moved.x.to(self._dtype) @ self._parts.joined(target).transpose(1, 2)
            wanted = self._moved.y.to(self._dtype) @ self._parts.joined(rows).transpose(1, 2)
            products, squares = (t.mul_(wanted).sum(1) for t in (found, wanted))
        else:
            products, squares = (
                torch.unflatten((a @ moments).mul_(rows).sum(2), 0, (self._groups, -1)).sum(1)
                for a, moments in zip((target, rows), self._products, strict=True)
            )
        slope = torch.where(squares > 0, products / squares, 1).clamp(LEAST_GAIN, 1)
        return target / slope.repeat_interleave(self._parts.count, 0).unsqueeze(2)


def _damped(H: Tensor, damping: Tensor) -> Tensor:
    return H + torch.diag(damping.expand(len(H)))


def _rounded(W: Tensor, step: Tensor, high: int) -> Tensor:
    return (W / step).round_().clamp_(-high, high).mul_(step)


def _compensated(W: Tensor, step: Tensor, U: Tensor, *, high: int) -> Tensor:
    """Spread the errors inside each part (OBQ's update with one order for all rows; GPTQ's Cholesky form).

    Args:
        W: `[groups * parts, columns, rows]`; it is used up.
        step: likewise.
        U: the Cholesky factor, each row divided by its diagonal, `[groups * parts, columns, columns]`.
        high: largest integer.

    Returns:
        The weights just before each was rounded, in the memory of `W`.
    """
    columns = W.shape[1]
    for first in range(0, columns, BLOCKS * BLOCK):
        last = min(first + BLOCKS * BLOCK, columns)
        errors = torch.empty_like(W[:, first:last])
        for start in range(first, last, BLOCK):
            end = min(start + BLOCK, last)
            for j in range(start, end):
                q = (W[:, j] / step[:, j]).round_().clamp_(-high, high).mul_(step[:, j])
                torch.sub(W[:, j], q, out=errors[:, j - first])
                error = errors[:, j - first : j - first + 1]
                W[:, j + 1 : end].addcmul_(error, U[:, j, j + 1 : end].unsqueeze(-1), value=-1)
            _subtract(W[:, end:last], U[:, start:end, end:last].transpose(1, 2), errors[:, start - first : end - first])
        limit = (high + OUTERMOST) * step[:, first:last]
        W[:, first:last] = torch.minimum(torch.maximum(W[:, first:last], -limit), limit)
        _subtract(W[:, last:], U[:, first:last, last:].transpose(1, 2), errors)
    return W


def _subtract(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Subtract the products of matrices in place: a product of its own would be written and read once more."""
    if len(into) == 1:  # several are written one after the other
        into[0].addmm_(a[0], b[0], alpha=-1)
    else:
        into.baddbmm_(a, b, alpha=-1)


def _descended(target: Tensor, moved: Tensor, step: Tensor, H: Tensor, *, high: int, sweeps: int) -> Tensor:
    """Choose each integer anew for the others as they are, column by column.

    With q at column j, the error  (w - q) H (w - q)^T  is smallest at  q_j + ((w - q) H)_j / H_jj.

    Args:
        target: w, `[groups * parts, columns, rows]`; it is used up.
        moved: values that round to the first q, likewise; it is used up.
        step: likewise.
        H: the moments, each row divided by its diagonal, `[groups * parts, columns, columns]`.
        high: largest integer.
        sweeps: over all columns.

    Returns:
        A value of each weight between its integer and the best one (`INWARD`).
    """
    columns = target.shape[1]
    Q = moved.div_(step).round_().clamp_(-high, high).mul_(step)
    R = H @ target.sub_(Q)
    for first in [*range(0, columns, BLOCKS * BLOCK)] * sweeps:
        last = min(first + BLOCKS * BLOCK, columns)
        wanted, all_changes = R[:, first:last].clone(), torch.empty_like(R[:, first:last])
        for start in range(first, last, BLOCK):
            end = min(start + BLOCK, last)
            for j in range(start, end):
                q = (Q[:, j] + wanted[:, j - first]).div_(step[:, j]).round_().clamp_(-high, high).mul_(step[:, j])
                change = all_changes[:, j - first : j - first + 1]
                torch.sub(q, Q[:, j], out=change[:, 0])
                Q[:, j] = q
                rest = wanted[:, j + 1 - first : end - first]
                rest.addcmul_(change, H[:, j + 1 : end, j].unsqueeze(-1), value=-1)
            changes = all_changes[:, start - first : end - first]
            _subtract(wanted[:, end - first :], H[:, end:last, start:end], changes)
        _subtract(R, H[:, :, first:last], all_changes)
    limit = OUTERMOST * step
    return Q + INWARD * torch.minimum(torch.maximum(R, -limit), limit)
