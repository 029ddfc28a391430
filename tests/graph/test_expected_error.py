"""Cross-layer factors with a small expected error: the error that is foreseen, and where its minimum lies."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import two_linear
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.graph import expected_error as module
from qft_plugin.graph.expected_error import Seen, SeenByLayers, least_expected_error
from qft_plugin.graph.folding import fold_network
from qft_plugin.graph.layer_graph import DofMap
from qft_plugin.graph.torch_model import Functional
from qft_plugin.tensors.mmse import weight_scale

WIDTH = 24

BITS = {"a.weight": 4, "b.weight": 4}


def toy() -> DofMap:
    """Map two linear layers with a ReLU between them."""
    return two_linear(16, WIDTH, 12)


def weights() -> dict[str, Tensor]:
    """Return the weights of `toy`."""
    return {"a.weight": torch.randn(WIDTH, 16), "b.weight": torch.randn(12, WIDTH)}


def seen_of_layer(x: Tensor, W: Tensor) -> Seen:
    """Return what there is to know of a layer that reads x, `[images, in]`."""
    span = (2 if bool((x < 0).any()) else 1) * x.abs().amax(0)
    return Seen(x.var(0, correction=0), span, (x @ W.T).var(0, correction=0).sum())


def seen_of(tensors: Mapping[str, Tensor], x: Tensor) -> dict[str, Seen]:
    """Return what the layers of `toy` read and make."""
    a, b = tensors["a.weight"], tensors["b.weight"]
    return {"a.weight": seen_of_layer(x, a), "b.weight": seen_of_layer((x @ a.T).relu(), b)}


def alike(tensors: Mapping[str, Tensor]) -> dict[str, Seen]:
    """Return what is seen where all channels are alike and independent."""
    return {name: Seen(torch.ones(W.shape[1]), torch.ones(W.shape[1]), W.square().sum()) for name, W in tensors.items()}


def found(tensors: Mapping[str, Tensor], seen: Mapping[str, Seen], **changes: Any) -> Tensor:
    """Return the factors of the inner channels of `toy`, less their mean."""
    settings: dict[str, Any] = {"per_channel": (), "activation_bits": 8, **changes}
    dof = toy()
    log_c = least_expected_error(dof, tensors, BITS, seen, **settings)
    inner = log_c[dof.layer("a.weight").out_index - 1]
    return inner - inner.mean()


def rounding_error(tensors: Mapping[str, Tensor], x: Tensor, log_c: Tensor | None = None) -> float:
    """Round the weights of `toy` to the nearest, one layer at a time: the sum of relative errors of their outputs."""
    dof = toy()
    folded = dict(tensors) if log_c is None else fold_network(dof, log_c, tensors)
    total = 0.0
    for layer in dof.layers:
        W = folded[layer.weight]
        step = weight_scale(W, layer.axes, bits=4, per_channel=False)
        rounded = (W / step).round().clamp(-7, 7) * step
        c = torch.cat([torch.zeros(1), torch.zeros(dof.size) if log_c is None else log_c]).exp()
        y = x if layer.weight == "a.weight" else (x @ tensors["a.weight"].T).relu()
        error = (y / c[layer.in_index]) @ (W - rounded).T * c[layer.out_index]
        total += float(error.square().sum() / (y @ tensors[layer.weight].T).square().sum())
    return total


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_error_that_is_foreseen_is_that_of_rounding(bits: int, per_channel: bool) -> None:
    """With independent inputs the expected error of a kernel is the measured one, with the best step."""
    torch.manual_seed(0)
    dof, tensors = toy(), weights()
    layer, W = dof.layer("b.weight"), tensors["b.weight"]
    x = torch.randn(4096, WIDTH) * torch.rand(WIDTH)
    kernel = module._Kernel.of(layer, W, bits, seen_of_layer(x, W), per_channel, torch.Generator())
    step = weight_scale(W, layer.axes, bits=bits, per_channel=per_channel)
    none = torch.zeros(dof.size + 1)
    expected = float(kernel.weight_error(none, step.reshape(-1).log()))
    high = 2 ** (bits - 1) - 1
    scale = layer.axes.on_weight(step, None, W)
    error = W - (W / scale).round().clamp(-high, high) * scale
    measured = float((x @ error.T).square().sum() / (x @ W.T).square().sum())
    assert expected == pytest.approx(measured, rel=0.25)


def test_the_error_of_rounding_the_input_is_foreseen() -> None:
    """Likewise of an input that is rounded to one grid over all channels, whose peaks are alike or not."""
    torch.manual_seed(0)
    dof, W = toy(), weights()["b.weight"]
    layer = dof.layer("b.weight")
    for spread in (torch.ones(WIDTH), torch.logspace(-1, 0, WIDTH)):
        x = (2 * torch.rand(4096, WIDTH) - 1) * spread
        kernel = module._Kernel.of(layer, W, 4, seen_of_layer(x, W), True, torch.Generator())
        expected = float(kernel.input_error(torch.zeros(dof.size + 1), 8))
        scale = x.abs().max() / 127
        error = x - (x / scale).round() * scale
        measured = float((error @ W.T).square().sum() / (x @ W.T).square().sum())
        norm = float(spread.norm(module.PEAK))  # stands for the largest of them, 1
        assert expected == pytest.approx(measured * norm**2, rel=0.15)


def test_factors_lower_the_error_of_rounding() -> None:
    """Inputs that differ by channel cost less after the factors have moved range to the large ones."""
    torch.manual_seed(0)
    tensors = weights()
    x = torch.randn(2048, 16)
    tensors["a.weight"] *= torch.logspace(-1, 0, WIDTH).unsqueeze(1)
    log_c = least_expected_error(toy(), tensors, BITS, seen_of(tensors, x), per_channel=(), activation_bits=None)
    assert rounding_error(tensors, x, log_c) < 0.93 * rounding_error(tensors, x)


def test_a_powerful_input_gets_the_finer_weights() -> None:
    """The weights that read it become larger against their step:  W * c,  c > 1."""
    torch.manual_seed(0)
    tensors = weights()
    seen = alike(tensors)
    power = torch.ones(WIDTH)
    power[5] = 100
    output = (tensors["b.weight"].square() * power).sum()
    log_c = found(tensors, {**seen, "b.weight": Seen(power, torch.ones(WIDTH), output)}, activation_bits=None)
    even = found(tensors, seen, activation_bits=None)
    change = log_c - even
    assert float(change[5]) > max(0.2, float(change.quantile(0.9)))


def test_a_channel_with_a_wide_range_is_scaled_down() -> None:
    """Else the grid of all channels is as coarse as its own; the weights that read it become larger:  W * c,  c > 1."""
    torch.manual_seed(0)
    tensors, span = weights(), torch.ones(WIDTH)
    span[5] = 10
    seen = alike(tensors)
    seen["b.weight"] = replace(seen["b.weight"], span=span)
    change = found(tensors, seen, activation_bits=4) - found(tensors, seen, activation_bits=None)
    assert int(change.argmax()) == 5
    assert float(change[5]) > 0.2


def test_the_order_of_channels_does_not_matter() -> None:
    """Permuting the inner channels permutes the factors."""
    torch.manual_seed(0)
    tensors, order = weights(), torch.randperm(WIDTH)
    seen = seen_of(tensors, torch.randn(512, 16))
    moved = {"a.weight": tensors["a.weight"][order], "b.weight": tensors["b.weight"][:, order]}
    b = seen["b.weight"]
    there = {**seen, "b.weight": replace(b, power=b.power[order], span=b.span[order])}
    torch.testing.assert_close(found(moved, there), found(tensors, seen)[order], atol=0.05, rtol=0)


def test_units_of_a_whole_layer_do_not_matter() -> None:
    """Errors are relative to the output of their layer."""
    torch.manual_seed(0)
    tensors = weights()
    seen = seen_of(tensors, torch.randn(512, 16))
    larger = {"a.weight": tensors["a.weight"] * 64, "b.weight": tensors["b.weight"]}
    a, b = seen["a.weight"], seen["b.weight"]
    there = {
        "a.weight": replace(a, output=a.output * 64**2),
        "b.weight": Seen(b.power * 64**2, b.span * 64, b.output * 64**2),
    }
    torch.testing.assert_close(found(larger, there), found(tensors, seen), atol=0.05, rtol=0)


def test_factors_are_bounded_where_a_channel_is_dead() -> None:
    """Nothing is read from it and nothing written into it: all factors stay finite and inside the bound."""
    torch.manual_seed(0)
    tensors = weights()
    tensors["a.weight"][3] = 0
    tensors["b.weight"][:, 4] = 0
    seen = seen_of(tensors, torch.randn(512, 16))
    log_c = least_expected_error(toy(), tensors, BITS, seen, per_channel=(), activation_bits=8, largest=4.0)
    assert bool(torch.isfinite(log_c).all())
    assert float(log_c.abs().max()) <= math.log(4) * (1 + 1e-6)


def test_layers_whose_outputs_are_constant_change_nothing() -> None:
    """There is no error to make smaller."""
    tensors = weights()
    zeros = {name: torch.zeros_like(W) for name, W in tensors.items()}
    assert not found(zeros, alike(zeros)).any()
    constant = {name: replace(seen, output=torch.tensor(0.0)) for name, seen in alike(tensors).items()}
    assert not found(tensors, constant).any()


def test_layers_that_are_not_quantized_have_no_say() -> None:
    """Without any, and without a free variable, there is nothing to choose."""
    tensors = weights()
    seen = seen_of(tensors, torch.randn(64, 16))
    assert not least_expected_error(toy(), tensors, {}, seen, per_channel=BITS, activation_bits=8).any()
    pinned = toy().all_pinned("a test")
    assert len(least_expected_error(pinned, tensors, BITS, seen, per_channel=BITS, activation_bits=8)) == 0


def test_a_layer_whose_input_was_not_seen_counts_its_channels_alike() -> None:
    """As if all of them had the power 1, without a say of their rounding."""
    torch.manual_seed(0)
    tensors = weights()
    damped = {
        name: replace(s, span=0 * s.span, output=s.output * (1 + module.DAMPING)) for name, s in alike(tensors).items()
    }
    torch.testing.assert_close(found(tensors, {}), found(tensors, damped), atol=1e-3, rtol=0)


def test_a_sample_of_a_large_kernel_stands_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the weights foresees the same error, on the mean."""
    torch.manual_seed(0)
    dof, W = toy(), weights()["b.weight"]
    layer, none = dof.layer("b.weight"), torch.zeros(dof.size + 1)
    seen = seen_of_layer(torch.randn(512, WIDTH), W)
    log_s = torch.tensor([0.6]).log()

    def error(seed: int) -> float:
        kernel = module._Kernel.of(layer, W, 4, seen, False, torch.Generator().manual_seed(seed))
        assert len(kernel.magnitude) == min(module.SAMPLED, W.numel())
        return float(kernel.weight_error(none, log_s))

    exact = error(0)
    monkeypatch.setattr(module, "SAMPLED", W.numel() // 3)
    assert sum(map(error, range(100))) / 100 == pytest.approx(exact, rel=0.05)


LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6), -1),
    "linear of sequences": (nn.Linear(6, 4), (5, 3, 6), -1),
    "conv1d": (nn.Conv1d(6, 4, 3), (5, 6, 7), 1),
    "conv2d": (nn.Conv2d(6, 4, 3, groups=2), (5, 6, 7, 7), 1),
    "conv_transpose2d": (nn.ConvTranspose2d(6, 4, 3), (5, 6, 7, 7), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_layers_read_is_seen(name: str) -> None:
    """Of all calls, by channel, whatever the kind of the layer."""
    layer, shape, axis = LAYERS[name]
    x = torch.randn(2, *shape)
    tensors = {k: p.detach() for k, p in layer.named_parameters()}
    with SeenByLayers(tensors) as looking, torch.no_grad():
        made = [Functional(layer)(tensors, (call,), {}) for call in x]
    seen = looking.seen["weight"]
    calls = [call.movedim(axis, 0).flatten(1) for call in x]
    torch.testing.assert_close(seen.power, sum(c.var(1, correction=0) for c in calls) / 2)
    assert torch.equal(seen.span, 2 * torch.stack([c.abs().amax(1) for c in calls]).amax(0))
    outputs = [y.movedim(axis, 0).flatten(1).var(1, correction=0).sum() for y in made]
    torch.testing.assert_close(seen.output, sum(outputs) / 2)


def test_arguments_by_name_are_seen_and_other_tensors_are_not() -> None:
    """A layer may be called by keyword; one with another weight is none of the network's."""
    W, x = torch.randn(4, 6), torch.randn(5, 6)
    with SeenByLayers({"w": W}) as looking:
        functional.linear(input=x, weight=W)
        functional.linear(x, W.clone())
    assert list(looking.seen) == ["w"]
    torch.testing.assert_close(looking.seen["w"].power, x.var(0, correction=0))
