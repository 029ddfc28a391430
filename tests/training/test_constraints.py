"""What hardware asks of scales, biases and accumulators, and that training keeps it."""

import math
from collections.abc import Iterator

import pytest
import reference
import torch
from graphs import chain, conv_op, mapped, parameters_of, unary_op
from hypothesis import given
from hypothesis import strategies as st
from models import CHANNELS, Concat, Residual, conv, image
from torch import nn

from qft_plugin.config import HardwareSpec, QFTConfig
from qft_plugin.errors import QFTWarning
from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.layer_graph import LayerGraph
from qft_plugin.graph.placement import ActivationGrid, Placement, WeightPlace
from qft_plugin.job.accumulators import check_accumulators, check_biases
from qft_plugin.job.start import _with_bits
from qft_plugin.tensors.axes import Axes
from qft_plugin.training.activation_scales import Ties, tied_grids
from qft_plugin.training.dof import Dof, WeightGrid, parameter_groups
from qft_plugin.training.integers import accumulator_bits, deployed_weights, folded_tensors, integer_biases
from qft_plugin.training.solve import accumulator_step, rescale_factor, scales_of, solve

EXACT = 1e-12
"""A handful of float64 operations in another order."""

INTEGER = 1e-9
"""An integer that was computed by dividing float64 numbers by a scale."""


GRIDS = {"a": ActivationGrid(0.1, 0, 255), "b": ActivationGrid(0.35, -128, 127), "c": ActivationGrid(0.022, 0, 15)}


def test_tied_grids() -> None:
    """One scale: the largest of the group. Shifts: the nearest power of two times the first. Neither: as they were."""
    shared = tied_grids(GRIDS, [["a", "b"]], "none")
    assert [g.scale for g in shared.values()] == [0.35, 0.35, 0.022]
    shifted = tied_grids(GRIDS, [["a", "b", "c"]], "power_of_two")
    assert [g.scale for g in shifted.values()] == [0.1, 0.4, 0.025]
    assert tied_grids(GRIDS, [["a", "b"]], "tensor") == GRIDS
    for found in (shared, shifted):
        assert all((g.low, g.high, g.zero_point) == (GRIDS[n].low, GRIDS[n].high, 0) for n, g in found.items())
    assert tied_grids(shifted, [["a", "b", "c"]], "power_of_two") == shifted
    assert [g.scale for g in GRIDS.values()] == [0.1, 0.35, 0.022]


def residual(hardware: HardwareSpec, *, channelwise: bool = True, seed: int = 0) -> Dof:
    """Return the degrees of freedom of conv -> x + conv(relu(conv(x))) -> conv, quantized everywhere.

    Grid `a` is after the first convolution and is added to `c`; `d` is after the addition.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(conv(), Residual(nn.Sequential(conv(), nn.ReLU(), conv())), conv(4)).double()
    dof_map = mapped(model, image())
    activations = {
        "in": ActivationGrid(0.03, -128, 127),
        "a": ActivationGrid(0.02, -128, 127),
        "b": ActivationGrid(0.011, 0, 255),
        "c": ActivationGrid(0.071, -128, 127),
        "d": ActivationGrid(0.05, -128, 127),
    }
    edges = {
        "0.weight": ("in", "a"),
        "1.body.0.weight": ("a", "b"),
        "1.body.2.weight": ("b", "c"),
        "2.weight": ("d", None),
    }
    weights = {}
    for layer in dof_map.layers:
        outs = (len(layer.out_index),) if channelwise else ()
        weights[layer.weight] = WeightGrid(4, 0.02 + 0.02 * torch.rand(outs).double(), *edges[layer.weight])
    groups = () if hardware.elementwise_rescale == "tensor" else [["a", "c"]]
    return Dof(
        dof_map,
        parameters_of(model),
        weights,
        activations,
        config=QFTConfig(hardware=hardware),
        ties=Ties(addends=groups),
    )


def trained(dof: Dof, steps: int = 3) -> Iterator[Dof]:
    """Take some optimizer steps on a random loss and yield the degrees of freedom after each."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([p for p in dof.parameters() if p.requires_grad], lr=0.2)
    for _ in range(steps):
        solution = solve(dof)
        values = [*solution.tensors.values(), *solution.activation_scales.values()]
        loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield dof


def states(dof: Dof) -> Iterator[Dof]:
    """Yield the degrees of freedom before and after each of some training steps."""
    yield dof
    yield from trained(dof)


