"""Where activation scales start: independent of the batches of a dataset, with each image at its weight."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qft_plugin.config import FinetuneConfig
from qft_plugin.graph.placement import ActivationGrid
from qft_plugin.graph.torch_model import Call
from qft_plugin.job.activation_ranges import RANGE_VALUES, activation_grids
from qft_plugin.tensors.fake_quantize import fake_quantize
from qft_plugin.training.data import Inputs, read_inputs
from qft_plugin.training.student import Watcher

UNSIGNED = ActivationGrid(1.0, 0, 15)
SHIFTING = ActivationGrid(1.0, 0, 15, zero_point=3, shifts=True)
SEARCH_SLACK = 1.05
"""The ends of a range are searched one after the other, in steps of about 1 % of the largest value."""


def inputs_of(parts: Sequence[Tensor]) -> Inputs:
    """Read images that come in some batches."""
    settings = FinetuneConfig(max_images=10**6)
    return read_inputs(parts, accepts=lambda *_: True, like=torch.zeros(()), settings=settings)


def plain(call: Call, watcher: Watcher) -> None:
    """Observe a network that quantizes its input in two places, by one quantizer."""
    (x,), _ = call
    watcher("q", x)
    watcher("q", 2 * x[:, :3])


@pytest.mark.parametrize("kind", ["max", "mse"])
@pytest.mark.parametrize("grid", [UNSIGNED, SHIFTING])
def test_batches_do_not_matter(kind: str, grid: ActivationGrid) -> None:
    """Batches of one, of seven or of all images give the same grid."""
    images = torch.randn(150, 40).exp() - 1
    found = [
        activation_grids({"q": grid}, plain, inputs_of(images.split(size)), kind)["q"]  # type: ignore[arg-type]
        for size in (1, 7, 150)
    ]
    assert found[0] == found[1] == found[2] != grid


def test_each_image_has_its_weight() -> None:
    """A last batch of a single image, and a smaller tensor, weigh as many values as they have."""
    images = torch.rand(65, 3000)
    images[64] *= 30
    assert images[:64].numel() > RANGE_VALUES
    seen = torch.cat([images.flatten(), 2 * images[:, :3].flatten()])

    def error(scale: float) -> float:
        return float((fake_quantize(seen, torch.tensor(scale), low=0, high=15) - seen).square().mean())

    best = min(error(float(seen.amax()) / 15 * k / 200) for k in range(1, 201))
    found = activation_grids({"q": UNSIGNED}, plain, inputs_of([images]), "mse")["q"].scale
    assert error(found) <= SEARCH_SLACK * best


def test_whole_numbers_and_nothing_have_ranges() -> None:
    """A quantizer that sees whole numbers gets their range; one that sees nothing keeps the host's."""

    def observe(call: Call, watcher: Watcher) -> None:
        watcher("whole", (call[0][0] * 100).long())
        watcher("empty", call[0][0][:, :0])

    grids = dict.fromkeys(["whole", "empty", "idle"], UNSIGNED)
    found = activation_grids(grids, observe, inputs_of([torch.ones(3, 4)]), "max")
    assert found["whole"].scale == pytest.approx(100 / 15)
    assert found["empty"] == found["idle"] == UNSIGNED
