"""Masks: exact shares and patterns, whatever ties there are, and the gradient through them."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from qft_plugin.tensors.axes import Axes
from qft_plugin.tensors.sparsity import mask_of, masked, smallest_dropped, two_of_four


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)),
    share=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 999),
)
def test_unstructured_share_is_exact(shape: tuple[int, ...], share: float, seed: int) -> None:
    """Exactly the rounded share is dropped, and no dropped weight is larger than a kept one."""
    u = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    kept = smallest_dropped(u, share=share)
    dropped = round(share * u.numel())
    assert int((~kept).sum()) == dropped
    np.testing.assert_array_equal(kept.numpy(), reference.smallest_dropped(u.numpy(), dropped))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_unstructured_share_is_exact_among_equals(share: float) -> None:
    """Ties do not change how many weights are dropped."""
    assert int((~smallest_dropped(torch.ones(4, 5), share=share)).sum()) == round(20 * share)


SHAPES = {
    "linear": ("linear", (3, 8), 1),
    "linear of 6": ("linear", (3, 6), 1),
    "linear of 7": ("linear", (2, 7), 1),
    "linear of 5": ("linear", (2, 5), 1),
    "conv": ("conv2d", (3, 8, 2, 2), 1),
    "conv1d": ("conv1d", (3, 9, 3), 1),
    "grouped": ("conv2d", (4, 6, 1, 2), 2),
    "transposed": ("conv_transpose2d", (8, 3, 2, 2), 1),
    "transposed of 7": ("conv_transpose1d", (7, 3, 2), 1),
    "grouped transposed": ("conv_transpose2d", (12, 2, 1, 2), 2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_two_of_four(name: str) -> None:
    """The mask is that of the loops for every kind of layer; of n channels in a group's last four min(n, 2) stay."""
    kind, shape, groups = SHAPES[name]
    u = torch.randn(shape, dtype=torch.float64)
    kept = two_of_four(u, Axes(kind, groups))
    transposed = "transpose" in kind
    np.testing.assert_array_equal(kept.numpy(), reference.two_of_four(u.numpy(), groups, transposed=transposed))
    channels = shape[0] // groups if transposed else shape[1]
    of_a_column = 2 * (channels // 4) + min(2, channels % 4)
    assert int(kept.sum()) == u.numel() // channels * of_a_column


def test_two_of_four_among_equals_and_zeros() -> None:
    """Ties and zeros do not change how many are kept, also next to channels that are only imagined."""
    for u in (torch.ones(3, 8), torch.zeros(3, 8)):
        assert (two_of_four(u, Axes("linear")).view(3, 2, 4).sum(-1) == 2).all()
    assert two_of_four(torch.zeros(3, 6), Axes("linear"))[:, 4:].all()


def test_a_mask_does_not_depend_on_the_memory_layout() -> None:
    """A kernel in channels-last order has the same mask."""
    u = torch.randn(4, 8, 3, 3)
    other = u.contiguous(memory_format=torch.channels_last)
    assert torch.equal(two_of_four(u, Axes("conv2d")), two_of_four(other, Axes("conv2d")))
    assert torch.equal(smallest_dropped(u, share=0.4), smallest_dropped(other, share=0.4))


def test_a_mask_passes_the_gradient_straight_through() -> None:
    """What is dropped is 0, without a sign, and hears of its gradient all the same."""
    x = torch.tensor([-3.0, 2.0, -1.0], requires_grad=True)
    y = masked(x, torch.tensor([True, True, False]))
    assert y.tolist() == [-3, 2, 0]
    assert math.copysign(1, y[2].item()) == 1
    y.backward(torch.tensor([1.0, 2.0, 4.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 4]


def test_normalisations_are_never_sparse() -> None:
    """A gain of a normalisation keeps all its values, whatever the setting."""
    for sparsity in (0.5, "2:4"):
        assert mask_of(torch.ones(5), Axes("layer_norm"), sparsity) is None


@pytest.mark.parametrize("sparsity", [None, 0.5, "2:4"])
def test_pruned_weights_stay_zero(sparsity: float | str | None) -> None:
    """What the user has pruned is dropped, and counts as 0 where others are chosen."""
    u, kept = torch.randn(3, 8), torch.rand(3, 8) > 0.3
    mask = mask_of(u, Axes("linear"), sparsity, kept=kept)
    assert mask is not None
    alone = mask_of(u, Axes("linear"), sparsity)
    expected = kept if alone is None else kept & alone(u * kept)
    assert torch.equal(mask(u), expected)
