"""Factors in front of additions: where they are put, and what the DoF map makes of them."""

import pytest
import torch
from torch import Tensor, nn

from qft_plugin.graph.channel_affine import addends_of, with_addend_factors
from qft_plugin.graph.dof_map import map_dof
from qft_plugin.graph.folding import fold_network
from qft_plugin.graph.layer_graph import PINNED, DofMap, Layer, LayerGraph
from qft_plugin.graph.record import record

CHANNELS = 6


class Residual(nn.Module):
    """Additions of two activations, of a constant, of what is broadcast, and of a tensor to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.c = nn.Conv2d(CHANNELS, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + 1
        x = torch.relu(torch.relu(self.b(x)) + x)
        x = self.c(x)
        x = x + x
        return x + x.mean((2, 3), keepdim=True)


def graph() -> LayerGraph:
    torch.manual_seed(0)
    return record(Residual().eval(), ((torch.randn(2, 3, 5, 5),), {}))


def test_only_additions_of_two_activations_of_one_shape() -> None:
    found = addends_of(graph())
    assert [(a.addition.rpartition("/")[0], a.index, a.channels, a.axis) for a in found] == [
        ("add", 0, CHANNELS, -3),
        ("add", 1, CHANNELS, -3),
    ]


class Tokens(nn.Module):
    """A convolution over a sequence in front of layers over tokens, `[images, tokens, channels]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv1d(3, CHANNELS, 3), nn.Linear(CHANNELS, 9), nn.Linear(9, CHANNELS)
        self.c = nn.Linear(CHANNELS, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2)
        return self.c(torch.relu(self.b(torch.relu(self.a(x))) + x))


class ChannelsLast(nn.Module):
    """Linear layers on images with their channels last, `[images, height, width, channels]`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, CHANNELS), nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(x)) + x)


class Sequences(nn.Module):
    """Convolutions over sequences, `[images, channels, length]`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, CHANNELS, 3), nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1)
        self.c = nn.Conv1d(CHANNELS, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.c(self.b(x) + x)


@pytest.mark.parametrize(
    ("model", "size", "axis"),
    [
        (Tokens, (2, 3, 8), -1),
        (ChannelsLast, (2, 7, 5, 3), -1),
        (Sequences, (2, 3, 8), -2),
    ],
)
def test_the_axis_is_that_of_the_channels(model: type[nn.Module], size: tuple[int, ...], axis: int) -> None:
    """Not that of tokens, of rows or of a length, which may change: the factors free all three edges."""
    plain = record(model().eval(), ((torch.randn(size),), {}))
    found = addends_of(plain)
    assert [(a.index, a.channels, a.axis) for a in found] == [(0, CHANNELS, axis), (1, CHANNELS, axis)]
    free = map_dof(with_addend_factors(plain, {a: a.factor for a in found}))
    assert free.size == map_dof(plain).size + 2 * CHANNELS


def test_what_no_factor_frees_is_left_out() -> None:
    """After a barrier on both sides, or with one scale for all channels, there is nothing to gain."""

    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(torch.sigmoid(self.a(x)) + torch.tanh(x.mean(1, keepdim=True).expand(-1, 4, -1, -1)))

    assert addends_of(record(Nothing().eval(), ((torch.randn(2, 3, 5, 5),), {}))) == ()


def test_factors_free_the_addends_from_each_other_and_from_the_sum() -> None:
    """`b` makes one addend, the other comes from `a` through a constant and is pinned; `c` reads the sum."""
    plain = graph()
    addends = addends_of(plain)
    tied, free = map_dof(plain), map_dof(with_addend_factors(plain, {a: a.factor for a in addends}))
    # An addition of a constant pins one addend, and without factors what it is added to with it.
    assert bool((tied.layer("b.weight").out_index == PINNED).all())
    assert bool((tied.layer("c.weight").in_index == PINNED).all())
    assert bool((free.layer("b.weight").out_index != PINNED).all())
    assert bool((free.layer("c.weight").in_index != PINNED).all())
    assert not set(free.layer("b.weight").out_index.tolist()) & set(free.layer("c.weight").in_index.tolist())
    first, second = (free.layer(a.factor) for a in addends)
    assert first.in_index.tolist() == free.layer("b.weight").out_index.tolist()
    assert bool((second.in_index == PINNED).all())
    assert first.out_index.tolist() == second.out_index.tolist() == free.layer("c.weight").in_index.tolist()


def test_a_graph_without_factors_is_the_same() -> None:
    plain = graph()
    assert with_addend_factors(plain, {}) == plain


def layer(name: str, ins: list[int], outs: list[int]) -> Layer:
    return Layer(name, None, "channel_affine", 1, (name,), ("x",), ("y",), torch.tensor(ins), torch.tensor(outs))


def test_merged_variables() -> None:
    """Chains merge into their smallest number, what touches a pinned channel is pinned, the rest stays."""
    layers = (layer("f", [1, 2, 3], [4, 4, PINNED]), layer("g", [4, 5, 6], [7, 5, 6]), layer("h", [6, 7], [1, 3]))
    merged, variable = DofMap(layers, (), 7, {}).merged({"f", "g"})
    assert variable.tolist() == [0, 1, 1, 0, 1, 5, 6, 1]
    assert merged.size == 7
    assert merged.layer("f").in_index.tolist() == merged.layer("f").out_index.tolist() == [1, 1, 0]
    assert merged.layer("h").in_index.tolist() == [6, 1]
    assert merged.layer("h").out_index.tolist() == [1, 0]


def test_merged_factors_leave_the_factors_of_addends_at_one() -> None:
    plain = graph()
    weights = {a: a.factor for a in addends_of(plain)}
    dof_map = map_dof(with_addend_factors(plain, weights))
    _, variable = dof_map.merged(weights.values())
    torch.manual_seed(0)
    log_c = torch.cat([torch.zeros(1), torch.randn(dof_map.size)])[variable[1:]]
    named = dict(Residual().named_parameters()) | {name: torch.ones(CHANNELS) for name in weights.values()}
    folded = fold_network(dof_map, log_c, named)
    for name in weights.values():
        assert torch.equal(folded[name], torch.ones(CHANNELS))


def test_nothing_to_merge() -> None:
    dof_map = map_dof(graph())
    merged, variable = dof_map.merged(())
    assert variable.tolist() == list(range(dof_map.size + 1))
    for before, after in zip(dof_map.layers, merged.layers, strict=True):
        assert torch.equal(before.in_index, after.in_index)
        assert torch.equal(before.out_index, after.out_index)