def test_addends_share_one_scale() -> None:
    """With no rescaling at additions there is one trained scale for the group, which starts at the largest."""
    dof = residual(HardwareSpec(elementwise_rescale="none"))
    assert len(dof.activations.log_s) == 4
    seen = set()
    for state in states(dof):
        scales = state.activations.steps()
        assert torch.equal(scales["a"], scales["c"])
        seen.add(scales["a"].item())
    assert len(seen) == 4
    assert residual(HardwareSpec(elementwise_rescale="none")).activations.steps()["a"].item() == pytest.approx(0.071)
    _, group, _ = parameter_groups(dof, learning_rate=1, scale_learning_rate=1)
    assert len({id(p) for p in group["params"]}) == len(group["params"])
    _, alone, _ = parameter_groups(
        dof, learning_rate=1, scale_learning_rate=1, layers=(), quantizers={"c"}, factors=False
    )
    assert alone["params"] == []
    every = dof.activations.steps().keys()
    _, group, _ = parameter_groups(
        dof, learning_rate=1, scale_learning_rate=1, layers=(), quantizers=every, factors=False
    )
    assert id(dof.activations.log_s[1]) in [id(p) for p in group["params"]]


def concatenated(hardware: HardwareSpec, grids: dict[str, ActivationGrid]) -> Dof:
    """Return the degrees of freedom of conv(cat([conv(x), conv(x)])), whose parts `p` and `q` have one scale."""
    model = Concat().double()
    weights = {
        "left.weight": WeightGrid(4, torch.tensor(0.02).double(), None, "p"),
        "right.weight": WeightGrid(4, torch.tensor(0.02).double(), None, "q"),
        "mix.weight": WeightGrid(4, torch.tensor(0.02).double(), "p", None),
    }
    dof_map = mapped(model, image())
    return Dof(
        dof_map,
        parameters_of(model),
        weights,
        grids,
        config=QFTConfig(hardware=hardware),
        ties=Ties(shared=[["p", "q"]]),
    )


@pytest.mark.parametrize("kind", ["tensor", "none", "power_of_two"])
def test_parts_of_a_concatenation_share_one_scale(kind: str) -> None:
    """One scale is trained for both, whatever additions need; it starts at the larger, and the wider grid counts."""
    grids = {"p": ActivationGrid(0.03, 0, 15), "q": ActivationGrid(0.07, -128, 127)}
    dof = concatenated(HardwareSpec(elementwise_rescale=kind, bias_bits=16), grids)
    assert dof.activations.steps()["p"].item() == pytest.approx(0.07)
    seen = set()
    for state in states(dof):
        scales = state.activations.steps()
        assert scales["p"].item() == scales["q"].item()
        seen.add(scales["p"].item())
        S_acc = accumulator_step(state, state.trained_weight("mix.weight"), scales_of(state))
        integers = (solve(state).tensors["mix.bias"] / S_acc).detach()
        torch.testing.assert_close(integers, integers.round(), rtol=0, atol=INTEGER * 2**8)
    assert len(seen) == 4
    assert dof.input_grids("mix.weight") == tuple(dof.activations.grids.values())
    assert dof.input_grids("left.weight") == ()
    W = deployed_weights(dof)["mix.weight"].integers.flatten(1)
    bias = integer_biases(dof, deployed_weights(dof))["mix.weight"]
    largest = max(float(((W * -128).maximum(W * 127)).sum(1).add(bias.clamp(min=0)).max()), 1)
    assert 2 ** (accumulator_bits(dof, deployed_weights(dof))["mix.weight"] - 1) > largest


def test_parts_of_a_concatenation_share_one_zero_point() -> None:
    """Zero points that train are one parameter over a range that holds both; the accumulator absorbs it."""
    grids = {"p": ActivationGrid(0.03, 0, 255, 200, shifts=True), "q": ActivationGrid(0.05, 0, 255, 20, shifts=True)}
    dof = concatenated(HardwareSpec(bias_bits=16), grids)
    p, q = dof.activations.grids.values()
    assert (p.scale, p.zero_point) == (q.scale, q.zero_point)
    assert p.scale * (0 - p.zero_point) == pytest.approx(-6, abs=p.scale)
    assert p.scale * (255 - p.zero_point) == pytest.approx(11.75, abs=p.scale)
    assert len(dof.activations.shift) == len(dof.activations.log_s) == 1
    with torch.no_grad():
        dof.activations.shift[0].add_(20 / 255)
    points = dof.activations.zero_points()
    assert points["p"].item() == points["q"].item() == p.zero_point + 20
    _, group, _ = parameter_groups(dof, learning_rate=1, scale_learning_rate=1)
    assert len({id(p) for p in group["params"]}) == len(group["params"])


