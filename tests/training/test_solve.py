"""The offline subgraph: Eq. (2), where training starts, and gradients to everything that trains."""

import numpy as np
import pytest
import reference
import torch
from dofs import ACTIVATIONS, KINDS, make_dof, two_layers
from graphs import FOLD_TOLERANCE, mapped, parameters_of

from qft_plugin.graph.folding import fold_network
from qft_plugin.training.dof import Dof, WeightGrid, parameter_groups
from qft_plugin.training.integers import deployed_weights, folded_tensors
from qft_plugin.training.solve import scales_of, solve, weight_scales

EXACT = 1e-12
"""A handful of float64 operations in another order."""


def test_weight_scales_is_equation_2() -> None:
    """S_wL = 1 / S_a(in), S_wR = S_a(out) * F; folded by the factors, their outer product has one step for each row."""
    s_in, s_out, F, kernel = [0.5, 2.0], [3.0, 5.0], [0.25, 0.5, 4.0], [0, 0, 1]
    tensors = (torch.tensor(values, dtype=torch.float64) for values in (s_in, s_out, F))
    found = weight_scales(*tensors, kernel=torch.tensor(kernel))
    for row, k in enumerate(kernel):
        c_in, c_out = torch.rand(4, dtype=torch.float64) + 0.5, torch.rand((), dtype=torch.float64) + 0.5
        S_wL, S_wR = 1 / (s_in[k] * c_in), s_out[k] * c_out * F[row]
        torch.testing.assert_close(S_wR * S_wL * c_in / c_out, found[row].expand(4), rtol=EXACT, atol=0)


