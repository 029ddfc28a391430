"""Fake-quantization: every code, ties, clip edges, and its native gradient."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qft_plugin.tensors.fake_quantize import fake_quantize, fake_quantize_composed, fake_quantize_folded, same_layout
from qft_plugin.tensors.grid import integer_range, to_integer

EXACT = 1e-12
"""float64 sums of at most a few hundred terms in another order."""

GRIDS = [(-7, 7, 0), (-8, 7, 0), (-128, 127, 0), (0, 15, 0), (0, 255, 117), (0, 15, 4)]
"""Narrow, full and unsigned grids, and unsigned ones with a zero point."""


def clear_of_ties(x: Tensor, scale: Tensor) -> Tensor:
    """Move values that lie next to a rounding tie: there the composed and the fused form may round differently."""
    u = x / scale
    near = ((u - u.floor()) - 0.5).abs() < 1e-6
    return torch.where(near, (u + 0.1) * scale, x)


@pytest.mark.parametrize("scale", [1.0, 0.125, 0.3])
def test_all_codes_of_four_bits_are_fixed_points(scale: float) -> None:
    """The 15 values of a narrow 4-bit grid quantize to themselves, and to all 15 integers."""
    codes = torch.arange(-7, 8, dtype=torch.float64)
    s = torch.tensor(scale, dtype=torch.float64)
    assert torch.equal(to_integer(codes * s, s, low=-7, high=7), codes)
    assert torch.equal(fake_quantize(codes * s, s, low=-7, high=7), codes * s)


def test_everything_between_two_codes_goes_to_the_nearer_one() -> None:
    """On a fine sweep beyond both ends, each value gets the nearest of the 15 codes."""
    s, codes = 0.25, np.arange(-7, 8) * 0.25
    x = torch.linspace(-2.5, 2.5, 1237, dtype=torch.float64)
    found = fake_quantize(x, torch.tensor(s, dtype=torch.float64), low=-7, high=7).numpy()
    distance = np.abs(x.numpy()[:, None] - codes)
    np.testing.assert_allclose(np.abs(found - x.numpy()), distance.min(1), rtol=0, atol=EXACT)
    assert set(found) == set(codes)


@pytest.mark.parametrize(("low", "high", "zero_point"), GRIDS)
def test_values_far_outside_clip_to_the_ends(low: int, high: int, zero_point: int) -> None:
    """Far values become the end codes, and the real value of a code is scale * (code - Z)."""
    s = torch.tensor(0.5)
    x = torch.tensor([-1e6, 1e6])
    assert to_integer(x, s, low=low, high=high, zero_point=zero_point).tolist() == [low, high]
    found = fake_quantize(x, s, low=low, high=high, zero_point=zero_point)
    assert found.tolist() == [0.5 * (low - zero_point), 0.5 * (high - zero_point)]


@pytest.mark.parametrize(("low", "high", "zero_point"), GRIDS)
def test_real_zero_is_exact(low: int, high: int, zero_point: int) -> None:
    """The real 0 (padding) is on every grid."""
    s = torch.tensor(0.37)
    assert float(fake_quantize(torch.zeros(()), s, low=low, high=high, zero_point=zero_point)) == 0.0


def test_arguments_stay_as_they_are() -> None:
    """The in-place arithmetic inside never touches the caller's tensors."""
    x, s = torch.randn(50), torch.tensor([0.3])
    before = x.clone()
    to_integer(x, s, low=-7, high=7)
    fake_quantize(x, s, low=-7, high=7, zero_point=2)
    assert torch.equal(x, before)
    assert s.tolist() == torch.tensor([0.3]).tolist()