def test_addends_differ_by_a_shift() -> None:
    """The ratio of the scales is a power of two exactly, before and after training, and both scales train."""
    dof = residual(HardwareSpec(elementwise_rescale="power_of_two"))
    assert len(dof.activations.log_s) == 5
    seen = set()
    for state in states(dof):
        scales = state.activations.steps()
        ratio = (scales["c"] / scales["a"]).item()
        assert math.frexp(ratio)[0] == 0.5
        seen.add(scales["a"].item())
    assert len(seen) == 4
    assert all(p.grad is not None and float(p.grad) != 0 for p in dof.activations.log_s)


def test_a_shift_between_addends_can_change() -> None:
    """A scale that moves by a factor of 3 takes another shift: the gradient has reached it."""
    dof = residual(HardwareSpec(elementwise_rescale="power_of_two"))
    ratios = []
    for move in (0.0, math.log(3)):
        with torch.no_grad():
            dof.activations.log_s[3].add_(move)
        scales = dof.activations.steps()
        ratios.append((scales["c"] / scales["a"]).item())
    assert ratios == [4, 16]


def test_without_a_constraint_addends_are_free() -> None:
    """Each has its scale, and none is moved at the start."""
    dof = residual(HardwareSpec())
    assert [round(s.item(), 9) for s in dof.activations.steps().values()] == [0.03, 0.02, 0.011, 0.071, 0.05]


@pytest.mark.parametrize("channelwise", [True, False])
@pytest.mark.parametrize("kind", ["power_of_two", 2, 4, 8])
def test_rescale_factors_are_what_hardware_can_multiply_by(kind: str | int, channelwise: bool) -> None:
    """Between two integer activations S_acc / s_out is a shift, or has so many bits, before and after training."""
    dof = residual(HardwareSpec(rescale_factor=kind), channelwise=channelwise)
    inside = [name for name, grid in dof.weight_grids.items() if grid.s_out is not None]
    assert len(inside) == 3
    for state in states(dof):
        scales = scales_of(state)
        for name in inside:
            module, grid = state.trained_weight(name), state.weight_grids[name]
            S_acc = accumulator_step(state, module, scales)
            factors = (S_acc / scales.activations[grid.s_out]).reshape(-1)
            assert factors.numel() == (CHANNELS if channelwise else 1)
            held = rescale_factor(state, module)
            torch.testing.assert_close(factors, held.reshape(-1), rtol=EXACT, atol=0)
            bits = 1 if kind == "power_of_two" else kind
            assert all(reference.significant(F, bits) for F in held.reshape(-1).tolist())
            assert deployed_weights(state)[name].step is not None
            torch.testing.assert_close(deployed_weights(state)[name].step, scales.weights[name], rtol=EXACT, atol=0)
        last = state.trained_weight("2.weight")
        assert torch.equal(rescale_factor(state, last), last.log_F.exp())
    assert all(state.trained_weight(name).log_F.grad.abs().sum() > 0 for name in inside)


