"""Scales of weights with the smallest squared error (MMSE): PPQ and APQ, Algorithms 1 and 2."""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from qft_plugin.tensors.axes import Axes
from qft_plugin.tensors.grid import largest_integer, quantize_factor, to_integer
from qft_plugin.tensors.ranges import SMALLEST_SCALE

PPQ_STARTS: Final = 12
PPQ_ITERATIONS: Final = 3

PPQ_LONG: Final = 512
"""Elements of a row from which on its error has hardly more than one minimum: only the best start of it goes on."""

PPQ_BLOCK: Final = 1 << 16
"""Elements solved at a time, so that the temporaries stay in the cache."""

APQ_TRIAL: Final = 2
"""Pairs of half-steps after which the better start of APQ is known."""

SAME_FACTOR: Final = 1e-4
"""Relative distance below which a rescale factor is one that the hardware can hold: logarithms round."""


def ppq(X: Tensor, *, high: int) -> Tensor:
    """Find the MMSE scale of every row by progressive projection (PPQ, Algorithm 1).

    Minimises  || X - S * clip(round(X / S), -high, high) ||^2  over S by alternating the best integers Q for a scale
    with the best scale for integers,  S = <Q, X> / <Q, Q>.  The rows are independent and are solved together.

    Departure: the alternation finds a local minimum only, so it starts from several shrunk maxima and keeps the best
    iterate, because at 4 bits the minimum next to the maximum is often not the best one.

    Args:
        X: one kernel slice per row, `[slices, elements]`, real units.
        high: largest integer; the grid is symmetric (narrow range).

    Returns:
        Scales, `[slices]`, real per step, greater than 0; PPQ(c * X) = c * PPQ(X).
    """
    block = max(1, PPQ_BLOCK // max(1, X.shape[1]))
    return torch.cat([_ppq_block(X[i : i + block], high) for i in range(0, X.shape[0], block)])


def _ppq_block(X: Tensor, high: int) -> Tensor:
    peak = X.abs().amax(1)
    S_zero = torch.full_like(peak, SMALLEST_SCALE)
    Y = X / torch.where(peak > 0, peak, torch.ones_like(peak)).unsqueeze(1)
    Q = torch.empty_like(Y)
    best, best_gain = torch.full_like(peak, 1 / high), torch.full_like(peak, -torch.inf)

    def project(S: Tensor) -> Tensor:
        nonlocal best, best_gain
        torch.div(Y, S.unsqueeze(1), out=Q).round_().clamp_(-high, high)
        qx, qq = torch.linalg.vecdot(Q, Y), torch.linalg.vecdot(Q, Q).clamp_(min=1)
        # With the scale that is best for these integers, |Y - S Q|^2 = |Y|^2 - <Q, Y>^2 / <Q, Q>.
        S, gain = (qx / qq).clamp_(min=SMALLEST_SCALE), qx.square() / qq
        better = gain > best_gain
        best, best_gain = torch.where(better, S, best), torch.where(better, gain, best_gain)
        return S

    long = X.shape[1] >= PPQ_LONG
    for start in torch.linspace(0.3, 1.0, PPQ_STARTS).tolist():
        S = torch.full_like(peak, start / high)
        for _ in range(1 if long else PPQ_ITERATIONS):
            S = project(S)
    for _ in range(PPQ_ITERATIONS if long else 0):
        project(best)
    return torch.where(peak > 0, best * peak, S_zero)


def apq(X: Tensor, *, high: int, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Find MMSE scales of rows and columns together by alternating projection (APQ, Algorithm 2).

    Minimises  || X - S T^T * Q ||^2,  Q = clip(round(X / (S T^T)), -high, high),  over S and T (Eq. 15), starting once
    from the scales of the rows alone, T = 1, and once from the root mean squares of the columns; after a few half-steps
    the better of the two goes on.

    Departure: Algorithm 2 as printed projects X / S, which minimises the error of X / S. The half-steps here are the
    exact minima of Eq. 15 for fixed integers,  T_j = sum_i S_i Q_ij X_ij / sum_i (S_i Q_ij)^2,  so that no step raises
    the error. They end in a local minimum, which is often far better after the second start.

    Args:
        X: `[rows, columns, elements]`, real units.
        high: largest integer; the grid is symmetric (narrow range).
        iterations: pairs of half-steps.

    Returns:
        S, `[rows]`, and T, `[columns]`, both greater than 0; the geometric mean of T is 1.
    """
    # One matrix: an element of a row is a row of its own, which shares its scale with the others.
    rows, columns, elements = X.shape
    flat = X.transpose(1, 2).reshape(rows * elements, columns).contiguous()
    size = flat.square().mean(0).sqrt() / flat.square().mean().sqrt().clamp(min=torch.finfo(X.dtype).tiny)
    starts = [torch.ones_like(size), torch.where(size > 0, size, 1)]
    pairs = [(ppq((flat / T).view(rows, -1), high=high), T) for T in starts]
    first = min(iterations, APQ_TRIAL)
    ends = [_alternate(flat, S, T, high, first) for S, T in pairs]
    S, T = min(ends, key=lambda end: float(_alternation_error(flat, end[0], end[1], high)))
    S, T = _alternate(flat, S, T, high, iterations - first)
    shift = T.log().mean().exp()
    return S * shift, T / shift


def _alternate(X: Tensor, S: Tensor, T: Tensor, high: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Return S, `[rows]`, and T, `[columns]`, after pairs of half-steps; X is `[rows * elements, columns]`."""
    elements = X.shape[0] // S.shape[0]
    tiny = torch.finfo(X.dtype).tiny
    for _ in range(iterations):
        above, below = torch.zeros_like(T), torch.zeros_like(T)
        for x, s, q, product in _blocks(X, S.repeat_interleave(elements), T, high):
            q.mul_(s)
            above += torch.mul(q, x, out=product).sum(0)
            below += q.square_().sum(0)
        T = _positive(above / below.clamp(min=tiny), T)
        sums = [
            (torch.mul(q, x, out=product) @ T, q.square_() @ T.square())
            for x, _, q, product in _blocks(X, S.repeat_interleave(elements), T, high)
        ]
        above, below = (torch.cat(parts).view(-1, elements).sum(1) for parts in zip(*sums, strict=True))
        S = _positive(above / below.clamp(min=tiny), S)
    return S, T


def _blocks(X: Tensor, S: Tensor, T: Tensor, high: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield rows of X, `[rows, columns]`, their scales, their integers, and space for a product, in the cache."""
    size = max(1, PPQ_BLOCK // max(1, X.shape[1]))
    space = X.new_empty(2, min(size, X.shape[0]), X.shape[1])
    inverse = 1 / T
    for i in range(0, X.shape[0], size):
        x, s = X[i : i + size], S[i : i + size, None]
        q = space[0, : x.shape[0]]
        torch.mul(x, 1 / s, out=q)
        yield x, s, q.mul_(inverse).round_().clamp_(-high, high), space[1, : x.shape[0]]


def _alternation_error(X: Tensor, S: Tensor, T: Tensor, high: int) -> Tensor:
    """Return the error of Eq. 15, `[]`."""
    blocks = _blocks(X, S.repeat_interleave(X.shape[0] // S.shape[0]), T, high)
    return torch.stack([q.mul_(s).mul_(T).sub_(x).square_().sum() for x, s, q, _ in blocks]).sum()


def _positive(factor: Tensor, before: Tensor) -> Tensor:
    """Return the factor; where it is not positive, the one before."""
    return torch.where(factor > 0, factor, before)


def weight_scale(W: Tensor, axes: Axes, *, bits: int, per_channel: bool) -> Tensor:
    """Return the MMSE scale of a weight: `[out]` per channel or `[]` per tensor, real per step."""
    slices = axes.out_slices(W) if per_channel else W.reshape(1, -1)
    S = ppq(slices, high=largest_integer(bits))
    return S if per_channel else S.squeeze(0)


def doubly_scales(W: Tensor, axes: Axes, *, bits: int) -> tuple[Tensor, Tensor]:
    """Return the MMSE scales of the output channels, `[out]`, real per step, and of the input channels, `[in]`, 1."""
    V = axes.by_output(W)
    # Each group is a kernel of its own: [out, in, elements].
    parts = V.reshape(axes.groups, V.shape[0] // axes.groups, V.shape[1], -1)
    pairs = [apq(part, high=largest_integer(bits)) for part in parts]
    return torch.cat([S for S, _ in pairs]), torch.cat([T for _, T in pairs])


def rounding_errors(W: Tensor, axes: Axes, *, bits: int = 4) -> dict[str, float]:
    """Return the relative error of a kernel rounded to the nearest, by granularity of its scales (Fig. 3).

    Args:
        W: the weight.
        axes: the meaning of its axes.
        bits: bit width.

    Returns:
        L2 norm of the error over that of the weight, by `"per-tensor"`, `"per-channel"` and `"doubly per-channel"`.
    """
    high = largest_integer(bits)
    S_channel = weight_scale(W, axes, bits=bits, per_channel=True)
    # Where an output reads one channel, as in a depthwise kernel, a scale of that channel says nothing new.
    one = axes.channels(W)[0] == axes.groups
    S, T = (S_channel, None) if one else doubly_scales(W, axes, bits=bits)
    steps = {
        "per-tensor": weight_scale(W, axes, bits=bits, per_channel=False),
        "per-channel": axes.on_weight(S_channel, None, W),
        "doubly per-channel": axes.on_weight(S, T, W),
    }
    size = W.norm().clamp(min=torch.finfo(W.dtype).tiny)
    return {name: float((to_integer(W, s, low=-high, high=high) * s - W).norm() / size) for name, s in steps.items()}


def nearest_factor(W: Tensor, axes: Axes, F: Tensor, *, unit: float, kind: str | int, bits: int) -> Tensor:
    """Choose the rescale factor that hardware can multiply by and that rounds a weight best.

    A factor that is one already, as in a model that was trained before, stays.

    Args:
        W: the weight, real units; a doubly per-channel kernel over its left scale. The error is then that of
            W / scale_in, which is the kernel's own up to the weight of its columns.
        axes: the meaning of its axes.
        F: the factor that a free scale would give, `[]` or `[out]`.
        unit: the weight's step over the factor.
        kind: see `grid.quantize_factor`.
        bits: bit width of the weight.

    Returns:
        Of the shape of `F`.
    """
    if kind != "power_of_two":
        return quantize_factor(F, kind)
    high = largest_integer(bits)
    slices = axes.out_slices(W) if F.dim() else W.reshape(1, -1)
    held = quantize_factor(F, kind)
    candidates = torch.stack([torch.exp2(F.log2().floor() + k) for k in (0, 1)])
    steps = (candidates * unit).reshape(2, -1, 1)
    errors = [(to_integer(slices, s, low=-high, high=high) * s - slices).square().sum(1) for s in steps]
    better = torch.where((errors[0] <= errors[1]).reshape(F.shape), candidates[0], candidates[1])
    return torch.where(torch.isclose(held, F, rtol=SAME_FACTOR, atol=0), held, better)
