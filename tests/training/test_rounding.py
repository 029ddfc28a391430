"""Lossy elements: what the student computes with ends as what is deployed, and a mask's zeros are exactly its share."""

import logging
import math
from typing import Any

import numpy as np
import pytest
import reference
import torch
from graphs import mapped, parameters_of
from hypothesis import given
from hypothesis import strategies as st
from models import CHANNELS, conv, image
from torch import Tensor, nn

from qft_plugin.config import FinetuneConfig, QFTConfig, Rounding, Sparsity
from qft_plugin.errors import ModelError
from qft_plugin.graph.placement import ActivationGrid
from qft_plugin.graph.torch_model import Call
from qft_plugin.tensors.axes import Axes
from qft_plugin.tensors.fake_quantize import fake_quantize
from qft_plugin.tensors.grid import integer_range, to_integer
from qft_plugin.tensors.sparsity import mask_of, masked, smallest_dropped
from qft_plugin.training.data import Inputs
from qft_plugin.training.dof import Dof, WeightGrid, parameter_groups
from qft_plugin.training.finetune import FinetuneResult, Goal, finetune
from qft_plugin.training.integers import deployed_weights, folded_tensors
from qft_plugin.training.loss import Loss, Prediction
from qft_plugin.training.phases import Options, Phase
from qft_plugin.training.rounding import (
    ELEMENTS,
    INSIDE,
    STRETCH,
    AlphaBlend,
    NearestRounding,
    SoftRounding,
    alpha,
    element_of,
    rectified_sigmoid,
    undecided,
)
from qft_plugin.training.rows import Kept
from qft_plugin.training.solve import solve
from qft_plugin.training.teacher import Targets, teacher_predictions

EXACT = 1e-12
"""A handful of float64 operations in another order."""

FLOAT32 = 1e-6
"""A handful of float32 operations."""

ROUNDINGS: list[Rounding] = ["ste", "soft", "blend"]
SPARSITIES: list[Sparsity] = [None, 0.3, "2:4"]
LOW, HIGH = -7, 7


def element(rounding: Rounding, u: Tensor, *, sparsity: Sparsity = None, bits: int = 4) -> NearestRounding:
    return element_of(u, bits=bits, rounding=rounding, mask=mask_of(u, Axes("linear"), sparsity))


def weights(count: int = 4, ins: int = 8) -> Tensor:
    """Return weights in units of their step, some beyond the grid and one exactly between two integers."""
    u = 4 * torch.randn(count, ins, dtype=torch.float64)
    u[0, 0], u[0, 1], u[0, 2] = 9.3, -7.6, 2.5
    return u


def used(made: NearestRounding, W: Tensor, step: Tensor, progress: float) -> Tensor:
    """Return what the student computes with, as `solve` does."""
    kept = made.kept(W, step)
    out: Tensor = made(W if kept is None else masked(W, kept), step, progress)
    return out


def moved_element(rounding: Rounding, sparsity: Sparsity) -> tuple[Tensor, Tensor, NearestRounding]:
    """Return weights in steps, the step of each channel, and an element whose parameters were moved by chance."""
    u, step = weights(), torch.rand(4, 1).double() + 0.1
    made = element(rounding, u, sparsity=sparsity)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p))
    return u, step, made


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_at_the_end_every_element_is_hard(rounding: Rounding, sparsity: Sparsity) -> None:
    """At progress 1 the weight is the step times the integers, bit for bit, whatever was trained."""
    u, step, made = moved_element(rounding, sparsity)
    W = (u + torch.randn_like(u)) * step
    integers = made.integers(W, step)
    assert torch.equal(used(made, W, step, 1.0), integers * step)
    assert torch.equal(integers, integers.round())
    assert float(integers.min()) >= LOW
    assert float(integers.max()) <= HIGH


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_start_is_the_nearest_rounding(rounding: Rounding, bits: int) -> None:
    """Untrained, every element rounds to the nearest integer of the grid, ties to even."""
    low, high = integer_range(bits, signed=True, narrow=True)
    u = torch.cat([weights(), torch.arange(-20, 21).double().view(1, -1)[:, :40].reshape(5, 8) / 2])
    made = element(rounding, u, bits=bits)
    expected = to_integer(u, torch.ones(()).double(), low=low, high=high)
    assert torch.equal(made.integers(u, torch.ones(()).double()), expected)


