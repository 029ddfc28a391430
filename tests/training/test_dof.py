"""The degrees of freedom: which of them train, at which rate, and how they fold."""

import pytest
import torch
from dofs import KINDS, make_dof, two_layers
from graphs import mapped, parameters_of
from torch import Tensor

from qft_plugin.config import QFTConfig
from qft_plugin.training.dof import Dof, parameter_groups
from qft_plugin.training.solve import solve

EXACT = 1e-12
"""A handful of float64 operations in another order."""


def test_the_left_scale_is_trained_with_the_other_scales() -> None:
    """It is given to the optimizer once, at the learning rate of scales, and a kernel without one has none."""
    model, x = two_layers("grouped")
    dof = make_dof(model, x, doubly=True)
    values, scales, _ = parameter_groups(dof, learning_rate=1, scale_learning_rate=2)
    left = [dof.trained_weight(name).log_L for name in dof.weight_grids]
    assert len(left) == 3
    assert all(sum(p is q for q in scales["params"]) == 1 for p in left)
    assert not any(p is q for p in left for q in values["params"])
    assert all(module.log_L is None and module.scale_in is None for module in make_dof(model, x).layers)


def test_values_and_scales_train_at_rates_of_their_own() -> None:
    """Weights and biases have the one rate, the logarithms of scales the other, those of factors a tenth of that."""
    groups = parameter_groups(make_dof(*two_layers("grouped")), learning_rate=1, scale_learning_rate=2)
    assert [group["lr"] for group in groups] == pytest.approx([1, 2, 0.2])


def test_a_part_of_the_degrees_of_freedom_trains() -> None:
    """Only the named layers with all that is theirs, the named quantizers, and the factors if asked."""
    dof = make_dof(*two_layers("grouped"), doubly=True)
    layer, step = dof.trained_weight("2.weight"), dof.activations.log_s[1]
    settings = {"learning_rate": 1.0, "scale_learning_rate": 2.0}
    values, scales, factors = parameter_groups(dof, **settings, layers={"2.weight"}, quantizers={"b"}, factors=False)
    assert {id(p) for p in values["params"]} == {id(layer.W), id(layer.bias)}
    assert {id(p) for p in scales["params"]} == {id(step), id(layer.log_F), id(layer.log_L)}
    assert not factors["params"]
    *others, factors = parameter_groups(dof, **settings, layers=(), quantizers=())
    assert not any(group["params"] for group in others)
    assert [id(p) for p in factors["params"]] == [id(dof.log_c)]


@pytest.mark.parametrize("channelwise", [True, False])
def test_a_shifted_bias_is_shifted_in_the_folded_network(channelwise: bool) -> None:
    """At any factors and units, the solved bias changes by what was added, and nothing else changes."""
    dof = make_dof(*two_layers("grouped"), channelwise=channelwise)
    before = solve(dof).tensors
    change = torch.randn_like(before["2.bias"])
    dof.shift_bias("2.weight", change)
    for name, after in solve(dof).tensors.items():
        expected = before[name] + change if name == "2.bias" else before[name]
        torch.testing.assert_close(after, expected, rtol=EXACT, atol=EXACT)


def test_fixed_factors_do_not_train() -> None:
    """With `train_cross_layer=False` the factors get no gradient and are not given to the optimizer."""
    model, x = two_layers("conv")
    dof = Dof(mapped(model, x), parameters_of(model), {}, {}, config=QFTConfig(train_cross_layer=False))
    assert not dof.log_c.requires_grad
    assert all(not g["params"] for g in parameter_groups(dof, learning_rate=1, scale_learning_rate=1))


@pytest.mark.parametrize("kind", KINDS)
def test_folding_of_the_degrees_of_freedom_is_differentiable(kind: str) -> None:
    """The folded weight and bias have the gradient of their formula in the factors."""
    dof = make_dof(*two_layers(kind))
    layer = dof.layers[1]
    c = dof.factors().detach().requires_grad_()

    def folded(c: Tensor) -> tuple[Tensor, Tensor]:
        channels = layer.channels(c)
        return layer.folded_weight(channels, layer.unit), layer.folded_bias(channels)

    assert torch.autograd.gradcheck(folded, (c,))
