"""What is found among the extremes of activations: constants, images that dominate, and where these are."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from qft_plugin.errors import DataError, QFTWarning
from qft_plugin.job.health import DOMINATES, FEW, Ranges, check_squares, dominant, extremes, warn_of_targets
from qft_plugin.training.data import Inputs
from qft_plugin.training.rows import Kept
from qft_plugin.training.teacher import Targets


@pytest.mark.parametrize("layout", ["rows", "channels last", "transposed", "view", "windows"])
def test_extremes_are_those_of_each_image(layout: str) -> None:
    """In any order of memory, and where each image has several rows."""
    x = torch.randn(4, 3, 5, 6)
    expected = torch.stack([x.flatten(1).amin(1), x.flatten(1).amax(1)], 1)
    laid_out = {
        "rows": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "view": torch.cat([x, 100 * x], 1)[:, :3],
        "windows": x.reshape(12, 30),
    }
    assert torch.equal(extremes(laid_out[layout], 4), expected)


def test_an_activation_without_an_axis_of_images_has_the_extremes_of_all() -> None:
    """A table of positions, or one number, is the same for each image."""
    assert extremes(torch.arange(6.0).view(3, 2), 4).tolist() == [[0, 5]] * 4
    assert extremes(torch.tensor(2.0), 4).tolist() == [[2, 2]] * 4


@pytest.mark.parametrize(
    ("others", "largest", "count", "found"),
    [
        (1.0, DOMINATES, FEW, True),
        (1.0, 0.9 * DOMINATES, FEW, False),
        (1.0, 1e30, FEW - 1, False),
        (0.0, 1e30, FEW, False),
    ],
)
def test_what_dominates(others: float, largest: float, count: int, found: bool) -> None:
    """An image from the threshold on, among enough others that are not all 0; its number and its ratio."""
    peaks = torch.full((count,), others)
    peaks[3] = largest
    assert dominant(peaks) == ((3, largest / others) if found else None)


class Student:
    """Has quantizers that read the image twice, a constant, a value of the image, and one number of it."""

    look: Callable[[str, Tensor], None]

    @contextmanager
    def looked_at(self, look: Callable[[str, Tensor], None]) -> Iterator[None]:
        self.look = look
        yield

    def watch(self, _: Mapping[str, Tensor], call: tuple[tuple[Tensor, ...], dict[str, Tensor]], __: object) -> None:
        x = call[0][0]
        self.look("image", x)
        self.look("image", -2 * x)
        self.look("constant", torch.full((len(x), 3), 5.0))
        self.look("by image", x[:, :1].expand(-1, 3))
        self.look("one number", x[:, :1])


def test_ranges_of_several_batches() -> None:
    """Extremes over all calls of a quantizer and over all batches; what is constant in each image, and everywhere."""
    ranges, x = Ranges(), torch.randn(20, 4)
    x[7] *= 1000
    for part in x.split(8):
        ranges.run(Student(), {}, ((part,), {}), {})
    assert ranges.images == 20
    low, high = ranges.of("image").unbind(1)
    assert torch.equal(low, torch.minimum(x, -2 * x).amin(1))
    assert torch.equal(high, torch.maximum(x, -2 * x).amax(1))
    assert ranges.constant() == {"constant": 5.0, "by image": None}
    assert ranges.dominated()["image"][0] == 7


def test_where_an_image_is() -> None:
    """Its item, and which image of that, counted over all processes; an item of one image is the image."""
    inputs = Inputs((torch.zeros(6, 1),), {}, (3, 1, 2), torch.device("cpu"))
    assert [inputs.item_of(i) for i in (2, 3, 5)] == [
        "Dataset item 0, image 2 of it,",
        "Dataset item 1",
        "Dataset item 2, image 1 of it,",
    ]


@pytest.mark.parametrize("halved", [True, False])
def test_targets_that_dominate(halved: bool) -> None:
    """An image that counts too much in the loss is warned of, one that overflows is refused, if it counts at all."""
    values = torch.ones(10, 4)
    inputs = Inputs((torch.zeros(10, 1),), {}, (4, 6), torch.device("cpu"))

    def targets(size: float) -> Targets:
        factor = torch.ones(10, 1)
        factor[5] = size
        return Targets((Kept(values.half(), factor) if halved else Kept(values * factor, None),), None)

    with pytest.warns(QFTWarning, match=r"Dataset item 1, image 1 of it,.* 50 times"):
        warn_of_targets(targets(50), (1.0,), inputs)
    warn_of_targets(targets(50), (0.0,), inputs)
    warn_of_targets(targets(2), (1.0,), inputs)
    with pytest.raises(DataError, match=r"Dataset item 1, image 1 of it,.* square.*1e\+30"):
        check_squares(targets(1e30), (1.0,), inputs)
    check_squares(targets(1e30), (0.0,), inputs)
    check_squares(targets(1e15), (1.0,), inputs)
