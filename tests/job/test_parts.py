"""Networks of which a part is quantized: nothing is the float network, everything the quantized one."""

from dataclasses import replace

import pytest
import torch
from small_host import SmallHost, SmallPlaced, SmallSource
from test_run import batches, network, settings
from torch import Tensor, nn

from qft_plugin.config import QFTConfig
from qft_plugin.job import parts as module
from qft_plugin.job.host import Problem, Start
from qft_plugin.job.parts import Difference, Parts, held_out
from qft_plugin.job.run import run_on
from qft_plugin.job.understand import images
from qft_plugin.training.loss import Prediction, normalised_l2
from qft_plugin.training.solve import solve

SAME = 1e-9
"""float64: weights that were folded and are unfolded again."""


def looked(model: nn.Module, items: list[Tensor], config: QFTConfig) -> tuple[Start[SmallPlaced], Problem[SmallSource]]:
    """Return the end of a job."""
    ended = run_on(images(model, items, config), SmallHost(model, items), config=config)
    return ended.start, ended.problem  # type: ignore[return-value]


def parts_of(model: nn.Module, items: list[Tensor], config: QFTConfig) -> Parts:
    return Parts(*looked(model, items, config), config)


def one_layer() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).double().eval()


def equal(one: Prediction, other: Prediction) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def test_nothing_quantized_is_the_float_network() -> None:
    """After training, folded with factors that have trained, the logits are those of the user's model."""
    model, items = network(), batches()
    parts = parts_of(model, items, settings())
    for call, count in parts.batches(64):
        found = parts.run(parts.none(), call)
        assert parts.difference(found, found, images=count) == Difference(count, 0.0, count)
        assert found.logits is not None
        torch.testing.assert_close(found.logits, model(call[0][0]).detach(), rtol=SAME, atol=SAME)


def test_float_weights_are_divided_by_the_factors_of_a_host() -> None:
    """Where a host multiplies what a layer reads, the float weight belongs to the product, as the quantized does."""
    model, items = network(), batches()
    config = settings()
    start, problem = looked(model, items, config)
    plain = Parts(start, problem, config)
    layer = plain.layers[1]
    factor = torch.linspace(0.5, 2, len(layer.in_index), dtype=torch.float64)
    placed = replace(start.placed, input_factors={layer.weight: factor})
    parts = Parts(replace(start, placed=placed), problem, config)
    for name, W in plain.floating.items():
        expected = W / factor[:, None, None] if name == layer.weight else W
        torch.testing.assert_close(parts.floating[name], expected, rtol=SAME, atol=0)


def test_everything_quantized_is_the_quantized_network_bit_by_bit() -> None:
    """With all layers and all quantizers, and without none of them, it is what the job trained."""
    model, items = network(), batches()
    config = settings()
    start, problem = looked(model, items, config)
    parts = Parts(start, problem, config)
    whole = parts.of(parts.reads, parts.quantized.activation_scales)
    call = problem.inputs.first(16)
    assert equal(parts.run(whole, call), parts.run(solve(start.dof), call))
    assert not equal(parts.run(whole, call), parts.run(parts.none(), call))


def test_the_parts_of_one_layer() -> None:
    """Of a network with one layer, this layer alone is the whole, and all but this layer is the float network."""
    parts = parts_of(one_layer(), batches(), settings())
    (layer,) = parts.layers
    for call, _ in parts.batches(64):
        assert equal(parts.run(parts.only(layer), call), parts.run(parts.quantized, call))
        assert equal(parts.run(parts.without(layer), call), parts.run(parts.none(), call))


def test_a_part_has_its_own_weights_and_what_they_read() -> None:
    """One layer has the quantized weight and bias, the others float ones; one quantizer of three is active."""
    parts = parts_of(network(), batches(), settings())
    first, second, last = parts.layers
    only, without = parts.only(second), parts.without(second)
    assert list(only.activation_scales) == list(parts.reads[second.weight]) == ["2.quantizer"]
    assert set(without.activation_scales) == {"0.quantizer", "6.quantizer"}
    for name in (second.weight, "2.bias"):
        assert torch.equal(only.tensors[name], parts.quantized.tensors[name])
        assert torch.equal(without.tensors[name], parts.floating[name])
    for layer in (first, last):
        assert torch.equal(only.tensors[layer.weight], parts.floating[layer.weight])
        assert torch.equal(without.tensors[layer.weight], parts.quantized.tensors[layer.weight])


def test_networks_are_judged_by_images_that_were_held_out() -> None:
    """Of 160 images the last 20, in batches that hold no more outputs than they may; of 64 all."""
    many = [torch.randn(16, 3, 6, 6, dtype=torch.float64) for _ in range(10)]
    config = settings()
    start, problem = looked(network(), many, config)
    assert held_out(problem) == (140, 160)
    seen = torch.cat([call[0][0] for call, _ in Parts(start, problem, config).batches(7)])
    assert torch.equal(seen, torch.cat(many)[140:147])
    assert held_out(looked(network(), batches(), config)[1]) == (0, 64)


def test_a_batch_holds_few_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """580 outputs of an image of 4 bytes each: three images fit into 7,000 bytes."""
    parts = parts_of(network(), batches(), settings())
    monkeypatch.setattr(module, "HELD", 7_000)
    assert [count for _, count in parts.batches(8)] == [3, 3, 2]


PRODUCTS = 36 * 8 * (27 + 20) + 36 * 8 * (72 + 20) + 4 * (8 + 20)
"""Of the chain, for one image: each of its 36 positions and 8 channels, and each class; 20 more for each value."""


@pytest.mark.parametrize(("work", "count"), [(1e3, 64), (40.5, 20), (1e-3, 16)])
def test_large_networks_are_looked_at_on_fewer_images(work: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many images as the products allow that two runs take, but at least 16, and not more than there are."""
    parts = parts_of(network(), batches(), settings())
    monkeypatch.setattr(module, "WORK", work * PRODUCTS)
    assert parts.images(runs=2) == count


def test_differences_add_up() -> None:
    """Means over two batches of different size; without classes in one of them there are none in both."""
    both = Difference(3, 0.3, 2) + Difference(1, 0.5, 1)
    assert (both.images, both.loss, both.agreement) == (4, pytest.approx(0.2), 0.75)
    assert (both + Difference(1, 0.0, None)).agreement is None


def test_a_difference_is_that_of_the_finetune() -> None:
    """On the same images, the loss at the compared activation and the share of the same classes."""
    model, items, config = network(), batches(), settings()
    start, problem = looked(model, items, config)
    parts, total, x = Parts(start, problem, config), Difference(), torch.cat(items)
    for call, count in parts.batches(64):
        found, expected = parts.run(parts.quantized, call), parts.run(parts.none(), call)
        total += parts.difference(found, expected, images=count)
    found = start.student(solve(start.dof), problem.inputs.first(64))
    assert found.logits is not None
    assert total.images == 64
    assert total.agreement == float((found.logits.argmax(1) == model(x).argmax(1)).double().mean())
    loss = normalised_l2(found.features[0], model[:4](x))  # type: ignore[index]
    assert total.loss == pytest.approx(float(loss.detach()), rel=1e-6)
