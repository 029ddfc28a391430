"""Where training starts: activation ranges, MMSE weight scales (PPQ), and cross-layer equalization for 4 bits."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from qft_plugin.graph import PINNED, DofMap, Layer
from qft_plugin.quantize import TRANSPOSED_KINDS, quantize_factor, to_integer

SMALLEST_SCALE: Final = 1e-12
"""Keeps the scale of an all-zero slice positive; its integers are 0 whatever the scale is."""

PPQ_STARTS: Final = 12
PPQ_ITERATIONS: Final = 3
PPQ_BLOCK: Final = 1 << 16
"""Elements solved at a time, so that the temporaries stay in the cache."""

MSE_CANDIDATES: Final = 80


def range_max(x: Tensor, *, low: int, high: int) -> Tensor:
    """Choose the smallest scale that clips nothing (naive max).

    Args:
        x: observed values, any shape, real units.
        low: smallest integer of the grid, at most 0.
        high: largest integer of the grid.

    Returns:
        The scale, `[]`, real per step.
    """
    scale = x.amax() / high
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
    flat = x.flatten()
    scales = range_max(x, low=low, high=high) * torch.linspace(0.1, 1, MSE_CANDIDATES, dtype=x.dtype)
    errors = [(to_integer(flat, s, low=low, high=high) * s - flat).square().sum() for s in scales]
    return scales[int(torch.stack(errors).argmin())]


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
    best, best_gain = torch.full_like(peak, 1 / high), torch.full_like(peak, -torch.inf)
    for start in torch.linspace(0.3, 1.0, PPQ_STARTS).tolist():
        S = torch.full_like(peak, start / high)
        for _ in range(PPQ_ITERATIONS):
            Q = (Y / S.unsqueeze(1)).round_().clamp_(-high, high)
            qx, qq = torch.linalg.vecdot(Q, Y), torch.linalg.vecdot(Q, Q).clamp_(min=1)
            # With the scale that is best for these integers, |Y - S Q|^2 = |Y|^2 - <Q, Y>^2 / <Q, Q>.
            S, gain = (qx / qq).clamp_(min=SMALLEST_SCALE), qx.square() / qq
            better = gain > best_gain
            best, best_gain = torch.where(better, S, best), torch.where(better, gain, best_gain)
    return torch.where(peak > 0, best * peak, S_zero)


def _second_axis_slices(W: Tensor, groups: int) -> Tensor:
    """Arrange a weight as one row per channel of its second axis, which is counted inside each group."""
    per_group = W.reshape(groups, W.shape[0] // groups, W.shape[1], -1)
    return per_group.transpose(1, 2).reshape(groups * W.shape[1], -1)


def out_slices(W: Tensor, *, kind: str, groups: int) -> Tensor:
    """Arrange a weight as one row per output channel, `[out, elements]`."""
    return _second_axis_slices(W, groups) if kind in TRANSPOSED_KINDS else W.flatten(1)


def in_slices(W: Tensor, *, kind: str, groups: int) -> Tensor:
    """Arrange a weight as one row per input channel, `[in, elements]`."""
    return W.flatten(1) if kind in TRANSPOSED_KINDS else _second_axis_slices(W, groups)


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
        high = 2 ** (bits[layer.weight] - 1) - 1
        whole = ppq(W.reshape(1, -1), high=high)
        for side, slices, index in (
            ("p", out_slices(W, kind=layer.kind, groups=layer.groups), layer.out_index),
            ("q", in_slices(W, kind=layer.kind, groups=layer.groups), layer.in_index),
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
    from the scales of the rows alone, T = 1, and once from those of the columns; the better end is kept.

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
    columns = _relative_scales(X.transpose(0, 1).flatten(1), high=high, whole=ppq(X.reshape(1, -1), high=high))
    ends = [_alternate(X, T, high, iterations) for T in (torch.ones_like(columns), columns)]
    S, T, _ = min(ends, key=lambda end: float(end[2]))
    shift = T.log().mean().exp()
    return S * shift, T / shift


def _alternate(X: Tensor, T: Tensor, high: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return S and T after the half-steps that begin with the best S for a given T, and the error of Eq. 15."""
    S = ppq((X / T[:, None]).flatten(1), high=high)
    for _ in range(iterations):
        Q = (X / (S[:, None] * T).unsqueeze(2)).round_().clamp_(-high, high)
        T = _projection(Q * S[:, None, None], X, (0, 2), T)
        QT = (X / (S[:, None] * T).unsqueeze(2)).round_().clamp_(-high, high) * T[:, None]
        S = _projection(QT, X, (1, 2), S)
    scale = (S[:, None] * T).unsqueeze(2)
    Q = (X / scale).round_().clamp_(-high, high)
    return S, T, (X - Q * scale).square().sum()


def _projection(basis: Tensor, X: Tensor, dims: tuple[int, int], before: Tensor) -> Tensor:
    """Return the factor of `basis` that is closest to X, along one axis; where it is not positive, the one before."""
    factor = (basis * X).sum(dims) / basis.square().sum(dims).clamp(min=torch.finfo(X.dtype).tiny)
    return torch.where(factor > 0, factor, before)


def weight_scale(W: Tensor, layer: Layer, *, bits: int, per_channel: bool) -> Tensor:
    """Return the MMSE scale of a weight: `[out]` per channel or `[]` per tensor, real per step."""
    slices = out_slices(W, kind=layer.kind, groups=layer.groups) if per_channel else W.reshape(1, -1)
    S = ppq(slices, high=2 ** (bits - 1) - 1)
    return S if per_channel else S.squeeze(0)


def doubly_scales(W: Tensor, layer: Layer, *, bits: int) -> tuple[Tensor, Tensor]:
    """Return the MMSE scales of the output channels, `[out]`, real per step, and of the input channels, `[in]`, 1."""
    transposed = layer.kind in TRANSPOSED_KINDS
    # Each group is a kernel of its own: [first axis in the group, second axis, elements].
    parts = W.reshape(layer.groups, W.shape[0] // layer.groups, W.shape[1], -1)
    pairs = [apq(part.transpose(0, 1) if transposed else part, high=2 ** (bits - 1) - 1) for part in parts]
    return torch.cat([S for S, _ in pairs]), torch.cat([T for _, T in pairs])


def nearest_factor(W: Tensor, layer: Layer, F: Tensor, *, unit: float, kind: str | int, bits: int) -> Tensor:
    """Choose the rescale factor that hardware can multiply by and that rounds a weight best.

    Args:
        W: the weight, real units.
        layer: its layer.
        F: the factor that a free scale would give, `[]` or `[out]`.
        unit: the weight's step over the factor.
        kind: see `quantize.quantize_factor`.
        bits: bit width of the weight.

    Returns:
        Of the shape of `F`.
    """
    if kind != "power_of_two":
        return quantize_factor(F, kind)
    high = 2 ** (bits - 1) - 1
    slices = out_slices(W, kind=layer.kind, groups=layer.groups) if F.dim() else W.reshape(1, -1)
    candidates = torch.stack([torch.exp2(F.log2().floor() + k) for k in (0, 1)])
    steps = (candidates * unit).reshape(2, -1, 1)
    errors = [(to_integer(slices, s, low=-high, high=high) * s - slices).square().sum(1) for s in steps]
    return torch.where((errors[0] <= errors[1]).reshape(F.shape), candidates[0], candidates[1])
