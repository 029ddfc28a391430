"""A float network quantized in one call on the real Brevitas."""

import copy

import pytest

pytest.importorskip("brevitas", reason="Brevitas is not installed")

import nets
import torch
from brevitas_models import CLOSE, assert_same_state, few, integers, relative, run, state_of, weight_scalings
from torch import nn

from qft_plugin import ConfigError, DataError, DeployabilityError, HardwareSpec, ModelError, QFTError, QFTWarning
from qft_plugin.brevitas import finetune, fold, initialize, inspect, quantize, save_qcdq, save_qonnx
from qft_plugin.graph.torch_model import tensors_in

pytestmark = pytest.mark.core

RUNS = tuple(nets.NETS)
"""Networks that must not be refused: all of the collection."""


@pytest.mark.parametrize("name", nets.NETS)
def test_quantize(name):
    """A float network comes back quantized, linked and close to itself, or is refused; it is never changed."""
    model, data = nets.build(name), nets.items(name)
    model.train()
    before, modules = state_of(model), [(n, type(m)) for n, m in model.named_modules()]
    steps = []
    try:
        result = quantize(model, data, config=few(small_layer_share=0), callback=steps.append)
    except ModelError:
        assert name not in RUNS
        return
    finally:
        assert_same_state(model, before)
        assert all(m.training for m in model.modules())
        assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert len(steps) == 4
    found = weight_scalings(result)
    layers = [m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
    assert len(found) == len(layers)
    for layer in found:
        assert integers(result.get_submodule(layer)).abs().max() <= 7
    model.eval()
    with torch.no_grad():
        expected, got = (list(tensors_in(nets.call(m, data[0]))) for m in (model, result))
    for e, f in zip(expected, got, strict=True):
        assert float((f - e).norm() / e.norm()) < 0.3
    folded = fold(result)
    with torch.no_grad():
        again = list(tensors_in(nets.call(folded, data[0])))
    for f, g in zip(got, again, strict=True):
        assert float((g - f).norm() / f.norm()) < 0.05


@pytest.mark.parametrize("name", ["inverted", "residual", "bias_and_norm", "squeeze_excite"])
def test_eight_bits_are_close(name):
    """With 8-bit weights the result is close to the float network: ReLU6 and all other functions stay exact."""
    model, data = nets.build(name), nets.items(name)
    if name == "inverted":
        with torch.no_grad():
            model.stem[1].weight.mul_(6)  # so that the bound of 6 matters
            model.expand[1].weight.mul_(3)
    result = quantize(model, data, config=few(weight_bits=8, finetune=None))
    x = torch.cat(data)
    assert relative(run(result, x), run(model, x)) < CLOSE
    if name == "inverted":
        unbounded = copy.deepcopy(model)
        unbounded.stem[2], unbounded.expand[2] = nn.ReLU(), nn.ReLU()
        assert relative(run(unbounded, x), run(model, x)) > 2 * CLOSE


def test_bits_of_quantize():
    """`quantize` takes what `finetune` leaves to the quantizers: bits by layer, and the granularity of the weights."""
    model, data = nets.build("residual"), nets.items("residual")
    config = few(
        finetune=None, small_layer_share=0, layer_bits={"conv2.weight": 6}, hardware=HardwareSpec(rescale="layerwise")
    )
    found = weight_scalings(quantize(model, data, config=config))
    assert {name: s.bits for name, s in found.items()} == dict.fromkeys(found, 4) | {"conv2": 6}
    assert not any(s.per_channel for s in found.values())
    found = weight_scalings(quantize(model, data, config=few(finetune=None, small_layer_share=0.05)))
    assert all(s.per_channel for s in found.values())
    assert found["fc"].bits == 7  # the smallest layer


class ByKeyword(nn.Module):
    """Calls its layers and activations by keyword."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        if self.what == "layer":
            return self.conv2(input=torch.relu(self.conv1(input=x)))
        return self.conv2(torch.relu(input=self.conv1(x)))


@pytest.mark.parametrize("what", ["layer", "activation"])
def test_calls_by_keyword(what):
    """A layer or a ReLU whose input is given by keyword is quantized like any other, or refused."""
    model, data = ByKeyword(what).eval(), [torch.randn(16, 3, 8, 8)]
    try:
        result = quantize(model, data, config=few(weight_bits=8))
    except QFTError:
        return
    assert relative(run(result, data[0]), run(model, data[0])) < CLOSE


def test_nothing_to_quantize():
    """A model without a layer is refused."""
    with pytest.raises(ModelError, match="at least one convolution or linear layer"):
        quantize(nn.PReLU(), [torch.randn(16, 3, 8, 8)], config=few())


def test_a_dead_channel_of_the_first_images():
    """A ReLU that gives only 0 on the first images does not keep a network from being quantized."""
    model, data = nets.build("squeeze_excite"), nets.items("squeeze_excite")
    nn.init.constant_(model.down.bias, -100.0)
    result = quantize(model, data, config=few())
    assert torch.isfinite(run(result, data[0])).all()


def test_arguments_in_the_wrong_place():
    """Settings where the example stands, a dict of settings, a network that has quantizers already."""
    model, data = nets.build("residual"), nets.items("residual")
    for call in (quantize, inspect):
        with pytest.raises(ConfigError, match=r"Found a QFTConfig\. Pass the settings by name: config="):
            call(model, data, few())
        with pytest.raises(ConfigError, match=r"config should be a QFTConfig\. Found dict"):
            call(model, data, config={"weight_bits": 4})
    result = quantize(model, data, config=few())
    with pytest.raises(ModelError, match=r"should be a float network\. Found quantizers of"):
        quantize(result, data, config=few())
    with pytest.raises(ConfigError, match=r"Found a QFTConfig\. Pass the settings by name"):
        inspect(result, data, few())
    with pytest.raises(ConfigError, match=r"config should be a QFTConfig\. Found dict"):
        initialize(result, data, {"equalize": False})
    with pytest.raises(DataError, match="Found one Tensor of shape"):
        quantize(model, data[0], config=few())
    with pytest.warns(QFTWarning, match=r"teacher should be the float network\. Found one with quantizers"):
        finetune(result, copy.deepcopy(result), data, few())


def test_a_folded_model_is_refused():
    """Its layers are of Brevitas, and named; quantizing it anew would quantize what is quantized."""
    items = nets.items("residual")
    folded = fold(quantize(nets.build("residual"), items, config=few(finetune=None)))
    with pytest.raises(ModelError, match=r"float network\. Found weight quantizers of Brevitas in stem, conv1"):
        quantize(folded, items, config=few())


@pytest.mark.parametrize("save", [save_qcdq, save_qonnx])
def test_a_float_model_is_not_saved(save, tmp_path):
    """A file of a float network would pass a proof that compares nothing."""
    with pytest.raises(DeployabilityError, match="should have quantizers of Brevitas"):
        save(nets.build("residual"), tmp_path / "net.onnx", nets.items("residual")[0])
    assert not list(tmp_path.iterdir())
