"""A dry run in each host: what it says is what `quantize` then does."""

import copy
import importlib
import random
from dataclasses import replace

import nets
import numpy as np
import pytest
import torch
from conftest import four_bits
from hosts import EACH_HOST, host_of
from torch import nn

from qft_plugin import ConfigError, DataError, HardwareSpec, ModelError

NETS = ["residual", "branches", "grouped", "transposed", "linear_only"]

SIZE = 3.0
"""The expected size of a file is right within this factor, for networks of a few kilobytes too."""


def expected_integers(found):
    """Return the layers whose weight will be quantized, with their bits."""
    return {layer.weight: layer.bits for layer in found.layers if layer.bits is not None}


@pytest.mark.parametrize("name", NETS)
def test_bits_and_layers_are_those_of_the_result(name, host, tmp_path):
    """Layers, bits and int8 convolutions are those that a job gives and a file has; the size is right roughly."""
    model, items = nets.build(name), nets.items(name)
    config = four_bits(small_layer_share=0.2)
    found = host.inspect(model, items, config)
    steps = []
    host.run(model, items, config, callback=steps.append)
    assert len(steps) == found.cost.steps
    quantized = host.quantize(model, items, replace(config, finetune=None))
    integers = host.integers(quantized, items[0])
    planned = expected_integers(found)
    assert planned.keys() == integers.keys()
    assert set(planned.values()) == {4, 7}
    for weight, values in integers.items():
        half = 2 ** (planned[weight] - 1)
        assert half / 2 <= float(values.abs().max()) <= half - 1, weight
    report = host.save_folded(quantized, tmp_path, items[0])
    kernels = [layer for layer in found.layers if layer.kind.startswith("conv") and not layer.not_int8]
    assert len(kernels) == report.int8_convolutions
    assert 1 / SIZE < found.file_bytes / report.bytes < SIZE
    assert len(steps) == found.cost.steps


