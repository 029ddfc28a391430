"""Cross-layer factors fold into any network without a change of its function."""

import pytest
import torch
from dofs import two_layers
from graphs import FOLD_TOLERANCE, checked, folding_error, mapped, parameters_of
from hypothesis import given
from hypothesis import strategies as st
from models import BLOCKS, chained, conv, image
from torch import nn

from qft_plugin.graph.folding import fold, fold_network, names_of
from qft_plugin.tensors.axes import Axes

EXACT = 1e-12
"""A handful of float64 operations in another order."""

NORMS = {"batch norm", "group norm", "layer norm", "rms norm"}

HOMOGENEOUS = sorted(set(BLOCKS) - NORMS - {"relu6", "silu", "pad with ones", "gate"})


@pytest.mark.parametrize("name", BLOCKS)
def test_random_factors_fold_into_every_block(name: str) -> None:
    """Any positive factors move into the weights around a block and leave the network's function as it is."""
    dof = checked(chained(name, "conv"), image())
    assert (dof.layers[-1].in_index > 0).all()


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_homogeneous_blocks_have_no_barrier(name: str) -> None:
    """No channel between the first convolution and a homogeneous block is pinned."""
    dof = mapped(chained(name, "conv"), image())
    assert (dof.layer("0.weight").out_index > 0).all()


@given(names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_random_factors_fold_into_random_networks(names: list[str], seed: int) -> None:
    """Whatever stands after whatever, the map allows only factors that fold without a change."""
    torch.manual_seed(seed)
    dof, error = folding_error(chained(*names, "conv"), image(), seed=seed)
    assert dof.size > 0
    assert error < FOLD_TOLERANCE


def test_a_wrong_map_would_be_seen() -> None:
    """The comparison above is not blind: one factor on one side only changes the output."""
    model, x = nn.Sequential(conv(), nn.ReLU(), conv()).double(), image()
    dof = mapped(model, x)
    folded = fold_network(dof, torch.full((dof.size,), 0.1, dtype=torch.float64), parameters_of(model))
    del folded["2.weight"]
    with torch.no_grad():
        changed = torch.func.functional_call(model, folded, x)
        assert float((changed - model(x)).abs().max()) > 0.01


def test_zero_factors_fold_to_the_same_tensors() -> None:
    """Log c = 0 gives every weight and bias back, bit for bit, and leaves the given ones alone."""
    model = chained("grouped", "layer norm")
    dof, tensors = mapped(model, image()), parameters_of(model)
    before = {k: v.clone() for k, v in tensors.items()}
    folded = fold_network(dof, torch.zeros(dof.size, dtype=torch.float64), tensors)
    assert set(folded) == set(names_of(dof.layers))
    assert all(torch.equal(folded[k], before[k]) and torch.equal(tensors[k], before[k]) for k in folded)


def test_folding_twice_is_folding_the_sum() -> None:
    """Factors form a group: folding a, then b, is folding a + b."""
    model = chained("depthwise", "grouped transposed", "residual")
    dof, tensors = mapped(model, image()), parameters_of(model)
    a, b = torch.randn(2, dof.size, dtype=torch.float64)
    twice = tensors | fold_network(dof, b, tensors | fold_network(dof, a, tensors))
    once = fold_network(dof, a + b, tensors)
    assert all(torch.allclose(twice[k], once[k], rtol=EXACT, atol=0) for k in once)


@pytest.mark.parametrize(
    ("kind", "shape", "groups", "ins", "outs"),
    [
        ("linear", (4, 6), 1, 6, 4),
        ("conv2d", (4, 3, 2, 2), 2, 6, 4),
        ("conv1d", (6, 1, 3), 6, 6, 6),
        ("conv_transpose2d", (6, 2, 2, 2), 2, 6, 4),
        ("layer_norm", (4,), 1, 4, 4),
    ],
)
def test_fold_is_differentiable(kind: str, shape: tuple[int, ...], groups: int, ins: int, outs: int) -> None:
    """The gradient of folding is that of W * c_in / c_out for weight and factors."""
    W = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    c_in, c_out = (torch.rand(n, dtype=torch.float64).add(0.5).requires_grad_() for n in (ins, outs))
    assert torch.autograd.gradcheck(lambda *t: fold(*t, axes=Axes(kind, groups)), (W, c_in, c_out))


def test_names_of_lists_weights_and_biases() -> None:
    """Every parameter of the layers is listed once, weight before bias, and missing biases are left out."""
    dof = mapped(two_layers("conv")[0], image())
    assert names_of(dof.layers) == ["0.weight", "2.weight", "2.bias", "4.weight", "4.bias"]
