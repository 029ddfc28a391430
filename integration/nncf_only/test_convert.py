"""From NNCF to OpenVINO by torch's tracer: hooks at their own calls, a free first axis, what a trace cannot keep."""

from importlib import metadata

import pytest
import torch
from torch import nn

pytest.importorskip("nncf", reason="these tests are about NNCF")

import nncf
import openvino
from conftest import four_bits, relative_error

import qft_plugin.nncf as host
from qft_plugin import DeployabilityError, ParityError, QFTWarning
from qft_plugin.deploy.ir_view import Compiled
from qft_plugin.deploy.openvino import set_weight_storage
from qft_plugin.nncf._convert import converted

SAME = 1e-5
"""Relative L2 difference of float32 sums in another order, where no activation is near a tie."""

OPENVINO = tuple(int(part) for part in metadata.version("openvino").split(".")[:2])


class Residual(nn.Module):
    """A residual network whose forward computes with sizes in `numbers`, before additions that are quantized."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.third, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def numbers(self, x):
        return x.shape[0]

    def forward(self, x):
        n = self.numbers(x)
        x = self.first(x).relu()
        x = self.second(x) + x
        x = self.third(x) + x
        return self.last(x.mean((2, 3)).view(n, -1))


class Sums(Residual):
    def numbers(self, x):
        height, width = x.shape[-2:]
        return x.numel() // (3 * height * width) + (height + width - 16) * 2


class InPlace(Residual):
    def numbers(self, x):
        n = m = x.size(0)
        m += 1
        return n * m // (n + 1)


class ManyNames(Residual):
    def numbers(self, x):
        return -(-x.shape[0] % 7) % 7 + x.shape[0] // 7 * 7 + abs(x.shape[2] - 8) + max(x.shape[2], 8) - 8


class Checked(Residual):
    def numbers(self, x):
        if x.shape[1] != 3 or x.dim() != 4 or min(x.shape[2:]) < 4:
            raise ValueError("images should have three channels")
        return x.shape[0]


class OnValues(Residual):
    def numbers(self, x):
        return x.shape[0] if x.sum() > 1e9 else x.size(0)


class OnBatch(Residual):
    def numbers(self, x):
        return x.shape[0] if x.shape[0] > 100 else x.size(0)


class Rounded(Residual):
    def numbers(self, x):
        return round(x.shape[0] / 1)


class Traced(Residual):
    def forward(self, x):
        return super().forward(x + x if torch.jit.is_tracing() else x)


class Normalised(nn.Module):
    """Normalises what varies little, by a layer or a group normalisation."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 16, 4, 4), norm, nn.Linear(16, 10)
        with torch.no_grad():
            self.first.weight.mul_(0.01)
            self.first.bias.mul_(0.01)

    def forward(self, x):
        x = self.first(x).flatten(2)
        if isinstance(self.norm, nn.GroupNorm):
            return self.last(self.norm(x).transpose(1, 2))
        return self.last(self.norm(x.transpose(1, 2)))


def quantized(network):
    """Quantize a network without a finetune."""
    torch.manual_seed(0)
    items = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    return nncf.quantize(network().eval(), nncf.Dataset(items), algorithm=four_bits(finetune=None)), items[0]


def differences(model, file, images):
    """Return the relative L2 difference of the file from torch for one and for all images."""
    set_weight_storage(file, "i4")
    parts = images[:1], images
    with torch.no_grad(), host.without_compiler():
        return [relative_error(Compiled(file, [])([x]), [model(x)]) for x in parts]


@pytest.mark.parametrize("network", [Residual, Sums, InPlace, ManyNames, Checked])
def test_sizes_shift_no_quantizer(network):
    """What a forward computes with sizes counts as no call, so each quantizer is in the file where it is in torch."""
    model, images = quantized(network)
    forward = model.forward
    with host.without_compiler():
        file = converted(model, images[:2])
    assert max(differences(model, file, images)) < SAME
    assert file.input(0).partial_shape[0].is_dynamic
    assert model.forward is forward


@pytest.mark.parametrize("network", [OnValues, OnBatch])
def test_decisions_are_passed_on(network):
    """A branch on values, or on the number of images, is named by file and line, once."""
    model, images = quantized(network)
    with host.without_compiler(), pytest.warns(QFTWarning) as caught:
        converted(model, images)
    line = network.numbers.__code__.co_firstlineno + 1
    assert [str(w.message).count(f"{__file__}:{line}") for w in caught] == [1]


def test_calls_that_only_a_trace_makes():
    """A model that adds something else while it is traced is refused by the name of the function."""
    model, images = quantized(Traced)
    with host.without_compiler(), pytest.raises(DeployabilityError, match=r"/add 3 and not 2 times"):
        converted(model, images)


@pytest.mark.core
def test_what_cannot_be_traced():
    """What torch cannot trace is refused in words, and the model is left as it was."""
    model, images = quantized(Rounded)
    forward = model.forward
    with host.without_compiler(), pytest.raises(DeployabilityError, match=r"torch\.jit\.trace.*__round__"):
        converted(model, images)
    assert model.forward is forward


@pytest.mark.core
@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.GroupNorm(4, 16)])
def test_normalisations_keep_their_epsilon(norm, tmp_path):
    """Where the variance is as small as the epsilon, the file is run as torch runs: neither is scaled alone.

    OpenVINO before 2025.4 computes a group normalisation in another way, and the proof refuses the file.
    """
    model, images = quantized(lambda: Normalised(norm))
    if isinstance(norm, nn.GroupNorm) and OPENVINO < (2025, 4):
        with pytest.raises(ParityError, match=r"norm/group_norm/0.*from the same numbers"):
            host.save_openvino(model, tmp_path / "model.xml", images)
        return
    path = host.save_openvino(model, tmp_path / "model.xml", images, check=False).path
    found = Compiled(openvino.Core().read_model(path), [])([images])
    with torch.no_grad(), host.without_compiler():
        assert relative_error(found, [model(images)]) < SAME
