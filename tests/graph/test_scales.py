"""Where training starts: ranges, PPQ, and equalization, with the symmetries that they must have."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from graphs import chain, conv_op, linear_op, mapped, parameters_of, unary_op
from hypothesis import given
from hypothesis import strategies as st
from models import chained, image
from torch import Tensor

from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.layer_graph import DofMap, Op, Ref
from qft_plugin.graph.scales import (
    SMALLEST_SCALE,
    apq,
    doubly_scales,
    equalization_factor,
    equalize,
    ppq,
    range_max,
    range_mse,
    weight_scale,
)
from qft_plugin.tensors.axes import Axes
from qft_plugin.tensors.fake_quantize import fake_quantize
from qft_plugin.training.offline import fold_network

EXACT = 1e-12
"""float64 sums in another order."""

FLOAT32 = 1e-6
"""The factors are returned as float32 logarithms: half a unit in the last place of numbers up to 8."""

SOLVER_SLACK = 1.02
"""PPQ finds local minima of the error; from its starts the best is within 2 % of a search over 1,000 scales."""

RANDOM_ROWS = st.tuples(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 40), st.sampled_from([1, 3, 7, 127]))


def rows(seed: int, count: int, size: int) -> Tensor:
    """Return random slices, some of them with outliers."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return X * (1 + 4 * (torch.rand(count, size, generator=generator) < 0.1))


def test_range_max_clips_nothing_and_is_the_smallest_that_does() -> None:
    """The largest value becomes the largest integer; for signed grids the tighter side decides."""
    x = torch.tensor([-3.0, 0.5, 2.0])
    assert float(range_max(x, low=0, high=255)) == pytest.approx(2 / 255)
    assert float(range_max(x, low=-128, high=127)) == pytest.approx(3 / 128)
    assert float(range_max(-x, low=-128, high=127)) == pytest.approx(3 / 127)


def test_range_of_nothing_is_positive() -> None:
    """An activation that is always 0 still has a scale greater than 0."""
    for choose in (range_max, range_mse):
        assert float(choose(torch.zeros(10), low=0, high=255)) > 0


@pytest.mark.parametrize(("low", "high"), [(0, 15), (-8, 7), (-3, 12)])
def test_range_mse_is_the_best_of_a_search(low: int, high: int) -> None:
    """No scale of a grid below the naive maximum has a smaller error, and the maximum itself is worse with outliers."""
    x = torch.cat([torch.randn(500), torch.tensor([9.0])])
    found = range_mse(x, low=low, high=high)
    peak = range_max(x, low=low, high=high)

    def error(s: Tensor) -> float:
        return float((fake_quantize(x, s, low=low, high=high) - x).square().sum())

    best = min(error(peak * k / 400) for k in range(40, 401))
    assert error(found) <= best * SOLVER_SLACK
    assert error(found) < 0.9 * error(peak) or low == 0


