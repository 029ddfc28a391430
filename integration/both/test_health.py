"""Results that are valid and of little use are warned of, and a start that is not finite is refused, with its place."""

import re
import warnings

import nets
import pytest
import torch
from conftest import few_steps, four_bits
from hosts import host_of
from torch import nn

from qft_plugin import DataError, HardwareSpec, ModelError, QFTWarning


def images(change):
    """Make the images of the residual network and change them: all of them, `[64, 3, 8, 8]`."""
    changed = change(torch.cat(nets.items("residual")))
    return list(changed.contiguous().split(16))


def scaled(factor, *, image=37):
    """Return a function that multiplies one image."""

    def change(x):
        x[image] *= factor
        return x

    return change


def quantize(host, change, **settings):
    """Quantize the residual network on changed images."""
    return host.finetuned(nets.build("residual"), images(change), four_bits(**settings))


def said(caught):
    """Return the texts of warnings."""
    return "\n".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize(("change", "words", "compensate"), [
    (lambda x: 0 * x, "0 everywhere", True),
    (lambda x: 0 * x + x[:, :1, :1, :1], "one value in each image", False),
], ids=["zeros", "one value an image"])  # fmt: skip
def test_constant_images(change, words, compensate, host):
    """Where images are constant, what reads them is named."""
    with pytest.warns(QFTWarning) as caught:
        quantize(host, change, finetune=None, compensate=compensate)
    assert f"Found {words} in all of the first 64 images in what 'stem/conv2d/0' reads" in said(caught)


class Dead(nets.Residual):
    """A residual network in which a ReLU is never awake, and a constant is added."""

    def __init__(self, value):
        super().__init__()
        self.last, self.value = nn.Conv2d(8, 4, 1), value

    def forward(self, x):
        dead = (self.stem(x) - 100).relu() + self.value
        return super().forward(x) + self.last(dead).mean((2, 3))


def test_a_dead_part_of_a_network(host, caplog):
    """An activation that is always 0 is named in the log only: its images are as they should be."""
    with caplog.at_level("WARNING", logger="qft_plugin"):
        host.quantize(nets.settled(Dead(0)), images(lambda x: x), four_bits(finetune=None))
    assert "0 in all of the first 64 images, so that no range could be chosen: what 'last/conv2d/" in caplog.text


def test_an_activation_that_is_always_the_same(host):
    """One that always has another value is warned of."""
    with pytest.warns(QFTWarning, match=r"Found 2 everywhere in all of the first 64 images in what 'last/conv2d/\d"):
        host.quantize(nets.settled(Dead(2)), images(lambda x: x), four_bits(finetune=None))


def test_one_image_many_times(host):
    """Where all images are the same, that is said."""
    with pytest.warns(QFTWarning, match=r"images should differ\. Found 64 times the same one"):
        quantize(host, lambda x: x[:1].expand(64, -1, -1, -1), finetune=None)


def test_one_image_dominates(host):
    """An image far above the others is named by its place in the dataset, for the ranges and for the loss."""
    with pytest.warns(QFTWarning) as caught:
        quantize(host, scaled(100))
    where = "Dataset item 2, image 5 of it, should be like the others. Found "
    assert re.search(where + r"[\d.]+ times .* first 64 images in what 'stem/conv2d/0' reads", said(caught))
    assert re.search(where + r"[\d.]+ times .* where the networks are compared", said(caught))


def test_one_image_that_the_loss_cannot_hold(host):
    """An image whose squares overflow is refused by its place in the dataset, and no learning rate is blamed."""
    words = "Dataset item 2, image 5 of it, should be of a size that the loss can square"
    # Brevitas has chosen a start, and warned, before it meets the teacher.
    warnings.simplefilter("ignore", QFTWarning)
    with pytest.raises(DataError, match=words):
        quantize(host, scaled(1e30))


@pytest.mark.parametrize("factor", [0.1, 4])
def test_images_of_ordinary_differences(factor, host):
    """An image that is somewhat larger or smaller than the others is not worth a word."""
    quantize(host, scaled(factor), finetune=None)


class Ratio(nn.Module):
    """Divides by a sum that is 0 where an image rounds to 0."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv1(x).relu()
        x = x / x.sum((1, 2, 3), keepdim=True)
        return self.fc(self.conv2(x).relu().mean((2, 3)))


@pytest.mark.parametrize("finetune", [None, few_steps()], ids=["start", "finetune"])
def test_a_start_that_is_not_finite(finetune, host):
    """A quantized network that computes NaN before any step is refused with the operation that makes the first one."""
    words = r"first in what 'conv2/conv2d/\d' reads, made by '\w*div\w*/0'"
    with pytest.raises(ModelError, match=words):
        host.finetuned(Ratio().eval(), images(scaled(1e-4)), four_bits(finetune=finetune))


@pytest.mark.nncf_only
def test_a_useless_result():
    """A loss that leaves nothing of the network is warned of."""
    clipped = pytest.warns(QFTWarning, match="A bias of 4 bits")
    with clipped, pytest.warns(QFTWarning, match=r"loss should end below 0\.3\. Found 0\.\d+"):
        quantize(host_of("nncf"), lambda x: x, hardware=HardwareSpec(bias_bits=4))


def test_a_training_that_does_harm(host):
    """Where training makes the network only worse, the start is returned and the learning rate named."""
    with pytest.warns(QFTWarning, match=r"the start is returned.*learning_rate \(50\)"):
        result, _ = quantize(host, lambda x: x, finetune=few_steps(learning_rate=50))
    assert result.final_loss == result.start_loss
