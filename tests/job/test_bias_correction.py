"""Bias correction: means by channel, and one run that corrects layer after layer."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from graphs import mapped, parameters_of
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin.graph.layer_graph import Layer
from qft_plugin.job.bias_correction import channel_means, correctable, corrections, output_means

EXACT = 1e-10
"""float64: sums of a few hundred terms in another order."""

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "tokens": (nn.Linear(6, 4), (5, 3, 6)),
    "four axes": (nn.Linear(6, 4), (5, 2, 3, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3), (5, 6, 7)),
    "conv2d": (nn.Conv2d(6, 4, 3), (5, 6, 7, 4)),
    "conv3d": (nn.Conv3d(6, 4, 2), (3, 6, 3, 4, 2)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (5, 6, 7, 4)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (5, 6, 7, 4)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (5, 6, 3, 4)),
    "norm": (nn.LayerNorm(6), (5, 3, 6)),
}


def layers_of(model: nn.Module, x: Tensor) -> list[Layer]:
    return list(mapped(model, x).layers)


def disturbed(model: nn.Module, amount: float = 0.3) -> dict[str, Tensor]:
    """Return the parameters of a model with weights that are wrong on average, as after a strong rounding."""
    return {n: p + amount * torch.rand_like(p) * n.endswith("weight") for n, p in parameters_of(model).items()}


def found_in_one_run(model: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    layers, floats = layers_of(model, x), parameters_of(model)
    means = output_means(layers, floats, lambda: torch.func.functional_call(model, floats, x))
    return corrections(layers, tensors, lambda: torch.func.functional_call(model, tensors, x), means)


@pytest.mark.parametrize("name", LAYERS)
def test_means_by_a_loop_over_channels(name: str) -> None:
    """The mean of a channel is that of all its values, on the axis where this kind of layer has its channels."""
    layer, shape = LAYERS[name]
    model, x = nn.Sequential(nn.Linear(shape[-1], shape[-1]), layer).double(), torch.randn(shape, dtype=torch.float64)
    y = model(x).detach()
    found = channel_means(y, layers_of(model, x)[-1])
    axis = 1 if "conv" in name or name in ("grouped", "depthwise", "transposed") else y.dim() - 1
    expected = [np.mean(np.take(y.numpy(), channel, axis)) for channel in range(y.shape[axis])]
    np.testing.assert_allclose(found.numpy(), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_has_the_float_means_afterwards(name: str) -> None:
    """With the bias changed by the correction, the mean output of every channel is that of the float layer."""
    layer, shape = LAYERS[name]
    model = nn.Sequential(nn.Linear(shape[-1], shape[-1]), layer).double()
    x = torch.randn(shape, dtype=torch.float64)
    tensors = disturbed(model)
    for weight, change in found_in_one_run(model, tensors, x).items():
        bias = weight.replace("weight", "bias")
        tensors[bias] = tensors[bias] + change
    last = layers_of(model, x)[-1]
    with torch.no_grad():
        found = channel_means(torch.func.functional_call(model, tensors, x), last)
        torch.testing.assert_close(found, channel_means(model(x), last), rtol=EXACT, atol=EXACT)


def stack() -> tuple[nn.Module, Tensor]:
    """Return a stack of several kinds of layers with activations between them."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(inplace=True),
        nn.ConvTranspose2d(6, 4, 2, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    return model, torch.randn(8, 3, 7, 7, dtype=torch.float64)


def test_one_run_is_the_same_as_one_run_for_each_layer() -> None:
    """Reference: correct a layer, run the corrected network anew, measure the next layer."""
    model, x = stack()
    tensors = disturbed(model)
    expected, corrected = {}, dict(tensors)
    for number, layer in enumerate(model):
        if not hasattr(layer, "weight"):
            continue
        with torch.no_grad():
            wanted = model[: number + 1](x)
            found = torch.func.functional_call(model[: number + 1], prefix(corrected, number), x)
        axes = [axis for axis in range(wanted.dim()) if axis != 1]
        change = np.mean(wanted.numpy(), tuple(axes)) - np.mean(found.numpy(), tuple(axes))
        expected[f"{number}.weight"] = change
        corrected[f"{number}.bias"] = corrected[f"{number}.bias"] + torch.from_numpy(change)
    result = found_in_one_run(model, tensors, x)
    assert list(result) == list(expected)
    for name, change in result.items():
        assert float(change.abs().max()) > 0.01
        np.testing.assert_allclose(change.numpy(), expected[name], rtol=1e-8, atol=EXACT)


def prefix(tensors: dict[str, Tensor], last: int) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if int(name.split(".")[0]) <= last}


def test_nothing_to_correct() -> None:
    """Where both networks are one, every correction is 0, and no tensor of the caller is changed."""
    model, x = stack()
    before = {name: t.clone() for name, t in parameters_of(model).items()}
    found = found_in_one_run(model, parameters_of(model), x)
    assert all(float(change.abs().max()) < EXACT for change in found.values())
    assert all(torch.equal(t, before[name]) for name, t in parameters_of(model).items())


class Twice(nn.Module):
    """A layer that is called twice, and whose weight is looked at by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        decay = self.shared.weight.square().sum()
        return self.shared(functional.relu(self.shared(x))) + 0 * decay


def test_the_first_call_decides() -> None:
    """A layer that is called twice has the float mean in its first call, and its second call runs with this bias."""
    model, x = Twice().double(), torch.randn(9, 4, dtype=torch.float64)
    tensors = disturbed(model)
    seen: list[Any] = []
    handle = model.shared.register_forward_hook(lambda _, __, y: seen.append(y))
    change = found_in_one_run(model, tensors, x)["shared.weight"]
    handle.remove()
    wanted, _, first, second = seen[-4:]  # before these, the network was recorded
    W, bias = tensors["shared.weight"], tensors["shared.bias"] + change
    torch.testing.assert_close(first, functional.linear(x, W, bias), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(first.mean(0), wanted.mean(0), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(second, functional.linear(first.relu(), W, bias), rtol=EXACT, atol=EXACT)


def test_layers_without_a_bias_of_their_own_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """A layer without a bias, or with one that another layer has too, is left out, and the log says which."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].bias = model[1].bias
    layers = layers_of(model.double(), torch.randn(2, 4, dtype=torch.float64))
    with caplog.at_level(logging.WARNING, logger="qft_plugin"):
        found = correctable(layers, [layer.weight for layer in layers])
    assert [layer.weight for layer in found] == ["3.weight"]
    assert "0.weight, 1.weight, 2.weight" in caplog.text
    caplog.clear()
    assert correctable(layers, ["3.weight"]) == found
    assert not caplog.text
