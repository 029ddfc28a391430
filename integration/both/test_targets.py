"""Targets under each host: mean bit widths are kept, targets met, and what cannot be met is said."""

import nets
import pytest
import torch
from conftest import four_bits
from torch.nn import functional

from qft_plugin import ConfigError, QFTWarning

UNTRAINED = {"finetune": None, "weight_bits": 2}


def average(report):
    """Return the mean bit width over all quantized weights."""
    layers = [layer for layer in report.layers if layer.bits is not None]
    return sum(layer.weights * layer.bits for layer in layers) / sum(layer.weights for layer in layers)


def many():
    """Return a network and 512 images."""
    return nets.build("branches"), nets.items("branches", batches=32)


@pytest.mark.parametrize("limit", [3, 4.5])
def test_a_mean_bit_width(limit, host):
    """The layers of the model have it, some of them more and some less; what the user has fixed stays."""
    model, items = nets.build("residual"), nets.items("residual")
    fixed = {"fc.weight": 5}
    report = host.report(model, items, four_bits(average_bits=limit, layer_bits=fixed, **UNTRAINED))
    assert limit - 1 < average(report) <= limit
    assert {layer.bits for layer in report.layers} == {2, 5, 7}
    assert next(layer.bits for layer in report.layers if layer.weight == "fc.weight") == 5


def test_an_agreement_with_less_than_all_bits(host):
    """The target is met with fewer bits than 7 everywhere, and 2 everywhere do not meet it; the decisions say so."""
    model, items = many()
    plain = host.report(model, items, four_bits(**UNTRAINED))
    # One more of the 64 images that are held out.
    report = host.report(model, items, four_bits(target_agreement=100 * plain.agreement + 1, **UNTRAINED))
    assert plain.agreement + 0.01 <= report.agreement
    assert 2 < average(report) < 7
    assert report.decisions[0].startswith("Raised to 7 bits: no layer.")
    assert report.decisions[-1].endswith("the target is met.")


def test_an_impossible_target(host):
    """With a measure that no result can reach, the best one is returned with a warning, and all layers were tried."""
    model, items = nets.build("residual"), nets.items("residual")
    x = torch.cat(items)
    with torch.no_grad():
        expected = model(x)

    def closeness(candidate):
        return -float(functional.mse_loss(host.outputs(candidate, x)[0], expected))

    config = four_bits(evaluate=closeness, max_drop=0, **UNTRAINED)
    with pytest.warns(QFTWarning, match="max_drop=0 should be met by some choice of bit widths"):
        report = host.report(model, items, config)
    assert {layer.bits for layer in report.layers} == {7}
    assert report.decisions[-1].endswith("the target is not met.")


def test_a_target_with_a_finetune(host):
    """Every job trains; the budget holds."""
    model, items = nets.build("inverted"), nets.items("inverted")
    report = host.report(model, items, four_bits(average_bits=5))
    assert 4 < average(report) <= 5
    assert report.final_loss is not None


def test_quantizers_of_a_model_have_their_bits():
    """A model that holds its quantizers has bits already: no target can change them."""
    pytest.importorskip("brevitas", reason="Brevitas is not installed here")
    from qft_plugin import brevitas

    model, items = nets.build("residual"), nets.items("residual")
    linked = brevitas.quantize(model, items, config=four_bits(finetune=None))
    for setting in ({"average_bits": 5}, {"target_agreement": 90}, {"evaluate": len, "max_drop": 1}):
        with pytest.raises(ConfigError, match="should be left at its default"):
            brevitas.finetune(linked, model, items, four_bits(weight_bits=4, small_layer_share=0.01, **setting))
