"""EfQAT: what trains is the most important part, the integers of the rest stay, and both are what is deployed."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from graphs import mapped, parameters_of
from hypothesis import given
from hypothesis import strategies as st
from models import chained, image
from torch import Tensor, nn

from qft_plugin.config import EfQAT, FinetuneConfig, QFTConfig
from qft_plugin.graph.placement import ActivationGrid
from qft_plugin.graph.torch_model import Call
from qft_plugin.tensors.mmse import weight_scale
from qft_plugin.tensors.partial_gradients import PartialBackward
from qft_plugin.training.data import Inputs
from qft_plugin.training.dof import Dof, WeightGrid, parameter_groups
from qft_plugin.training.efqat import (
    PartialTraining,
    choose,
    held_kernels,
    hold,
    magnitudes,
    release,
    settle,
    sizes,
)
from qft_plugin.training.finetune import FinetuneResult, Goal, finetune
from qft_plugin.training.held import Held
from qft_plugin.training.integers import deployed_weights, folded_tensors
from qft_plugin.training.loss import Loss, Prediction
from qft_plugin.training.phases import Options, Phase, Step
from qft_plugin.training.solve import solve
from qft_plugin.training.teacher import teacher_predictions

EXACT = 1e-10
"""float64 sums of up to a thousand terms in another order."""

ACTIVATIONS = {"a": ActivationGrid(0.05, 0, 255), "b": ActivationGrid(0.3, 0, 255)}
BLOCKS = ("relu", "grouped", "relu", "depthwise", "relu", "grouped transposed", "layer norm")
"""All kinds of kernels, and a norm, between a convolution and a linear layer."""


def network() -> nn.Module:
    return chained(*BLOCKS)


def make_dof(model: nn.Module, *, per_channel: bool = True, doubly: bool = False, train_scales: bool = True) -> Dof:
    """Return the degrees of freedom of a network in which every layer reads grid `a` and feeds grid `b`."""
    dof_map, tensors = mapped(model, image()), parameters_of(model)
    grids = {}
    for layer in dof_map.layers:
        W, norm = tensors[layer.weight], layer.kind == "layer_norm"
        bits = 8 if norm else 4
        scale = weight_scale(W, layer.axes, bits=bits, per_channel=per_channel and not norm)
        left = torch.rand(len(layer.in_index), dtype=torch.float64) + 0.5 if doubly and not norm else None
        grids[layer.weight] = WeightGrid(bits, scale, "a", "b", left)
    return Dof(dof_map, tensors, grids, ACTIVATIONS, config=QFTConfig(train_scales=train_scales))


def some(dof: Dof, *, share: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Return random channels of each kernel."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(len(m), generator=generator) < share for name, m in magnitudes(dof).items()}


def student(dof: Dof, model: nn.Module, *, cheaper: bool = True) -> Callable[[Call], Prediction]:
    def run(call: Call) -> Prediction:
        solution = solve(dof)
        with PartialBackward(solution.partial if cheaper else ()):
            y = torch.func.functional_call(model, solution.tensors, call[0])
        return Prediction((y,), y)

    return run


def moved(dof: Dof) -> Dof:
    """Move everything that trains."""
    with torch.no_grad():
        for group in parameter_groups(dof, learning_rate=1, scale_learning_rate=1):
            for p in group["params"]:
                p.add_(0.1 * torch.randn_like(p))
    return dof


def integers(dof: Dof) -> dict[str, Tensor]:
    return {name: found.integers for name, found in deployed_weights(dof).items()}


def channels(dof: Dof, name: str, W: Tensor) -> Tensor:
    """Arrange a weight as one row per output channel."""
    layer = dof.map.layer(name)
    return layer.axes.out_slices(W) if layer.is_kernel else W.unsqueeze(1)


RATIOS = [0.0, 0.01, 0.05, 0.25, 0.5, 0.7, 0.99, 1.0]

importances = st.lists(
    st.tuples(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.integers(1, 5)), min_size=1, max_size=5
)


@given(
    layers=importances,
    ratio=st.sampled_from([0.0, 0.01, 0.05, 0.25, 0.5, 0.7, 0.99, 1.0]),
    mode=st.sampled_from(["cwpl", "cwpn", "lwpn"]),
)
def test_the_most_important_are_chosen(layers: list[tuple[list[float], int]], ratio: float, mode: str) -> None:
    """By loops: whatever trains is at least as important as what does not, and one more would be too many."""
    magnitudes = {str(i): torch.tensor(m, dtype=torch.float64) for i, (m, _) in enumerate(layers)}
    sizes = {str(i): len(m) * each for i, (m, each) in enumerate(layers)}
    chosen = choose(magnitudes, sizes, EfQAT(mode=mode, ratio=ratio))
    assert {n: len(t) for n, t in chosen.items()} == {n: len(m) for n, m in magnitudes.items()}
    if ratio == 0:
        assert not any(t.any() for t in chosen.values())
        return
    if mode == "cwpl":
        for name, m in magnitudes.items():
            order = sorted(range(len(m)), key=lambda o: (-float(m[o]), o))
            expected = sorted(order[: max(1, round(ratio * len(m)))])
            assert chosen[name].nonzero().flatten().tolist() == expected
        return
    if mode == "cwpn":
        entries = [(float(m), (n, o)) for n, t in magnitudes.items() for o, m in enumerate(t)]
        weights = {(n, o): sizes[n] // len(magnitudes[n]) for _, (n, o) in entries}
    else:
        entries = [(float(t.mean()), (n, o)) for n, t in magnitudes.items() for o in range(1)]
        weights = {(n, 0): sizes[n] for n in magnitudes}
    taken, room = [], ratio * sum(sizes.values()) * (1 + 1e-9)
    for _, key in sorted(entries, key=lambda entry: -entry[0]):
        if taken and weights[key] > room:
            break
        taken.append(key)
        room -= weights[key]
    for name, t in chosen.items():
        for o in range(len(t)):
            assert bool(t[o]) == ((name, o if mode == "cwpn" else 0) in taken)


@pytest.mark.parametrize("mode", ["cwpl", "cwpn", "lwpn"])
def test_without_kernels_there_is_no_choice(mode: str) -> None:
    """Where norms alone are quantized nothing is chosen."""
    assert choose({}, {}, EfQAT(mode=mode)) == {}


def test_importance_is_the_mean_magnitude_of_the_folded_weight() -> None:
    """In real units of the folded network, by output channel, of kernels alone."""
    dof = make_dof(network())
    with torch.no_grad():
        dof.log_c.normal_(std=0.3)
    tensors, found = folded_tensors(dof), magnitudes(dof)
    kernels = [layer for layer in dof.map.layers if layer.is_kernel]
    assert set(found) == {layer.weight for layer in kernels}
    assert len(kernels) < len(dof.map.layers)
    for layer in kernels:
        rows = channels(dof, layer.weight, tensors[layer.weight])
        torch.testing.assert_close(found[layer.weight], rows.abs().mean(1), rtol=EXACT, atol=0)
        assert sizes(dof)[layer.weight] == rows.numel()


@pytest.mark.parametrize("doubly", [False, True], ids=["", "doubly"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_holding_changes_nothing(share: float, per_channel: bool, doubly: bool) -> None:
    """At the moment of a choice the student's weights and biases stay as they are, bit for bit."""
    dof = make_dof(network(), per_channel=per_channel, doubly=doubly)
    with torch.no_grad():
        dof.log_c.normal_(std=0.3)
    before = solve(dof).tensors
    for seed in range(3):
        hold(dof, some(dof, share=share, seed=seed))
        after = solve(dof).tensors
        assert all(torch.equal(after[name], before[name]) for name in before)
        moved(dof)
        before = solve(dof).tensors
        settle(dof)
        after = solve(dof).tensors
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_kernels_keep_their_memory_format() -> None:
    """A kernel with its channels last has them last in the student too, whatever trains of it."""
    model = network()
    dof = make_dof(model)
    layer = dof.trained_weight("0.weight")
    layer.W.data = layer.W.data.contiguous(memory_format=torch.channels_last)
    for share in (0.0, 0.3, 1.0):
        hold(dof, some(dof, share=share))
        assert solve(dof).tensors["0.weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("doubly", [False, True], ids=["", "doubly"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
def test_integers_stay_while_scales_move(per_channel: bool, doubly: bool) -> None:
    """Settled and released, what is deployed has the old integers in the channels that were held, and others elsewhere;
    the weights that the student had are the deployed ones.
    """
    dof = make_dof(network(), per_channel=per_channel, doubly=doubly)
    start, steps = integers(dof), {n: d.step for n, d in deployed_weights(dof).items()}
    trained = some(dof)
    hold(dof, trained)
    moved(dof)
    expected = solve(dof).tensors
    settle(dof)
    release(dof)
    found = deployed_weights(dof)
    different = 0
    for name, mask in trained.items():
        now, before = (channels(dof, name, t) for t in (found[name].integers, start[name]))
        assert torch.equal(now[~mask], before[~mask])
        different += int((now[mask] != before[mask]).sum())
        assert not torch.equal(found[name].step, steps[name])
    assert different > 0
    for name, t in solve(dof).tensors.items():
        assert torch.equal(t, expected[name])


@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gradients_of_all_that_trains(share: float, per_channel: bool) -> None:
    """Rows, biases, norms, rescale factors and activation steps get the gradients of the ordinary backward pass."""
    model = network()
    dof, x = make_dof(model, per_channel=per_channel), image()
    hold(dof, some(dof, share=share))
    leaves = [p for g in parameter_groups(dof, learning_rate=1, scale_learning_rate=1) for p in g["params"]]
    found = []
    for cheaper in (True, False):
        y = student(dof, model, cheaper=cheaper)(((x,), {})).features[0]
        found.append(torch.autograd.grad(y.square().sum(), leaves))
    for ours, expected in zip(*found, strict=True):
        assert float(expected.abs().sum()) > 0
        torch.testing.assert_close(ours, expected, rtol=EXACT, atol=EXACT)


def test_the_gradient_of_a_held_step_by_hand() -> None:
    """dL/dlog F of a channel that is held is the sum of dL/dW times W over it, a difference quotient says."""
    model = network()
    dof, x = make_dof(model), image()
    hold(dof, some(dof, share=0.0))
    layer, run = dof.trained_weight("0.weight"), student(dof, model)

    def loss() -> Tensor:
        return run(((x,), {})).features[0].square().sum()

    (gradient,) = torch.autograd.grad(loss(), layer.log_F)
    for o in range(3):
        ends = []
        for change in (1e-6, -2e-6):
            layer.log_F.data[o] += change
            ends.append(float(loss().detach()))
        layer.log_F.data[o] += 1e-6
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(gradient[o]), rel=1e-5)


