"""Networks that strangers bring to any host: what they return, how they were made, and what they do in place."""

import dataclasses
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from conftest import few_steps, four_bits, relative_error
from hosts import host_of
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin import QFTWarning
from qft_plugin.graph.torch_model import tensors_in

CLOSE = 0.1
"""Relative L2 error of the outputs in 4 bits after a few steps; of another network it is 0.3 and more."""


class Chain(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(x).relu()).relu()).relu()

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


class WithNothing(Chain):
    """Returns a dictionary in which there is nothing under some names, and a number."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"loss": None, "logits": self.head(self.features(x)), "stages": 3}


@dataclasses.dataclass
class Output:
    """What a network returns."""

    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


class WithClass(Chain):
    """Returns an object of a class of its own."""

    def forward(self, x: Tensor) -> Output:
        return Output(self.head(self.features(x)))


class PlusOne(Chain):
    """Changes in place what a layer has read before."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv1(x).relu()
        b = self.conv2(a)
        a += 1
        return self.head(self.conv3(a + b).relu())


class ReluLater(Chain):
    """Rectifies in place what a layer has read before."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv1(x)
        b = self.conv2(a)
        a.relu_()
        return self.head(self.conv3(a + b).relu())


class OneChannel(nn.Module):
    """LeNet's way: images of one channel, and a view of what the last convolution makes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 3)
        self.fc1, self.fc2 = nn.Linear(64, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.conv1(x).relu(), 2)
        x = functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(x.view(-1, 64)).relu())


def in_inference_mode() -> nn.Module:
    """Make a network where no gradients can be."""
    with torch.inference_mode():
        return nets.settled(nets.Residual())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "with_nothing": WithNothing,
    "with_class": WithClass,
    "plus_one": PlusOne,
    "relu_later": ReluLater,
    "one_channel": OneChannel,
    "inference_mode": in_inference_mode,
    "float64": lambda: Chain().double(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_quantized_and_saved(name, host, tmp_path):
    """The network is finetuned from a start near the teacher, stays near it, and its file proves to be the same."""
    model = NETWORKS[name]().eval()
    channels = 1 if name == "one_channel" else 3
    dtype = next(model.parameters()).dtype
    items = list(torch.randn(4, 16, channels, 18, 18, dtype=dtype))
    result, quantized = host.finetuned(model, items, four_bits())
    assert 0 < result.final_loss <= result.start_loss < CLOSE
    with torch.no_grad():
        expected = list(tensors_in(model(items[0])))
    assert 0 < relative_error(host.outputs(quantized, items[0]), expected) < CLOSE
    host.save(quantized, tmp_path, items[0][:2])


class OneImage(Chain):
    """Takes a single image: it reshapes what it has made to a batch of 1."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)).reshape(1, 8))


def test_a_model_that_takes_a_single_image(host, tmp_path):
    """Where the dataset has single images and the model takes no more, every image is a call of its own."""
    model, items = OneImage().eval(), list(torch.randn(24, 1, 3, 8, 8))
    result, quantized = host.finetuned(model, items, four_bits(finetune=few_steps(images_fed=32)))
    assert result.steps == 32
    assert 0 < result.final_loss <= result.start_loss < CLOSE
    with torch.no_grad():
        expected = [model(items[0])]
    assert 0 < relative_error(host.outputs(quantized, items[0]), expected) < 2 * CLOSE
    host.save(quantized, tmp_path, items[0])


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized in every call."""

    def forward(self, x: Tensor) -> Tensor:
        W = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, W / W.std((1, 2, 3), keepdim=True), self.bias, padding=self.padding)


@pytest.mark.nncf_only
def test_layers_whose_weights_are_computed_are_named():
    """A layer that NNCF cannot quantize is named, with the reason; the others are quantized."""
    host = host_of("nncf")
    model = Chain()
    model.conv2 = Standardized(8, 8, 3, padding=1)
    items = list(torch.randn(2, 16, 3, 8, 8))
    with pytest.warns(QFTWarning, match=r"1 of 4 layers.*: (\w+/)?conv2d/\d.*floating point"):
        _, quantized = host.finetuned(model.eval(), items, four_bits(finetune=None))
    assert set(host.integers(quantized, items[0])) == {"conv1.weight", "conv3.weight", "fc.weight"}


def test_weights_that_are_computed_from_parameters_alone():
    """Under Brevitas such a weight is computed once, and quantized like any other."""
    host = host_of("brevitas")
    model = Chain()
    model.conv2 = Standardized(8, 8, 3, padding=1)
    items = list(torch.randn(2, 16, 3, 8, 8))
    _, quantized = host.finetuned(model.eval(), items, four_bits(finetune=None))
    assert "conv2.weight" in host.integers(quantized, items[0])
