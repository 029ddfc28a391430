"""One contract for all hosts: the same tests under each of them, and the same result where both are installed."""

import gc
import random
import warnings

import nets
import numpy as np
import pytest
import torch
from conftest import few_steps, four_bits, relative_error
from torch import nn
from torch.nn import functional

from qft_plugin import ConfigError, QFTWarning
from qft_plugin.graph.torch_model import tensors_in

pytestmark = pytest.mark.core

NETS = ["residual", "preactivation", "branches", "grouped", "one_d", "linear_only", "bias_and_norm"]
"""Networks that both hosts take; the others use something that one of them cannot trace."""

LAST_BIT = 1e-6
"""A scale that is read, stored as its logarithm and written may change in its last bit."""

SAME_START = 0.985
"""The hosts sum in different orders, so single weights on an edge between two integers fall to different sides, and
those that make up for them follow: of a network of a thousand weights one edge moves up to ten."""

SAME_END = 0.97
"""Eight steps on top of that."""


@pytest.mark.parametrize("name", NETS)
def test_read_then_write_changes_nothing(name, host):
    """A finetune whose learning rates are 0 gives the outputs of no finetune at all."""
    model, items = nets.build(name), nets.items(name)
    still = few_steps(learning_rate=0, scale_learning_rate=0)
    start, end = (host.quantize(model, items, four_bits(finetune=finetune)) for finetune in (None, still))
    assert relative_error(host.outputs(end, items[0]), host.outputs(start, items[0])) < LAST_BIT
    assert equal_share(host.integers(end, items[0]), host.integers(start, items[0])) == 1


@pytest.mark.parametrize("name", NETS)
def test_eight_bits_are_nearly_float(name, host):
    """With 8-bit weights and nothing trained, outputs are those of the float network within a few percent."""
    model, items = nets.build(name), nets.items(name)
    quantized = host.quantize(model, items, four_bits(weight_bits=8, finetune=None))
    expected = list(tensors_in(nets.call(model, items[0])))
    assert relative_error(host.outputs(quantized, items[0]), [t.detach() for t in expected]) < 0.05


def test_batches_of_the_dataset_do_not_matter(host):
    """The default start is the same for one batch, for single images, and for what lies between."""
    model, items = nets.build("residual"), nets.items("residual")
    images = torch.cat([x**3 for x in items])
    starts = [
        host.outputs(host.quantize(model, list(images.split(size)), four_bits(finetune=None)), images)
        for size in (1, 24, len(images))
    ]
    assert relative_error(starts[0], starts[2]) == relative_error(starts[1], starts[2]) == 0


@pytest.mark.parametrize("finetune", [None, few_steps()], ids=["start", "finetune"])
def test_random_numbers_go_on_as_before(host, finetune):
    """Those of torch, numpy and Python: what comes after a job does not depend on it."""
    model, items = nets.build("residual"), nets.items("residual")
    host.quantize(model, items, four_bits(finetune=finetune))  # what is done once in a process is done

    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = states()
    host.quantize(model, items, four_bits(finetune=finetune))
    assert states() == before


def test_a_callback_that_cannot_be_called_is_refused_before_any_work(host):
    """A finetune would end at its first step."""

    def data():
        raise AssertionError
        yield

    with pytest.raises(ConfigError, match="callback should be a function of one Step"):
        host.run(nets.build("residual"), data(), four_bits(), callback=3)


class AlwaysRandom(nn.Module):
    """Drops something in eval mode too."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x):
        return self.head(functional.dropout(self.conv(x).relu(), 0.05).flatten(1))


def test_a_file_leaves_out_a_dropout_that_is_active_in_eval_mode(host, tmp_path):
    """It is told, and the rest of the file is proved."""
    torch.manual_seed(0)
    model, image = AlwaysRandom().eval(), torch.randn(8, 3, 8, 8)
    with pytest.warns(QFTWarning, match="something random is still active"):
        _, quantized = host.finetuned(model, [image], four_bits())
    with warnings.catch_warnings(record=True) as told:  # the exporters warn of their own things too
        warnings.simplefilter("always")
        report = host.save(quantized, tmp_path, image)
    assert any("a dropout that is active in eval mode" in str(w.message) for w in told)
    assert report.proof.weights == 2
    assert report.relative_error < 0.01


class HalfUsed(nn.Module):
    """Computes more than it returns."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.idle = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 3))

    def forward(self, x):
        x = self.stem(x).relu()
        self.idle(x)
        return self.head(x.mean((2, 3)))


def test_what_no_output_depends_on_may_be_missing_in_a_file(host, tmp_path):
    """Exporters leave it out, and the file is right."""
    torch.manual_seed(0)
    model, image = HalfUsed().eval(), torch.randn(8, 3, 16, 16)
    _, quantized = host.finetuned(model, [image], four_bits())
    report = host.save(quantized, tmp_path, image)
    assert report.proof.weights == 2
    assert report.relative_error < 0.01


def test_a_step_leaves_nothing_to_the_garbage_collector(host):
    """Between steps no tensor stays alive in a circle of references: at 224x224 that would be gigabytes."""
    model, items = nets.build("inverted"), nets.items("inverted")
    alive = []

    def count(step):
        if step.number == 2:
            gc.collect()
            gc.disable()
        # By their type: a look at an attribute may call deprecated code of another package.
        alive.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))

    try:
        host.run(model, items, four_bits(finetune=few_steps(images_fed=96)), callback=count)
    finally:
        gc.enable()
    assert len(alive) == 6
    assert len(set(alive[2:])) == 1


def equal_share(one, other):
    """Return the share of all weights that have the same integer in two networks."""
    assert one.keys() == other.keys()
    equal = sum(float((one[n] == other[n]).sum()) for n in one)
    return equal / sum(t.numel() for t in one.values())


@pytest.mark.parametrize("name", NETS)
def test_both_hosts_give_the_same_integers(name, both):
    """The same network, images, ranges and seed give the same integers within noise, before and after a finetune."""
    model, items = nets.build(name), nets.items(name)
    for finetune, least in ((None, SAME_START), (few_steps(), SAME_END)):
        config = four_bits(activation_range="max", finetune=finetune)
        found = [host.integers(host.quantize(model, items, config), items[0]) for host in both]
        assert equal_share(*found) > least