@pytest.mark.parametrize("choose", [range_max, range_mse])
@given(power=st.integers(-10, 10), seed=st.integers(0, 10**6))
def test_ranges_follow_the_unit_of_the_data(choose: Callable[..., Tensor], power: int, seed: int) -> None:
    """Measured in other units the same values get the same scale, exactly for powers of two; order does not matter."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    k = 2.0**power
    scale = choose(x, low=-8, high=7)
    assert float(choose(k * x, low=-8, high=7)) == float(k * scale)
    assert float(choose(x.flip(0).view(10, 20), low=-8, high=7)) == pytest.approx(float(scale), rel=FLOAT32)


@given(RANDOM_ROWS)
def test_ppq_is_as_good_as_a_search(case: tuple[int, int, int, int]) -> None:
    """The error of every row is within 2 % of the best of a brute-force search over scales."""
    seed, count, size, high = case
    X = rows(seed, count, size)
    S = ppq(X, high=high)
    for row, scale in zip(X.numpy(), S.tolist(), strict=True):
        found = reference.squared_error(row, scale, high)
        floor = EXACT * float((row**2).sum())
        assert found <= SOLVER_SLACK * reference.best_squared_error(row, high, 150) + floor


@given(case=RANDOM_ROWS, power=st.integers(-12, 12))
def test_ppq_follows_the_unit_of_the_weights(case: tuple[int, int, int, int], power: int) -> None:
    """PPQ(c X) = c PPQ(X), exactly for powers of two, and to rounding for other factors; the sign does not matter."""
    seed, count, size, high = case
    X = rows(seed, count, size)
    S = ppq(X, high=high)
    assert torch.equal(ppq(2.0**power * X, high=high), 2.0**power * S)
    assert torch.equal(ppq(-X, high=high), S)


@given(case=RANDOM_ROWS)
def test_ppq_treats_rows_and_elements_alike(case: tuple[int, int, int, int]) -> None:
    """Permuting rows permutes the scales, permuting elements changes nothing, a row alone has the same scale."""
    seed, count, size, high = case
    X = rows(seed, count, size)
    S = ppq(X, high=high)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ppq(X[order], high=high), S[order], rtol=EXACT, atol=0)
    torch.testing.assert_close(ppq(X.flip(1), high=high), S, rtol=EXACT, atol=0)
    torch.testing.assert_close(torch.cat([ppq(x.unsqueeze(0), high=high) for x in X]), S, rtol=EXACT, atol=0)


def test_ppq_in_blocks_is_ppq_at_once() -> None:
    """Rows that are too many for one block get the scales that they get alone."""
    X = torch.randn(9, 1 << 14, dtype=torch.float64)
    torch.testing.assert_close(ppq(X, high=7)[5:6], ppq(X[5:6], high=7), rtol=EXACT, atol=0)


def test_ppq_recovers_a_grid() -> None:
    """Weights that are on a grid already, with its end codes in use, get the step of the grid and no error."""
    Q = torch.cat([torch.arange(-7, 8).repeat(3, 2), torch.randint(-7, 8, (3, 40))], dim=1).double()
    S = torch.tensor([0.1, 3.0, 1e-4], dtype=torch.float64)
    torch.testing.assert_close(ppq(Q * S.unsqueeze(1), high=7), S, rtol=EXACT, atol=0)


def test_ppq_of_zeros_is_positive() -> None:
    """A slice of zeros gets a scale greater than 0 and leaves its neighbours alone."""
    X = torch.randn(3, 8)
    expected = ppq(X, high=7)
    X[1] = 0
    found = ppq(X, high=7)
    assert float(found[1]) == pytest.approx(SMALLEST_SCALE)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("per_channel", [True, False])
def test_weight_scale_is_ppq_of_its_slices(per_channel: bool) -> None:
    """Per channel there is one scale for every output channel, per tensor a single one without an axis."""
    dof = mapped(chained("grouped transposed"), image())
    layer = next(la for la in dof.layers if "transpose" in la.kind)
    W = torch.randn(8, 2, 3, 3)
    S = weight_scale(W, layer.axes, bits=4, per_channel=per_channel)
    if per_channel:
        expected = torch.stack(
            [ppq(W[2 * (o // 2) : 2 * (o // 2) + 2, o % 2].reshape(1, -1), high=7)[0] for o in range(8)]
        )
        torch.testing.assert_close(S, expected)
    else:
        torch.testing.assert_close(S, ppq(W.reshape(1, -1), high=7)[0])


RANDOM_KERNELS = st.tuples(
    st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.sampled_from([1, 3, 7, 127])
)


def kernel(seed: int, count: int, columns: int, size: int) -> Tensor:
    """Return a random kernel `[rows, columns, elements]` whose columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    skew = torch.exp(torch.randn(columns, 1, generator=generator, dtype=torch.float64))
    return rows(seed, count, columns * size).view(count, columns, size) * skew