SHAPES = {
    "scalar": ((3, 4, 5), ()),
    "one element": ((3, 4, 5), (1,)),
    "per output channel": ((4, 3, 2, 2), (4, 1, 1, 1)),
    "per input channel": ((4, 3, 2, 2), (1, 3, 1, 1)),
    "doubly per channel": ((4, 3, 2, 2), (4, 3, 1, 1)),
    "last axis": ((2, 5, 6), (6,)),
}


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (shape, layout)
        for shape in SHAPES
        for layout in ("contiguous", "channels last", "with gaps")
        if layout != "channels last" or len(SHAPES[shape][0]) == 4
    ],
)
@pytest.mark.parametrize(("low", "high", "zero_point"), GRIDS)
def test_value_and_gradients_against_loops(low: int, high: int, zero_point: int, shape: str, layout: str) -> None:
    """Value, dL/dx and dL/ds are those of the loops and of autograd through the composed form."""
    x_shape, s_shape = SHAPES[shape]
    s = 0.5 + torch.rand(s_shape, dtype=torch.float64)
    x = torch.randn(x_shape, dtype=torch.float64) * (high - low) / 2 + (low + high) / 2 - zero_point
    x = clear_of_ties(x, s)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "with gaps":
        x = torch.stack([x, x], dim=-1)[..., 0]
    g = torch.randn(x_shape, dtype=torch.float64)
    value, gx, gs = _value_and_gradients(fake_quantize, x, s, g, low, high, zero_point)
    composed = _value_and_gradients(fake_quantize_composed, x, s, g, low, high, zero_point)
    expected = reference.fake_quantize(x.numpy(), s.numpy(), low, high, zero_point)
    expected_gx, expected_gs = reference.fake_quantize_gradients(x.numpy(), s.numpy(), g.numpy(), low, high, zero_point)
    np.testing.assert_allclose(value, expected, rtol=EXACT, atol=EXACT)
    np.testing.assert_array_equal(gx, expected_gx)
    np.testing.assert_allclose(gs, expected_gs, rtol=EXACT, atol=EXACT * (high - low))
    assert 0 < np.count_nonzero(gx == 0) < gx.size
    for found, other in zip((value, gx, gs), composed, strict=True):
        np.testing.assert_allclose(found, other, rtol=EXACT, atol=EXACT * (high - low))


