"""The axes of a weight: vectors on them, slices, and the order of its channels."""

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from qft_plugin.tensors.axes import Axes

EXACT = 1e-12
"""float64 sums of at most a few hundred terms in another order."""

KINDS = [
    ("linear", (4, 6), 1, 6, 4),
    ("conv1d", (4, 6, 3), 1, 6, 4),
    ("conv2d", (4, 3, 2, 2), 2, 6, 4),
    ("conv2d", (8, 1, 2, 2), 4, 4, 8),
    ("conv3d", (4, 2, 1, 2, 1), 1, 2, 4),
    ("conv_transpose1d", (6, 4, 3), 1, 6, 4),
    ("conv_transpose2d", (6, 2, 2, 2), 2, 6, 4),
    ("conv_transpose3d", (4, 3, 1, 1, 2), 4, 4, 12),
]


@pytest.mark.parametrize(("kind", "shape", "groups", "ins", "outs"), KINDS)
def test_per_in_and_per_out_scale_what_they_say(
    kind: str, shape: tuple[int, ...], groups: int, ins: int, outs: int
) -> None:
    """A factor of an input channel undoes its inverse on the input; one of an output channel scales the output."""
    W = torch.randn(shape, dtype=torch.float64)
    x = torch.randn(2, ins, *(5,) * (len(shape) - 2), dtype=torch.float64)
    a, b = torch.rand(ins, dtype=torch.float64) + 0.5, torch.rand(outs, dtype=torch.float64) + 0.5
    function = getattr(torch.nn.functional, kind)

    def layer(x: Tensor, W: Tensor) -> Tensor:
        return function(x, W) if kind == "linear" else function(x, W, groups=groups)

    spatial = (1, -1, *(1,) * (len(shape) - 2))
    axes = Axes(kind, groups)
    scaled = W * axes.per_in(a, W) * axes.per_out(b, W)
    assert scaled.shape == W.shape
    found = layer(x / a.view(spatial), scaled)
    torch.testing.assert_close(found, layer(x, W) * b.view(spatial), rtol=EXACT, atol=EXACT)


def test_per_out_of_a_normalisation_is_the_vector() -> None:
    """A weight with one axis holds one value per channel already."""
    v = torch.rand(5)
    assert torch.equal(Axes("layer_norm").per_out(v, torch.ones(5)), v)


@pytest.mark.parametrize(("kind", "shape", "groups", "ins", "outs"), KINDS)
def test_slices_hold_what_a_channel_touches(
    kind: str, shape: tuple[int, ...], groups: int, ins: int, outs: int
) -> None:
    """Row c of the slices is what the kernel's gradient is nonzero at when only channel c is active."""
    W = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x = torch.rand(1, ins, *(4,) * (len(shape) - 2), dtype=torch.float64) + 0.1
    function = getattr(torch.nn.functional, kind)
    extra = {} if kind == "linear" else {"groups": groups}
    assert W.requires_grad
    axes = Axes(kind, groups)
    for slices, count, of_output in ((axes.out_slices, outs, True), (axes.in_slices, ins, False)):
        found = slices(W.detach())
        assert found.shape[0] == count
        for c in range(count):
            alone = torch.zeros_like(x)
            alone[:, c : c + 1] = x[:, c : c + 1]
            y = function(x, W, **extra)[:, c] if of_output else function(alone, W, **extra)
            (g,) = torch.autograd.grad(y.sum(), W)
            assert sorted(W.detach()[g != 0].tolist()) == sorted(found[c].tolist())


@pytest.mark.parametrize(("kind", "shape", "groups", "ins", "outs"), KINDS)
def test_output_channels_come_first_and_go_back(
    kind: str, shape: tuple[int, ...], groups: int, ins: int, outs: int
) -> None:
    """The order of a transposed kernel is that of the loops over groups and channels, and it is undone."""
    W, axes = torch.randn(shape), Axes(kind, groups)
    V = axes.by_output(W)
    assert V.shape == (outs, ins // groups, *shape[2:])
    if axes.transposed:
        for o in range(outs):
            for i in range(ins // groups):
                assert torch.equal(V[o, i], W[o // shape[1] * (ins // groups) + i, o % shape[1]])
    else:
        assert V is W
    assert torch.equal(axes.from_output(V), W)


@pytest.mark.parametrize(("kind", "shape", "groups", "ins", "outs"), KINDS)
def test_channels_of_both_sides(kind: str, shape: tuple[int, ...], groups: int, ins: int, outs: int) -> None:
    """The channels of all groups are counted."""
    assert Axes(kind, groups).channels(torch.empty(shape)) == (ins, outs)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("doubly", [True, False])
@pytest.mark.parametrize(("kind", "shape", "groups", "ins", "outs"), KINDS)
def test_scales_stand_on_the_axes_of_their_channels(
    kind: str, shape: tuple[int, ...], groups: int, ins: int, outs: int, doubly: bool, per_channel: bool
) -> None:
    """Broadcast against the weight, the step of each element is that of the loops over channels (Eq. 5)."""
    S = torch.rand((outs,) if per_channel else (), dtype=torch.float64) + 0.5
    T = torch.rand(ins, dtype=torch.float64) + 0.5
    W = torch.zeros(shape, dtype=torch.float64)
    found = Axes(kind, groups).on_weight(S, T if doubly else None, W).expand_as(W)
    left = T.numpy() if doubly else np.ones(ins)
    right = S.expand(outs).numpy()
    expected = reference.kernel_steps(shape, right, left, groups, transposed="transpose" in kind)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize(("kind", "shape", "groups", "ins", "outs"), KINDS)
def test_scales_on_the_axes_are_differentiable(
    kind: str, shape: tuple[int, ...], groups: int, ins: int, outs: int
) -> None:
    """The gradient of both scales is that of their product."""
    S, T = (torch.rand(n, dtype=torch.float64).add(0.5).requires_grad_() for n in (outs, ins))
    W = torch.zeros(shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda S, T: Axes(kind, groups).on_weight(S, T, W), (S, T))