def test_what_trains() -> None:
    """Rows in the place of kernels, norms and biases whole, no cross-layer factors and no left scales."""
    dof = make_dof(network(), doubly=True)
    trained = some(dof)
    trained["0.weight"][:] = False
    hold(dof, trained)
    values, scales, factors = (g["params"] for g in parameter_groups(dof, learning_rate=1, scale_learning_rate=1))
    assert not factors
    rows = [held.rows for held in held_kernels(dof).values() if len(held.index)]
    assert len(rows) < len(held_kernels(dof))
    assert {id(p) for p in rows} < {id(p) for p in values}
    others = {id(p) for p in values} - {id(p) for p in rows}
    norms = {id(d.W) for d in dof.quantized() if not d.layer.is_kernel}
    assert norms
    assert others == norms | {id(d.bias) for d in dof.quantized() if d.bias is not None}
    assert {id(p) for p in scales} == {id(d.log_F) for d in dof.quantized()} | {id(p) for p in dof.activations.log_s}
    for name, held in held_kernels(dof).items():
        assert held.rows.shape[0] == int(trained[name].sum())
        assert held.rows[0].numel() == sizes(dof)[name] // len(trained[name]) if len(held.index) else True


def settings(train: EfQAT | None, **changes: float) -> FinetuneConfig:
    return FinetuneConfig(**{"images_fed": 640, "batch_size": 16, "train": train, **changes})


