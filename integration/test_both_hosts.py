"""One contract for all hosts: the same tests under each of them, and the same result where both are installed."""

import importlib.util

import nets
import pytest
import torch
from conftest import few_steps, four_bits, relative_error

from qft_plugin.model import tensors_in

NETS = ["residual", "preactivation", "branches", "grouped", "one_d", "linear_only", "bias_and_norm"]
"""Networks that both hosts take; the others use something that one of them cannot trace."""

LAST_BIT = 1e-6
"""A scale that is read, stored as its logarithm and written may change in its last bit."""

SAME_START = 0.995
"""The hosts sum in different orders, so single weights on an edge between two integers fall to different sides."""

SAME_END = 0.97
"""Eight steps on top of that."""


class UnderNNCF:
    """Quantizes with NNCF."""

    def __init__(self):
        import nncf

        import qft_plugin.nncf as host
        from qft_plugin.nncf.save import weight_integers

        self._nncf, self._host, self._integers = nncf, host, weight_integers

    def quantize(self, model, items, config):
        return self._host.quantize(model, self._nncf.Dataset(items), config).model

    def outputs(self, model, item):
        with torch.no_grad(), self._host.without_compiler():
            return list(tensors_in(nets.call(model, item)))

    def integers(self, model, item):
        with self._host.without_compiler():
            return self._integers(model, item)


class UnderBrevitas:
    """Quantizes with Brevitas."""

    def __init__(self):
        from qft_plugin import brevitas
        from qft_plugin.brevitas.save import weight_integers

        self._host, self._integers = brevitas, weight_integers

    def quantize(self, model, items, config):
        return self._host.fold(self._host.quantize(model, items, config=config))

    def outputs(self, model, item):
        with torch.no_grad():
            return list(tensors_in(nets.call(model, item)))

    def integers(self, model, _):
        return self._integers(model)


HOSTS = {"nncf": UnderNNCF, "brevitas": UnderBrevitas}


@pytest.fixture(params=HOSTS)
def host(request):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed here")
    return HOSTS[request.param]()


@pytest.fixture
def both():
    missing = [name for name in HOSTS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed here")
    return [make() for make in HOSTS.values()]


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