def test_nothing_changes(host):
    """The user's model, its modes and all random states are as they were."""
    model, items = nets.build("residual"), nets.items("residual")
    model.bn1.train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    names = [name for name, _ in model.named_modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    found = host.inspect(model, items, four_bits())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert found.cost.images == 64
    assert found.host in type(host).__name__.lower()


def test_what_pins_an_activation(host):
    """The network's input is pinned, and activations between layers are free; each names the layers that read it."""
    found = host.inspect(nets.build("residual"), nets.items("residual"), four_bits())
    first = found.activations[0]
    assert (first.channels, first.free, first.pinned_by) == (3, 0, "input of the network")
    assert first.layers == ("stem.weight",)
    assert any(a.free == a.channels and not a.pinned_by and a.layers for a in found.activations)


def test_weights_alone(host):
    """Without quantized activations nothing is expected in int8, and the reason is the setting."""
    config = four_bits(hardware=HardwareSpec(activation_bits=None), finetune=None)
    found = host.inspect(nets.build("residual"), nets.items("residual"), config)
    assert not found.int8_layers
    assert all("HardwareSpec.activation_bits=None" in layer.not_int8 for layer in found.layers)
    assert {a.bits for a in found.activations} == {None}


def test_errors_are_those_of_quantize(host):
    """What quantize refuses is refused in the same words."""
    model, items = nets.build("residual"), nets.items("residual")
    for config, data, network, error in (
        (four_bits(layer_bits={"absent": 4}), items, model, ConfigError),
        (four_bits(), [x.double() for x in items], model, DataError),
        (four_bits(), [(x, x) for x in items], model, DataError),
        (four_bits(), items, nets.build("residual").half(), ModelError),
    ):
        told = []
        for call in (host.inspect, host.quantize):
            with pytest.raises(error) as caught:
                call(network, data, config)
            told.append(str(caught.value))
        assert told[0] == told[1]


@pytest.mark.parametrize("name", EACH_HOST)
def test_phases_are_shown_unless_not_asked_for(name, capfd):
    """On stderr, as those of a job, without bars of the host's own."""
    host_of(name)
    host, items = importlib.import_module(f"qft_plugin.{name}"), nets.items("residual")
    data = items if name == "brevitas" else __import__("nncf").Dataset(items)
    host.inspect(nets.build("residual"), data, config=four_bits(), verbose=False)
    assert "qft_plugin:" not in capfd.readouterr().err
    host.inspect(nets.build("residual"), data, config=four_bits())
    shown = capfd.readouterr()
    phases = [line.split(": ")[1].removesuffix(" ...") for line in shown.err.splitlines() if line.endswith(" ...")]
    assert phases[:3] == ["images", "reading the model", "teacher"]
    assert phases[-1] == "timing"
    assert not {"finetune", "compensation", "writing"} & set(phases)
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" not in shown.out  # of which rich draws bars


def test_an_iterator_is_told():
    """Of a dataset that can be read once, what the dry run has read is gone: that is said."""
    pytest.importorskip("brevitas")
    from qft_plugin.brevitas import inspect

    found = inspect(nets.build("residual"), iter(nets.items("residual", batches=9)), config=four_bits())
    assert any("taken 4 items" in line for line in found.warnings)
    assert not found.cost.images_known


class Own(nn.Module):
    """A network of Brevitas' layers: two with quantizers of this package, one with another."""

    def __init__(self):
        super().__init__()
        import brevitas.nn as qnn
        from brevitas.quant import Int8WeightPerTensorFloat

        from qft_plugin.brevitas import QFTInt4Weight, QFTInt4WeightPerTensorFloat, QFTInt8Act, QFTUint8Act

        self.inp = qnn.QuantIdentity(act_quant=QFTInt8Act)
        self.a = qnn.QuantConv2d(3, 8, 3, weight_quant=QFTInt4Weight)
        self.relu = qnn.QuantReLU(act_quant=QFTUint8Act, bit_width=6)
        self.b = qnn.QuantConv2d(8, 8, 1, weight_quant=QFTInt4WeightPerTensorFloat, weight_bit_width=5)
        self.c = qnn.QuantLinear(8, 4, bias=True, weight_quant=Int8WeightPerTensorFloat)

    def forward(self, x):
        return self.c(self.b(self.relu(self.a(self.inp(x)))).mean((2, 3)))


def test_a_quantized_network_of_the_user():
    """Its own quantizers decide; it is not linked by the dry run; a layer with another quantizer is listed."""
    pytest.importorskip("brevitas")
    from qft_plugin.brevitas import inspect
    from qft_plugin.brevitas._link import shared_factors

    model, items = Own().eval(), [torch.randn(16, 3, 8, 8) for _ in range(4)]
    before = copy.deepcopy(model.state_dict())
    found = inspect(model, items)
    assert [(la.name, la.bits, la.activation_bits, la.granularity) for la in found.layers] == [
        ("a", 4, 8, "per channel"),
        ("b", 5, 6, "per tensor"),
        ("c", None, None, ""),
    ]
    assert found.layers[1].reason == "its quantizer in the model has 5 bits"
    assert "a quantizer of another kind" in found.layers[2].reason
    assert found.cost.step_seconds > 0
    assert shared_factors(model) is None
    assert before.keys() == model.state_dict().keys()
    assert all(
        torch.equal(a, b) or a.isnan().all() for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(ConfigError, match="the model's quantizers decide"):
        inspect(model, items, config=four_bits(weight_bits=3))


def test_a_save_that_would_be_refused():
    """Scales by input channel fit QONNX alone, which is said before anything trains."""
    pytest.importorskip("brevitas")
    from qft_plugin.brevitas import inspect

    config = four_bits(hardware=HardwareSpec(doubly_per_channel=True))
    found = inspect(nets.build("residual"), nets.items("residual"), config=config)
    assert "save_qcdq refuses" in found.refusals[0]
    assert {layer.granularity for layer in found.layers} == {"doubly per channel"}
    assert not found.int8_layers


@pytest.mark.nncf_only
def test_arguments_of_nncf():
    """Its own arguments decide too: an ignored layer stays in float with that reason, and a wrong one is refused."""
    nncf = pytest.importorskip("nncf")
    import qft_plugin.nncf as host

    model, data = nets.build("residual"), nncf.Dataset(nets.items("residual"))
    scope = nncf.IgnoredScope(names=["conv1/conv2d/0"])
    found = host.inspect(model, data, four_bits(), ignored_scope=scope)
    (ignored,) = [layer for layer in found.layers if layer.bits is None]
    assert ignored.name == "conv1"
    assert ignored.reason == "nncf has placed no quantizer on its weight"
    with pytest.raises(Exception, match="mode should be None"):
        host.inspect(model, data, mode=nncf.QuantizationMode.FP8_E4M3)
