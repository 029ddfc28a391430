"""Folding a BatchNorm: the folded layer computes what layer and norm compute together."""

import copy
from typing import Any

import pytest
import torch
from graphs import record
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.graph.batch_norms import can_fold, folded_norm, kind_of, merge_norms, replaceable

EXACT = 1e-12
"""float64: a product and a sum per channel in another order; outputs are of the order of 10."""

NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

LAYERS: dict[str, tuple[int, int, dict[str, int]]] = {
    "plain": (6, 4, {"padding": 1}),
    "strided": (6, 4, {"stride": 2, "padding": 1, "dilation": 2}),
    "grouped": (6, 4, {"groups": 2}),
    "depthwise": (6, 6, {"groups": 6}),
    "depthwise with two outputs each": (3, 6, {"groups": 3}),
}


def layer_and_input(name: str, dim: int, *, transposed: bool, bias: bool) -> tuple[nn.Module, Tensor]:
    ins, outs, extra = LAYERS[name]
    layer = (TRANSPOSED if transposed else CONV)[dim](ins, outs, 3, bias=bias, **extra)
    return layer.double(), torch.randn(2, ins, *(6,) * dim, dtype=torch.float64)


def batch_norm(dim: int, channels: int, *, affine: bool = True) -> nn.Module:
    """Return a norm in eval mode none of whose channels is like another; some have a negative weight."""
    norm = NORM[dim](channels, affine=affine, eps=0.1).double().eval()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 4)
        if affine:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm


def assert_folds(layer: nn.Module, norm: nn.Module, x: Tensor) -> None:
    """Put the folded tensors into a copy of the layer and compare outputs."""
    assert can_fold(layer, norm, layer(x).shape)
    before = copy.deepcopy((layer.state_dict(), norm.state_dict()))
    W, bias = folded_norm(layer, norm)
    assert W.dtype == bias.dtype == torch.float64
    assert W.shape == layer.weight.shape
    for module, state in zip((layer, norm), before, strict=True):
        assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())
    folded = copy.deepcopy(layer)
    folded.weight, folded.bias = nn.Parameter(W), nn.Parameter(bias)
    torch.testing.assert_close(folded(x), norm(layer(x)), rtol=EXACT, atol=10 * EXACT)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_absorb_a_norm(name: str, dim: int, transposed: bool, bias: bool) -> None:
    """Weight and bias are scaled along the output channels, wherever the kernel keeps them."""
    layer, x = layer_and_input(name, dim, transposed=transposed, bias=bias)
    assert_folds(layer, batch_norm(dim, layer.out_channels), x)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