def run(
    dof: Dof, model: nn.Module, config: FinetuneConfig, *, callback: Callable[[Step], None] | None = None
) -> FinetuneResult:
    """Finetune the way the pipeline does, against the float network."""
    inputs = Inputs((torch.randn(64, *image().shape[1:], dtype=torch.float64),), {}, (64,), torch.device("cpu"))

    def teacher(call: Call) -> Prediction:
        y = model(*call[0])
        return Prediction((y,), y)

    part = config.trains_part
    partial = None if part is None else PartialTraining(dof, part)
    groups = parameter_groups(dof, learning_rate=config.learning_rate, scale_learning_rate=config.scale_learning_rate)
    loss = Loss((1.0,), 0.0)
    try:
        return finetune(
            student(dof, model),
            dof,
            [Phase(loss, groups)],
            goal=Goal(inputs, teacher_predictions(teacher, inputs, batch_size=16, memory_limit=2**20), loss),
            config=config,
            options=Options(callback=callback, schedule=dof.set_progress, partial=partial),
        )
    finally:
        release(dof)


@pytest.mark.parametrize("mode", ["cwpl", "cwpn", "lwpn"])
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.4])
def test_a_part_learns(mode: str, ratio: float) -> None:
    """The loss falls, with scales, biases and norms alone too; what was never chosen keeps its integers."""
    model = network()
    dof = make_dof(model)
    start, steps = integers(dof), [p.detach().clone() for p in dof.activations.log_s]
    ever = {name: torch.zeros_like(m, dtype=torch.bool) for name, m in magnitudes(dof).items()}

    def watch(_: Step) -> None:
        for name, held in held_kernels(dof).items():
            ever[name] |= held.trained

    config = settings(EfQAT(mode=mode, ratio=ratio, refresh_images=160))
    result = run(dof, model, config, callback=watch)
    assert result.final_loss < 0.95 * result.start_loss
    assert not held_kernels(dof)
    assert not any(torch.equal(p, before) for p, before in zip(dof.activations.log_s, steps, strict=True))
    assert any(t.any() for t in ever.values()) == (ratio > 0)
    changed = 0
    for name, now in integers(dof).items():
        before = start[name]
        if name in ever:
            now, before = channels(dof, name, now)[~ever[name]], channels(dof, name, before)[~ever[name]]
            assert torch.equal(now, before)
        changed += int((integers(dof)[name] != start[name]).sum())
    assert changed > 0 or ratio == 0
    y = student(dof, model)(((image(),), {})).features[0]
    assert math.isfinite(float(y.detach().sum()))


