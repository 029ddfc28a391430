"""What the students of all hosts are made of: the stand-in of a quantizer, unfolding, and what is compared."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import mapped, parameters_of, record
from models import chained, image
from torch import Tensor, nn

from qft_plugin.graph.folding import fold_network
from qft_plugin.graph.placement import ActivationGrid
from qft_plugin.tensors.fake_quantize import fake_quantize, fake_quantize_composed
from qft_plugin.training.loss import Prediction
from qft_plugin.training.solve import Solution
from qft_plugin.training.student import (
    QUANTIZER_OP,
    FakeQuantizer,
    Unfold,
    compiled_fake_quantize,
    looked_at,
    prediction_of,
    set_grids,
    unfolded,
)

EXACT = 1e-10
"""float64: a dozen layers with factors up to e^2 on either side, then one product."""

GRID = ActivationGrid(0.1, 0, 15, 3)


def test_without_a_scale_values_pass_and_are_seen() -> None:
    """The output is equal to the input, whose values of all calls are seen, also after a later operation in place."""
    quantizer, idle = FakeQuantizer(GRID), FakeQuantizer(GRID)
    quantizer.scale = torch.ones(())
    inputs = [torch.randn(2, 3), torch.randn(4)]
    before = [x.clone() for x in inputs]

    def run() -> None:
        for x in inputs:
            y = quantizer(x)
            assert torch.equal(y, x)
            y.add_(1)

    for _ in range(2):
        seen: list[tuple[str, Tensor]] = []

        def watch(name: str, x: Tensor, seen: list[tuple[str, Tensor]] = seen) -> None:
            seen.append((name, x.clone()))

        with looked_at({"a": quantizer, "idle": idle}, watch):
            run()
        assert [name for name, _ in seen] == ["a", "a"]
        assert all(torch.equal(x, b) for (_, x), b in zip(seen, before, strict=True))
    assert quantizer.watcher is None
    assert all(torch.equal(x, b) for x, b in zip(inputs, before, strict=True))


def test_without_a_grid_values_pass() -> None:
    """Before a grid is known the module already stands in its place."""
    x = torch.randn(2, 3)
    assert torch.equal(FakeQuantizer()(x), x)


@pytest.mark.parametrize("late", [False, True], ids=["grid at once", "grid later"])
@pytest.mark.parametrize("shape", [(), (1, 4, 1, 1)])
def test_with_a_scale_values_are_quantized(shape: tuple[int, ...], late: bool) -> None:
    """The grid's integers and zero point are used with the scale that was put in, not with the grid's own."""
    quantizer = FakeQuantizer() if late else FakeQuantizer(GRID)
    if late:
        quantizer.set_grid(GRID, fake_quantize)
    x, scale = torch.randn(2, 4, 5, 5), 0.2 + torch.rand(shape)
    quantizer.scale = scale
    assert torch.equal(quantizer(x), fake_quantize(x, scale, low=0, high=15, zero_point=3))
    assert quantizer.watcher is None
    quantizer.scale = None
    assert torch.equal(quantizer(x), x)


def test_gradients_reach_data_and_scale() -> None:
    """The scale is part of the graph of the one call that it was put in for."""
    quantizer, x = FakeQuantizer(GRID), torch.rand(2, 4, requires_grad=True)
    quantizer.scale = torch.tensor(0.17, requires_grad=True)
    quantizer(x).sum().backward()
    assert float(x.grad.sum()) > 0
    assert float(quantizer.scale.grad) != 0


def test_another_function_may_quantize() -> None:
    """The function that was given is called with the grid, and with no other value."""
    calls: list[dict[str, Any]] = []

    def function(x: Tensor, scale: Tensor, **grid: int) -> Tensor:
        calls.append(grid)
        return x * scale

    quantizer = FakeQuantizer(GRID, function)
    quantizer.scale = torch.tensor(2.0)
    assert quantizer(torch.tensor([3.0])).tolist() == [6.0]
    assert calls == [{"low": 0, "high": 15, "zero_point": 3}]


def test_a_stand_in_is_one_operation_for_a_recorder() -> None:
    """Without a scale it shows as its one known operation; with one, nothing inside it is seen."""
    model = nn.Sequential(nn.ReLU(), FakeQuantizer(GRID), nn.ReLU())
    graph = record(model, torch.randn(2, 3))
    assert [op.function for op in graph.ops] == ["relu", QUANTIZER_OP, "relu"]
    assert graph.ops[1].name == f"1/{QUANTIZER_OP}/0"
    assert graph.ops[2].inputs == graph.ops[1].outputs
    model[1].scale = torch.tensor(0.1)
    assert [op.function for op in record(model, torch.randn(2, 3)).ops] == ["relu", "relu"]


@pytest.mark.parametrize("bounded", [False, True])
def test_a_relu_that_only_the_quantizer_reads(bounded: bool) -> None:
    """Left to the quantizer, value and gradients are those of one after the other, for each of several calls."""
    quantizer = FakeQuantizer(ActivationGrid(0.02, 0, 255, 0))
    xs, gs = torch.randn(2, 2, 3, 4, 4) * 4, torch.randn(2, 2, 3, 4, 4)
    bounds = [torch.rand(3) + 0.5 for _ in xs]
    results = []
    for together in (False, True):
        quantizer.scale = torch.tensor(0.02, requires_grad=True)
        leaves = [x.clone().requires_grad_() for x in xs]
        highs = [b.clone().requires_grad_() for b in bounds]
        if together:
            arguments = [(high, -3) if bounded else () for high in highs]
            read = [quantizer.after(x, *a) for x, a in zip(leaves, arguments, strict=True)]
            assert all(r is x for r, x in zip(read, leaves, strict=True))
        else:
            read = [x.relu() for x in leaves]
            read = [torch.minimum(x, b.view(-1, 1, 1)) for x, b in zip(read, highs, strict=True)] if bounded else read
        ys = [quantizer(x) for x in read]
        sum((y * g).sum() for y, g in zip(ys, gs, strict=True)).backward()
        results.append([*ys, *(x.grad for x in leaves), quantizer.scale.grad, *(h.grad for h in highs if bounded)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    # What it reads next is its own again.
    x = -torch.rand(2, 3, 4, 4, requires_grad=True)
    quantizer(x).sum().backward()


def test_without_a_scale_a_relu_that_was_left_to_it_is_computed() -> None:
    """The same numbers as the ReLU, or the bounded one, gives; the quantizer shows what it would have read."""
    x, high = torch.randn(2, 3, 4, 4), torch.rand(3) + 0.5
    for bound, expected in (((), x.relu()), ((high, -3), torch.minimum(x.relu(), high.view(-1, 1, 1)))):
        quantizer, seen = FakeQuantizer(ActivationGrid(0.02, 0, 255, 0)), list[Tensor]()
        quantizer.watcher = seen.append
        assert torch.equal(quantizer(quantizer.after(x, *bound)), expected)
        assert torch.equal(quantizer.rectified(x, *bound), expected)
        assert [torch.equal(s, expected) for s in seen] == [True]


def test_a_solution_leaves_quantizers_out() -> None:
    """Who has no scale in it passes values on, whatever scale it had before."""
    quantizers = {name: FakeQuantizer(GRID) for name in ("a", "b")}
    scale = torch.tensor(0.1)
    for scales in ({"a": scale, "b": scale}, {"b": scale}):
        set_grids(quantizers, Solution({}, scales, torch.ones(1)))
    x = torch.rand(4)
    assert torch.equal(quantizers["a"](x), x)
    assert not torch.equal(quantizers["b"](x), x)


def test_a_copy_is_a_quantizer_of_its_own() -> None:
    """A copied student has its own scales, and its state dict holds none of this."""
    quantizer = FakeQuantizer(GRID)
    other = copy.deepcopy(quantizer)
    other.scale = torch.tensor(0.3)
    x = torch.rand(4)
    assert torch.equal(quantizer(x), x)
    assert torch.equal(other(x), fake_quantize(x, other.scale, low=0, high=15, zero_point=3))
    assert not quantizer.state_dict()


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 3), 1), ((2, 5, 3), 2), ((2, 3, 5), 1), ((2, 3, 4, 4), 1), ((2, 3, 2, 2, 2), 1)],
    ids=["vectors", "sequences", "signals", "images", "volumes"],
)
def test_unfolding_by_hand(shape: tuple[int, ...], axis: int) -> None:
    """Each channel is multiplied by start * factor of its variable, on the axis where its kind of activation has it."""
    x = torch.randn(shape, dtype=torch.float64)
    index, start = torch.tensor([2, 0, 1]), torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    factors = torch.tensor([1.0, 4.0, 10.0], dtype=torch.float64)
    logits = torch.randn(2, 3)
    found = unfolded(Prediction((x,), logits), [Unfold(index, start, axis)], factors)
    for channel, factor in enumerate([10.0, 3.0, 2.0]):
        assert torch.equal(found.features[0].select(axis, channel), factor * x.select(axis, channel))
    assert found.logits is logits


def test_nothing_to_unfold() -> None:
    """Where no channel is rescaled the prediction stays as it is."""
    prediction = Prediction((torch.randn(2, 3), torch.randn(2)), None)
    assert unfolded(prediction, [None], torch.ones(4)) == prediction


def test_each_activation_is_unfolded_by_its_own_factors() -> None:
    """Of three features the second has no factors, and the third, an output, is not among those with any."""
    x, y, z = torch.randn(3, 2, 2)
    ones, factors = torch.ones(2), torch.tensor([1.0, 4.0, 10.0])
    found = unfolded(Prediction((x, y, z), None), [Unfold(torch.tensor([2, 1]), ones, 1), None], factors)
    assert torch.equal(found.features[0], x * torch.tensor([10.0, 4.0]))
    assert found.features[1] is y
    assert found.features[2] is z
    found = unfolded(Prediction((x, y), None), [None, Unfold(torch.tensor([0, 1]), 2 * ones, 1)], factors)
    assert found.features[0] is x
    assert torch.equal(found.features[1], y * torch.tensor([2.0, 8.0]))


@pytest.mark.parametrize("names", [("conv", "relu"), ("residual",), ("conv", "halves")])
def test_unfolding_gives_the_activation_of_the_float_network(names: tuple[str, ...]) -> None:
    """After folding twice, first a start and then what was trained, the activation comes back in float units."""
    model, x = chained(*names, "conv"), image()
    dof, graph = mapped(model, x), record(model, x)
    tensor = graph.ops[-4].inputs[0]
    first, second = torch.randn(2, dof.size, dtype=torch.float64)
    tensors = fold_network(dof, second, parameters_of(model) | fold_network(dof, first, parameters_of(model)))
    seen: list[Tensor] = []
    last = model[-2]
    last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        torch.func.functional_call(model, tensors, x)
    index = dof.channel_index[tensor]
    assert index.tolist() == dof.layers[-2].in_index.tolist()
    assert float((seen[1] - seen[0]).abs().max()) > 0.1
    start = torch.cat([torch.zeros(1), first]).exp()[index]
    found = unfolded(
        Prediction((seen[1],), None),
        [Unfold(index, start, dof.channel_axes[tensor])],
        torch.cat([torch.zeros(1), second]).exp(),
    )
    torch.testing.assert_close(found.features[0], seen[0], rtol=EXACT, atol=EXACT)


MATRIX, IMAGES, LABELS = torch.randn(2, 3), torch.randn(2, 3, 4, 4), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("outputs", "logits"),
    [
        ([MATRIX], True),
        ([MATRIX, LABELS], True),
        ([IMAGES], False),
        ([MATRIX, MATRIX], False),
        ([MATRIX, IMAGES], False),
    ],
    ids=["a matrix", "a matrix and labels", "an image", "two matrices", "a matrix and an image"],
)
@pytest.mark.parametrize("compared", [[], [IMAGES], [IMAGES, MATRIX]], ids=["none", "an activation", "two"])
@pytest.mark.parametrize("with_outputs", [False, True], ids=["inside", "outputs too"])
def test_what_is_compared(outputs: list[Tensor], logits: bool, compared: list[Tensor], with_outputs: bool) -> None:
    """Activations, then every floating output if asked; logits are there where the one output is `[N, classes]`."""
    found = prediction_of(outputs, compared, with_outputs=with_outputs)
    expected = [*compared, *(t for t in outputs if t is not LABELS and with_outputs)]
    assert [id(t) for t in found.features] == [id(t) for t in expected]
    assert (found.logits is MATRIX) if logits else (found.logits is None)


def broken(_: Callable[..., Tensor], **__: Any) -> Callable[..., Tensor]:
    """Stand in for `torch.compile` where compilation fails, which shows in the first call."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no C++ compiler")

    return call


