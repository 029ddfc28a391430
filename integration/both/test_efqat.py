"""EfQAT under both hosts: a part of the weights trains, and the integers of the rest are those of the start."""

from dataclasses import replace

import nets
import pytest
import torch
from conftest import few_steps, four_bits, relative_error

from qft_plugin import EfQAT
from qft_plugin.graph.torch_model import tensors_in
from qft_plugin.tensors.partial_gradients import Convolution, Linear

NETS = ["residual", "in_place", "grouped", "one_d", "bias_and_norm", "transformer"]
"""Networks that both hosts take."""

SAME_END = 0.97
"""The hosts sum in different orders, so single weights on an edge between two integers fall to different sides."""

CLOSE = 0.25
"""Relative L2 error of 4-bit weights after a few steps; a network with a wrong scale is at 0.5 and more."""

NEVER = 10**9
"""More images than are fed: what trains is chosen once."""


def trained(ratio, *, images_fed=128, compensate=True, **settings):
    """Make the settings of a short finetune of a part."""
    finetune = few_steps(images_fed=images_fed, train=EfQAT(ratio=ratio, **settings))
    return four_bits(activation_range="max", compensate=compensate, finetune=finetune)


def share(one, other):
    """Return the share of the weights of all kernels that have the same integer in two networks."""
    one, other = kernels(one), kernels(other)
    assert one.keys() == other.keys()
    equal = sum(float((one[n] == other[n]).sum()) for n in one)
    return equal / sum(t.numel() for t in one.values())


def kernels(integers):
    """Leave out the norms, which always train, and which NNCF alone quantizes."""
    return {name: t for name, t in integers.items() if t.dim() > 1}


@pytest.mark.parametrize("name", NETS)
def test_without_a_ratio_no_integer_changes(name, host):
    """With a ratio of 0 scales, biases and norms lower the loss, and every kernel keeps its integers."""
    model, items = nets.build(name), nets.items(name)
    config = trained(0, compensate=False)  # from a start that leaves something to do
    start = host.integers(host.quantize(model, items, replace(config, finetune=None)), items[0])
    result, _ = host.finetuned(model, items, config)
    end = host.quantize(model, items, config)
    assert result.final_loss < result.start_loss
    for weight, integers in kernels(host.integers(end, items[0])).items():
        assert torch.equal(integers, start[weight])
    expected = [t.detach() for t in tensors_in(nets.call(model, items[0]))]
    assert relative_error(host.outputs(end, items[0]), expected) < CLOSE


@pytest.mark.parametrize("mode", ["cwpl", "cwpn", "lwpn"])
def test_a_part_of_the_integers_changes(mode, host):
    """What is not chosen keeps its integers: with one choice, no more channels change than were allowed to."""
    model, items = nets.build("residual"), nets.items("residual")
    config = trained(0.25, mode=mode, images_fed=640, compensate=False, refresh_images=NEVER)
    start, end = (
        host.integers(host.quantize(model, items, c), items[0]) for c in (replace(config, finetune=None), config)
    )
    assert 0 < 1 - share(start, end) < 0.25
    changed = {n: (start[n] != t).flatten(1).any(1) for n, t in end.items()}
    if mode == "cwpl":
        assert all(int(c.sum()) <= max(1, round(0.25 * len(c))) for c in changed.values())
    held = sum(t[changed[n]].numel() for n, t in end.items())
    assert held <= 0.25 * sum(t.numel() for t in end.values())


@pytest.mark.parametrize("refresh_images", [48, NEVER])
@pytest.mark.parametrize("name", [name for name in NETS if name != "transformer"])
def test_both_hosts_train_the_same_part(name, refresh_images, both):
    """The same network, images, ranges and seed give the same integers within noise, with other choices on the way.

    (Of a transformer NNCF quantizes other tensors than Brevitas.)
    """
    model, items = nets.build(name), nets.items(name)
    config = trained(0.25, refresh_images=refresh_images)
    found = [host.integers(host.quantize(model, items, config), items[0]) for host in both]
    assert share(*found) > SAME_END


@pytest.mark.parametrize("name", [*NETS, "twice", "transposed"])
def test_no_weight_gradient_is_computed(name, host, monkeypatch):
    """With a ratio of 0 every layer has the cheaper backward pass, whatever stands after it, so none is computed."""
    inputs = []
    for operation in (Linear, Convolution):
        monkeypatch.setattr(operation, "weight_gradient", lambda *_: pytest.fail("the gradient of a whole kernel"))
        run = operation.run
        monkeypatch.setattr(operation, "run", lambda *args, run=run: inputs.append(args[1].shape) or run(*args))
    model, items = nets.build(name), nets.items(name)
    _, quantized = host.finetuned(model, items, trained(0))
    calls = len(inputs) / (128 / 16)
    assert calls == len(kernels(host.integers(quantized, items[0]))) + (name == "twice")
