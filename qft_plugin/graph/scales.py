"""Where training starts: activation ranges, MMSE weight scales (PPQ), and cross-layer equalization for 4 bits."""

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from qft_plugin.graph.layer_graph import PINNED, DofMap
from qft_plugin.tensors.axes import Axes
from qft_plugin.tensors.grid import largest_integer, quantize_factor, to_integer

SMALLEST_SCALE: Final = 1e-12
"""Keeps the scale of an all-zero slice positive; its integers are 0 whatever the scale is."""

PPQ_STARTS: Final = 12
PPQ_ITERATIONS: Final = 3
PPQ_LONG: Final = 512
"""Elements of a row from which on its error has hardly more than one minimum: only the best start of it goes on."""

PPQ_BLOCK: Final = 1 << 16
"""Elements solved at a time, so that the temporaries stay in the cache."""

APQ_TRIAL: Final = 2
"""Pairs of half-steps after which the better start of APQ is known."""

MSE_CANDIDATES: Final = 80

SAME_FACTOR: Final = 1e-4
"""Relative distance below which a rescale factor is one that the hardware can hold: logarithms round."""


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
    errors = [_squared_error(x, s, low=low, high=high) for s in scales]
    return scales[int(torch.stack(errors).argmin())]


def shifted_range_max(x: Tensor, *, low: int, high: int) -> tuple[Tensor, int]:
    """Choose the smallest scale that clips nothing, and the integer of the real 0.

    Args:
        x: observed values, any shape, real units.
        low: smallest integer of the grid.
        high: largest integer of the grid.

    Returns:
        The scale, `[]`, real per step, and the zero point.
    """
    return _shifted(x.amin().clamp(max=0), x.amax().clamp(min=0), low=low, high=high)


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
    smallest, largest = x.amin().clamp(max=0), x.amax().clamp(min=0)

    def best(ends: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        found = [_shifted(*pair, low=low, high=high) for pair in ends]
        errors = [_squared_error(x, s, low=low - z, high=high - z) for s, z in found]
        return ends[int(torch.stack(errors).argmin())]

    shrinks = _shrinks(x)
    a, b = best([(smallest * r, largest * r) for r in shrinks])
    a, b = best([(a, b), *((smallest * r, b) for r in shrinks)])
    a, b = best([(a, b), *((a, largest * r) for r in shrinks)])
    return _shifted(a, b, low=low, high=high)


def _shifted(smallest: Tensor, largest: Tensor, *, low: int, high: int) -> tuple[Tensor, int]:
    """Return the scale of a grid over a range, and the integer of the real 0."""
    scale = ((largest - smallest) / (high - low)).clamp(min=SMALLEST_SCALE)
    return scale, int((low - smallest / scale).round().clamp(low, high))


def _shrinks(x: Tensor) -> Tensor:
    return torch.linspace(0.1, 1, MSE_CANDIDATES, dtype=x.dtype, device=x.device)


def _squared_error(x: Tensor, s: Tensor, *, low: int, high: int) -> Tensor:
    return (to_integer(x, s, low=low, high=high) * s - x).square().sum()


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


def equalization_factor(producer: Tensor, consumer: Tensor, *, beta: float) -> Tensor:
    """Share the range of a channel between the kernel that makes it and those that read it.

    Eq. (19):  C = q^beta / p^(1 - beta)

    with p the MMSE scale of the producer's output slice and q that of the consumer's input slice, each relative to
    its own tensor. A factor C > 1 moves range from the consumer's input channel to the producer's output channel:
    after  W_producer * C  and  W_consumer / C  both relative scales are equal where beta = 1/2 (Eq. 17's toy case).

    Args:
        producer: p, `[channels]`.
        consumer: q, `[channels]`.
        beta: 1/2 equalizes both sides; 1 equalizes the consumers alone.

    Returns:
        C, `[channels]`, without unit.
    """
    return consumer.pow(beta) / producer.pow(1 - beta)


def _relative_scales(slices: Tensor, *, high: int, whole: Tensor) -> Tensor:
    """MMSE scale of each slice over that of the whole tensor; slices of zeros say nothing and count as 1."""
    relative = ppq(slices, high=high) / whole
    return torch.where(slices.abs().amax(1) > 0, relative, torch.ones_like(relative))


def equalize(
    dof: DofMap, weights: Mapping[str, Tensor], bits: Mapping[str, int], *, beta: float, largest: float = 64.0
) -> Tensor:
    """Choose the initial cross-layer factors with the 4-bit equalization of App. D (Eq. 19-21).

    A variable may stand on several producers (the inputs of an elementwise add, Eq. 21) and several consumers
    (fan-out, Eq. 20): each side enters as the weighted geometric mean of its slices' relative scales, a slice
    weighing as many as it has elements.

    Args:
        dof: the DoF map.
        weights: weight by name, real units.
        bits: bit width by name of each weight that is quantized; others have no say.
        beta: see `equalization_factor`.
        largest: bound on the factor and on its inverse, so that no activation is scaled out of its 8 bits.

    Returns:
        log c of every free variable, `[dof.size]`: the natural logarithm of the scale S_a up to one constant per edge,
        c = 1 / C, because a smaller S_a gives the producer's output channel the larger integers.
    """
    sums = {side: torch.zeros(dof.size + 1, dtype=torch.float64) for side in ("p", "q", "p_weight", "q_weight")}
    for layer in dof.layers:
        if layer.weight not in bits:
            continue
        W = weights[layer.weight].detach().double().cpu()
        high = largest_integer(bits[layer.weight])
        whole = ppq(W.reshape(1, -1), high=high)
        for side, slices, index in (
            ("p", layer.axes.out_slices(W), layer.out_index),
            ("q", layer.axes.in_slices(W), layer.in_index),
        ):
            size = torch.full((slices.shape[0],), float(slices.shape[1]), dtype=torch.float64)
            relative = _relative_scales(slices, high=high, whole=whole)
            sums[side].index_add_(0, index, size * relative.log())
            sums[f"{side}_weight"].index_add_(0, index, size)
    p, q = (sums[s].div(sums[f"{s}_weight"].clamp(min=1)).exp() for s in ("p", "q"))
    C = equalization_factor(p, q, beta=beta).clamp(1 / largest, largest)
    return -C.log()[PINNED + 1 :].to(torch.float32)


def apq(X: Tensor, *, high: int, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Find MMSE scales of rows and columns together by alternating projection (APQ, Algorithm 2).

    Minimises  || X - S T^T * Q ||^2,  Q = clip(round(X / (S T^T)), -high, high),  over S and T (Eq. 15), starting once
    from the scales of the rows alone, T = 1, and once from the root mean squares of the columns; after a few half-steps
    the better of the two goes on.

    Departure: Algorithm 2 as printed projects X / S, which minimises the error of X / S. The half-steps here are the
    exact minima of Eq. 15 for fixed integers,  T_j = sum_i S_i Q_ij X_ij / sum_i (S_i Q_ij)^2,  so that no step raises
    the error. They end in a local minimum, which is often far better behind the second start.

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


def nearest_factor(
    W: Tensor, axes: Axes, F: Tensor, *, unit: float, kind: str | int, bits: int, scale_in: Tensor | None = None
) -> Tensor:
    """Choose the rescale factor that hardware can multiply by and that rounds a weight best.

    A factor that is one already, as in a model that was trained before, stays.

    Args:
        W: the weight, real units.
        axes: the meaning of its axes.
        F: the factor that a free scale would give, `[]` or `[out]`.
        unit: the weight's step over the factor.
        kind: see `quantize.quantize_factor`.
        bits: bit width of the weight.
        scale_in: left scale of a doubly per-channel kernel, `[in]`. The error is then that of W / scale_in,
            which is the kernel's own up to the weight of its columns.

    Returns:
        Of the shape of `F`.
    """
    if kind != "power_of_two":
        return quantize_factor(F, kind)
    high = largest_integer(bits)
    if scale_in is not None:
        W = W / axes.per_in(scale_in, W)
    slices = axes.out_slices(W) if F.dim() else W.reshape(1, -1)
    held = quantize_factor(F, kind)
    candidates = torch.stack([torch.exp2(F.log2().floor() + k) for k in (0, 1)])
    steps = (candidates * unit).reshape(2, -1, 1)
    errors = [(to_integer(slices, s, low=-high, high=high) * s - slices).square().sum(1) for s in steps]
    better = torch.where((errors[0] <= errors[1]).reshape(F.shape), candidates[0], candidates[1])
    return torch.where(torch.isclose(held, F, rtol=SAME_FACTOR, atol=0), held, better)