def refusing(_: Callable[..., Tensor], **__: Any) -> Callable[..., Tensor]:
    """Stand in for `torch.compile` where it refuses to work at all, as on a Python that it does not know yet."""
    raise RuntimeError("not supported on this Python")


@pytest.mark.parametrize(
    "compiler",
    [
        broken,
        refusing,
    ],
)
def test_without_a_compiler_the_built_in_function_is_used(
    compiler: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where fusing does not work, a warning is logged and training goes on with `fake_quantize`."""
    monkeypatch.setattr(torch, "compile", compiler)
    with caplog.at_level(logging.WARNING, logger="qft_plugin"):
        found = compiled_fake_quantize.__wrapped__()  # without the cache, which outlives this test
    assert found is fake_quantize
    assert "torch.compile does not work here" in caplog.text


def test_with_a_compiler_the_fused_function_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the compiler makes of the composed form is tried once, forwards and backwards, and returned."""
    runs: list[tuple[int, ...]] = []

    def compiler(function: Callable[..., Tensor], **_: Any) -> Callable[..., Tensor]:
        assert function is fake_quantize_composed

        def fused(x: Tensor, *args: Tensor, **kwargs: int) -> Tensor:
            runs.append(tuple(x.shape))
            return function(x, *args, **kwargs)

        return fused

    monkeypatch.setattr(torch, "compile", compiler)
    found = compiled_fake_quantize.__wrapped__()
    assert len(runs) == 1
    scale = torch.tensor(0.3)
    for x in (torch.randn(3, 4), torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)):
        expected = fake_quantize(x, scale, low=-8, high=7)
        value = found(x, scale, low=-8, high=7, zero_point=0)
        torch.testing.assert_close(value, expected)
        assert value.stride() == x.stride()
        bound = torch.rand(x.shape[1]).view(-1, *(1,) * (x.dim() - 2))
        expected = fake_quantize(x, scale, low=0, high=7, bound=bound)
        torch.testing.assert_close(found(x, scale, low=0, high=7, zero_point=0, bound=bound), expected)
    # One axis, or three with the channels in the middle, in the order of memory: few variants are compiled.
    assert runs[1:] == [(12,), (3, 4, 1), (96,), (32, 3, 1)]
    assert not caplog.text