def test_all_is_what_no_part_is() -> None:
    """A ratio of 1 gives the result of no setting at all, bit for bit."""
    model = network()
    found = []
    for train in (None, EfQAT(ratio=1), EfQAT(ratio=1, mode="lwpn")):
        torch.manual_seed(0)
        dof = make_dof(model)
        found.append((run(dof, model, settings(train)), dof.state_dict()))
    for result, state in found[1:]:
        assert result == found[0][0]
        assert all(torch.equal(state[name], t) for name, t in found[0][1].items())


@pytest.mark.parametrize("refresh_images", [100, 10_000])
def test_the_loss_at_the_end_is_that_of_what_is_deployed(refresh_images: int) -> None:
    """The final loss, taken while integers are held, is that of the released state on the same images."""
    model = network()
    dof = make_dof(model)
    torch.manual_seed(1)
    result = run(dof, model, settings(EfQAT(ratio=0.3, refresh_images=refresh_images), restarts=2))
    torch.manual_seed(1)
    assert result.final_loss < result.start_loss
    again = run(dof, model, settings(None, learning_rate=0.0, scale_learning_rate=0.0))
    assert again.start_loss == pytest.approx(result.final_loss, rel=EXACT)


def test_the_choice_is_made_anew_when_it_is_time() -> None:
    """With 640 images in batches of 16 and a choice every 150, the steps that see a new one are the 11th, 20th, ..."""
    model = network()
    dof = make_dof(model)
    seen: list[int] = []
    kept: list[dict[str, Held]] = []

    def watch(step: Step) -> None:
        if not kept or held_kernels(dof)["0.weight"] is not kept[-1]["0.weight"]:
            seen.append(step.number)
            kept.append(held_kernels(dof))

    run(dof, model, settings(EfQAT(ratio=0.3, refresh_images=150)), callback=watch)
    assert seen == [1] + [1 + math.ceil(images / 16) for images in (150, 300, 450, 600)]


