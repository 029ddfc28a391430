"""Bias correction under each host: mean outputs come back to those of the float network."""

import nets
import pytest
import torch
from conftest import few_steps, four_bits

from qft_plugin.graph.torch_model import tensors_in

pytestmark = pytest.mark.wide

CORRECTED = 0.05
"""What is left of the error of the mean of an output whose layer was corrected: the hosts' outputs come from their own
quantizers, with other rounding of single activations."""


def mean_error(host, model, quantized, items):
    """Return the largest difference of the mean of an output from the float network's."""
    images = torch.cat(items)
    with torch.no_grad():
        expected = list(tensors_in(model(images)))
    return max(
        float((f - e).mean([a for a in range(e.dim()) if a != 1]).abs().max())
        for f, e in zip(host.outputs(quantized, images), expected, strict=True)
    )


def biased(name):
    """Return a network whose inputs are never negative, so that rounded weights have a strong mean error."""
    return nets.build(name), [x.abs() for x in nets.items(name)]


@pytest.mark.parametrize("equalize", [True, False])
@pytest.mark.parametrize("name", ["residual", "branches", "grouped", "one_d", "linear_only", "bias_and_norm", "twice"])
def test_the_means_of_the_outputs_are_those_of_the_float_network(name, equalize, host):
    """Without a finetune, corrected biases give the outputs the means that they have in floating point."""
    model, items = biased(name)
    start = {"equalize": equalize, "compensate": False, "finetune": None, "weight_bits": 3}
    before, after = (
        mean_error(host, model, host.quantize(model, items, four_bits(bias_correction=on, **start)), items)
        for on in (False, True)
    )
    assert before > 1e-3
    assert after < CORRECTED * before


def test_only_biases_change(host):
    """The integers of the weights are the same with and without the correction."""
    model, items = biased("residual")
    found = [
        host.integers(host.quantize(model, items, four_bits(bias_correction=on, finetune=None)), items[0])
        for on in (False, True)
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_finetune_starts_from_corrected_biases(host):
    """With rates of 0, what comes out of the finetune is the corrected start."""
    model, items = biased("linear_only")
    still = few_steps(learning_rate=0, scale_learning_rate=0)
    start = {"compensate": False, "bias_correction": True}
    one, other = (host.quantize(model, items, four_bits(finetune=f, **start)) for f in (None, still))
    for x, y in zip(host.outputs(one, items[0]), host.outputs(other, items[0]), strict=True):
        torch.testing.assert_close(x, y)


def test_layers_without_a_bias(host, caplog):
    """A layer without a bias stays as it is and is named; the others are corrected."""
    model, items = Bare().eval(), [x.abs() for x in nets.items("residual")]
    config = four_bits(bias_correction=True, compensate=False, finetune=None)
    with caplog.at_level("WARNING", logger="qft_plugin"):  # whatever level was set before
        quantized = host.quantize(model, items, config)
    assert "without a bias of their own: conv.weight" in caplog.text
    plain = host.quantize(model, items, four_bits(compensate=False, finetune=None))
    assert mean_error(host, model, quantized, items) < CORRECTED * mean_error(host, model, plain, items)


class Bare(torch.nn.Module):
    """A convolution without a bias before a linear layer with one."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))