@pytest.mark.parametrize("rounding", ["soft", "blend"])
def test_the_start_of_training_is_nearly_float(rounding: Rounding) -> None:
    """At progress 0 a blended weight is the float one, and a softly rounded one is it to a thousandth of a step."""
    u, step = weights(), torch.tensor(0.3).double()
    found = used(element(rounding, u), u * step, step, 0.0)
    inside = u if rounding == "blend" else u.clamp(LOW, HIGH)
    torch.testing.assert_close(found, inside * step, rtol=0, atol=1.1e-3 * 0.3 if rounding == "soft" else EXACT)


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_ste_is_fake_quantization(progress: float) -> None:
    """Without a mask, rounding to nearest is `fake_quantize` at every position, and its float weight is left alone."""
    u, step = weights(), torch.tensor(0.3).double()
    made = element("ste", u)
    assert torch.equal(made(u, step, progress), fake_quantize(u, step, low=LOW, high=HIGH))
    assert made.near(u, step) is u


def test_rectified_sigmoid_is_that_of_the_reference() -> None:
    """AdaRound's Eq. (23), with both flat ends."""
    V = torch.linspace(-6, 6, 41, dtype=torch.float64)
    expected = [reference.rectified_sigmoid(v) for v in V.tolist()]
    np.testing.assert_allclose(rectified_sigmoid(V).numpy(), expected, rtol=EXACT, atol=EXACT)
    assert expected[0] == 0
    assert expected[-1] == 1


def test_soft_rounding_by_hand() -> None:
    """Weight, and gradient of V and of the step, of a single weight of 2.3 steps of 0.5: base 2, share 0.3."""
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    made = element_of(torch.tensor([[2.3]], dtype=torch.float64), bits=4, rounding="soft")
    assert isinstance(made, SoftRounding)
    found = made(torch.tensor([[1.15]]), step, 0.5)
    assert found.item() == pytest.approx(1.15, rel=EXACT)
    found.sum().backward()
    assert float(step.grad or 0) == pytest.approx(2.3, rel=EXACT)
    # h = 1.2 sigmoid(V) - 0.1 = 0.3, so sigmoid(V) = 1/3 and dh/dV = 1.2 * 1/3 * 2/3; V is stored as V / STRETCH.
    assert made.V.grad is not None
    assert float(made.V.grad) == pytest.approx(0.5 * 1.2 * 2 / 9 * STRETCH, rel=EXACT)


def test_soft_rounding_of_random_weights() -> None:
    """Element by element it is  step * (base + h(V))  of the reference, on the grid without a clip."""
    u, step = weights(), torch.rand(4, 1).double() + 0.1
    made = element("soft", u)
    assert isinstance(made, SoftRounding)
    with torch.no_grad():
        made.V.add_(torch.randn_like(made.V))
    found = made(u, step, 0.3).detach().numpy()
    for o, i in np.ndindex(*u.shape):
        base = min(max(math.floor(u[o, i]), LOW), HIGH - 1)
        expected = float(step[o, 0]) * (base + reference.rectified_sigmoid(float(made.V.detach()[o, i]) * STRETCH))
        assert found[o, i] == pytest.approx(expected, rel=EXACT, abs=EXACT)


def test_soft_rounding_trains_no_float_weight() -> None:
    """The float weight gets no gradient, V does, and where V changes sign the integer does."""
    u = weights().requires_grad_()
    made = element("soft", u)
    assert isinstance(made, SoftRounding)
    made(u, torch.ones(()).double(), 0.0).sum().backward()
    assert u.grad is None
    assert made.V.grad is not None
    assert float(made.V.grad.abs().min()) > 0
    before = made.integers(u, torch.ones(()))
    with torch.no_grad():
        made.V.neg_()
    assert torch.equal((made.integers(u, torch.ones(())) - before).abs(), torch.ones_like(u))