@pytest.mark.parametrize("channelwise", [True, False])
@pytest.mark.parametrize("bits", [4, 8, 24, 32])
def test_biases_are_integers_of_the_accumulator(bits: int, channelwise: bool) -> None:
    """Solved biases are whole numbers of s_in * S_w within their bits, in the student and in what is written."""
    dof = residual(HardwareSpec(bias_bits=bits), channelwise=channelwise)
    with torch.no_grad():
        for module in dof.layers:
            module.bias.mul_(30)
    clipped = 0
    for state in states(dof):
        solution, scales = solve(state), scales_of(state)
        absorbed = integer_biases(state, deployed_weights(state))
        for layer in state.map.layers:
            S_acc = accumulator_step(state, state.trained_weight(layer.weight), scales)
            integers = (solution.tensors[layer.bias] / S_acc).detach()
            torch.testing.assert_close(integers, integers.round(), rtol=0, atol=INTEGER * 2 ** (bits // 2))
            assert -(2 ** (bits - 1)) <= integers.min().round()
            assert integers.max().round() <= 2 ** (bits - 1) - 1
            clipped += int((integers.round() == 2 ** (bits - 1) - 1).sum())
            assert torch.equal(folded_tensors(state)[layer.bias], solution.tensors[layer.bias].detach())
            assert torch.equal(absorbed[layer.weight], integers.round())
    assert (clipped > 0) == (bits <= 8)
    assert all(module.bias.grad is not None for module in dof.layers)


def test_float_biases_stay() -> None:
    """Without bias bits a bias is any number."""
    dof = residual(HardwareSpec())
    biases = {layer.bias: dof.trained_weight(layer.weight) for layer in dof.map.layers}
    for name, module in biases.items():
        expected = module.bias * module.bias_unit
        torch.testing.assert_close(solve(dof).tensors[name], expected, rtol=EXACT, atol=EXACT)


def test_a_layer_that_reads_floats_keeps_a_float_bias() -> None:
    """Where the input is not quantized there is no accumulator, and the bias stays as it is."""
    model = nn.Sequential(nn.Linear(3, 2)).double()
    grids = {"0.weight": WeightGrid(4, torch.tensor(0.2).double(), None, None)}
    dof_map = mapped(model, torch.zeros(1, 3, dtype=torch.float64))
    dof = Dof(dof_map, parameters_of(model), grids, {}, config=QFTConfig(hardware=HardwareSpec(bias_bits=4)))
    torch.testing.assert_close(solve(dof).tensors["0.bias"], model[0].bias, rtol=EXACT, atol=EXACT)
    assert accumulator_bits(dof, deployed_weights(dof)) == {}


KERNELS = {
    "conv": ("conv2d", (2, 2, 1, 2), 1),
    "grouped": ("conv2d", (4, 2, 1, 2), 2),
    "linear": ("linear", (3, 4), 1),
    "transposed": ("conv_transpose2d", (2, 3, 1, 2), 1),
}
INPUTS = [(0, 15, 0), (-8, 7, 0), (0, 15, 6), (-7, 7, 0), (0, 255, 200)]


@pytest.mark.parametrize("grid", INPUTS)
@pytest.mark.parametrize("kernel", KERNELS)
@given(seed=st.integers(0, 10**6), size=st.floats(0.1, 100))
def test_accumulators_are_as_wide_as_the_worst_input_needs(
    kernel: str, grid: tuple[int, int, int], seed: int, size: float
) -> None:
    """The width holds every sum of extreme inputs in any order, bias first or last, and one bit less does not."""
    torch.manual_seed(seed)
    kind, shape, groups = KERNELS[kernel]
    model = {
        "conv": lambda: nn.Conv2d(2, 2, (1, 2)),
        "grouped": lambda: nn.Conv2d(4, 4, (1, 2), groups=2),
        "linear": lambda: nn.Linear(4, 3),
        "transposed": lambda: nn.ConvTranspose2d(2, 3, (1, 2)),
    }[kernel]()
    net = nn.Sequential(model).double()
    x = torch.zeros((1, 4) if kind == "linear" else (1, shape[0] if "transpose" in kind else shape[1] * groups, 3, 3))
    with torch.no_grad():
        model.bias.mul_(size)
    dof_map = mapped(net, x.double())
    weights = {"0.weight": WeightGrid(4, torch.tensor(0.2).double(), "in", None)}
    activations = {"in": ActivationGrid(0.1, *grid)}
    dof = Dof(dof_map, parameters_of(net), weights, activations, config=QFTConfig(hardware=HardwareSpec(bias_bits=16)))
    rows = Axes(kind, groups).out_slices(deployed_weights(dof)["0.weight"].integers).numpy()
    assert rows.shape == ({"conv": 2, "grouped": 4}.get(kernel, 3), 4)
    biases = integer_biases(dof, deployed_weights(dof))["0.weight"].numpy()
    ends = [reference.widest_sum(row, int(bias), *grid[:2]) for row, bias in zip(rows, biases, strict=True)]
    smallest, largest = min(low for low, _ in ends), max(high for _, high in ends)
    bits = accumulator_bits(dof, deployed_weights(dof))["0.weight"]
    assert -(2 ** (bits - 1)) <= smallest
    assert largest <= 2 ** (bits - 1) - 1
    assert smallest < -(2 ** (bits - 2)) or largest > 2 ** (bits - 2) - 1 or bits == 2


def one_linear(W_int: list[int], grid: tuple[int, int, int], bias: int = 0) -> Dof:
    """Return a linear layer of given integers."""
    net = nn.Sequential(nn.Linear(len(W_int), 1)).double()
    tensors = {"0.weight": torch.tensor([W_int]).double(), "0.bias": torch.tensor([bias]).double()}
    weights = {"0.weight": WeightGrid(8, torch.tensor(1.0).double(), "in", None)}
    activations = {"in": ActivationGrid(1.0, *grid)}
    return Dof(mapped(net, torch.zeros(1, len(W_int)).double()), tensors, weights, activations)


@pytest.mark.parametrize(
    ("W_int", "grid", "bias", "bits"),
    [
        ([127], (0, 1, 0), 0, 8),  # 127
        ([127], (0, 1, 0), 1, 9),  # 128
        ([-127], (0, 1, 0), -1, 8),  # -128
        ([-127], (0, 1, 0), -2, 9),  # -129
        ([127, -127], (0, 1, 0), 0, 8),  # 127 and -127, never both
        ([1], (-128, 127, 0), 0, 8),
        ([-1], (-128, 127, 0), 0, 9),  # 128
        ([0], (0, 255, 0), 0, 2),  # nothing to hold: a sign and a bit
        ([127] * 10, (0, 255, 0), 0, 20),  # 323850 is below 2^19
        ([127] * 10, (0, 255, 128), 0, 20),  # 323850 - 162560 is below 2^18, but the bias may come last
    ],
)
def test_accumulator_bits_by_hand(W_int: list[int], grid: tuple[int, int, int], bias: int, bits: int) -> None:
    """The ends of two's complement, by numbers that just fit and just do not."""
    dof = one_linear(W_int, grid, bias)
    assert accumulator_bits(dof, deployed_weights(dof)) == {"0.weight": bits}


def test_a_layer_that_could_overflow_is_named() -> None:
    """A warning names it with the width that it needs; a wide accumulator, or none, is silent."""
    dof = one_linear([127] * 10, (0, 255, 0))
    dof.hardware = HardwareSpec(accumulator_bits=19)
    with pytest.warns(QFTWarning, match=r"accumulator of 19 bits.*0\.weight needs 20"):
        check_accumulators(dof, deployed_weights(dof))
    for width in (20, None):
        dof.hardware = HardwareSpec(accumulator_bits=width)
        check_accumulators(dof, deployed_weights(dof))


@pytest.mark.parametrize(("bias", "needed"), [(127, None), (128, 9), (-128, None), (-129, 9), (70_000, 18)])
def test_a_bias_that_is_clipped_is_named(bias: int, needed: int | None) -> None:
    """A warning names it with the bits that it needs; one that fits, or stays in float, is silent."""
    dof = one_linear([127], (0, 255, 0), bias)
    check_biases(dof)
    dof.hardware = HardwareSpec(bias_bits=8)
    if needed is None:
        check_biases(dof)
    else:
        with pytest.warns(QFTWarning, match=rf"A bias of 8 bits .*0\.bias needs {needed}"):
            check_biases(dof)


def fork() -> tuple[LayerGraph, Placement]:
    """Return a -> relu -> (b and c), c -> d, with a quantizer in front of a, after relu and after c."""
    shape = (1, 4, 2, 2)
    graph = chain(
        conv_op("a", "x", shape=(4, 4)),
        unary_op("act", "relu", "a"),
        conv_op("b", "act", shape=(4, 4)),
        conv_op("c", "act", shape=(4, 4)),
        conv_op("d", "c", shape=(4, 4)),
        shapes=dict.fromkeys(["x", "a", "act", "b", "c", "d"], shape),
        outputs=("b", "d"),
    )
    on_tensor = {"x": "in", "act": "after relu", "c": "after c", "d": "out"}
    grids = {name: ActivationGrid(0.1, *((0, 255) if "relu" in name else (-128, 127))) for name in on_tensor.values()}
    places = {f"{name}.weight": WeightPlace(per_channel=True) for name in "abcd"}
    return graph, Placement(grids, on_tensor, {}, places)


def bits_of(placement: Placement) -> dict[str, int]:
    return {name: (g.high - g.low).bit_length() for name, g in placement.activations.items()}


def test_activations_have_the_bits_that_their_readers_ask_for() -> None:
    """Of several readers the widest wins, what no layer reads has the default, and the rest of the placement stays."""
    graph, placement = fork()
    dof_map = map_dof(graph)
    config = QFTConfig(
        layer_activation_bits={"a.*": 5, "b.weight": 4, "c.weight": 7}, hardware=HardwareSpec(activation_bits=6)
    )
    found = _with_bits(graph, placement, dof_map, config)
    assert bits_of(found) == {"in": 5, "after relu": 7, "after c": 6, "out": 6}
    assert (found.on_tensor, found.weights) == (placement.on_tensor, placement.weights)
    config = QFTConfig(layer_activation_bits={"b.weight": 4, "c.weight": 4})
    assert bits_of(_with_bits(graph, placement, dof_map, config))["after relu"] == 4
    assert _with_bits(graph, placement, dof_map, QFTConfig()).activations == placement.activations