def test_left_scales_hear_nothing() -> None:
    """The left scale of a kernel that is held gets no gradient, neither from its rows nor from the rest."""
    model = network()
    dof = make_dof(model, doubly=True)
    hold(dof, some(dof))
    student(dof, model)(((image(),), {})).features[0].square().sum().backward()
    lefts = [d.log_L for d in dof.quantized() if d.log_L is not None]
    assert len(lefts) == len(held_kernels(dof))
    assert all(left.grad is None for left in lefts)


def test_the_optimizer_holds_moments_of_rows_only() -> None:
    """After a refresh there is state for the rows that train and for nothing that was let go; a layer that was never
    chosen before starts afresh.
    """
    model = network()
    dof = make_dof(model)
    partial = PartialTraining(dof, EfQAT(mode="cwpn", ratio=0.3, refresh_images=100))
    groups = parameter_groups(dof, learning_rate=0.015, scale_learning_rate=3e-3)
    optimizer = torch.optim.Adam(groups, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        student(dof, model)(((image(),), {})).features[0].square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step()
    before, moments = held_kernels(dof), {id(p): s["exp_avg"].clone() for p, s in optimizer.state.items()}
    partial.refresh(99, optimizer)
    assert all(held_kernels(dof)[name] is held for name, held in before.items())
    with torch.no_grad():  # what was least important becomes what is most
        for layer in dof.quantized():
            if layer.held is not None and not layer.held.trained.all():
                layer.log_F.add_(2.0 * (layer.layer.weight == "0.weight"))
    partial.refresh(100, optimizer)
    after = held_kernels(dof)
    assert int(after["0.weight"].trained.sum()) > int(before["0.weight"].trained.sum())
    for name, held in after.items():
        stays = held.trained & before[name].trained
        if stays.any():
            ours = optimizer.state[held.rows]["exp_avg"][stays[held.index]]
            assert torch.equal(ours, moments[id(before[name].rows)][stays[before[name].index]])
        elif not before[name].trained.any():
            assert held.rows not in optimizer.state
    step()
    trained = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in optimizer.state} == {id(p) for p in trained}
    count = sum(p.numel() for p in trained)
    assert count == sum(s["exp_avg"].numel() for s in optimizer.state.values())
    kernels = sum(sizes(dof).values())
    assert sum(held.rows.numel() for held in after.values()) <= 0.3 * kernels


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda dof: pickle.loads(pickle.dumps(dof))], ids=["copy", "pickle"])
def test_a_state_can_be_copied_at_any_time(copied: Callable[[Dof], Dof]) -> None:
    """Copied and pickled while a part trains, it computes the same; its state dict is that of a whole one."""
    dof = make_dof(network())
    whole = set(dof.state_dict())
    hold(dof, some(dof))
    moved(dof)
    other = copied(dof)
    expected = solve(dof).tensors
    for name, t in solve(other).tensors.items():
        assert torch.equal(t, expected[name])
    assert all(held_kernels(other)[name].rows is not held.rows for name, held in held_kernels(dof).items())
    assert all(held.rows.is_leaf and held.rows.requires_grad for held in held_kernels(other).values())
    assert set(other.state_dict()) == whole


def test_steps_that_do_not_train_move_nothing() -> None:
    """Without training scales only rows, biases and norms train, and the loss falls all the same."""
    model = network()
    dof = make_dof(model, train_scales=False)
    steps = {name: d.step for name, d in deployed_weights(dof).items()}
    result = run(dof, model, settings(EfQAT(ratio=0.3)))
    assert result.final_loss < result.start_loss
    assert all(torch.equal(d.step, steps[name]) for name, d in deployed_weights(dof).items())