def test_training_starts_at_the_given_values() -> None:
    """Untrained, the degrees of freedom give the given steps, weights, biases and activation scales back."""
    model, x = two_layers("grouped")
    tensors, dof_map = parameters_of(model), mapped(model, x)
    grids = {
        "0.weight": WeightGrid(4, torch.full((8,), 0.1), None, "a"),
        "2.weight": WeightGrid(8, torch.tensor(0.02), "a", "b"),
    }
    dof = Dof(dof_map, tensors, grids, ACTIVATIONS)
    steps, solution = scales_of(dof).weights, solve(dof)
    for name, grid in grids.items():
        torch.testing.assert_close(steps[name], grid.scale.double(), rtol=EXACT, atol=0)
        assert deployed_weights(dof)[name].bits == grid.bits
    for name in ("2.bias", "4.weight", "4.bias"):
        torch.testing.assert_close(solution.tensors[name], tensors[name], rtol=EXACT, atol=EXACT)
    for name, grid in ACTIVATIONS.items():
        assert solution.activation_scales[name].item() == pytest.approx(grid.scale, rel=EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_doubly_per_channel_training_starts_at_the_given_scales(kind: str) -> None:
    """Untrained, both scales are those given and the weight before rounding is the float one, for any left scale; it is
    stored in units of its own step.
    """
    model, x = two_layers(kind)
    tensors, dof_map = parameters_of(model), mapped(model, x)
    layer = dof_map.layer("2.weight")
    S, T = (torch.rand(len(index), dtype=torch.float64) + 0.1 for index in (layer.out_index, layer.in_index))
    dof = Dof(dof_map, tensors, {"2.weight": WeightGrid(4, S, "a", "b", T)}, ACTIVATIONS)
    found = deployed_weights(dof)["2.weight"]
    torch.testing.assert_close(found.step, S, rtol=EXACT, atol=0)
    torch.testing.assert_close(found.step_in, T, rtol=EXACT, atol=0)
    for name, t in folded_tensors(dof).items():
        torch.testing.assert_close(t, tensors[name], rtol=EXACT, atol=EXACT)
    steps = layer.axes.on_weight(S, T, tensors["2.weight"])
    torch.testing.assert_close(
        dof.trained_weight("2.weight").W.detach(), tensors["2.weight"] / steps, rtol=EXACT, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_left_scale(kind: str) -> None:
    """dL/dlog L_i is the sum of dL/dW * W over what input channel i touches: integers stay where a step changes."""
    dof = make_dof(*two_layers(kind), doubly=True)
    layer, module = dof.map.layer("2.weight"), dof.trained_weight("2.weight")
    tensor = solve(dof).tensors["2.weight"]
    g = torch.randn_like(tensor)
    tensor.backward(g)
    found = deployed_weights(dof)["2.weight"]
    transposed = "transpose" in layer.kind
    shape = tuple(tensor.shape)
    steps = reference.kernel_steps(
        shape, found.step.numpy(), found.step_in.numpy(), layer.groups, transposed=transposed
    )
    expected = np.zeros(len(layer.in_index))
    for i in range(len(expected)):
        alone = np.zeros(len(expected))
        alone[i] = 1
        touched = reference.kernel_steps(shape, found.step.numpy(), alone, layer.groups, transposed=transposed)
        expected[i] = (g.numpy() * (touched > 0) * found.integers.numpy() * steps).sum()
    assert module.log_L is not None
    np.testing.assert_allclose(module.log_L.grad.numpy(), expected, rtol=1e3 * EXACT, atol=1e3 * EXACT)
    assert np.abs(expected).min() > 0


def test_both_scales_of_a_kernel_have_one_common_factor_too_many() -> None:
    """Moving a factor from the left scale to the rescale factor changes no integer and no weight."""
    dof = make_dof(*two_layers("conv"), doubly=True)
    before = deployed_weights(dof)
    with torch.no_grad():
        for module in dof.layers:
            module.log_L.add_(1.5)
            module.log_F.sub_(1.5)
    for name, after in deployed_weights(dof).items():
        assert torch.equal(after.integers, before[name].integers)
        torch.testing.assert_close(
            after.step, before[name].step * torch.tensor(-1.5).double().exp(), rtol=EXACT, atol=0
        )


def test_a_layer_that_is_not_quantized_is_folded_but_not_trained() -> None:
    """A layer without a grid keeps its float weight up to the factors and is in no parameter group."""
    model, x = two_layers("conv")
    grids = {"0.weight": WeightGrid(4, torch.tensor(0.1), None, "a")}
    dof = Dof(mapped(model, x), parameters_of(model), grids, ACTIVATIONS)
    with torch.no_grad():
        dof.log_c.normal_()
    expected = fold_network(dof.map, dof.log_c.detach(), parameters_of(model))
    torch.testing.assert_close(solve(dof).tensors["2.weight"], expected["2.weight"], rtol=EXACT, atol=0)
    trained = {id(p) for g in parameter_groups(dof, learning_rate=1, scale_learning_rate=1) for p in g["params"]}
    assert trained == {id(p) for p in dof.parameters() if p.requires_grad}
    assert not any(id(p) in trained for p in dof.layers[1].parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_degrees_of_freedom_fold_like_the_network(kind: str) -> None:
    """Without grids, what is solved is the float network with the factors folded: weights, biases and outputs."""
    model, x = two_layers(kind)
    dof = Dof(mapped(model, x), parameters_of(model), {}, {})
    with torch.no_grad():
        dof.log_c.normal_()
        tensors = solve(dof).tensors
        expected = fold_network(dof.map, dof.log_c, parameters_of(model))
        assert set(tensors) == set(expected)
        for name, t in tensors.items():
            torch.testing.assert_close(t, expected[name], rtol=EXACT, atol=0)
        folded = torch.func.functional_call(model, tensors, x)
        torch.testing.assert_close(folded, model(x), rtol=FOLD_TOLERANCE, atol=FOLD_TOLERANCE)


@pytest.mark.parametrize("doubly", [False, True], ids=["", "doubly"])
@pytest.mark.parametrize("channelwise", [True, False])
def test_every_degree_of_freedom_gets_a_gradient(channelwise: bool, doubly: bool) -> None:
    """Weights, biases, rescale factors, left scales, activation steps and cross-layer factors all reach the loss."""
    dof = make_dof(*two_layers("conv"), channelwise=channelwise, doubly=doubly)
    solution = solve(dof)
    loss = sum(t.square().sum() for t in solution.tensors.values())
    loss.backward()
    for name, p in dof.named_parameters():
        assert p.grad is not None, name
        assert float(p.grad.abs().sum()) > 0, name
