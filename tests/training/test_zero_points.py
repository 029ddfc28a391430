"""Zero points: their gradient, their training, and Eq. (7), by which a kernel multiplies shifted integers alone."""

from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from graphs import mapped, parameters_of
from torch import Tensor, nn

from qft_plugin.config import HardwareSpec, QFTConfig
from qft_plugin.graph.placement import ActivationGrid
from qft_plugin.tensors.fake_quantize import fake_quantize, fake_quantize_composed
from qft_plugin.tensors.grid import to_integer
from qft_plugin.training.dof import Dof, WeightGrid, parameter_groups
from qft_plugin.training.integers import deployed_weights, integer_biases
from qft_plugin.training.solve import accumulator_step, scales_of, solve
from qft_plugin.training.student import FakeQuantizer, set_grids

EXACT = 1e-12
"""float64 sums of at most a few hundred terms in another order."""

INTEGER = 1e-6
"""A sum of products of integers is one up to float64 rounding of the steps that they were multiplied by."""

GRIDS = [(0, 255, 117), (0, 15, 4), (-8, 7, 3), (-128, 127, -100), (0, 15, 0), (0, 15, 15)]
"""Unsigned and signed grids with a zero point inside and at the ends."""


def test_gradient_of_the_zero_point_by_hand() -> None:
    """Inside the grid (x = 1) Z has no effect, above it (x = 100) the value is s (15 - Z): dL/dZ = -s g."""
    Z = torch.tensor(4.0, requires_grad=True)
    x, g = torch.tensor([1.0, 100.0]), torch.tensor([7.0, 3.0])
    y = fake_quantize(x, torch.tensor(0.5), low=0, high=15, zero_point=Z)
    y.backward(g)
    assert y.tolist() == [1.0, 0.5 * (15 - 4)]
    assert Z.grad is not None
    assert float(Z.grad) == -0.5 * 3


def test_both_ends_of_the_grid_pull_the_zero_point() -> None:
    """Below the grid the value is s (0 - Z), so that equal gradients at both ends add up."""
    Z = torch.tensor(4.0, requires_grad=True)
    fake_quantize(torch.tensor([-50.0, 100.0]), torch.tensor(0.5), low=0, high=15, zero_point=Z).sum().backward()
    assert float(Z.grad) == -1.0


