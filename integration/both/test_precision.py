"""Training steps in lower precision, under both hosts."""

import nets
import pytest
import torch
from conftest import few_steps, four_bits

from qft_plugin import ConfigError, EfQAT

NETS = ["residual", "in_place", "grouped", "one_d", "inverted", "transformer"]

CLOSE = 0.2
"""Relative difference of losses on few images, after steps in which weights on an edge fell to different sides."""


def trained(**settings):
    """Make the settings of a short finetune."""
    return four_bits(activation_range="max", compensate=False, finetune=few_steps(**settings))


@pytest.mark.parametrize("train", [None, EfQAT(ratio=0.25)], ids=["all", "a part"])
@pytest.mark.parametrize("name", NETS)
def test_steps_in_bfloat16_train_the_same_network(name, train, host):
    """Steps differ a little from those in float32, what is chosen and given back is in float32."""
    model, items = nets.build(name), nets.items(name)
    wide, _ = host.finetuned(model, items, trained(train=train))
    low, quantized = host.finetuned(model, items, trained(train=train, precision="bfloat16"))
    assert low.start_loss == wide.start_loss
    assert low.losses[0] != wide.losses[0]
    assert low.losses[0] == pytest.approx(wide.losses[0], rel=CLOSE)
    assert low.final_loss == pytest.approx(wide.final_loss, rel=CLOSE)
    # Eight steps may gain something in one precision and nothing in the other: the start is given back then.
    assert max(low.final_loss - low.start_loss, wide.final_loss - wide.start_loss) <= 0
    assert {t.dtype for t in quantized.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert all(t.dtype == torch.float32 for t in host.outputs(quantized, items[0]))


def test_a_network_in_double_precision_trains_in_its_own(host):
    """Lower precision beside double makes no sense."""
    model, items = nets.build("residual").double(), [t.double() for t in nets.items("residual")]
    with pytest.raises(ConfigError, match=r"precision.*float64"):
        host.quantize(model, items, trained(precision="bfloat16"))
