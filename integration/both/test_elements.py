"""Every element and mask on a small network under both hosts: the integers that leave have the zeros of the mask."""

import importlib.util

import nets
import pytest
import torch
from conftest import few_steps, four_bits, relative_error
from hosts import EACH_HOST, HOSTS

from qft_plugin.graph.torch_model import tensors_in
from qft_plugin.tensors.axes import Axes
from qft_plugin.tensors.sparsity import two_of_four

pytestmark = pytest.mark.wide

ELEMENTS = ["ste", "soft", "blend"]
SPARSITIES = [None, 0.5, "2:4"]
SHARE = 0.5

LAST_BIT = 1e-6
"""A scale that is read, stored as its logarithm and written may change in its last bit."""

CLOSE = {None: 0.35, SHARE: 0.95, "2:4": 0.95}
"""Relative L2 error of the outputs after 8 steps; a network of zeros is at 1, and random weights bear no pruning."""


@pytest.fixture(params=EACH_HOST)
def host(request):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed here")
    return request.param


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=str)
@pytest.mark.parametrize("rounding", ELEMENTS)
def test_elements_and_masks(rounding, sparsity, host):
    """After a finetune the network is still close to its teacher, and its integers are on the grid with the zeros of
    the mask; the stem, which has three input channels, stays dense under 2:4.
    """
    model, items = nets.build("residual"), nets.items("residual")
    under = HOSTS[host]()
    quantized = under.quantize(model, items, four_bits(rounding=rounding, sparsity=sparsity))
    integers = {name: t.detach() for name, t in under.integers(quantized, items[0]).items()}
    assert set(integers) == {"stem.weight", "conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"}
    for name, found in integers.items():
        assert float(found.abs().max()) <= 7
        zeros = int((found == 0).sum())
        if sparsity == SHARE:
            assert zeros >= round(SHARE * found.numel()), name
            assert zeros < 0.8 * found.numel()
        elif sparsity == "2:4" and name != "stem.weight":
            kept = two_of_four(found.float(), Axes("linear"))
            assert not found[~kept].any(), name
            assert zeros < 0.8 * found.numel()
        else:
            assert zeros < 0.45 * found.numel()
    expected = [t.detach() for t in tensors_in(nets.call(model, items[0]))]
    assert relative_error(under.outputs(quantized, items[0]), expected) < CLOSE[sparsity]


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=str)
@pytest.mark.parametrize("rounding", ELEMENTS)
def test_with_nothing_trained_elements_are_alike(rounding, sparsity, host):
    """A finetune whose learning rates are 0 gives the integers of rounding to nearest without a finetune."""
    model, items = nets.build("residual"), nets.items("residual")
    still = few_steps(learning_rate=0, scale_learning_rate=0)
    under = HOSTS[host]()
    start = under.quantize(model, items, four_bits(finetune=None, sparsity=sparsity))
    end = under.quantize(model, items, four_bits(finetune=still, sparsity=sparsity, rounding=rounding))
    one, other = (under.integers(q, items[0]) for q in (start, end))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert relative_error(under.outputs(end, items[0]), under.outputs(start, items[0])) < LAST_BIT


@pytest.mark.parametrize("rounding", ELEMENTS)
def test_sparse_integers_reach_the_file(rounding, host, tmp_path):
    """The exports prove that the integers of the file are those of the model, the zeros among them."""
    model, items = nets.build("residual"), nets.items("residual")
    quantized = HOSTS[host]().quantize(model, items, four_bits(rounding=rounding, sparsity="2:4"))
    if host == "nncf":
        from qft_plugin.nncf import save_openvino

        save_openvino(quantized, tmp_path / "net.xml", items[0])
    else:
        from qft_plugin.brevitas import save_qcdq

        save_qcdq(quantized, tmp_path / "net.onnx", items[0])
    assert any(tmp_path.iterdir())
