"""Where a finetune starts: equalized, with the ranges and scales that were asked for, and corrected biases."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from small_host import SmallHost, SmallNetwork, SmallPlaced, SmallSource
from torch import Tensor, nn
from torch.nn import functional

from qft_plugin import HardwareSpec, QFTConfig
from qft_plugin.errors import ModelError, QFTWarning
from qft_plugin.job.bias_correction import channel_means
from qft_plugin.job.host import Problem, Start
from qft_plugin.job.start import initialize, start
from qft_plugin.job.understand import images, understand
from qft_plugin.tensors.mmse import weight_scale
from qft_plugin.tensors.ranges import range_mse
from qft_plugin.training.data import Inputs
from qft_plugin.training.solve import solve

EXACT = 1e-10
"""float64: three layers with factors up to e^3 on either side."""


def network() -> nn.Module:
    """Return two convolutions, a pool and a linear layer, in float64, whose channels have ranges far apart."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double().eval()
    factors = torch.logspace(-1, 1, 8, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.mul_(factors[:, None, None, None])
        model[0].bias.mul_(factors)
        model[2].weight.div_(factors[:, None, None])
    return model


def batches() -> list[Tensor]:
    """Return 48 images in batches, whose neighbours are alike."""
    return [(torch.randn(16, 3, 1, 1) + 0.3 * torch.randn(16, 3, 6, 6)).double() for _ in range(3)]


def settings(**changes: Any) -> QFTConfig:
    """Return the settings of a start: 4 bits in every layer, and no finetune."""
    return QFTConfig(**{"small_layer_share": 0, "finetune": None, **changes})


def understood(host: SmallHost, config: QFTConfig) -> Problem[SmallSource]:
    """Read a model and images, and understand them."""
    inputs = images(host.model, host.items(), config)
    return understand(host.read(inputs, config), inputs, config)


def begun(config: QFTConfig, model: nn.Module | None = None) -> tuple[Problem[SmallSource], Start[SmallPlaced]]:
    """Return a problem and its start."""
    host = SmallHost(network() if model is None else model, batches())
    problem = understood(host, config)
    return problem, initialize(host, problem, config)


def seen(problem: Problem[SmallSource], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what each quantizer reads in the float network, of all images."""
    found: dict[str, Tensor] = {}
    SmallNetwork(problem).observe(tensors, problem.inputs.batch(slice(None)), found.__setitem__)
    return found


def error(problem: Problem[SmallSource], begin: Start[SmallPlaced]) -> float:
    """Return how far the start is from the float network, relative to it."""
    call = problem.inputs.batch(slice(None))
    with torch.no_grad():
        (found,) = begin.student(solve(begin.dof), call).features
        (wanted,) = SmallNetwork(problem).predict(problem.source.tensors, call).features
    return float((found - wanted).norm() / wanted.norm())


def test_equalization_evens_the_ranges_and_changes_no_function() -> None:
    """Factors that are folded into the weights bring the channels together; the float network stays the same."""
    problem, begin = begun(settings(compensate=False))
    call = problem.inputs.batch(slice(None))
    before, after = (
        float(tensors["0.weight"].flatten(1).abs().amax(1).log().std())
        for tensors in (problem.source.tensors, begin.placed.tensors)
    )
    assert after < 0.3 * before
    assert bool((begin.log_c != 0).any())
    outputs = [SmallNetwork(problem).run(t, call, {})[0] for t in (problem.source.tensors, begin.placed.tensors)]
    assert float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()) < EXACT


def test_without_equalization_the_weights_are_the_users() -> None:
    """All factors are 1, and every weight and bias keeps its bits."""
    problem, begin = begun(settings(equalize=False, compensate=False))
    assert not begin.log_c.any()
    assert not begin.dof.log_c.any()
    for name, tensor in begin.placed.tensors.items():
        assert torch.equal(tensor, problem.source.tensors[name])
    equalized = begun(settings(compensate=False))
    assert error(*equalized) < 0.7 * error(problem, begin)


@pytest.mark.parametrize("kind", ["max", "mse", "host"])
def test_ranges_of_activations(kind: Any) -> None:
    """Nothing is clipped, the squared error is the smallest, or the host's ranges stay."""
    problem, begin = begun(settings(activation_range=kind, equalize=False))
    for name, x in seen(problem, begin.placed.tensors).items():
        grid = begin.dof.activations.grids[name]
        expected = {
            "max": float(x.abs().max()) / grid.high,
            "mse": float(range_mse(x.flatten(), low=grid.low, high=grid.high)),
            "host": begin.placed.placement.activations[name].scale,
        }
        assert (grid.low, grid.high) == (-127, 127)
        assert grid.scale == pytest.approx(expected[kind], rel=EXACT)


def test_scales_of_weights_have_the_smallest_error() -> None:
    """A scale for each output channel where the host can, one for all where the hardware has one rescale factor."""
    for rescale in ("channelwise", "layerwise"):
        _, begin = begun(settings(hardware=HardwareSpec(rescale=rescale), compensate=False))
        for layer in begin.dof.map.layers:
            W, grid = begin.placed.tensors[layer.weight], begin.dof.weight_grids[layer.weight]
            expected = weight_scale(W, layer.axes, bits=4, per_channel=rescale == "channelwise")
            assert grid.bits == 4
            torch.testing.assert_close(grid.scale, expected)


def test_bit_widths_are_those_of_the_settings() -> None:
    """Of weights by name or by size, of activations by what reads them."""
    config = settings(
        small_layer_share=0.1, layer_bits={"0.weight": 6}, layer_activation_bits={"2.weight": 5}, compensate=False
    )
    _, begin = begun(config)
    assert {name: grid.bits for name, grid in begin.dof.weight_grids.items()} == {
        "0.weight": 6,
        "2.weight": 4,
        "6.weight": 7,
    }
    bits = {name: (g.high - g.low).bit_length() for name, g in begin.dof.activations.grids.items()}
    assert bits == {"0.quantizer": 8, "2.quantizer": 5, "6.quantizer": 8}


def test_rounding_errors_compensate_each_other() -> None:
    """The start is closer to the float network than rounding to nearest is."""
    near, compensated = (error(*begun(settings(compensate=c))) for c in (False, True))
    assert compensated < 0.8 * near


def test_a_pruned_weight_is_not_compensated() -> None:
    """Where a weight stays 0 nothing can be moved: the tensors of this layer are those that were placed."""
    config = settings()
    host = SmallHost(network(), batches())
    problem = understood(host, config)
    kept = {"2.weight": torch.ones_like(problem.source.tensors["2.weight"], dtype=torch.bool)}
    begin = initialize(host, replace(problem, source=replace(problem.source, kept=kept)), config)
    moved = {
        layer.weight: not torch.allclose(
            begin.dof.trained_weight(layer.weight).W * begin.dof.trained_weight(layer.weight).unit,
            begin.placed.tensors[layer.weight],
        )
        for layer in begin.dof.map.layers
    }
    assert moved == {"0.weight": True, "2.weight": False, "6.weight": True}


def test_corrected_biases_bring_the_means_back() -> None:
    """In each channel the mean output of a layer is that of the float network, within its scatter."""
    found = []
    for correct in (False, True):
        problem, begin = begun(settings(bias_correction=correct, compensate=False))
        call, solution = problem.inputs.batch(slice(None)), solve(begin.dof)
        outputs: list[Tensor] = []
        with torch.no_grad():
            wanted = SmallNetwork(problem).run(problem.source.tensors, call, {})[0]
            begin.student.trace(solution, call, {"6/linear/0": outputs.append})
            (read,) = outputs
            quantized = functional.linear(read, solution.tensors["6.weight"], solution.tensors["6.bias"])
        layer = begin.dof.map.layer("6.weight")
        found.append(float((channel_means(quantized, layer) - channel_means(wanted, layer)).abs().max()))
    assert found[1] < 0.05 * found[0]


def test_a_start_that_the_caller_chooses() -> None:
    """Factors that are given are folded into the network; nothing is compensated where that is not asked for."""
    config = settings()
    host = SmallHost(network(), batches())
    problem = understood(host, config)
    log_c = torch.randn(problem.source.dof_map.size, dtype=torch.float64)
    begin = start(host, problem, config, log_c=log_c, compensate=False)
    assert torch.equal(begin.log_c, log_c)
    call = problem.inputs.batch(slice(None))
    outputs = [SmallNetwork(problem).run(t, call, {})[0] for t in (problem.source.tensors, begin.placed.tensors)]
    assert float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()) < EXACT


@dataclass(frozen=True)
class NothingQuantized(SmallHost):
    """Puts no quantizer on any weight."""

    def place(self, source: SmallSource, tensors: Mapping[str, Tensor], inputs: Inputs) -> SmallPlaced:
        placed = super().place(source, tensors, inputs)
        return placed.with_placement(replace(placed.placement, weights={}))


def test_a_host_that_quantizes_nothing() -> None:
    """There is nothing to train: an error says what may keep the layers out."""
    host = NothingQuantized(network(), batches())
    with pytest.raises(ModelError, match=r"At least one layer should be quantized\. Found none"):
        initialize(host, understood(host, settings()), settings())


class Standardized(nn.Module):
    """Computes the weight of a convolution in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(c, 4, 3, padding=1, dtype=torch.float64) for c in (3, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.second.weight
        x = functional.conv2d(self.first(x).relu(), weight - weight.mean(), padding=1)
        return x.mean((2, 3))


def test_computed_weights_are_named() -> None:
    """They stay in floating point, and the user hears which."""
    with pytest.warns(QFTWarning, match=r"Found 1 of 2 layers whose weights.*conv2d/1\. They stay in floating point"):
        begun(settings(), Standardized())


@pytest.mark.parametrize("what", ["constant", "dominated"])
def test_images_that_say_little(what: str) -> None:
    """Images that are all the same, or of which one is far larger than all others, are told of."""
    items = batches()
    if what == "constant":
        items = [torch.full_like(batch, 0.5) for batch in items]
    else:
        items[1][3] *= 1000
    host = SmallHost(network(), items)
    words = {"constant": "Dataset: images should differ", "dominated": "Dataset item 1, image 3 of it"}
    with pytest.warns(QFTWarning) as caught:
        initialize(host, understood(host, settings()), settings())
    assert any(words[what] in str(w.message) for w in caught)