@given(RANDOM_KERNELS)
def test_apq_is_never_worse_than_its_rows_alone(case: tuple[int, int, int, int, int]) -> None:
    """The error of Eq. 15 is at most that of PPQ's scales of the rows with T = 1, where it starts."""
    *shape, high = case
    X = kernel(*shape)
    S, T = apq(X, high=high)
    alone = reference.doubly_squared_error(X.numpy(), ppq(X.flatten(1), high=high).numpy(), np.ones(X.shape[1]), high)
    floor = EXACT * float(X.square().sum())
    assert reference.doubly_squared_error(X.numpy(), S.numpy(), T.numpy(), high) <= alone + floor


@given(RANDOM_KERNELS)
def test_apq_only_gets_better(case: tuple[int, int, int, int, int]) -> None:
    """No further iteration raises the error."""
    *shape, high = case
    X = kernel(*shape)
    found = [apq(X, high=high, iterations=n) for n in range(6)]
    errors = [reference.doubly_squared_error(X.numpy(), S.numpy(), T.numpy(), high) for S, T in found]
    floor = EXACT * float(X.square().sum())
    assert all(after <= before + floor for before, after in pairwise(errors))


def test_apq_is_better_where_the_columns_differ() -> None:
    """With columns that differ by a factor of ten, scales of the columns take at least a third of the error away, and
    larger columns get larger scales.
    """
    size = torch.logspace(-0.5, 0.5, 12, dtype=torch.float64)
    X = torch.randn(12, 12, 9, dtype=torch.float64) * size[:, None]
    S, T = apq(X, high=7)
    found = reference.doubly_squared_error(X.numpy(), S.numpy(), T.numpy(), 7)
    alone = reference.doubly_squared_error(X.numpy(), ppq(X.flatten(1), high=7).numpy(), np.ones(12), 7)
    assert found < 2 / 3 * alone
    assert float(torch.corrcoef(torch.stack([T, size]))[0, 1]) > 0.9


@pytest.mark.parametrize("columns", [True, False], ids=["columns", "rows"])
def test_apq_ends_where_no_single_scale_is_better(columns: bool) -> None:
    """After many iterations, changing one scale a little either way does not lower the error: a local minimum."""
    X = kernel(1, 4, 5, 6)
    S, T = (t.numpy() for t in apq(X, high=7, iterations=100))
    least = reference.doubly_squared_error(X.numpy(), S, T, 7)
    for i, factor in ((i, f) for i in range(len(T if columns else S)) for f in (1 - 1e-4, 1 + 1e-4)):
        moved = (T if columns else S).copy()
        moved[i] *= factor
        S_moved, T_moved = (S, moved) if columns else (moved, T)
        assert reference.doubly_squared_error(X.numpy(), S_moved, T_moved, 7) > least


@given(case=RANDOM_KERNELS, power=st.integers(-12, 12))
def test_apq_follows_the_unit_of_the_weights(case: tuple[int, int, int, int, int], power: int) -> None:
    """APQ(c X) = (c S, T), exactly for powers of two: the unit is in S alone; the sign does not matter."""
    *shape, high = case
    X = kernel(*shape)
    S, T = apq(X, high=high)
    for other, unit in ((2.0**power * X, 2.0**power), (-X, 1.0)):
        S_other, T_other = apq(other, high=high)
        assert torch.equal(S_other, unit * S)
        assert torch.equal(T_other, T)


@given(RANDOM_KERNELS)
def test_apq_treats_rows_columns_and_elements_alike(case: tuple[int, int, int, int, int]) -> None:
    """Permuting rows permutes S, permuting columns permutes T, and the order of the elements changes nothing."""
    *shape, high = case
    X = kernel(*shape)
    S, T = apq(X, high=high)
    generator = torch.Generator().manual_seed(case[0])
    i, j, k = (torch.randperm(n, generator=generator) for n in X.shape)
    S_moved, T_moved = apq(X[i][:, j][:, :, k], high=high)
    torch.testing.assert_close(S_moved, S[i], rtol=1e3 * EXACT, atol=0)
    torch.testing.assert_close(T_moved, T[j], rtol=1e3 * EXACT, atol=0)


