"""The inputs that meet the weights of a layer, by random positions."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from qft_plugin.graph.layer_graph import Const, Layer, Op, Ref
from qft_plugin.job.gptq_inputs import (
    LEAST_ROWS,
    MOST_ROWS,
    PER_COLUMN,
    PRODUCTS,
    can_compensate,
    input_rows,
    rows_wanted,
)


def layer_of(module: nn.Module, kind: str, groups: int = 1) -> Layer:
    W = module.weight
    index = torch.zeros(1, dtype=torch.int64)
    return Layer("w", None, kind, groups, ("op",), ("x",), ("y",), index, index.expand(W.shape[0]))


def op_of(module: nn.Module, kind: str) -> Op:
    """Describe the call of a module the way a host does, by position."""
    args: tuple[object, ...] = (Ref(0), Const("w", tuple(module.weight.shape)), None)
    if kind != "linear":
        args = (*args, module.stride, module.padding, module.dilation, module.groups)
    return Op("op", kind, ("x",), ("y",), args, {})


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0)),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "same, uneven": nn.Conv2d(4, 6, (4, 3), padding="same"),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4),
    "sequence": nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "linear": nn.Linear(4, 6),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_are_what_the_weights_meet(name: str) -> None:
    """Weights times rows are outputs of the layer, for every position that was picked."""
    module = CONVOLUTIONS[name]
    kind = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Linear: "linear"}[type(module)]
    groups = getattr(module, "groups", 1)
    x = {"conv1d": torch.randn(3, 4, 9), "conv2d": torch.randn(3, 4, 8, 8), "linear": torch.randn(3, 5, 4)}[kind]
    layer = layer_of(module, kind, groups)
    assert can_compensate(layer)
    rows = input_rows(x, op_of(module, kind), layer, module.weight.detach(), count=20, generator=torch.Generator())
    W = module.weight.detach().reshape(groups, module.weight.shape[0] // groups, -1)
    found = (rows @ W.transpose(1, 2)).permute(1, 0, 2).flatten(1)
    function = {"conv1d": functional.conv1d, "conv2d": functional.conv2d}.get(kind)
    if function is None:
        outputs = functional.linear(x, module.weight).flatten(0, 1)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using padding='same'")  # torch's own, of uneven padding
            y = function(x, module.weight, None, module.stride, module.padding, module.dilation, groups)
        outputs = y.flatten(2).transpose(1, 2).flatten(0, 1)
    distance = torch.cdist(found.double(), outputs.detach().double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.amin(1).max() < 1e-5  # float32 sums of at most 36 products


def test_rows_are_of_the_same_positions_for_inputs_of_one_shape() -> None:
    """In the same state of the generator: what the float and the quantized network read is compared row by row."""
    for name, module in CONVOLUTIONS.items():
        kind = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Linear: "linear"}[type(module)]
        layer = layer_of(module, kind, getattr(module, "groups", 1))
        x = {"conv1d": torch.randn(3, 4, 9), "conv2d": torch.randn(3, 4, 8, 8), "linear": torch.randn(3, 5, 4)}[kind]
        found = [
            input_rows(
                values, op_of(module, kind), layer, module.weight, count=6, generator=torch.Generator().manual_seed(1)
            )
            for values in (x, 2 * x)
        ]
        assert torch.equal(2 * found[0], found[1]), name
        assert found[0].shape[1] == 6, name


def test_wide_kernels_have_more_rows_until_that_costs_too_much() -> None:
    """Rows grow with the unknowns, and the arithmetic stays below a limit."""
    assert rows_wanted(9) == LEAST_ROWS
    assert rows_wanted(100) == 100 * PER_COLUMN
    assert rows_wanted(800) == MOST_ROWS
    assert rows_wanted(2304) * 2304**2 <= PRODUCTS


def test_what_cannot_be_listed_is_left_alone() -> None:
    """Transposed and 3-d convolutions and normalisations start from rounding to nearest."""
    for kind in ("conv_transpose2d", "conv3d", "layer_norm"):
        assert not can_compensate(layer_of(nn.Conv2d(1, 1, 1), kind))
