"""What a job works on: the images that it takes, a map that is proved, and where networks are compared."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import parameters_of, record
from models import Apply
from small_host import SmallHost, SmallSource
from torch import Tensor, nn

from qft_plugin import EfQAT, FinetuneConfig, QFTConfig
from qft_plugin.errors import ConfigError, QFTWarning
from qft_plugin.job.host import Problem
from qft_plugin.job.understand import images, proven_map, understand
from qft_plugin.training.data import Inputs


def network(between: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Return two convolutions, a pool and a linear layer, in float64."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), between(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double().eval()


def batches(count: int = 3, size: int = 4) -> list[Tensor]:
    """Return images in batches."""
    return [torch.randn(size, 3, 6, 6, dtype=torch.float64) for _ in range(count)]


def settings(**finetune: Any) -> QFTConfig:
    """Return the settings of a finetune."""
    return QFTConfig(finetune=FinetuneConfig(**{"compile": False, **finetune}))


def read(model: nn.Module, config: QFTConfig) -> tuple[SmallSource, Inputs]:
    """Read a model and images."""
    host = SmallHost(model, batches())
    inputs = images(model, host.items(), config)
    return host.read(inputs, config), inputs


def understood(model: nn.Module, config: QFTConfig) -> Problem[SmallSource]:
    """Read a model and images, and understand them."""
    source, inputs = read(model, config)
    return understand(source, inputs, config)


def test_networks_are_compared_in_front_of_the_pool() -> None:
    """Where nothing else is asked for, at the input of the last pool, and not at the outputs."""
    at = understood(network(), settings()).at
    assert [(place.op, place.tensor) for place in at.inputs] == [("1/adaptive_avg_pool2d/0", "0/3/relu/1")]
    assert not at.outputs


def test_class_probabilities_alone_need_no_activation() -> None:
    """With a proportion of 1 the loss has no other part."""
    at = understood(network(), settings(cross_entropy=1)).at
    assert (at.inputs, at.outputs) == ((), False)


def test_places_that_are_named() -> None:
    """Each is the input of a module; the end of a block is one more, in front of them."""
    at = understood(network(), settings(loss_at=["0.2", "3"], blocks=["0.2"])).at
    assert [place.tensor for place in at.inputs] == ["0/1/relu/0", "0/1/relu/0", "2/flatten/0"]
    assert at.blocks == 1
    with pytest.raises(ConfigError, match=r"FinetuneConfig\.loss_at.*'nowhere'"):
        understood(network(), settings(loss_at="nowhere"))


def test_a_pruned_network_trains_as_a_whole() -> None:
    """Which weights train is not chosen among those that stay 0."""
    config = settings(train=EfQAT(ratio=0.5))
    source, inputs = read(network(), config)
    pruned = replace(source, kept={"0.0.weight": source.tensors["0.0.weight"] > 0})
    with pytest.raises(ConfigError, match=r"EfQAT\(ratio=0\).*a ratio of 0\.5 and 1 pruned weights"):
        understand(pruned, inputs, config)
    understand(pruned, inputs, settings(train=EfQAT(ratio=0)))


class Rows(nn.Module):
    """Reads images as they lie in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.view(len(x), -1).mean(1)[:, None, None, None]


@pytest.mark.parametrize(
    ("between", "channels_last"), [(nn.ReLU, True), (Rows, False), (lambda: nn.GroupNorm(2, 8), False)]
)
def test_the_layout_of_images(between: Callable[[], nn.Module], channels_last: bool) -> None:
    """Channels last on a CPU, unless a view or the gradient of a GroupNorm needs the ordinary layout."""
    assert understood(network(between), settings()).inputs.channels_last == channels_last


def test_a_map_is_tried_before_it_is_used() -> None:
    """A model that computes something else than what its graph says keeps all scales, and the user hears of it."""
    shown, model = network(), network(lambda: Apply(torch.tanh))
    call = ((batches()[0],), {})
    free = proven_map(shown, record(shown, *call[0]), parameters_of(shown), call)
    assert free.size == 16
    with pytest.warns(QFTWarning, match="computes something else when the scales of its channels change"):
        pinned = proven_map(model, record(shown, *call[0]), parameters_of(model), call)
    assert pinned.size == 0
    assert all(edge.free == 0 and "not invariant" in edge.reason for edge in pinned.edges)


def test_the_precision_of_a_model_in_float64_is_its_own() -> None:
    """A finetune in bfloat16 is for networks in float32."""
    with pytest.raises(ConfigError, match=r'precision should be "float32".*torch\.float64'):
        images(network(), batches(), settings(precision="bfloat16"))


def test_only_as_many_images_as_asked_are_taken() -> None:
    """The rest of the dataset is not even read."""

    def endless() -> Any:
        while True:
            yield batches(1)[0]

    assert len(images(network(), endless(), settings(max_images=10))) == 10


class Single(nn.Module):
    """Takes one image only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == 1
        return self.conv(x)


def test_a_model_that_takes_one_image() -> None:
    """It is called for each image by itself, if that is how they come."""
    assert images(Single(), batches(size=1), settings()).largest == 1
    assert images(network(), batches(size=1), settings()).largest is None
