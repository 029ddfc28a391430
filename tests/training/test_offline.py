"""The offline subgraph: factors fold without a change, and integers are those of Eq. (2) before folding."""

import numpy as np
import pytest
import reference
import torch
from graphs import FOLD_TOLERANCE, chain, linear_op, mapped, parameters_of, unary_op
from models import CHANNELS, conv, image
from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.folding import fold_network, names_of
from qft_plugin.graph.layer_graph import DofMap
from qft_plugin.graph.placement import ActivationGrid
from qft_plugin.tensors.fake_quantize import fake_quantize
from qft_plugin.training.dof import Dof, WeightGrid, parameter_groups
from qft_plugin.training.integers import deployed_weights, folded_tensors
from qft_plugin.training.solve import scales_of, solve, weight_scales

EXACT = 1e-12
"""A handful of float64 operations in another order."""


def two_layers(kind: str) -> tuple[nn.Module, Tensor]:
    """Return convolution, ReLU and a second layer of another kind."""
    second = {
        "conv": conv(),
        "grouped": conv(groups=2),
        "depthwise": conv(groups=CHANNELS),
        "transposed": nn.ConvTranspose2d(CHANNELS, 4, 3),
        "grouped transposed": nn.ConvTranspose2d(CHANNELS, 4, 3, groups=2),
    }[kind]
    return nn.Sequential(
        conv(bias=False), nn.ReLU(), second, nn.ReLU(), nn.Conv2d(second.out_channels, 3, 1)
    ).double(), image()


KINDS = ["conv", "grouped", "depthwise", "transposed", "grouped transposed"]
ACTIVATIONS = {"a": ActivationGrid(0.05, 0, 255), "b": ActivationGrid(0.3, 0, 255)}


def make_dof(model: nn.Module, x: Tensor, *, bits: int = 4, channelwise: bool = True, doubly: bool = False) -> Dof:
    """Return random degrees of freedom of `two_layers`, whose middle layer reads grid `a` and feeds grid `b`."""
    dof_map = mapped(model, x)
    edges = {"0.weight": (None, "a"), "2.weight": ("a", "b"), "4.weight": ("b", None)}
    grids = {}
    for layer in dof_map.layers:
        size = (len(layer.out_index),) if channelwise else ()
        spread = parameters_of(model)[layer.weight].std()
        scale = spread * (0.15 + 0.15 * torch.rand(size, dtype=torch.float64))
        left = torch.exp(0.3 * torch.randn(len(layer.in_index), dtype=torch.float64)) if doubly else None
        grids[layer.weight] = WeightGrid(bits, scale, *edges[layer.weight], left)
    dof = Dof(dof_map, parameters_of(model), grids, ACTIVATIONS)
    with torch.no_grad():
        left_scales = [layer.log_L for layer in dof.layers if layer.log_L is not None]
        for p in [dof.log_c, *dof.activations.log_s, *(layer.log_F for layer in dof.layers), *left_scales]:
            p.add_(0.3 * torch.randn_like(p))
    return dof


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
        expected = unfolded_integers(dof, name, parameters_of(model)[name])
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


@pytest.mark.parametrize("doubly", [False, True], ids=["", "doubly"])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_tensors_are_the_folded_network(kind: str, doubly: bool) -> None:
    """What is given back unrounded is the float network with the trained factors folded in, whatever the scales."""
    model, x = two_layers(kind)
    dof = make_dof(model, x, doubly=doubly)
    tensors = folded_tensors(dof)
    expected = fold_network(dof.map, dof.log_c.detach(), parameters_of(model))
    assert set(tensors) == set(expected)
    for name, t in tensors.items():
        assert not t.requires_grad
        torch.testing.assert_close(t, expected[name], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_left_scale(kind: str) -> None:
    """By the loops of the reference: dL/dlog L_i is the sum of dL/dstep * step over what input channel i touches."""
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
    W = folded_tensors(dof)["2.weight"].numpy()
    _, of_steps = reference.fake_quantize_gradients(W, steps, g.numpy(), -7, 7)
    expected = np.zeros(len(layer.in_index))
    for i in range(len(expected)):
        alone = np.zeros(len(expected))
        alone[i] = 1
        touched = reference.kernel_steps(shape, found.step.numpy(), alone, layer.groups, transposed=transposed)
        expected[i] = (of_steps * (touched > 0) * steps).sum()
    assert module.log_L is not None
    np.testing.assert_allclose(module.log_L.grad.numpy(), expected, rtol=1e3 * EXACT, atol=1e3 * EXACT)
    assert np.abs(expected).min() > 0


def test_the_left_scale_is_trained_with_the_other_scales() -> None:
    """It is given to the optimizer once, at the learning rate of scales, and a kernel without one has none."""
    model, x = two_layers("grouped")
    dof = make_dof(model, x, doubly=True)
    values, scales = parameter_groups(dof, learning_rate=1, scale_learning_rate=2)
    left = [dof.trained_weight(name).log_L for name in dof.weight_grids]
    assert len(left) == 3
    assert all(sum(p is q for q in scales["params"]) == 1 for p in left)
    assert not any(p is q for p in left for q in values["params"])
    assert all(module.log_L is None and module.scale_in is None for module in make_dof(model, x).layers)


def test_values_and_scales_train_at_rates_of_their_own() -> None:
    """The first group, of weights and biases, has the one rate, the second one, of all logarithms, the other."""
    values, scales = parameter_groups(make_dof(*two_layers("grouped")), learning_rate=1, scale_learning_rate=2)
    assert (values["lr"], scales["lr"]) == (1, 2)


def test_a_part_of_the_degrees_of_freedom_trains() -> None:
    """Only the named layers with all that is theirs, the named quantizers, and the factors if asked."""
    dof = make_dof(*two_layers("grouped"), doubly=True)
    layer, step = dof.trained_weight("2.weight"), dof.activations.log_s[1]
    settings = {"learning_rate": 1.0, "scale_learning_rate": 2.0}
    values, scales = parameter_groups(dof, **settings, layers={"2.weight"}, quantizers={"b"}, factors=False)
    assert {id(p) for p in values["params"]} == {id(layer.W), id(layer.bias)}
    assert {id(p) for p in scales["params"]} == {id(step), id(layer.log_F), id(layer.log_L)}
    _, scales = parameter_groups(dof, **settings, layers=(), quantizers=())
    assert [id(p) for p in scales["params"]] == [id(dof.log_c)]


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
        return layer.folded_weight(channels), layer.folded_bias(channels)

    assert torch.autograd.gradcheck(folded, (c,))


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


def test_names_of_lists_weights_and_biases() -> None:
    """Every parameter of the layers is listed once, weight before bias, and missing biases are left out."""
    dof: DofMap = mapped(two_layers("conv")[0], image())
    assert names_of(dof.layers) == ["0.weight", "2.weight", "2.bias", "4.weight", "4.bias"]