@given(case=RANDOM_KERNELS, empty=st.sampled_from(["row", "column", "both", "all"]))
def test_apq_of_zeros_is_positive(case: tuple[int, int, int, int, int], empty: str) -> None:
    """Whatever is zero, every scale is finite and greater than 0, and the geometric mean of T is 1."""
    *shape, high = case
    X = kernel(*shape)
    if empty in ("row", "both", "all"):
        X[0] = 0
    if empty in ("column", "both"):
        X[:, -1] = 0
    if empty == "all":
        X.zero_()
    for scale in (pair := apq(X, high=high)):
        assert bool(torch.isfinite(scale).all())
        assert bool((scale > 0).all())
    assert float(pair[1].log().mean().exp()) == pytest.approx(1, rel=EXACT)


def test_apq_ignores_a_row_of_zeros() -> None:
    """A row of zeros has no say in the scales of the columns, nor a column of zeros in those of the rows."""
    X = kernel(3, 4, 5, 6)
    S, T = apq(X, high=7)
    S_more, T_more = apq(torch.cat([X, torch.zeros_like(X[:1])]), high=7)
    torch.testing.assert_close(S_more[:4], S, rtol=EXACT, atol=0)
    torch.testing.assert_close(T_more, T, rtol=EXACT, atol=0)
    S_more, T_more = apq(torch.cat([X, torch.zeros_like(X[:, :1])], dim=1), high=7)
    # The geometric mean of T is over all columns, so a common factor moves from one side to the other.
    torch.testing.assert_close(S_more[:, None] * T_more[:5], S[:, None] * T, rtol=EXACT, atol=0)


def codes(*shape: int) -> Tensor:
    """Return all 15 integers of 4 bits along the last axis, in an order of its own at every place."""
    order = torch.rand(*shape, 15).argsort(-1)
    return order.double() - 7


def test_apq_recovers_a_grid() -> None:
    """A kernel that is on a grid of rank one already, near enough to that of its rows alone for the first integers to
    be right, gets the steps of the grid and no error.
    """
    S, T = torch.tensor([0.1, 3.0, 1e-4, 1.0]).double(), 1 + 0.04 * torch.linspace(-1, 1, 6).double()
    T = T / T.log().mean().exp()
    X = codes(4, 6) * S[:, None, None] * T[:, None]
    found_S, found_T = apq(X, high=7)
    torch.testing.assert_close(found_S, S, rtol=EXACT, atol=0)
    torch.testing.assert_close(found_T, T, rtol=EXACT, atol=0)
    error = reference.doubly_squared_error(X.numpy(), found_S.numpy(), found_T.numpy(), 7)
    assert error < EXACT**2 * float(X.square().sum())