def gradients(
    function: Callable[..., Tensor], x: Tensor, s: Tensor, Z: Tensor, g: Tensor, low: int, high: int
) -> list[Tensor]:
    """Return the value and the gradients of data, scale and zero point."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, s, Z)]
    y = function(inputs[0], inputs[1], low=low, high=high, zero_point=inputs[2])
    y.backward(g)
    return [y.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
@pytest.mark.parametrize(("low", "high", "zero_point"), GRIDS)
def test_gradients_are_those_of_the_definition(low: int, high: int, zero_point: int, layout: str) -> None:
    """Value and gradients of data, scale and zero point are those of autograd through the composed form."""
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64) * (high - low) / 2 + (low + high) / 2 - zero_point
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x
    x = x.transpose(1, 3) if layout == "transposed" else x
    g = torch.randn_like(x)
    s, Z = (torch.tensor(float(v), dtype=torch.float64) for v in (0.7, zero_point))
    fused, composed = (gradients(f, x, s, Z, g, low, high) for f in (fake_quantize, fake_quantize_composed))
    for found, expected in zip(fused, composed, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT * (high - low))
    assert 0 < int((fused[1] == 0).sum()) < x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high", "zero_point"), GRIDS)
def test_a_trained_zero_point_gives_the_values_of_an_integer(
    low: int, high: int, zero_point: int, dtype: torch.dtype
) -> None:
    """Held in a tensor or an integer, the zero point gives the same bits, and the same gradients of data and scale."""
    x = torch.randn(500, dtype=dtype, requires_grad=True) * (high - low) - zero_point
    s = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    results = []
    for Z in (zero_point, torch.tensor(float(zero_point), dtype=dtype, requires_grad=True)):
        y = fake_quantize(x, s, low=low, high=high, zero_point=Z)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, s))])
        integers = to_integer(x.detach(), s.detach(), low=low, high=high, zero_point=Z)
        results[-1].append(integers.detach())
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_zero_point_alone_may_need_a_gradient() -> None:
    """With fixed data and scale the zero point still gets its gradient."""
    Z = torch.tensor(2.0, requires_grad=True)
    fake_quantize(torch.tensor([100.0, 0.0]), torch.tensor(1.0), low=0, high=15, zero_point=Z).sum().backward()
    assert float(Z.grad) == -1.0


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "linear": (lambda: nn.Linear(6, 5), {}),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), {}),
    "conv": (lambda: nn.Conv2d(6, 4, 3), {}),
    "conv without bias": (lambda: nn.Conv2d(6, 4, 2, bias=False), {}),
    "conv with padding": (lambda: nn.Conv2d(6, 4, 3, padding=1), {"padding": 1}),
    "conv with strides": (lambda: nn.Conv2d(6, 4, 3, padding=1, stride=2), {"padding": 1, "stride": 2}),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), {"padding": 1, "groups": 6}),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), {"groups": 2}),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3), {}),
    "transposed with strides": (lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1), {"padding": 1, "stride": 2}),
    "grouped transposed": (lambda: nn.ConvTranspose2d(6, 4, 2, groups=2), {"groups": 2}),
}


def layer_dof(
    layer: nn.Module, grid: ActivationGrid, *, channelwise: bool, bias_bits: int | None = 16
) -> tuple[nn.Module, Dof, Tensor]:
    """Return a network of one layer that reads a quantized input, trained degrees of freedom, and an input."""
    model = nn.Sequential(layer).double()
    x = torch.randn((20, 6) if isinstance(layer, nn.Linear) else (2, 6, 5, 5), dtype=torch.float64) + 0.4
    dof_map = mapped(model, x)
    outs = len(dof_map.layers[0].out_index)
    scale = 0.05 + 0.05 * torch.rand((outs,) if channelwise else (), dtype=torch.float64)
    grids = {"0.weight": WeightGrid(4, scale, "in", None)}
    hardware = HardwareSpec(bias_bits=bias_bits)
    dof = Dof(dof_map, parameters_of(model), grids, {"in": grid}, config=QFTConfig(hardware=hardware))
    with torch.no_grad():
        for p in dof.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, dof, x


@pytest.mark.parametrize("channelwise", [True, False])
@pytest.mark.parametrize("grid", [(0, 255, 90), (0, 15, 6), (-128, 127, 0), (0, 255, 0), (-8, 7, -2)])
@pytest.mark.parametrize("kind", LAYERS)
def test_integers_alone_compute_the_fake_quantized_layer(
    kind: str, grid: tuple[int, int, int], channelwise: bool
) -> None:
    """Eq. (7): int64 products of shifted integers, started from the absorbed bias, are the float layer's sums."""
    low, high, zero_point = grid
    make, settings = LAYERS[kind]
    start = ActivationGrid(4.0 / (high - low), low, high, zero_point, shifts=zero_point != 0)
    model, dof, x = layer_dof(make(), start, channelwise=channelwise)
    solution, deployed = solve(dof), deployed_weights(dof)["0.weight"]
    absorbed = integer_biases(dof, deployed_weights(dof))["0.weight"]
    s = solution.activation_scales["in"].detach()
    Z = int(solution.zero_points["in"]) if zero_point else zero_point

    x_fq = fake_quantize(x, s, low=low, high=high, zero_point=Z)
    simulated = torch.func.functional_call(model, solution.tensors, (x_fq,)).detach()

    integers = to_integer(x, s, low=low, high=high, zero_point=Z).numpy().astype(np.int64)
    kernel, bias = (t.numpy().astype(np.int64) for t in (deployed.integers, absorbed))
    assert np.array_equal(kernel, deployed.integers.numpy())
    np.testing.assert_allclose(absorbed.numpy(), bias, rtol=0, atol=INTEGER)
    if "linear" in kind:
        acc = reference.linear_integers(integers, kernel, bias)
    else:
        loops = reference.transposed_conv_integers if "transposed" in kind else reference.conv_integers
        acc = loops(integers, kernel, bias, zero_point=Z, **settings)
    S_acc = (s * deployed.step).numpy()
    steps = simulated.numpy() / (S_acc.reshape(-1, *(1,) * (acc.ndim - 2)) if channelwise else S_acc)
    np.testing.assert_allclose(steps, acc, rtol=0, atol=INTEGER)
    assert len(np.unique(acc)) > 20


def test_the_absorbed_bias_by_hand() -> None:
    """Kernel [1, -2, 3] and bias 0.7 at steps 0.5 (input) and 0.2 (weight), Z = 5: 7 - 5 * (1 - 2 + 3) = -3."""
    model = nn.Sequential(nn.Linear(3, 1)).double()
    tensors = {
        "0.weight": torch.tensor([[0.2, -0.4, 0.6]], dtype=torch.float64),
        "0.bias": torch.tensor([0.7], dtype=torch.float64),
    }
    grids = {"0.weight": WeightGrid(4, torch.tensor(0.2, dtype=torch.float64), "in", None)}
    dof = Dof(
        mapped(model, torch.zeros(1, 3, dtype=torch.float64)), tensors, grids, {"in": ActivationGrid(0.5, 0, 15, 5)}
    )
    S_acc = accumulator_step(dof, dof.trained_weight("0.weight"), scales_of(dof))
    assert S_acc is not None
    assert S_acc.item() == pytest.approx(0.1, rel=EXACT)
    assert integer_biases(dof, deployed_weights(dof))["0.weight"].tolist() == [-3]


