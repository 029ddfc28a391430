"""Grids of integers, rounding onto them, and factors that hardware can multiply by."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from qft_plugin.tensors.grid import integer_range, largest_integer, quantize_factor, round_ste, to_integer

EXACT = 1e-12
"""A handful of float64 operations in another order."""

FACTORS = st.floats(1e-6, 1e6)


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "expected"),
    [
        (4, True, True, (-7, 7)),
        (4, True, False, (-8, 7)),
        (4, False, False, (0, 15)),
        (8, True, False, (-128, 127)),
        (2, True, True, (-1, 1)),
        (1, False, False, (0, 1)),
    ],
)
def test_integer_range(bits: int, signed: bool, narrow: bool, expected: tuple[int, int]) -> None:
    """Narrow grids are symmetric, full ones two's complement, unsigned ones start at 0."""
    assert integer_range(bits, signed=signed, narrow=narrow) == expected


def test_largest_integer_is_that_of_both_signed_grids() -> None:
    """Narrow and full grids end at the same integer."""
    for bits in range(2, 33):
        assert {integer_range(bits, signed=True, narrow=narrow)[1] for narrow in (True, False)} == {
            largest_integer(bits)
        }


def test_ties_go_to_even() -> None:
    """Halves round to the even neighbour on both sides of 0, and at the clip edges."""
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, 6.5, 7.5, -0.5, -1.5, -2.5, -6.5, -7.5])
    expected = torch.tensor([0.0, 2, 2, 4, 6, 7, 0, -2, -2, -6, -7])
    assert torch.equal(to_integer(x, torch.tensor(1.0), low=-7, high=7), expected)


def test_round_ste_rounds_and_lets_the_gradient_through() -> None:
    """The value is the nearest integer, the gradient is 1."""
    x = torch.tensor([0.2, 0.5, 1.5, -2.7], requires_grad=True)
    y = round_ste(x)
    y.sum().backward()
    assert y.tolist() == [0, 0, 2, -3]
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(F=FACTORS)
def test_a_factor_that_is_a_power_of_two(dtype: torch.dtype, F: float) -> None:
    """The result is a power of two exactly, the nearest one in the logarithm, and stays where it is."""
    given_factor = torch.tensor(F, dtype=dtype)
    found = quantize_factor(given_factor, "power_of_two")
    assert found.dtype == dtype
    assert math.frexp(found.item())[0] == 0.5
    assert abs(math.log2(found.item() / given_factor.item())) <= 0.5 + 1e-6
    assert torch.equal(quantize_factor(found, "power_of_two"), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(F=FACTORS, bits=st.integers(2, 24))
def test_a_factor_of_some_bits(dtype: torch.dtype, F: float, bits: int) -> None:
    """The result has so many significant bits exactly, is the nearest such number, and stays where it is."""
    given_factor = torch.tensor(F, dtype=dtype)
    found = quantize_factor(given_factor, bits).item()
    assert reference.significant(found, bits)
    step = 2.0 ** (math.frexp(given_factor.item())[1] - bits)
    assert abs(found - given_factor.item()) <= step / 2
    assert quantize_factor(torch.tensor(found, dtype=dtype), bits).item() == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["power_of_two", 2, 4, 8, 24])
def test_every_shift_is_a_fixed_point(kind: str | int, dtype: torch.dtype) -> None:
    """Powers of two, in vectors as kernels of the library see them, come back in every bit."""
    F = torch.tensor([2.0**k for k in range(-40, 41)], dtype=dtype)
    assert torch.equal(quantize_factor(F, kind), F)


def test_any_factor_may_stay() -> None:
    """As floats, factors are the given tensor."""
    F = torch.tensor([0.3, 7.0])
    assert quantize_factor(F, "float") is F


@pytest.mark.parametrize("bits", [2, 5, 12])
def test_the_gradient_passes_the_rounding_of_a_factor(bits: int) -> None:
    """Of an integer multiplier the gradient is 1, of a shift it is relative: d log F_q / d log F = 1."""
    F = torch.tensor([0.3, 1.0, 7.1], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(quantize_factor(F, bits).sum(), F)
    torch.testing.assert_close(g, torch.ones_like(g), rtol=EXACT, atol=0)
    log_F = F.detach().log().requires_grad_()
    (g,) = torch.autograd.grad(quantize_factor(log_F.exp(), "power_of_two").log().sum(), log_F)
    torch.testing.assert_close(g, torch.ones_like(g), rtol=EXACT, atol=0)