LAYOUTS = {
    "linear": ("linear", 1, 6, 4, False),
    "conv": ("conv2d", 1, 6, 4, True),
    "grouped": ("conv1d", 2, 6, 4, True),
    "depthwise": ("conv2d", 6, 6, 6, True),
    "depthwise with two outputs each": ("conv2d", 3, 3, 6, True),
    "transposed": ("conv_transpose3d", 1, 6, 4, True),
    "grouped transposed": ("conv_transpose2d", 2, 6, 4, True),
    "depthwise transposed": ("conv_transpose1d", 6, 6, 6, True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_doubly_scales_belong_to_their_channels(name: str) -> None:
    """For every kind of layer there is one scale per output and one per input channel, in the order of the channels:
    those that a kernel on a grid was made with, up to one common factor in each group.
    """
    kind, groups, ins, outs, has_elements = LAYOUTS[name]
    transposed = "transpose" in kind
    first, second = (ins, outs // groups) if transposed else (outs, ins // groups)
    size = {"1": (15,), "2": (3, 5), "3": (1, 3, 5)}.get(kind[-2], ())
    S, T = torch.exp(torch.randn(outs)).double(), 1 + 0.04 * torch.rand(ins).double()
    steps = reference.kernel_steps((first, second, *size), S.numpy(), T.numpy(), groups, transposed=transposed)
    if has_elements:
        Q = codes(first, second).view(first, second, *size)
    else:
        # Without elements the columns stand in for them; each row has the end code.
        Q = torch.tensor([7.0, -7.0, 7.0, -7.0, 7.0, -7.0]).double().expand(first, second)
    W = Q * torch.from_numpy(steps)
    found_S, found_T = doubly_scales(W, Axes(kind, groups), bits=4)
    assert found_S.shape == (outs,)
    assert found_T.shape == (ins,)
    found_steps = reference.kernel_steps(W.shape, found_S.numpy(), found_T.numpy(), groups, transposed=transposed)
    np.testing.assert_allclose(found_steps, steps, rtol=EXACT)
    for g in range(groups):
        factor = found_S.view(groups, -1)[g] / S.view(groups, -1)[g]
        torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=EXACT, atol=0)
        factor = found_T.view(groups, -1)[g] / T.view(groups, -1)[g]
        torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=EXACT, atol=0)
        assert float(found_T.view(groups, -1)[g].log().mean()) == pytest.approx(0, abs=EXACT)


def test_doubly_scales_depend_on_bits() -> None:
    """The largest integer is that of the narrow grid: a kernel of the values -1, 0 and 1 alone has step 1 at 2 bits."""
    W = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, 1.0]]).double()
    for bits, step in ((2, 1.0), (3, 1 / 3)):
        S, T = doubly_scales(W, Axes("linear"), bits=bits)
        integers = (W / (S[:, None] * T)).round()
        assert float(integers.abs().max()) <= 2 ** (bits - 1) - 1
        torch.testing.assert_close(integers * S[:, None] * T, W, rtol=EXACT, atol=EXACT)
        assert float(S.min()) >= step * (1 - EXACT)


@given(seed=st.integers(0, 10**6), beta=st.floats(0, 1))
def test_equalization_factor_is_equation_19(seed: int, beta: float) -> None:
    """The vector form is the loop of the reference."""
    p, q = np.random.default_rng(seed).uniform(0.1, 3, (2, 5))
    found = equalization_factor(torch.from_numpy(p), torch.from_numpy(q), beta=beta)
    np.testing.assert_allclose(found.numpy(), reference.equalization_factor(p, q, beta), rtol=EXACT)


def toy(width: int = 6) -> DofMap:
    """Map Eq. 17's toy case: two linear layers with a ReLU between them."""
    return map_dof(
        chain(
            linear_op("a", "x", shape=(width, 4)),
            unary_op("act", "relu", "a"),
            linear_op("b", "act", shape=(3, width)),
            shapes={"x": (2, 4), "a": (2, width), "act": (2, width), "b": (2, 3)},
            outputs=("b",),
        )
    )


def balanced(width: int = 6) -> dict[str, Tensor]:
    """Return weights whose inner channels all have MMSE scale 1 on both sides."""
    A, B = torch.randn(width, 4).double(), torch.randn(3, width).double()
    return {"a.weight": A / ppq(A, high=7).unsqueeze(1), "b.weight": B / ppq(B.T.contiguous(), high=7)}


BITS = {"a.weight": 4, "b.weight": 4}


