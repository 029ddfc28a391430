"""What hardware holds: integers are those of Eq. (2) before folding, and they compute what the student does."""

import numpy as np
import pytest
import reference
import torch
from dofs import KINDS, make_dof, two_layers
from graphs import chain, linear_op, parameters_of, unary_op
from torch import Tensor

from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.folding import fold_network
from qft_plugin.graph.placement import ActivationGrid
from qft_plugin.tensors.fake_quantize import fake_quantize
from qft_plugin.training.dof import Dof, WeightGrid
from qft_plugin.training.integers import deployed_weights, folded_tensors
from qft_plugin.training.solve import scales_of, solve

EXACT = 1e-12
"""A handful of float64 operations in another order."""


def unfolded_integers(dof: Dof, weight: str, W: Tensor) -> np.ndarray:
    """Integers of a weight before folding, from S_a = s * c on both sides and F, by the loops of the reference.

    The left scale of a doubly per-channel kernel is 1 / S_a(in) times one of its own.
    """
    layer, grid = dof.map.layer(weight), dof.weight_grids[weight]
    module = next(m for m in dof.layers if m.layer.weight == weight)
    c = dof.factors().detach()
    s_in = 1.0 if grid.s_in is None else dof.activations.steps()[grid.s_in].detach()
    s_out = 1.0 if grid.s_out is None else dof.activations.steps()[grid.s_out].detach()
    S_a_in, S_a_out = s_in * c[layer.in_index], s_out * c[layer.out_index]
    F = module.log_F.detach().exp().expand(len(S_a_out))
    if module.log_L is not None:
        S_a_in = S_a_in / module.log_L.detach().exp()
    loops = reference.transposed_weight_integers if "transpose" in layer.kind else reference.conv_weight_integers
    high = 2 ** (grid.bits - 1) - 1
    return loops(W.numpy(), S_a_in.numpy(), S_a_out.numpy(), F.numpy(), high, layer.groups)


def stretched(dof: Dof, weight: str) -> Tensor:
    """By what a weight has grown with its step since the start: it is stored in steps."""
    module = dof.trained_weight(weight)
    return (module.step(scales_of(dof).weights[weight]) / module.unit).detach()


@pytest.mark.parametrize("doubly", [False, True], ids=["", "doubly"])
@pytest.mark.parametrize("channelwise", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_those_before_folding(kind: str, channelwise: bool, doubly: bool) -> None:
    """W / (S_wR outer S_wL) of Eq. (2) rounds to the integers that are deployed from the folded weight."""
    model, x = two_layers(kind)
    dof = make_dof(model, x, channelwise=channelwise, doubly=doubly)
    deployed = deployed_weights(dof)
    assert set(deployed) == {"0.weight", "2.weight", "4.weight"}
    for name, found in deployed.items():
        expected = unfolded_integers(dof, name, parameters_of(model)[name] * stretched(dof, name))
        np.testing.assert_array_equal(found.integers.numpy(), expected)
        assert len(found.integers.unique()) > 3


@pytest.mark.parametrize("doubly", [False, True], ids=["", "doubly"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_student_computes_with_the_deployed_integers(kind: str, doubly: bool) -> None:
    """Each fake-quantized weight is the deployed integers times the deployed step, bit for bit."""
    dof = make_dof(*two_layers(kind), doubly=doubly)
    solution = solve(dof)
    for name, found in deployed_weights(dof).items():
        layer = dof.map.layer(name)
        left = np.ones(len(layer.in_index)) if found.step_in is None else found.step_in.numpy()
        assert (found.step_in is not None) == doubly
        steps = reference.kernel_steps(
            tuple(found.integers.shape), found.step.numpy(), left, layer.groups, transposed="transpose" in layer.kind
        )
        np.testing.assert_array_equal(solution.tensors[name].detach().numpy(), found.integers.numpy() * steps)


@pytest.mark.parametrize("doubly", [False, True], ids=["", "doubly"])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_tensors_are_the_folded_network(kind: str, doubly: bool) -> None:
    """What is given back unrounded is the float network, grown with its steps, with the trained factors folded in."""
    model, x = two_layers(kind)
    dof = make_dof(model, x, doubly=doubly)
    tensors, grown = folded_tensors(dof), parameters_of(model)
    for name in dof.weight_grids:
        grown[name] = grown[name] * stretched(dof, name)
    expected = fold_network(dof.map, dof.log_c.detach(), grown)
    assert set(tensors) == set(expected)
    for name, t in tensors.items():
        assert not t.requires_grad
        torch.testing.assert_close(t, expected[name], rtol=EXACT, atol=EXACT)


def test_integer_graph_computes_the_fake_quantized_graph() -> None:
    """Integer products, one rescale by F and a rounding give the integers of the float simulation (Eq. 8-11)."""
    n, m, k = 6, 5, 3
    graph = chain(
        linear_op("first", "x", shape=(m, n)),
        unary_op("act", "relu", "first"),
        linear_op("second", "act", shape=(k, m)),
        shapes={"x": (4, n), "first": (4, m), "act": (4, m), "second": (4, k)},
        outputs=("second",),
    )
    tensors = {
        "first.weight": torch.randn(m, n, dtype=torch.float64),
        "second.weight": torch.randn(k, m, dtype=torch.float64),
    }
    activations = {"in": ActivationGrid(0.07, -128, 127), "mid": ActivationGrid(0.11, 0, 255)}
    grids = {
        "first.weight": WeightGrid(4, torch.rand(m).double() + 0.2, "in", "mid"),
        "second.weight": WeightGrid(4, torch.tensor(0.2).double(), "mid", None),
    }
    dof = Dof(map_dof(graph), tensors, grids, activations)
    with torch.no_grad():
        for p in dof.parameters():
            p.add_(0.1 * torch.randn_like(p))
    deployed, solution = deployed_weights(dof), solve(dof)
    s_in, s_mid = (solution.activation_scales[name].detach() for name in ("in", "mid"))

    x_fq = fake_quantize(torch.randn(4, n, dtype=torch.float64), s_in, low=-128, high=127)
    hidden = torch.relu(x_fq @ solution.tensors["first.weight"].detach().T)
    hidden_fq = fake_quantize(hidden, s_mid, low=0, high=255)
    out = hidden_fq @ solution.tensors["second.weight"].detach().T

    first, second = deployed["first.weight"], deployed["second.weight"]
    acc = reference.linear_integers((x_fq / s_in).round().numpy(), first.integers.numpy(), np.zeros(m))
    F = dof.layers[0].log_F.detach().exp().numpy()
    hidden_int = np.clip(np.rint(np.maximum(acc * F, 0)), 0, 255)
    np.testing.assert_array_equal(hidden_int, (hidden_fq / s_mid).round().numpy())
    assert len(np.unique(hidden_int)) > 5
    acc = reference.linear_integers(hidden_int, second.integers.numpy(), np.zeros(k))
    np.testing.assert_allclose(acc * float(s_mid * second.step), out.numpy(), rtol=EXACT, atol=EXACT)
