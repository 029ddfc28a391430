"""PPQ and APQ: as good as a search, with the symmetries that they must have."""

import math
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from graphs import mapped
from hypothesis import given
from hypothesis import strategies as st
from models import chained, image
from torch import Tensor

from qft_plugin.tensors.axes import Axes
from qft_plugin.tensors.grid import quantize_factor
from qft_plugin.tensors.mmse import apq, doubly_scales, nearest_factor, ppq, rounding_errors, weight_scale
from qft_plugin.tensors.ranges import SMALLEST_SCALE

EXACT = 1e-12
"""float64 sums in another order."""

SOLVER_SLACK = 1.02
"""PPQ finds local minima of the error; from its starts the best is within 2 % of a search over 1,000 scales."""

RANDOM_ROWS = st.tuples(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 40), st.sampled_from([1, 3, 7, 127]))


def rows(seed: int, count: int, size: int) -> Tensor:
    """Return random slices, some of them with outliers."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return X * (1 + 4 * (torch.rand(count, size, generator=generator) < 0.1))


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


WEIGHTS = [("conv2d", (4, 3, 2, 2), 1, 4), ("linear", (5, 9), 1, 5), ("conv_transpose2d", (4, 3, 2, 2), 2, 6)]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("kind", "shape", "groups", "outs"), WEIGHTS)
def test_the_nearest_shift_is_the_better_of_two(
    kind: str, shape: tuple[int, ...], groups: int, outs: int, per_channel: bool, bits: int
) -> None:
    """Of the powers of two on both sides of the free factor, each channel has the one with the smaller error."""
    W, axes, high = torch.randn(shape, dtype=torch.float64), Axes(kind, groups), 2 ** (bits - 1) - 1
    F = torch.exp(torch.randn((outs,) if per_channel else (), dtype=torch.float64)) / high
    found = nearest_factor(W, axes, F, unit=0.7, kind="power_of_two", bits=bits)
    assert found.shape == F.shape
    slices = axes.out_slices(W) if per_channel else W.reshape(1, -1)
    chosen = set()
    for row, free, taken in zip(slices, F.reshape(-1), found.reshape(-1), strict=True):
        candidates = [2.0 ** math.floor(math.log2(free)), 2.0 ** (math.floor(math.log2(free)) + 1)]
        errors = [reference.squared_error(row.numpy(), c * 0.7, high) for c in candidates]
        assert taken == candidates[int(errors[1] < errors[0])]
        chosen.add(int(taken == candidates[1]))
    assert not per_channel or bits != 4 or kind == "linear" or chosen == {0, 1}


def test_a_factor_of_some_bits_is_rounded_to_the_nearest() -> None:
    """With several significant bits the nearest factor is as good as any, and a float factor stays."""
    W, F = torch.randn(4, 3), torch.rand(4) + 0.1
    for kind in ("float", 6):
        found = nearest_factor(W, Axes("linear"), F, unit=1.0, kind=kind, bits=4)
        assert torch.equal(found, quantize_factor(F, kind))


def test_errors_by_granularity() -> None:
    """By hand from the scales of each; more scales are never worse by more than the solver's slack."""
    W, axes = rows(0, 6, 40).view(6, 10, 2, 2) * torch.arange(1, 11).view(1, 10, 1, 1), Axes("conv2d")
    found = rounding_errors(W, axes)
    S, T = doubly_scales(W, axes, bits=4)
    steps = {
        "per-tensor": ppq(W.reshape(1, -1), high=7),
        "per-channel": ppq(W.flatten(1), high=7).view(6, 1, 1, 1),
        "doubly per-channel": S.view(6, 1, 1, 1) * T.view(1, 10, 1, 1),
    }
    for name, step in steps.items():
        error = (W / step).round().clamp(-7, 7) * step - W
        assert found[name] == pytest.approx(float(error.norm() / W.norm()), rel=EXACT)
    assert found["doubly per-channel"] < found["per-channel"] < found["per-tensor"]


def test_a_depthwise_kernel_has_one_channel_for_each_output() -> None:
    """A scale of that channel adds nothing to that of the output; a kernel of zeros has no error."""
    depthwise = rounding_errors(rows(1, 8, 9).view(8, 1, 3, 3), Axes("conv2d", 8))
    assert depthwise["doubly per-channel"] == depthwise["per-channel"]
    assert set(rounding_errors(torch.zeros(4, 3), Axes("linear")).values()) == {0.0}