def test_equalization_undoes_a_skew() -> None:
    """Eq. 17's toy case: inner channels skewed by random factors come back balanced, up to one common factor."""
    dof, weights = toy(), balanced()
    D = torch.exp(torch.randn(6, dtype=torch.float64))
    skewed = {"a.weight": weights["a.weight"] * D.unsqueeze(1), "b.weight": weights["b.weight"] / D}
    folded = fold_network(dof, equalize(dof, skewed, BITS, beta=0.5).double(), skewed)
    ratio_a, ratio_b = folded["a.weight"] / weights["a.weight"], folded["b.weight"] / weights["b.weight"]
    common = torch.full_like(ratio_a, float(ratio_a[0, 0]))
    torch.testing.assert_close(ratio_a, common, rtol=10 * FLOAT32, atol=0)
    torch.testing.assert_close(ratio_b, 1 / common[0, 0].expand_as(ratio_b), rtol=10 * FLOAT32, atol=0)


def test_equalization_makes_both_sides_equally_fine() -> None:
    """Afterwards a channel's MMSE scale is in the same proportion on its producer's and its consumer's side."""
    dof = toy()
    weights = {"a.weight": torch.randn(6, 4).double(), "b.weight": torch.randn(3, 6).double()}
    weights["a.weight"] *= torch.exp(torch.randn(6, 1))
    folded = fold_network(dof, equalize(dof, weights, BITS, beta=0.5).double(), weights)
    producer = ppq(folded["a.weight"], high=7)
    consumer = ppq(folded["b.weight"].T.contiguous(), high=7)
    ratio = producer / consumer
    torch.testing.assert_close(ratio, ratio[0].expand(6), rtol=10 * FLOAT32, atol=0)
    assert float(producer.std()) > 0.01


def test_equalization_of_the_consumers_alone() -> None:
    """With beta = 1 all input slices of the consumer become equally large and the producer has no say."""
    dof = toy()
    weights = {"a.weight": torch.randn(6, 4).double(), "b.weight": torch.randn(3, 6).double()}
    log_c = equalize(dof, weights, BITS, beta=1.0)
    folded = fold_network(dof, log_c.double(), weights)
    consumer = ppq(folded["b.weight"].T.contiguous(), high=7)
    torch.testing.assert_close(consumer, consumer[0].expand(6), rtol=10 * FLOAT32, atol=0)
    other = weights | {"a.weight": weights["a.weight"] * torch.rand(6, 1)}
    torch.testing.assert_close(equalize(dof, other, BITS, beta=1.0), log_c)


def test_sign_of_the_equalization() -> None:
    """A channel that is large in the consumer gets C > 1, log c = -log C < 0: range moves to the producer."""
    dof, weights = toy(), balanced()
    weights["b.weight"][:, 2] *= 16
    log_c = equalize(dof, weights, BITS, beta=0.5)
    channel = dof.layer("a.weight").out_index - 1
    others = log_c[channel[[0, 1, 3, 4, 5]]]
    assert float(log_c[channel[2]] - others.mean()) == pytest.approx(-math.log(4), abs=10 * FLOAT32)
    folded = fold_network(dof, log_c.double(), weights)
    gain = folded["a.weight"][2].abs().sum() / folded["a.weight"][0].abs().sum()
    assert float(gain) > float(weights["a.weight"][2].abs().sum() / weights["a.weight"][0].abs().sum())


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_equalization_is_equivariant_to_channel_order(beta: float) -> None:
    """Permuting the inner channels permutes the factors."""
    dof, order = toy(), torch.randperm(6)
    weights = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(3, 6)}
    moved = {"a.weight": weights["a.weight"][order], "b.weight": weights["b.weight"][:, order]}
    log_c, log_c_moved = (equalize(dof, w, BITS, beta=beta) for w in (weights, moved))
    channel = dof.layer("a.weight").out_index - 1
    torch.testing.assert_close(log_c_moved[channel], log_c[channel][order])


def test_equalization_ignores_the_unit_of_a_layer() -> None:
    """Multiplying a whole layer by a constant changes no factor: scales are relative to their own tensor."""
    dof = toy()
    weights = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(3, 6)}
    scaled = {"a.weight": weights["a.weight"] * 8, "b.weight": weights["b.weight"] / 4}
    assert torch.equal(equalize(dof, scaled, BITS, beta=0.5), equalize(dof, weights, BITS, beta=0.5))


