"""Slow and obvious: the paper's equations as NumPy loops, one line of mathematics to one line of code."""

import math

import numpy as np


def integer_of(x: float, scale: float, low: int, high: int, zero_point: int = 0) -> int:
    """Eq. (1), one number:  clip(round(x / scale) + Z, low, high), ties to even."""
    return int(min(max(np.rint(x / scale) + zero_point, low), high))


def fake_quantize(x: np.ndarray, scale: np.ndarray, low: int, high: int, zero_point: int = 0) -> np.ndarray:
    """Eq. (1):  scale * (clip(round(x / scale) + Z, low, high) - Z); the scale broadcasts."""
    scales = np.broadcast_to(scale, x.shape)
    out = np.empty_like(x)
    for i in np.ndindex(x.shape):
        out[i] = scales[i] * (integer_of(x[i], scales[i], low, high, zero_point) - zero_point)
    return out


def fake_quantize_gradients(
    x: np.ndarray, scale: np.ndarray, g: np.ndarray, low: int, high: int, zero_point: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Chain rule of Eq. (1) with d round(u) / du = 1; nothing passes where the clip is active.

    Inside the clip  d x_fq / ds = round(x / s) - x / s,  outside it is the clip's bound (minus Z).
    """
    scales = np.broadcast_to(scale, x.shape)
    gx, gs = np.zeros_like(x), np.zeros_like(scales)
    for i in np.ndindex(x.shape):
        r = np.rint(x[i] / scales[i]) + zero_point
        if low <= r <= high:
            gx[i] = g[i]
            gs[i] = g[i] * (r - zero_point - x[i] / scales[i])
        else:
            gs[i] = g[i] * (min(max(r, low), high) - zero_point)
    extra = x.ndim - np.ndim(scale)
    gs = gs.sum(axis=tuple(range(extra)))
    kept = tuple(d for d, n in enumerate(np.shape(scale)) if n == 1)
    return gx, gs.sum(axis=kept, keepdims=True)


def conv_weight_integers(
    W: np.ndarray, S_a_in: np.ndarray, S_a_out: np.ndarray, F: np.ndarray, high: int, groups: int
) -> np.ndarray:
    """Integers of an ordinary or grouped kernel `[out, in/groups, *k]` by Eq. (1) and (2).

    S_wL = 1 / S_a_in, S_wR = S_a_out * F, and the step of W[o, i] is S_wR[o] * S_wL[i].
    """
    S_wL, S_wR = 1 / S_a_in, S_a_out * F
    out_per_group, in_per_group = W.shape[0] // groups, W.shape[1]
    W_int = np.empty_like(W)
    for at in np.ndindex(W.shape):
        o, i = at[:2]
        step = S_wR[o] * S_wL[(o // out_per_group) * in_per_group + i]
        W_int[at] = integer_of(W[at], step, -high, high)
    return W_int


def transposed_weight_integers(
    W: np.ndarray, S_a_in: np.ndarray, S_a_out: np.ndarray, F: np.ndarray, high: int, groups: int
) -> np.ndarray:
    """The same for a transposed convolution's kernel `[in, out/groups, *k]`."""
    S_wL, S_wR = 1 / S_a_in, S_a_out * F
    in_per_group, out_per_group = W.shape[0] // groups, W.shape[1]
    W_int = np.empty_like(W)
    for at in np.ndindex(W.shape):
        i, o = at[:2]
        step = S_wR[(i // in_per_group) * out_per_group + o] * S_wL[i]
        W_int[at] = integer_of(W[at], step, -high, high)
    return W_int


def kernel_steps(
    shape: tuple[int, ...], S_wR: np.ndarray, S_wL: np.ndarray, groups: int, *, transposed: bool
) -> np.ndarray:
    """Eq. (5):  the step of the element between input channel i and output channel o is S_wR[o] * S_wL[i].

    A kernel is `[out, in/groups, *k]`, that of a transposed convolution `[in, out/groups, *k]`.
    """
    steps = np.empty(shape)
    per_group = shape[0] // groups
    for at in np.ndindex(shape):
        first = at[0]
        second = (at[0] // per_group) * shape[1] + at[1]
        o, i = (second, first) if transposed else (first, second)
        steps[at] = S_wR[o] * S_wL[i]
    return steps


def doubly_squared_error(X: np.ndarray, S: np.ndarray, T: np.ndarray, high: int) -> float:
    """Eq. (15):  sum of (X[i, j, k] - S[i] T[j] * clip(round(X[i, j, k] / (S[i] T[j])), -high, high))^2."""
    return sum(squared_error(X[i, j], S[i] * T[j], high) for i, j in np.ndindex(X.shape[:2]))


def squared_error(row: np.ndarray, scale: float, high: int) -> float:
    """|| x - S * clip(round(x / S), -high, high) ||^2  of one slice."""
    return float(sum((x - scale * integer_of(x, scale, -high, high)) ** 2 for x in row))


def best_squared_error(row: np.ndarray, high: int, candidates: int) -> float:
    """Smallest error of Eq. (1) over a fine grid of scales up to the one that clips nothing."""
    peak = max(abs(x) for x in row)
    return min(squared_error(row, peak / high * k / candidates, high) for k in range(1, candidates + 1))


def equalization_factor(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    """Eq. (19):  C = q^beta / p^(1 - beta)."""
    C = np.empty_like(p)
    for m in range(len(p)):
        C[m] = q[m] ** beta / p[m] ** (1 - beta)
    return C


def channel_logarithms(
    slices: list[tuple[np.ndarray, float, int]],
) -> float:
    """Eq. (20), (21): weighted mean of log(slice scale / tensor scale) over all slices that stand on a channel."""
    total = sum(size for _, _, size in slices)
    return sum(size * float(np.log(scale / whole)) for scale, whole, size in slices) / total


def linear_integers(x_int: np.ndarray, W_int: np.ndarray, bias_int: np.ndarray) -> np.ndarray:
    """The accumulator of the online graph (Eq. 8), one multiply-accumulate at a time."""
    acc = np.zeros((x_int.shape[0], W_int.shape[0]))
    for n, o in np.ndindex(acc.shape):
        acc[n, o] = bias_int[o]
        for i in range(W_int.shape[1]):
            acc[n, o] += W_int[o, i] * x_int[n, i]
    return acc


def conv_integers(
    x_int: np.ndarray,
    W_int: np.ndarray,
    bias_int: np.ndarray,
    *,
    zero_point: int,
    padding: int = 0,
    stride: int = 1,
    groups: int = 1,
) -> np.ndarray:
    """The accumulator of a 2-d convolution, one multiply-accumulate at a time; padding holds the real 0, which is Z."""
    images, _, height, width = x_int.shape
    outs, per_group, kh, kw = W_int.shape
    padded = np.full((images, x_int.shape[1], height + 2 * padding, width + 2 * padding), zero_point, dtype=np.int64)
    padded[:, :, padding : padding + height, padding : padding + width] = x_int
    size = (padded.shape[2] - kh) // stride + 1, (padded.shape[3] - kw) // stride + 1
    acc = np.zeros((images, outs, *size), dtype=np.int64)
    for n, o, y, x in np.ndindex(acc.shape):
        acc[n, o, y, x] = bias_int[o]
        for i, dy, dx in np.ndindex(per_group, kh, kw):
            channel = (o // (outs // groups)) * per_group + i
            acc[n, o, y, x] += W_int[o, i, dy, dx] * padded[n, channel, y * stride + dy, x * stride + dx]
    return acc


def transposed_conv_integers(
    x_int: np.ndarray,
    W_int: np.ndarray,
    bias_int: np.ndarray,
    *,
    zero_point: int,
    padding: int = 0,
    stride: int = 1,
    groups: int = 1,
) -> np.ndarray:
    """The same of a transposed convolution: an ordinary one, of the flipped kernel, over an input with Z between and
    around its values.
    """
    images, ins, height, width = x_int.shape
    per_group, kh, kw = W_int.shape[1:]
    spread = np.full((images, ins, (height - 1) * stride + 1, (width - 1) * stride + 1), zero_point, dtype=np.int64)
    spread[:, :, ::stride, ::stride] = x_int
    flipped = np.zeros((per_group * groups, ins // groups, kh, kw), dtype=np.int64)
    for o, i, dy, dx in np.ndindex(flipped.shape):
        channel = (o // per_group) * (ins // groups) + i
        flipped[o, i, dy, dx] = W_int[channel, o % per_group, kh - 1 - dy, kw - 1 - dx]
    return conv_integers(spread, flipped, bias_int, zero_point=zero_point, padding=kh - 1 - padding, groups=groups)


def widest_sum(W_int: np.ndarray, bias_int: int, low: int, high: int) -> tuple[int, int]:
    """The smallest and the largest number that an accumulator can hold on its way, whatever comes first.

    Every subset of the products, each with either end of the grid of its input, with and without the bias.
    """
    sums = {0, bias_int}
    for w in W_int.flat:
        sums |= {s + int(w) * q for s in sums for q in (low, high)}
    return min(sums), max(sums)


def smallest_dropped(u: np.ndarray, count: int) -> np.ndarray:
    """Unstructured sparsity: the `count` smallest magnitudes become 0, of equal ones those that come first."""
    kept = np.ones(u.size, dtype=bool)
    for _ in range(count):
        smallest = min((i for i in range(u.size) if kept[i]), key=lambda i: abs(u.flat[i]))
        kept[smallest] = False
    return kept.reshape(u.shape)


def two_of_four(u: np.ndarray, groups: int, *, transposed: bool) -> np.ndarray:
    """2:4 sparsity: of channels 4n to 4n + 3 of the inputs of a group, the two largest are kept at each position.

    A kernel is `[out, in/groups, *k]`, that of a transposed convolution `[in, out/groups, *k]`.
    """
    kept = np.ones(u.shape, dtype=bool)
    per_group = u.shape[0] // groups if transposed else u.shape[1]
    for at in np.ndindex(u.shape):
        channel = at[0] % per_group if transposed else at[1]
        first = channel - channel % 4
        larger = 0
        for other in range(first, min(first + 4, per_group)):
            place = (at[0] - channel + other, *at[1:]) if transposed else (at[0], other, *at[2:])
            larger += abs(u[place]) > abs(u[at])
        kept[at] = larger < 2
    return kept


def rectified_sigmoid(V: float) -> float:
    """AdaRound, Eq. (23):  clip(sigmoid(V) * (1.1 + 0.1) - 0.1, 0, 1)."""
    return min(max(1.2 / (1 + np.exp(-V)) - 0.1, 0.0), 1.0)


def undecided(h: np.ndarray, beta: float) -> float:
    """AdaRound, Eq. (24), as a mean:  1 - |2 h - 1|^beta."""
    return sum(1 - abs(2 * x - 1) ** beta for x in h.flat) / h.size


def blended(W: float, scale: float, alpha: float, high: int) -> float:
    """Alpha-blending:  (1 - alpha) W + alpha Q(W)."""
    return (1 - alpha) * W + alpha * scale * integer_of(W, scale, -high, high)


def significant(F: float, bits: int) -> bool:
    """Whether a number is an integer of so many bits before a shift."""
    mantissa, _ = math.frexp(F)
    return (mantissa * 2**bits).is_integer()