def _value_and_gradients(
    function: Callable[..., Tensor], x: Tensor, s: Tensor, g: Tensor, low: int, high: int, zero_point: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, s = x.detach().requires_grad_(), s.detach().clone().requires_grad_()
    y = function(x, s, low=low, high=high, zero_point=zero_point)
    y.backward(g)
    assert x.grad is not None
    assert s.grad is not None
    return y.detach().numpy(), x.grad.numpy(), s.grad.numpy()


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "with gaps"])
@pytest.mark.parametrize("high", [15, 255])
@pytest.mark.parametrize("low", [0, -3])
@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (6, 5), (2, 3, 5)])
@pytest.mark.parametrize("bounded", [False, True], ids=["ReLU", "bounded ReLU"])
def test_a_relu_is_computed_along_with_the_quantization(
    bounded: bool, shape: tuple[int, ...], low: int, high: int, layout: str
) -> None:
    """Value and all gradients are those of one after the other: data on both sides of 0, bounds inside and outside."""
    if layout == "channels last" and len(shape) < 4:
        return
    axis = 1 if len(shape) == 4 else len(shape) - 1
    bound = torch.tensor([0.5, 1.0, 2.0, 1e-3, 40.0], dtype=torch.float64).view(-1, *(1,) * (len(shape) - 1 - axis))
    s = torch.tensor(1.7 / (high - low), dtype=torch.float64)
    x = clear_of_ties(torch.randn(shape, dtype=torch.float64), s)
    x.flatten()[::7] = 0
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "with gaps":
        x = torch.stack([x, x], dim=-1)[..., 0]
    g = torch.randn(shape, dtype=torch.float64)
    results = []
    for function in (fake_quantize, fake_quantize_composed):
        x_, s_, b_ = (t.detach().clone().requires_grad_() for t in (x, s, bound))
        kwargs: dict[str, Any] = {"bound": b_} if bounded else {"rectified": True}
        y = function(x_, s_, low=low, high=high, zero_point=low, **kwargs)
        y.backward(g)
        results.append([y.detach(), x_.grad, s_.grad, *([b_.grad] if bounded else [])])
        # A later operation in place does not disturb the gradient.
        x_.grad = s_.grad = b_.grad = None
        y = function(x_, s_, low=low, high=high, zero_point=low, **kwargs)
        y.mul_(1.0) if function is fake_quantize_composed else y.add_(1)
        y.backward(g)
        results[-1] += [x_.grad, s_.grad]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT * (high - low))
    assert 0 < int((results[0][1] == 0).sum()) < x.numel()


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bounded", "shifted"])
def test_data_in_lower_precision(kind: str, channels_last: bool) -> None:
    """The arithmetic is that of the scale's float32, whatever the data is in; only what is stored has fewer bits."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, 5, 4, 2).to(torch.bfloat16).contiguous(memory_format=layout)
    s, g = torch.tensor(0.013), torch.randn(3, 5, 4, 2).to(torch.bfloat16)
    results = []
    for data in (x, x.float()):
        x_, s_, z_ = data.clone().requires_grad_(), s.clone().requires_grad_(), torch.tensor(100.0, requires_grad=True)
        bound = torch.tensor([0.5, 1, 2, 1e-3, 40]).view(-1, 1, 1).requires_grad_()
        kwargs: dict[str, Any] = {"bounded": {"bound": bound}, "shifted": {"zero_point": z_}}.get(kind, {})
        y = fake_quantize(x_, s_, low=0, high=255, **kwargs)
        y.backward(g.to(y.dtype))
        results.append((y.detach(), x_.grad, s_.grad, z_.grad, bound.grad))
    (y, gx, gs, gz, gb), (wide, wide_gx, wide_gs, wide_gz, wide_gb) = results
    assert y.dtype == x.dtype
    assert torch.equal(y, wide.to(x.dtype))
    assert gx is not None
    assert gx.dtype == x.dtype
    assert torch.equal(gx, wide_gx.to(x.dtype))
    # What the result lost is in the gradient of the scale: at most half a unit in the last of 8 bits of each value.
    lost = float((g.float() * wide).abs().sum()) * 2**-9 / float(s)
    torch.testing.assert_close(gs, wide_gs, rtol=1e-5, atol=lost)
    assert (gz is None) == (kind != "shifted")
    torch.testing.assert_close(gz, wide_gz, rtol=1e-5, atol=1e-6)
    assert (gb is None) == (kind != "bounded")
    torch.testing.assert_close(gb, wide_gb, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("s_shape", [(1,), (1, 1, 1, 1)])
def test_a_bound_with_a_scale_of_any_rank(s_shape: tuple[int, ...]) -> None:
    """A scale of one element may have any number of axes."""
    x, bound = torch.randn(2, 5, 3, 2), torch.full((5, 1, 1), 0.8)
    found = fake_quantize(x, torch.full(s_shape, 0.1), low=0, high=15, bound=bound)
    assert torch.equal(found, fake_quantize(x, torch.tensor(0.1), low=0, high=15, bound=bound))


def test_a_gradient_keeps_its_precision_in_another_layout() -> None:
    """Only the order in memory is that of the other tensor."""
    g = torch.randn(2, 5, 3, 2)
    found = same_layout(g, torch.empty(2, 5, 3, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last))
    assert found.stride() == (30, 1, 10, 5)
    assert torch.equal(found, g)


KERNEL = (4, 3, 2, 2)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "step_shape", "unit_shapes"),
    [
        *((KERNEL, step, units) for step in [(), (4, 1, 1, 1), (4, 3, 1, 1)] for units in [[()], [(4, 1, 1, 1)]]),
        (KERNEL, (4, 1, 1, 1), [(4, 1, 1, 1), (1, 3, 1, 1)]),
        (KERNEL, (4, 3, 1, 1), [(4, 3, 1, 1), (), (1, 3, 1, 1)]),
        # Units and steps as large as the kernel: a normalisation, one output channel, doubly per-channel.
        ((4,), (), [(4,)]),
        ((4,), (4,), [(4,), (4,)]),
        ((1, 3, 1, 1), (), [(), (1, 3, 1, 1), ()]),
        ((4, 3, 1, 1), (4, 3, 1, 1), [(4, 3, 1, 1), (1, 3, 1, 1)]),
        ((4, 3), (4, 3), [(4, 3), (1, 3)]),
    ],
)
def test_a_folded_kernel(
    shape: tuple[int, ...], step_shape: tuple[int, ...], unit_shapes: list[tuple[int, ...]], channels_last: bool
) -> None:
    """Value and all gradients are those of multiplying first and fake-quantizing then."""
    step = 0.1 + torch.rand(step_shape, dtype=torch.float64)
    units = [0.5 + torch.rand(shape, dtype=torch.float64) for shape in unit_shapes]
    W, g = torch.randn(2, *shape, dtype=torch.float64)
    if channels_last and len(shape) == 4:
        W = W.contiguous(memory_format=torch.channels_last)
    results = []
    for fused in (False, True):
        leaves = [t.detach().clone().requires_grad_() for t in (W, step, *units)]
        W_, step_, *units_ = leaves
        if fused:
            used = fake_quantize_folded(W_, units_, step_, low=-7, high=7)
            assert used.stride() == W_.stride()
        else:
            used = fake_quantize(functools.reduce(operator.mul, units_, W_), step_, low=-7, high=7)
        used.backward(g)
        results.append([used.detach(), *(t.grad for t in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("s_shape", [(), (1, 4, 1, 1)])
def test_a_gradient_in_another_layout_is_followed(s_shape: tuple[int, ...]) -> None:
    """A transposed, an expanded and a channels-last gradient give what a contiguous one gives."""
    s = 0.3 + torch.rand(s_shape, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    g = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = _value_and_gradients(fake_quantize, x, s, g, -2, 1, 0)
    for other in (g.transpose(2, 3).contiguous().transpose(2, 3), g.contiguous(memory_format=torch.channels_last)):
        found = _value_and_gradients(fake_quantize, x, s, other, -2, 1, 0)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=EXACT, atol=EXACT)
    ones = _value_and_gradients(fake_quantize, x, s, torch.ones_like(g), -2, 1, 0)
    expanded = _value_and_gradients(fake_quantize, x, s, torch.ones((), dtype=x.dtype).expand(g.shape), -2, 1, 0)
    for a, b in zip(expanded, ones, strict=True):
        np.testing.assert_allclose(a, b, rtol=EXACT, atol=EXACT)


def test_gradient_of_the_scale_by_hand() -> None:
    """Inside the clip ds is round(u) - u, outside it is the end code: u = 1.3, -0.4, 9, -20 on a narrow 4-bit grid."""
    s = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([1.3, -0.4, 9.0, -20.0], dtype=torch.float64) * 0.5
    x.requires_grad_()
    fake_quantize(x, s, low=-7, high=7).sum().backward()
    assert x.grad is not None
    assert s.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]
    assert float(s.grad) == pytest.approx((1 - 1.3) + (0 + 0.4) + 7 - 7, rel=EXACT)


def test_data_alone_may_need_a_gradient() -> None:
    """With a fixed scale the gradient of the data is unchanged."""
    x = torch.tensor([0.2, 50.0], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), low=-7, high=7).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 0]


@given(
    seed=st.integers(0, 10**6),
    power=st.integers(-8, 8),
    bits=st.integers(2, 8),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_scaling_data_and_scale_scales_the_result(seed: int, power: int, bits: int, shape: list[int]) -> None:
    """fake_quantize(k x, k s) = k fake_quantize(x, s) exactly for powers of two, and repeating it changes nothing."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    low, high = integer_range(bits, signed=True, narrow=True)
    s, k = torch.tensor(0.3), 2.0**power
    once = fake_quantize(x, s, low=low, high=high)
    assert torch.equal(fake_quantize(k * x, k * s, low=low, high=high), k * once)
    assert torch.equal(fake_quantize(once, s, low=low, high=high), once)
    assert torch.equal(fake_quantize(-x, s, low=low, high=high), -once)