def test_equalization_is_bounded() -> None:
    """However skewed the weights, no factor leaves [1 / largest, largest]; zero slices have no say."""
    dof, weights = toy(), balanced()
    weights["a.weight"][0] *= 1e6
    weights["b.weight"][:, 1] *= 1e6
    weights["a.weight"][2] = 0
    log_c = equalize(dof, weights, BITS, beta=0.5, largest=8.0)
    assert bool(torch.isfinite(log_c).all())
    assert float(log_c.abs().max()) == pytest.approx(math.log(8), rel=FLOAT32)


def fan_out() -> DofMap:
    """Map two producers whose sum is read by two consumers."""
    shape = (1, 4, 2, 2)
    return map_dof(
        chain(
            conv_op("a", "x", shape=(4, 3)),
            conv_op("b", "x", shape=(4, 3)),
            Op("sum", "add", ("a", "b"), ("sum",), (Ref(0), Ref(1))),
            conv_op("c", "sum", shape=(2, 4)),
            conv_op("d", "sum", shape=(5, 4)),
            shapes={"x": (1, 3, 2, 2), "a": shape, "b": shape, "sum": shape, "c": (1, 2, 2, 2), "d": (1, 5, 2, 2)},
            outputs=("c", "d"),
        )
    )


@pytest.mark.parametrize("quantized", ["abcd", "ac", "ad"])
def test_shared_edges_take_the_weighted_mean(quantized: str) -> None:
    """Eq. 20 and 21: each side is the geometric mean over its layers, weighed by elements; float layers have no say."""
    dof = fan_out()
    shapes = {"a": (4, 3), "b": (4, 3), "c": (2, 4), "d": (5, 4)}
    weights = {f"{k}.weight": torch.randn(*v, 1, 1).double() for k, v in shapes.items()}
    bits = {f"{k}.weight": 4 for k in quantized}
    found = equalize(dof, weights, bits, beta=0.5)
    for m, variable in enumerate((dof.layer("a.weight").out_index - 1).tolist()):
        sides = []
        for names, axis in (("ab", 0), ("cd", 1)):
            slices = []
            for name in names:
                if name in quantized:
                    W = weights[f"{name}.weight"].squeeze()
                    piece = W[m] if axis == 0 else W[:, m]
                    whole = float(ppq(W.reshape(1, -1), high=7))
                    slices.append((float(ppq(piece.reshape(1, -1), high=7)), whole, piece.numel()))
            sides.append(np.array([math.exp(reference.channel_logarithms(slices))]))
        C = reference.equalization_factor(*sides, 0.5)
        assert float(found[variable]) == pytest.approx(-math.log(float(C[0])), abs=FLOAT32)


def test_equalized_real_network_computes_the_same() -> None:
    """The chosen factors fold into a real network without changing its outputs."""
    model, x = chained("residual", "depthwise", "concat"), image()
    dof, tensors = mapped(model, x), parameters_of(model)
    log_c = equalize(dof, tensors, dict.fromkeys((la.weight for la in dof.layers), 4), beta=0.5)
    assert float(log_c.abs().max()) > 0.1
    after = torch.func.functional_call(model, fold_network(dof, log_c.double(), tensors), x)
    torch.testing.assert_close(after, model(x), rtol=1e3 * EXACT, atol=1e3 * EXACT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_equalization_on_an_accelerator() -> None:
    """Weights on an accelerator get the factors that they get on the CPU."""
    dof = toy()
    weights = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(3, 6)}
    there = {k: v.cuda() for k, v in weights.items()}
    found = equalize(dof, there, BITS, beta=0.5).cpu()
    torch.testing.assert_close(found, equalize(dof, weights, BITS, beta=0.5), rtol=10 * FLOAT32, atol=10 * FLOAT32)
