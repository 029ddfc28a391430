"""Errors of layers under each host: networks of which a part is quantized are what they claim to be."""

import nets
import pytest
import torch
from conftest import few_steps, four_bits
from torch import nn

from qft_plugin.graph.torch_model import tensors_in
from qft_plugin.job import run
from qft_plugin.job.parts import Parts

FOLDED = 1e-4
"""float32: weights with factors that are unfolded by the next layer, over a few layers."""

NETWORKS = ["residual", "in_place", "inverted", "grouped", "twice", "branches", "features", "transformer", "one_d"]


class OneLayer(nn.Module):
    """A linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 4)

    def forward(self, x):
        return self.linear(x)


def parts_of(host, model, items, config, monkeypatch):
    """Quantize and return the parts of the result, and what was measured."""
    found, measure = [], run.measure

    def noted(start, problem, settings):
        found.append(Parts(start, problem, settings))
        return measure(start, problem, settings)

    monkeypatch.setattr(run, "measure", noted)
    report = host.report(model, items, config)
    (parts,) = found
    return parts, report


@pytest.mark.parametrize("name", NETWORKS)
def test_from_nothing_to_everything(name, host, monkeypatch):
    """Nothing quantized is the user's network, with a ReLU that a quantizer computes too; each layer has its errors."""
    model, items = nets.build(name), nets.items(name)
    parts, report = parts_of(host, model, items, four_bits(analyse=True), monkeypatch)
    for call, _ in parts.batches(16):
        found = parts.run(parts.none(), call)
        with torch.no_grad():
            (expected, *_) = tensors_in(model(*call[0], **call[1]))
        if found.logits is not None:
            torch.testing.assert_close(found.logits, expected, rtol=FOLDED, atol=FOLDED)
        whole = parts.of(parts.reads, parts.quantized.activation_scales)
        for one, other in zip(parts.run(whole, call).tensors, parts.run(parts.quantized, call).tensors, strict=True):
            assert torch.equal(one, other)
    found = {layer.weight: layer.errors for layer in report.layers if layer.errors is not None}
    assert set(found) == {layer.weight for layer in report.layers if layer.bits is not None}
    assert set(found) >= {layer.weight for layer in parts.layers if layer.is_kernel}
    for errors in found.values():
        assert 0 < errors.weight < 0.5
        assert errors.output_alone > 0
        assert errors.output_accumulated > 0
        assert errors.clipped is None or 0 <= errors.clipped < 0.1
        assert 0 <= errors.dead < 0.6


def test_one_layer_alone_is_the_whole(host, monkeypatch):
    """Of a network with one layer, the layer alone has the loss of the network, and nothing has none."""
    model, items = OneLayer().eval(), [torch.randn(32, 12) for _ in range(6)]
    parts, report = parts_of(host, model, items, four_bits(analyse=True, finetune=None), monkeypatch)
    (layer,), errors = parts.layers, report.layers[0].errors
    for call, _ in parts.batches(24):
        assert torch.equal(parts.run(parts.only(layer), call).tensors[0], parts.run(parts.quantized, call).tensors[0])
    assert report.analysed == 24
    assert errors.output_alone == errors.output_accumulated
    assert (errors.loss_without, errors.agreement_without) == (0, 1)
    assert errors.loss_only > 0


def test_less_bits_more_error(host):
    """The layer with 3 bits has the largest error of its weight, and the largest loss alone."""
    model, items = nets.build("residual"), nets.items("residual")
    bits = {"conv1.weight": 3}
    settings = four_bits(weight_bits=6, layer_bits=bits, analyse=True, compensate=False, finetune=few_steps())
    errors = {layer.weight: layer.errors for layer in host.report(model, items, settings).layers}
    assert max(errors, key=lambda name: errors[name].weight) == "conv1.weight"
    assert max(errors, key=lambda name: errors[name].loss_only) == "conv1.weight"