def test_linear_layers_absorb_a_norm(affine: bool, bias: bool) -> None:
    """A linear layer on `[N, C]` does as well, and a norm without weight and bias counts as one with 1 and 0."""
    layer = nn.Linear(5, 3, bias=bias).double()
    assert_folds(layer, batch_norm(1, 3, affine=affine), torch.randn(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_a_norm_that_is_not_affine(transposed: bool) -> None:
    """Without weight and bias the norm still divides and shifts."""
    layer, x = layer_and_input("grouped", 2, transposed=transposed, bias=False)
    assert_folds(layer, batch_norm(2, layer.out_channels, affine=False), x)


@given(
    groups=st.integers(1, 3),
    ins=st.integers(1, 3),
    outs=st.integers(1, 3),
    size=st.integers(1, 3),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_of_kernel_absorbs_a_norm(
    groups: int, ins: int, outs: int, size: int, transposed: bool, seed: int
) -> None:
    """Whatever the number of groups and of channels in a group, every output channel gets its own factor."""
    torch.manual_seed(seed)
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = make(groups * ins, groups * outs, size, groups=groups).double()
    assert_folds(layer, batch_norm(2, groups * outs), torch.randn(1, groups * ins, 4, 4, dtype=torch.float64))


def test_float32_is_folded_in_float64() -> None:
    """For a float32 network the result is that of the same network in float64, not rounded in between."""
    layer, _ = layer_and_input("plain", 2, transposed=False, bias=True)
    norm = batch_norm(2, 4)
    layer, norm = layer.float(), norm.float()
    found = folded_norm(layer, norm)
    expected = folded_norm(copy.deepcopy(layer).double(), copy.deepcopy(norm).double())
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert not torch.equal(found[0], found[0].float().double())


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_kind_is_the_function_that_is_called(transposed: bool, dim: int) -> None:
    """The name of the kind is that of the torch function that the layer's forward calls."""
    layer, x = layer_and_input("plain", dim, transposed=transposed, bias=True)
    assert [op.function for op in record(layer, x).ops] == [kind_of(layer)]


class Around(nn.Module):
    """A convolution and a BatchNorm of which something else uses a part."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.conv, self.norm = use, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.norm(y)
        if self.use == "between":
            return z + y
        if self.use == "output":
            return z, y
        if self.use == "layer":
            return self.conv(z.relu())
        if self.use == "weight":
            return torch.nn.functional.conv2d(z.relu(), self.conv.weight)
        if self.use == "norm":
            return self.norm(z.relu())
        return z.relu()


@pytest.mark.parametrize(
    ("use", "merged"),
    [("none", 1), ("between", 0), ("output", 0), ("layer", 0), ("weight", 0), ("norm", 0)],
)
def test_a_norm_is_merged_where_nothing_else_uses_a_part_of_the_pair(use: str, merged: int) -> None:
    """Not where the activation between has other readers or is an output, nor where weight or norm are used again."""
    model, x = Around(use).double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (model.norm.running_mean, model.norm.running_var, model.norm.weight, model.norm.bias):
            tensor.uniform_(0.3, 2)
    expected = model(x)
    assert len(merge_norms(model, model, record(model, x))) == merged
    torch.testing.assert_close(model(x), expected, rtol=EXACT, atol=10 * EXACT)


def test_kind_of_a_linear_layer() -> None:
    """Likewise for a linear layer, which has no number of axes in its name."""
    assert [op.function for op in record(nn.Linear(3, 2), torch.ones(1, 3)).ops] == [kind_of(nn.Linear(3, 2))]


def test_only_running_statistics_of_a_batch_norm_fold() -> None:
    """A norm that is training, has no running statistics, or mixes channels is no factor per channel."""
    conv = nn.Conv2d(3, 4, 1)
    shape = (2, 4, 5, 5)
    assert can_fold(conv, nn.BatchNorm2d(4).eval(), shape)
    assert not can_fold(conv, nn.BatchNorm2d(4), shape)
    assert not can_fold(conv, nn.BatchNorm2d(4, track_running_stats=False).eval(), shape)
    for norm in (nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, track_running_stats=True), nn.LayerNorm(4), nn.Identity()):
        assert not can_fold(conv, norm.eval(), shape)


def test_only_convolutions_and_linear_layers_absorb_a_norm() -> None:
    """What has no kernel, or one that is not a product with the input, cannot take a norm."""
    norm = nn.BatchNorm1d(4).eval()
    for layer in (nn.ReLU(), nn.Embedding(5, 4), nn.Bilinear(2, 2, 4), nn.BatchNorm1d(4).eval(), nn.PReLU(4)):
        assert not can_fold(layer, norm, (2, 4))


def test_a_norm_over_tokens_does_not_fold() -> None:
    """On `[N, tokens, features]` a norm has a factor for each token, which a linear layer cannot take, also where
    there are as many of the one as of the other.
    """
    assert can_fold(nn.Linear(8, 4), nn.BatchNorm1d(4).eval(), (2, 4))
    assert not can_fold(nn.Linear(8, 4), nn.BatchNorm1d(4).eval(), (2, 4, 4))
    assert can_fold(nn.Conv1d(8, 4, 1), nn.BatchNorm1d(4).eval(), (2, 4, 4))
    assert not can_fold(nn.Conv1d(8, 4, 1), nn.BatchNorm1d(4).eval(), (4, 4))


class NormAct(nn.BatchNorm2d):
    """A subclass whose forward ends in an activation function."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        ).abs()


class OtherEps(nn.BatchNorm2d):
    """A subclass that hands another epsilon to torch's function than its attribute says."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, 0.5)


@pytest.mark.parametrize(("kind", "folds"), [(nn.BatchNorm2d, True), (NormAct, True), (OtherEps, False)])
@pytest.mark.parametrize("second_name", [False, True])
def test_a_merged_norm_keeps_what_a_subclass_does_more(kind: type[nn.Module], folds: bool, second_name: bool) -> None:
    """A subclass stays where it is, neutral; one that computes with other numbers than its own is left alone."""
    norm = batch_norm(2, 6)
    norm.__class__ = kind
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False).double(), norm, nn.ReLU())
    if second_name:
        model.norm = norm
        model.forward = lambda x: model[2](model.norm(model[0](x)))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = model(x)
    assert merge_norms(model, model, record(model, x)) == (["0"] if folds else [])
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert type(model[1]) is (nn.Identity if kind is nn.BatchNorm2d else kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, NormAct])
def test_a_norm_is_merged_once(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """Merged again, nothing changes: the scales of its layer need not be chosen anew."""
    norm = batch_norm(2, 6)
    norm.__class__ = kind
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm, nn.ReLU()).to(dtype)
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    assert merge_norms(model, model, record(model, x)) == ["0"]
    weight = model[0].weight.clone()
    assert merge_norms(model, model, record(model, x)) == []
    assert torch.equal(model[0].weight, weight)


class Unusual(nn.Module):
    """Two norms, the first of which is used in an unusual way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3).double(), batch_norm(2, 6)
        self.conv2, self.norm2 = nn.Conv2d(6, 4, 3).double(), batch_norm(2, 4)
        self.how, self.held = how, [self.norm1]

    def forward(self, x: Tensor) -> Tensor:
        x, norm = self.conv1(x), self.norm1
        if self.how == "function":
            x = functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            x = (self.held[0] if self.how == "held outside" else norm)(x)
        return self.norm2(self.conv2(x))


UNUSUAL = ["plain", "function", "held outside"]


@pytest.mark.parametrize("how", UNUSUAL)
def test_a_merged_norm_changes_nothing_however_it_is_called(how: str) -> None:
    """A forward may hand a norm's tensors to the function, or call it by a name that is none of a module."""
    model, x = Unusual(how), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = model(x)
    assert merge_norms(model, model, record(model, x)) == ["conv1", "conv2"]
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert (type(model.norm1) is nn.Identity) == (how != "function")


@pytest.mark.parametrize("how", UNUSUAL)
def test_a_norm_that_is_not_called_by_its_name_is_not_replaceable(how: str) -> None:
    """Another module in its place would not be called; the model is left as it was."""
    model, x = Unusual(how), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected, modules = model(x), list(model.modules())
    found = replaceable(model, ["norm1", "norm2"], ((x,), {}))
    assert found == {"plain": {"norm1", "norm2"}, "function": set(), "held outside": {"norm2"}}[how]
    assert list(model.modules()) == modules
    assert torch.equal(model(x), expected)
