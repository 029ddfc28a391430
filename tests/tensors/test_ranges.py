"""Scales from ranges: nothing clipped or the smallest error, in any unit."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qft_plugin.tensors.fake_quantize import fake_quantize
from qft_plugin.tensors.ranges import range_max, range_mse, shifted_range_max, shifted_range_mse

FLOAT32 = 1e-6
"""float32 sums and quotients in another order."""

MSE_SLACK = 1.02
"""The search over 80 shrunk maxima is within 2 % of one over 400."""

SEARCH_SLACK = 1.05
"""The ends of a range are searched one after the other, in steps of about 1 % of the largest value."""


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
    assert error(found) <= best * MSE_SLACK
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


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_range_that_shifts_is_as_good_as_a_search(sign: float) -> None:
    """Scale and zero point together have an error close to the best of all ends, and clipping a tail gains."""
    x = sign * torch.cat([torch.rand(2000) * 3 - 1, torch.tensor([9.0])])

    def error(found: tuple[Tensor, int]) -> float:
        scale, zero_point = found
        return float((fake_quantize(x, scale, low=0, high=15, zero_point=zero_point) - x).square().sum())

    ends: list[Callable[[float], float]] = [lambda r: float(x.amin()) * r, lambda r: float(x.amax()) * r]
    tries = [r / 40 for r in range(2, 41)]
    best = min(
        error(shifted_range_max(torch.tensor([ends[0](a), ends[1](b)]), low=0, high=15)) for a in tries for b in tries
    )
    found = error(shifted_range_mse(x, low=0, high=15))
    assert found <= SEARCH_SLACK * best
    assert found < error(shifted_range_max(x, low=0, high=15))
