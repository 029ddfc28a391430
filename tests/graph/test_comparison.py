"""Where teacher and student are compared: the output of the backbone, or what the settings name."""

from typing import Any

import pytest
from graphs import chain, conv_op, linear_op, record, unary_op
from models import Gate, image
from torch import Tensor, nn

from qft_plugin.errors import ConfigError
from qft_plugin.graph.comparison import ComparedInput, Comparison, backbone_output, comparison
from qft_plugin.graph.layer_graph import LayerGraph

MAP = (1, 4, 2, 2)


def compared(model: nn.Module, shape: tuple[int, ...] | None = None) -> str | None:
    """Return the function whose input is compared, for a real network."""
    x = image() if shape is None else image().new_zeros(shape)
    graph = record(model.double().eval(), x)
    found = backbone_output(graph)
    assert comparison(graph, None) == Comparison(() if found is None else (found,), outputs=found is None)
    if found is None:
        return None
    op = next(op for op in graph.ops if op.name == found.op)
    assert op.inputs[found.index] == found.tensor
    return op.function


class Reduce(nn.Module):
    """A mean over given axes."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


def test_the_backbone_ends_at_the_global_pool() -> None:
    """Adaptive pooling to one position, or a mean over space, in front of the classifier is chosen."""
    assert compared(nn.Sequential(nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))) == (
        "adaptive_avg_pool2d"
    )
    assert compared(nn.Sequential(nn.Conv2d(8, 4, 1), Reduce(2, 3), nn.Linear(4, 2))) == "mean"
    assert compared(nn.Sequential(nn.Conv2d(8, 4, 1), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(4, 2))) == "avg_pool2d"


def test_the_last_of_several_global_pools_is_chosen() -> None:
    """The squeeze of a gate inside the network is a global pool too, but not the last one."""
    model = nn.Sequential(Gate(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()
    graph = record(model, image())
    found = backbone_output(graph)
    assert found is not None
    assert found.op == [op.name for op in graph.ops if op.function == "adaptive_avg_pool2d"][-1]


def test_without_a_global_pool_the_last_linear_layer_is_chosen() -> None:
    """A pool that leaves several positions is not global."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    graph = record(model, image())
    found = backbone_output(graph)
    assert found is not None
    assert found.op == graph.ops[-1].name


def test_a_mean_over_channels_is_not_a_global_pool() -> None:
    """16 channels of 4x4 positions: the mean over channels makes as many numbers as one over space, but is another."""
    model = nn.Sequential(nn.Conv2d(8, 16, 1), Reduce(1), nn.Flatten(), nn.Linear(16, 2))
    assert compared(model, (2, 8, 4, 4)) == "linear"


@pytest.mark.parametrize("tokens", [6, 8])
def test_a_mean_over_tokens_does_not_depend_on_their_number(tokens: int) -> None:
    """Pooled sequences are compared at the same place, whether or not there are as many tokens as channels."""
    model = nn.Sequential(nn.Linear(8, 8), Reduce(1), nn.Linear(8, 2))
    assert compared(model, (2, tokens, 8)) == compared(model, (2, 5, 8))


def test_without_either_the_output_is_compared() -> None:
    """A fully convolutional network is compared at its output."""
    assert compared(nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU())) is None


def named() -> LayerGraph:
    """Write down a graph with names as a host gives them."""
    return chain(
        conv_op("stem/conv2d/0", "x", shape=(4, 3)),
        unary_op("layer1/0/relu/0", "relu", "stem/conv2d/0"),
        unary_op("layer10/relu/0", "relu", "layer1/0/relu/0"),
        linear_op("head/linear/0", "layer10/relu/0", shape=(2, 2)),
        shapes={
            "x": (1, 3, 2, 2),
            "stem/conv2d/0": MAP,
            "layer1/0/relu/0": MAP,
            "layer10/relu/0": MAP,
            "head/linear/0": MAP,
        },
        outputs=("head/linear/0",),
    )


@pytest.mark.parametrize(
    ("loss_at", "op", "tensor"),
    [
        ("head", "head/linear/0", "layer10/relu/0"),
        ("layer1.0", "layer1/0/relu/0", "stem/conv2d/0"),
        ("layer1", "layer1/0/relu/0", "stem/conv2d/0"),
        ("layer10", "layer10/relu/0", "layer1/0/relu/0"),
        ("layer10/relu/0", "layer10/relu/0", "layer1/0/relu/0"),
    ],
)
def test_loss_at_names_a_module_or_an_operation(loss_at: str, op: str, tensor: str) -> None:
    """A module stands for the first operation inside it, and `layer1` is not the beginning of `layer10`."""
    assert comparison(named(), loss_at) == Comparison((ComparedInput(op, 0, tensor, asked=loss_at),), outputs=False)


@pytest.mark.parametrize("loss_at", ["layer", "body", "", "x"])
def test_a_wrong_loss_at_is_an_error_that_lists_the_names(loss_at: str) -> None:
    """A name that is neither is refused, with the operations there are."""
    with pytest.raises(ConfigError, match=r"loss_at.*head/linear/0") as caught:
        comparison(named(), loss_at)
    assert repr(loss_at) in str(caught.value)


@pytest.mark.parametrize(
    ("loss_at", "weights"),
    [
        ({"head": 2.0, "layer1.0": 0.5}, (2.0, 0.5)),
        (["head", "layer1.0"], (1.0, 1.0)),
        (("head", "layer1.0"), (1.0, 1.0)),
    ],
)
def test_several_names_keep_their_order_and_weights(loss_at: Any, weights: tuple[float, ...]) -> None:
    """A mapping gives each place its weight, a list gives all the same; outputs would come after them with weight 1."""
    found = comparison(named(), loss_at)
    assert [at.op for at in found.inputs] == ["head/linear/0", "layer1/0/relu/0"]
    assert not found.outputs
    assert found.weights(2) == weights
    assert found.weights(4) == (*weights, 1.0, 1.0)


def test_one_wrong_name_among_several_is_an_error() -> None:
    """Every name is looked up, and the one that is wrong is shown."""
    with pytest.raises(ConfigError, match=r"loss_at.*'body'"):
        comparison(named(), {"head": 1.0, "body": 1.0})