@given(progress=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 99))
def test_regulariser_is_that_of_the_reference(progress: float, seed: int) -> None:
    """The mean of AdaRound's Eq. (24) over all layers: nothing in the warm-up, then a mean with beta from 8 to 2."""
    generator = torch.Generator().manual_seed(seed)
    made = [element("soft", 4 * torch.randn(n, 5, generator=generator, dtype=torch.float64)) for n in (2, 7)]
    found = undecided([*made, element("ste", weights())], progress)
    if progress < 0.2:
        assert found is None
        return
    beta = 8 - 6 * min(1, (progress - 0.2) / 0.4)
    h = np.concatenate([m.share().detach().numpy().ravel() for m in made if isinstance(m, SoftRounding)])
    assert found is not None
    assert found.item() == pytest.approx(reference.undecided(h, beta), rel=1e-9)
    assert 0 <= found.item() <= 1


def test_regulariser_drives_to_a_decision() -> None:
    """Followed alone it ends at 0 and every weight at the integer that was nearest; hard elements have none of it."""
    u = weights()
    made = element("soft", u)
    assert isinstance(made, SoftRounding)
    nearest = made.integers(u, torch.ones(()))
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        found = undecided([made], 0.9)
        assert found is not None
        found.backward()
        optimizer.step()
    assert found.item() < 1e-3
    assert torch.equal(made.integers(u, torch.ones(())), nearest)
    assert undecided([element("ste", u), element("blend", u)], 0.9) is None
    assert undecided([made], 1.0) is None


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5, 0.79, 0.8, 1.0])
def test_blend_is_that_of_the_reference(progress: float) -> None:
    """Element by element it is  (1 - alpha) W + alpha Q(W); alpha runs from 0 to 1."""
    u, step = weights(), torch.rand(4, 1).double() + 0.1
    W = u * step
    found = element("blend", u)(W, step, progress).numpy()
    share = 1 - (1 - min(1, progress / 0.8)) ** 3
    assert alpha(progress) == pytest.approx(share)
    for o, i in np.ndindex(*u.shape):
        expected = reference.blended(float(W[o, i]), float(step[o, 0]), share, HIGH)
        assert found[o, i] == pytest.approx(expected, rel=EXACT, abs=EXACT)


def test_gradient_of_the_blend_by_hand() -> None:
    """The weight hears 1 - alpha of the gradient, even beyond the grid, and the step alpha times the integer."""
    W = torch.tensor([[2.3, 9.0]], dtype=torch.float64, requires_grad=True)
    step = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    made = AlphaBlend(W, low=LOW, high=HIGH, mask=None)
    made(W, step, 0.4).sum().backward()
    share = 1 - 0.5**3
    assert W.grad is not None
    torch.testing.assert_close(W.grad, torch.full_like(W, 1 - share), rtol=EXACT, atol=0)
    assert float(step.grad or 0) == pytest.approx(share * (2 + 7), rel=EXACT)


@pytest.mark.parametrize("rounding", ["ste", "blend"])
def test_a_dropped_weight_can_come_back(rounding: Rounding) -> None:
    """The gradient reaches the dropped weights, and one that grows beyond a kept one takes its place."""
    u, one = torch.tensor([[0.2, 3.0, -4.0, 5.0]], dtype=torch.float64), torch.ones(()).double()
    made = element(rounding, u, sparsity="2:4")
    assert made.integers(u, one).tolist() == [[0, 0, -4, 5]]
    W = u.clone().requires_grad_()
    used(made, W, one, 0.3).sum().backward()
    assert W.grad is not None
    assert float(W.grad.abs().min()) > 0
    u[0, 1] = 4.8
    assert made.integers(u, one).tolist() == [[0, 5, 0, 5]]


