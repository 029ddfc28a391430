"""Modules that absorb cross-layer factors without being kernels, from the float network to the file, on both hosts."""

import importlib.util

import nets
import pytest
import torch
from conftest import four_bits, relative_error
from torch import nn

from qft_plugin import HardwareSpec
from qft_plugin.deploy.openvino import INT8
from qft_plugin.graph.channel_affine import ChannelAffine, Rescaled
from qft_plugin.graph.channel_clip import ChannelHardtanh

EXPLICIT = HardwareSpec(activation_scale="explicit")

FILE = 1e-2
"""Relative L2 difference of a file from torch: single activations of a tiny network may round the other way."""

SAME = 1e-5
"""Float32 sums with factors on other sides of a product."""


def problem():
    return nets.build("preactivation"), nets.items("preactivation")


@pytest.fixture
def nncf_host():
    if importlib.util.find_spec("nncf") is None:
        pytest.skip("NNCF is not installed here")
    import nncf

    import qft_plugin.nncf as host

    return lambda model, items, config: host.quantize(model, nncf.Dataset(items), config), host


@pytest.fixture
def brevitas_host():
    if importlib.util.find_spec("brevitas") is None:
        pytest.skip("Brevitas is not installed here")
    from qft_plugin import brevitas

    return brevitas


@pytest.mark.nncf_only
def test_nncf_keeps_the_modules_of_the_model(nncf_host, tmp_path):
    """Every module has its old type again, the file runs in int8, and explicit scales free what SiLU makes."""
    quantize, host = nncf_host
    model, items = problem()
    folded, explicit = (quantize(model, items, four_bits(hardware=h)) for h in (HardwareSpec(), EXPLICIT))
    assert explicit.dof_map.size == folded.dof_map.size + 8
    for job in (folded, explicit):
        types = {name: type(module) for name, module in model.named_modules()}
        kept = {name: type(module) for name, module in job.model.named_modules() if name in types and name}
        assert kept == {name: kind for name, kind in types.items() if name}
        assert not any(isinstance(m, (ChannelHardtanh, ChannelAffine, Rescaled)) for m in job.model.modules())
        report = host.save_openvino(job.model, tmp_path / "net.xml", items[0])
        assert report.relative_error < FILE
        assert set(report.convolutions.values()) | set(report.linear.values()) <= INT8


@pytest.mark.nncf_only
def test_a_relu6_that_several_blocks_share_is_put_back_everywhere(nncf_host):
    """The written network is the student, also where one module stands in several places."""
    quantize, host = nncf_host

    class Block(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.conv, self.act = nn.Conv2d(8, 8, 3, padding=1), act

        def forward(self, x):
            return self.act(self.conv(x))

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            act = nn.ReLU6()
            self.stem, self.one, self.two = nn.Conv2d(3, 8, 1), Block(act), Block(act)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.two(self.one(self.stem(x))).mean((2, 3)))

    model, items = Shared().eval(), [4 * torch.randn(16, 3, 8, 8) for _ in range(4)]
    job = quantize(model, items, four_bits(weight_bits=8))
    assert job.dof_map.size > 0
    assert type(job.model.one.act) is type(job.model.two.act) is nn.ReLU6
    with torch.no_grad(), host.without_compiler():
        assert relative_error([job.model(items[0])], [model(items[0])]) < 10 * FILE


def test_brevitas_folds_them(brevitas_host, tmp_path):
    """Folded and linked model compute the same, and every export of them proves what it writes."""
    model, items = problem()
    sizes = []
    for hardware in (HardwareSpec(), EXPLICIT):
        linked = brevitas_host.quantize(model, items, config=four_bits(hardware=hardware))
        sizes.append(brevitas_host.dof_map_of(linked).size)
        folded = brevitas_host.fold(linked)
        with torch.no_grad():
            assert relative_error([folded(items[0])], [linked(items[0])]) < SAME
        assert brevitas_host.save_qonnx(linked, tmp_path / "linked.onnx", items[0]).relative_error < FILE
        assert brevitas_host.save_qonnx(folded, tmp_path / "folded.onnx", items[0]).relative_error < FILE
        report = brevitas_host.save_qcdq(folded, tmp_path / "qcdq.onnx", items[0])
        assert set(report.convolutions.values()) <= INT8
    assert sizes[1] == sizes[0] + 8


def test_brevitas_remembers_that_scales_are_explicit(brevitas_host):
    """Linking again without the word keeps the scales that it freed."""
    model, items = problem()
    linked = brevitas_host.quantize(model, items, config=four_bits(hardware=EXPLICIT, finetune=None))
    size = brevitas_host.dof_map_of(linked).size
    assert brevitas_host.link(linked, items[0]).size == size