def test_a_layer_without_an_accumulator_has_no_integer_bias() -> None:
    """Where the input is not quantized, or the kernel's scale differs by input channel, there is no one scale."""
    model, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.zeros(1, 6, dtype=torch.float64)
    scale, left = torch.ones(5, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for grid in (WeightGrid(4, scale, None, None), WeightGrid(4, scale, "in", None, left)):
        dof = Dof(mapped(model, x), parameters_of(model), {"0.weight": grid}, {"in": ActivationGrid(0.5, 0, 15, 5)})
        assert integer_biases(dof, deployed_weights(dof)) == {}


def shifting(zero_point: int = 6, *, shifts: bool = True, train_scales: bool = True) -> Dof:
    """Return degrees of freedom with one activation of 4 bits that may shift, and one that may not."""
    model = nn.Sequential(nn.Linear(6, 5)).double()
    grids = {"in": ActivationGrid(0.2, 0, 15, zero_point, shifts), "other": ActivationGrid(0.2, 0, 15, 3)}
    weights = {"0.weight": WeightGrid(4, torch.tensor(0.2).double(), "in", None)}
    dof_map = mapped(model, torch.zeros(1, 6, dtype=torch.float64))
    return Dof(dof_map, parameters_of(model), weights, grids, config=QFTConfig(train_scales=train_scales))


def test_zero_points_start_where_they_were_and_only_where_they_shift() -> None:
    """Untrained they are the grid's, and a grid that does not shift has none in the solution."""
    dof = shifting()
    assert {name: Z.item() for name, Z in solve(dof).zero_points.items()} == {"in": 6}
    assert solve(shifting(shifts=False)).zero_points == {}


@pytest.mark.parametrize("shift", [-100, -0.41, -0.4, -0.034, 0.0, 0.01, 0.033, 0.034, 0.3, 0.61, 100])
def test_a_zero_point_stays_an_integer_of_the_grid(shift: float) -> None:
    """Whatever the trained shift, it is a whole number from the smallest to the largest integer."""
    dof = shifting()
    with torch.no_grad():
        dof.activations.shift[0].fill_(shift)
    Z = dof.activations.zero_points()["in"].item()
    assert min(max(np.rint(6 + 15 * shift), 0), 15) == Z


def test_a_zero_point_trains() -> None:
    """Data from -4 to -1 on a grid from -1.2 to 1.8: gradient steps move the grid to the data, and the error falls."""
    dof = shifting()
    x = torch.linspace(-4, -1, 200, dtype=torch.float64)
    _, scales, _ = parameter_groups(dof, learning_rate=1, scale_learning_rate=1)
    assert sum(p is dof.activations.shift[0] for p in scales["params"]) == 1
    optimizer = torch.optim.Adam(scales["params"], lr=0.02)
    errors, seen = [], set()
    for _ in range(150):
        Z = dof.activations.zero_points()["in"]
        y = fake_quantize(x, dof.activations.steps()["in"], low=0, high=15, zero_point=Z)
        loss = (y - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
        seen.add(Z.item())
    assert len(seen) > 3
    assert all(Z.is_integer() and 0 <= Z <= 15 for Z in seen)
    assert errors[-1] < 0.05 * errors[0]


def test_zero_points_have_the_gradient_of_their_grid() -> None:
    """Z = Z_0 + (high - low) * shift: one unit of the shift is the whole grid."""
    dof = shifting()
    dof.activations.zero_points()["in"].backward()
    assert dof.activations.shift[0].grad.item() == 15


def test_zero_points_train_with_the_scales_only() -> None:
    """Without trained scales, and with another quantizer's turn, a zero point is given to no optimizer."""
    fixed = shifting(train_scales=False)
    assert not fixed.activations.shift[0].requires_grad
    groups = parameter_groups(fixed, learning_rate=1, scale_learning_rate=1)
    assert not any(p is fixed.activations.shift[0] for group in groups for p in group["params"])
    dof = shifting()
    groups = parameter_groups(dof, learning_rate=1, scale_learning_rate=1, quantizers={"other"})
    assert not any(p is dof.activations.shift[0] for group in groups for p in group["params"])


def test_the_student_quantizes_with_the_trained_zero_point() -> None:
    """A stand-in starts with the zero point of its grid and takes that of the solution, with its gradient."""
    dof = shifting()
    quantizer, other = FakeQuantizer(dof.activations.grids["in"]), FakeQuantizer(dof.activations.grids["other"])
    assert quantizer.zero_point == 6
    with torch.no_grad():
        dof.activations.shift[0].fill_(-4 / 15)
    set_grids({"in": quantizer, "other": other}, solve(dof))
    x = torch.tensor([-50.0, 50.0], dtype=torch.float64)
    y = quantizer(x)
    torch.testing.assert_close(y.detach(), torch.tensor([-2.0, 13.0]).double() * 0.2, rtol=EXACT, atol=EXACT)
    assert other.zero_point == 3
    y.sum().backward()
    assert dof.activations.shift[0].grad.item() == pytest.approx(-2 * 0.2 * 15, rel=EXACT)