def test_soft_rounding_keeps_the_mask_of_its_start() -> None:
    """Whatever V becomes, the zeros are those of the first mask, and what is dropped hears nothing."""
    u, one = torch.tensor([[0.2, 2.9, -3.1, 5.0]], dtype=torch.float64), torch.ones(()).double()
    made = element("soft", u, sparsity="2:4")
    assert isinstance(made, SoftRounding)
    made(u, one, 0.3).sum().backward()
    assert made.V.grad is not None
    assert (made.V.grad != 0).tolist() == [[False, False, True, True]]
    with torch.no_grad():
        made.V.neg_()
    assert made.integers(u, one).tolist() == [[0, 0, -4, 6]]


@pytest.mark.parametrize("sparsity", [0.3, "2:4"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_step_hears_nothing_of_dropped_weights(rounding: Rounding, sparsity: Sparsity) -> None:
    """With a step for each weight, only those of kept weights have a gradient."""
    u = weights()
    made = element(rounding, u, sparsity=sparsity)
    step = torch.ones_like(u).requires_grad_()
    used(made, u.clone(), step, 0.3).sum().backward()
    assert made.mask is not None
    kept = made.mask(u)
    assert step.grad is not None
    assert float(step.grad[~kept].abs().max()) == 0
    assert float(step.grad[kept].abs().max()) > 0


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_float_weight_rounds_to_the_integers(rounding: Rounding, sparsity: Sparsity) -> None:
    """What is written in float is within 0.49 steps of the deployed integer, or on the same side of the grid's end."""
    u, step, made = moved_element(rounding, sparsity)
    W = (u + torch.randn_like(u)) * step
    near, integers = made.near(W, step), made.integers(W, step)
    assert torch.equal(to_integer(near, step, low=LOW, high=HIGH), integers)
    moved = (near - W).abs() > EXACT
    assert float((near / step - integers)[moved].abs().max() if moved.any() else 0) <= INSIDE + EXACT


def test_near_weights_choose_the_same_mask() -> None:
    """Read again, as Brevitas does, the written float weight keeps and drops the same integers."""
    for sparsity in (0.1, 0.5, 0.9, "2:4"):
        u, one = 4 * torch.randn(16, 8, dtype=torch.float64), torch.ones(()).double()
        made = element("ste", u, sparsity=sparsity)
        again = element("ste", made.near(u, one), sparsity=sparsity)
        assert torch.equal(again.integers(made.near(u, one), one), made.integers(u, one))


KINDS = ["conv", "grouped", "depthwise", "transposed", "grouped transposed"]
ACTIVATIONS = {"a": ActivationGrid(0.05, 0, 255), "b": ActivationGrid(0.3, 0, 255)}


def network(kind: str = "conv") -> nn.Sequential:
    """Return convolution, ReLU and a second layer of another kind, ReLU, and a third."""
    second = {
        "conv": conv(),
        "grouped": conv(groups=2),
        "depthwise": conv(groups=CHANNELS),
        "transposed": nn.ConvTranspose2d(CHANNELS, 4, 3),
        "grouped transposed": nn.ConvTranspose2d(CHANNELS, 4, 3, groups=2),
    }[kind]
    third = nn.Conv2d(second.out_channels, 3, 1)
    return nn.Sequential(conv(bias=False), nn.ReLU(), second, nn.ReLU(), third).double()


def make_dof(
    model: nn.Module, *, rounding: Rounding = "ste", sparsity: Sparsity = None, doubly: bool = False, bits: int = 4
) -> Dof:
    """Return the degrees of freedom of `network`."""
    dof_map = mapped(model, image())
    edges = {"0.weight": (None, "a"), "2.weight": ("a", "b"), "4.weight": ("b", None)}
    grids = {}
    for layer in dof_map.layers:
        spread = parameters_of(model)[layer.weight].std()
        scale = spread * 2 ** (4 - bits) * (0.2 + 0.1 * torch.rand(len(layer.out_index), dtype=torch.float64))
        left = torch.exp(0.3 * torch.randn(len(layer.in_index), dtype=torch.float64)) if doubly else None
        grids[layer.weight] = WeightGrid(bits, scale, *edges[layer.weight], left)
    return Dof(
        dof_map, parameters_of(model), grids, ACTIVATIONS, config=QFTConfig(rounding=rounding, sparsity=sparsity)
    )


def moved(dof: Dof) -> Dof:
    """Move everything that trains."""
    with torch.no_grad():
        for p in dof.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return dof


@pytest.mark.parametrize("doubly", [False, True], ids=["", "doubly"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_solved_is_what_is_deployed(rounding: Rounding, sparsity: Sparsity, kind: str, doubly: bool) -> None:
    """After any training, solved weights are deployed integers times steps, folded weights round to them, and a
    doubly per-channel kernel is no exception.
    """
    dof = moved(make_dof(network(kind), rounding=rounding, sparsity=sparsity, doubly=doubly))
    solution, folded = solve(dof), folded_tensors(dof)
    for name, found in deployed_weights(dof).items():
        layer = dof.map.layer(name)
        step = layer.axes.on_weight(found.step, found.step_in, found.integers)
        assert torch.equal(solution.tensors[name].detach(), found.integers * step)
        assert torch.equal(to_integer(folded[name], step, low=LOW, high=HIGH), found.integers)
        channels = layer.in_index.numel() // layer.groups
        zeros = int((found.integers == 0).sum())
        if sparsity == 0.3:
            assert zeros >= round(0.3 * found.integers.numel())
        elif sparsity == "2:4" and channels >= 4:
            kept = reference.two_of_four(found.integers.numpy(), layer.groups, transposed="transpose" in layer.kind)
            assert not found.integers.numpy()[~kept].any()
            assert zeros >= found.integers.numel() - found.integers.numel() // channels * (channels // 4 * 2 + 2)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_all_that_trains_is_given_to_the_optimizer(rounding: Rounding) -> None:
    """Once each; soft rounding trains V instead of the weight, and the cross-layer factors train with STE only."""
    dof = make_dof(network(), rounding=rounding)
    given_ = [id(p) for g in parameter_groups(dof, learning_rate=1, scale_learning_rate=1) for p in g["params"]]
    assert len(given_) == len(set(given_))
    assert set(given_) == {id(p) for p in dof.parameters() if p.requires_grad}
    names = {name for name, p in dof.named_parameters() if p.requires_grad}
    assert ("layers.1.W" in names) == (rounding != "soft")
    assert ("layers.1.element.V" in names) == (rounding == "soft")
    assert ("log_c" in names) == (rounding == "ste")


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_degree_of_freedom_gets_a_gradient(rounding: Rounding, sparsity: Sparsity) -> None:
    """In the middle of the training everything that trains reaches the loss."""
    dof = moved(make_dof(network(), rounding=rounding, sparsity=sparsity, doubly=True))
    dof.set_progress(0.4)
    sum(t.square().sum() for t in solve(dof).tensors.values()).backward()  # type: ignore[union-attr]
    for name, p in dof.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert float(p.grad.abs().sum()) > 0, name


def test_factors_hear_nothing_of_dropped_weights() -> None:
    """The gradient of the cross-layer factors is that of the kernel with its zeros."""
    dof = make_dof(network(), sparsity=0.5)
    solution = solve(dof)
    (found,) = torch.autograd.grad(solution.tensors["2.weight"].sum(), dof.log_c)
    layer, module = dof.map.layer("2.weight"), dof.trained_weight("2.weight")
    kept = smallest_dropped(module.W.detach(), share=0.5)
    inside = kept & (module.W.detach().abs() < HIGH + 0.5)
    W = torch.where(inside, module.W * module.unit, 0).detach()
    expected = torch.zeros(1 + dof.map.size, dtype=torch.float64)
    expected.index_add_(0, layer.in_index, W.sum((0, 2, 3))).index_add_(0, layer.out_index, -W.sum((1, 2, 3)))
    torch.testing.assert_close(found, expected[1:], rtol=1e3 * EXACT, atol=1e3 * EXACT)


def test_layers_without_a_pattern_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """2:4 leaves a depthwise kernel dense and says so; a share does not."""
    with caplog.at_level(logging.WARNING, "qft_plugin"):
        dof = make_dof(network("depthwise"), sparsity="2:4")
    assert "not sparse: 2.weight" in caplog.text
    assert dof.trained_weight("2.weight").element.mask is None
    assert dof.trained_weight("0.weight").element.mask is not None
    caplog.clear()
    make_dof(network("depthwise"), sparsity=0.5)
    assert not caplog.text


def test_a_network_without_a_pattern_is_refused() -> None:
    """Where no layer has four input channels, 2:4 is an error that names the layers."""
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS)).double()
    dof_map = mapped(model, image())
    grids = {"0.weight": WeightGrid(4, torch.ones(()).double(), None, None)}
    with pytest.raises(ModelError, match=r"QFTConfig.sparsity='2:4'.*0\.weight.*four input channels"):
        Dof(dof_map, parameters_of(model), grids, {}, config=QFTConfig(sparsity="2:4"))


def run(dof: Dof, model: nn.Module, x: Tensor, targets: Targets, **changes: Any) -> FinetuneResult:
    """Finetune a student without quantized activations."""

    def student(call: Call) -> Prediction:
        return Prediction((torch.func.functional_call(model, solve(dof).tensors, call[0]),), None)

    config = FinetuneConfig(images_fed=64 * 120, batch_size=64, **changes)
    groups = parameter_groups(dof, learning_rate=config.learning_rate, scale_learning_rate=config.scale_learning_rate)
    loss = Loss((1.0,), 0.0)
    return finetune(
        student,
        dof,
        [Phase(loss, groups)],
        goal=Goal(Inputs((x,), {}, (len(x),), x.device), targets, loss),
        config=config,
        options=Options(schedule=dof.set_progress, penalty=dof.penalty),
    )


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_element_lowers_the_loss(rounding: Rounding, sparsity: Sparsity) -> None:
    """Hard and deployed, the student is closer to its teacher after a finetune than before, by a quarter at least; what
    is reported is the loss of the deployed weights on images that were held out.
    """
    model = network()
    x = torch.randn(128, CHANNELS, 5, 5, dtype=torch.float64)
    targets = teacher_predictions(
        lambda call: Prediction((model(*call[0]).detach(),), None),
        Inputs((x,), {}, (len(x),), x.device),
        batch_size=64,
        memory_limit=2**30,
    )
    dof = make_dof(model, rounding=rounding, sparsity=sparsity, bits=3)
    result = run(dof, model, x, targets)
    assert dof.progress == 1
    assert result.final_loss < 0.75 * result.start_loss
    tensors = {name: t.detach() for name, t in solve(dof).tensors.items()}
    for name, found in deployed_weights(dof).items():
        layer = dof.map.layer(name)
        tensors[name] = found.integers * layer.axes.on_weight(found.step, found.step_in, found.integers)
    y, t = torch.func.functional_call(model, tensors, x), targets.features[0].values
    held_out = slice(len(x) - result.held_out, None)
    loss = (y[held_out] - t[held_out]).square().sum() / t[held_out].square().sum()
    assert float(loss) == pytest.approx(result.final_loss, rel=FLOAT32)


def test_the_regulariser_decides() -> None:
    """With it the last steps of the training are about as good as the hard weights; without it they are far better."""
    model = network()
    x = torch.randn(128, CHANNELS, 5, 5, dtype=torch.float64)
    targets = Targets((Kept(model(x).detach(), None),), None)
    gaps = []
    for weight in (0.0, 300.0):
        dof = make_dof(model, rounding="soft", bits=3)
        result = run(dof, model, x, targets, rounding_weight=weight)
        gaps.append(result.final_loss / result.losses[-1])
    assert gaps[0] > 2
    assert gaps[1] < 1.5


def test_elements_are_those_of_the_setting() -> None:
    """There is one element for each name, with nearest rounding as the default."""
    assert set(ELEMENTS) == set(ROUNDINGS)
    assert type(element_of(torch.ones(4, 6), bits=4)) is NearestRounding
